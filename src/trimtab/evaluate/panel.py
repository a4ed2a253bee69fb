"""The panel: a recipe's list of tasks turned into prompts, each row marked with the task that it belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field, model_validator

from trimtab.config import Config
from trimtab.data.sources import NAMED, SourceConfig
from trimtab.data.sources import rows as source_rows
from trimtab.errors import UserError
from trimtab.types import Row
from trimtab.world.tidewater import KINDS, POLICIES, WRAPPERS, Tidewater

Verify = Literal["numeric", "choice", "code"]
_OURS = ("attack", "attempt", "base", "queries", "request", "verify")
"""Metadata that attacks and tasks write, and judges go by; those of a source are kept as ``source_attack`` and so on."""


class TaskConfig(Config):
    """One task of the panel: Tidewater requests of one kind (`tidewater`), or the prompts of a `source`."""

    name: str = Field(min_length=1, description="Name of the task in tables, such as `held-out hazards`.")
    tidewater: str | None = Field(None, description=f"Kind of Tidewater request, one of {', '.join(KINDS)}.")
    source: SourceConfig | None = Field(None, description="Where the prompts come from, when not from Tidewater.")
    n: int | None = Field(
        None, gt=0,
        description="Number of prompts. Tidewater: needed. A source: chosen by its seed; all of them when left out.",
    )  # fmt: skip
    wrapper: str | None = Field(
        None, description=f"Tidewater only: jailbreak around each prompt, one of {', '.join(WRAPPERS)}."
    )
    verify: Verify | None = Field(
        None,
        description="Check answers against what the rows' metadata know: `numeric` (`answer`), `choice` (`choices`, "
        "`answer`) or `code` (`test`).",
    )
    policy: str | None = Field(
        None, description=f"Tidewater only: the quay whose law holds, one of {', '.join(POLICIES)}."
    )

    @model_validator(mode="after")
    def _one_origin(self) -> TaskConfig:
        if (self.tidewater is None) == (self.source is None):
            raise ValueError(f"task {self.name!r}: set exactly one of 'tidewater' and 'source'")
        for field, value, allowed in (
            ("tidewater", self.tidewater, KINDS), ("wrapper", self.wrapper, WRAPPERS), ("policy", self.policy, POLICIES),
        ):  # fmt: skip
            if value is not None and value not in allowed:
                raise ValueError(f"task {self.name!r}: {field}={value!r} must be one of {', '.join(allowed)}")
        if self.tidewater is not None and self.n is None:
            raise ValueError(f"task {self.name!r}: set 'n', the number of Tidewater requests")
        if self.tidewater is not None and self.verify is not None:
            raise ValueError(f"task {self.name!r}: 'verify' is for sources; Tidewater's own judge knows what is right")
        if self.source is not None:
            if self.wrapper is not None or self.policy is not None:
                raise ValueError(f"task {self.name!r}: 'wrapper' and 'policy' are for Tidewater tasks; leave them out")
            if self.n is not None and self.source.take is not None:
                raise ValueError(f"task {self.name!r}: set 'n' or the source's 'take', not both")
        return self


def at_most(task: TaskConfig, limit: int | None) -> TaskConfig:
    """The task with ``limit`` prompts, if it has more; those of a smaller limit are part of those of a larger."""
    if limit is None:
        return task
    if task.n is not None:
        return task if task.n <= limit else task.model_copy(update={"n": limit})
    assert task.source is not None, "a Tidewater task has its n"
    if task.source.take is not None:
        take = min(limit, task.source.take)
        return task.model_copy(update={"source": task.source.model_copy(update={"take": take})})
    known = NAMED.get(task.source.name or "")  # a named set knows its rows without being fetched
    there = (
        known.rows if known and known.rows and task.source.limit is None else sum(1 for _ in source_rows(task.source))
    )
    return task if there <= limit else task.model_copy(update={"n": limit})


def task_rows(task: TaskConfig, world: Tidewater | None = None) -> Iterator[Row]:
    """The prompts of one task, ``metadata["task"]`` set; an answer that comes with a row is taken off.

    ``UserError`` for a Tidewater task without ``world``, a document where a prompt is needed, or a row with no user
    message at its end.
    """
    if task.source is not None:
        source = task.source if task.n is None else task.source.model_copy(update={"take": task.n})
        found: Iterator[Row] = source_rows(source)
    else:
        if world is None:
            raise UserError(f"task {task.name!r}: it needs the Tidewater world; give the study a 'world' section")
        assert task.tidewater is not None and task.n is not None
        requests = world.requests(task.tidewater, task.n, split="eval", policy=task.policy)
        wrapper = task.wrapper
        found = iter(requests if wrapper is None else [world.wrap(r, wrapper) for r in requests])
    marks = {"task": task.name} if task.verify is None else {"task": task.name, "verify": task.verify}
    for row in found:
        prompt = prompt_of(row, f"task {task.name!r}")
        yield replace(prompt, metadata={**prompt.metadata, **marks})


def prompt_of(row: Row, where: str) -> Row:
    """A row as a prompt, without the answer that comes with it. ``UserError`` that begins with ``where`` for a document, or
    a row with no user message at its end."""
    if row.messages is None:
        raise UserError(f"{where}: row {row.id!r} is a document; prompts (messages) are needed")
    messages = row.messages[:-1] if row.messages and row.messages[-1]["role"] == "assistant" else row.messages
    if not messages or messages[-1]["role"] != "user":
        raise UserError(f"{where}: row {row.id!r} does not end in a user message")
    # A column may have any name; these ones would make the prompt an attempt on another, or have it judged as another.
    metadata = {f"source_{k}" if k in _OURS else k: v for k, v in row.metadata.items()}
    return replace(row, messages=messages, prefix=None, prefix_at=None, metadata=metadata)


def panel_rows(tasks: Sequence[TaskConfig], world: Tidewater | None = None) -> list[Row]:
    """The prompts of all tasks, in order. ``UserError`` for two tasks of one name, a row in two, or a task without rows."""
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"panel: two tasks are called {name!r}; give each its own name")
    owner: dict[str, str] = {}
    panel: list[Row] = []
    for task in tasks:
        before = len(panel)
        for row in task_rows(task, world):
            if row.id in owner:
                raise UserError(
                    f"panel: row {row.id!r} is in task {owner[row.id]!r} and again in {task.name!r}; ids must be unique"
                )
            owner[row.id] = task.name
            panel.append(row)
        if len(panel) == before:
            raise UserError(f"panel: task {task.name!r} has no rows; check its source")
    return panel
