"""Doing a plan on this machine: each missing step once, in order, each leaving one artefact.

A killed run starts again where it was: finished steps are found by name, an unfinished training goes on from its newest
checkpoint. Nothing of a step that failed is kept but its resumable work.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import trimtab
from trimtab.artifact import Artifact, Draft, Store, is_no_space, no_space, write_atomic
from trimtab.errors import TrimtabError
from trimtab.study.plan import Plan, Step
from trimtab.study.progress import Reporter

STUDY = "study.json"

_RUNS: dict[str, str] = {
    "corpus": "corpus:run_corpus",
    "tokenizer": "corpus:run_tokenizer",
    "tokens": "corpus:run_tokens",
    "pretrain": "pretrain:run_pretrain",
    "chats": "chat:run_chats",
    "sft": "chat:run_sft",
    "generate": "panel:run_generate",
    "judge": "panel:run_judge",
}
"""Kind of step -> function; imported when first needed, because most of them bring torch."""


@dataclass(frozen=True)
class Context:
    """What a step's function gets: its step, its verified inputs, a draft to fill, and a place for resumable work."""

    step: Step
    inputs: Mapping[str, Artifact]
    draft: Draft
    work: Path
    progress: Callable[[Mapping[str, Any]], None]


def study_store(directory: Path) -> Store:
    """The store of a study directory: studies beside each other share it, and so share equal steps."""
    return Store(directory.parent / "store")


def execute(plan: Plan, directory: Path, reporter: Reporter) -> int:
    """Do what is missing and leave ``study.json`` in ``directory``; returns the number of steps done.

    Raises ``UserError`` or ``Fault``; a full disk is a ``Fault`` wherever it shows.
    """
    store = study_store(directory)
    with store.lock():
        store.clear_drafts()
        missing = [step for step in plan.steps.values() if not store.has(step.kind, step.id)]
        for number, step in enumerate(missing, 1):
            reporter.start(step.short, step.name, number, len(missing))
            started = time.monotonic()
            try:
                _do(step, plan, store, reporter)
            except TrimtabError:
                raise
            except Exception as error:
                if is_no_space(error):
                    raise no_space(store.root) from error
                raise
            reporter.done(step.short, step.name, time.monotonic() - started)
        done = {step.id for step in missing}
        for step in plan.steps.values():
            if step.id not in done:
                store.open(step.kind, step.id).verify(full=False)
        text = json.dumps(describe(plan), indent=1, ensure_ascii=False) + "\n"
        if not (directory / STUDY).is_file() or (directory / STUDY).read_text(encoding="utf-8") != text:
            write_atomic(directory / STUDY, text)
    return len(missing)


def _do(step: Step, plan: Plan, store: Store, reporter: Reporter) -> None:
    inputs = {role: store.open(plan.steps[id].kind, id, verify=True) for role, id in step.inputs.items()}
    _quieten()
    module, function = _RUNS[step.kind].split(":")
    run = getattr(import_module(f"trimtab.study.steps.{module}"), function)
    work = store.work(step.kind, step.id)
    with store.create(step.kind, step.id, config=step.config, inputs=step.inputs, versions=versions()) as draft:
        started = time.monotonic()
        work.mkdir(parents=True, exist_ok=True)
        draft.tokens = step.tokens
        run(Context(step, inputs, draft, work, reporter.update))
        if draft.seconds is None:
            draft.seconds = round(time.monotonic() - started, 3)


def _quieten() -> None:
    """Keep the libraries' own bars and notices out of ours; errors stay."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def describe(plan: Plan) -> dict[str, Any]:
    """All that the report needs to find a study's artefacts again, as plain data (``study.json``)."""
    return {
        "schema": 1,
        "recipe": plan.recipe.plain(),
        "arms": [
            {
                "id": arm.id,
                "label": arm.label,
                "group": arm.group,
                "seed": arm.seed,
                "against": arm.against,
                "settings": dict(arm.settings),
                "stages": dict(arm.stages),
                "steps": list(arm.steps),
            }
            for arm in plan.arms
        ],
        "steps": {
            step.id: {
                "kind": step.kind,
                "name": step.name,
                "tokens": step.tokens,
                "flops": step.flops,
                "inputs": dict(step.inputs),
            }
            for step in plan.steps.values()
        },
    }


def versions() -> dict[str, str]:
    """Versions of what a result may depend on."""
    found = {"trimtab": trimtab.__version__, "python": platform.python_version(), "machine": platform.machine()}
    for name in ("numpy", "torch", "transformers", "tokenizers", "peft", "accelerate"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
