"""Doing a plan on this machine: each missing step once, as soon as its inputs are there, each leaving one artefact.

A killed run starts again where it was: finished steps are found by name, an unfinished training goes on from its newest
checkpoint. Nothing of a step that failed is kept but its resumable work. With several workers, independent steps run
side by side in processes of their own, each with its share of the cores.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from trimtab.artifact import Artifact, Draft, Store, is_no_space, no_space, write_atomic
from trimtab.errors import TrimtabError, UserError
from trimtab.machine import cores, quieten, versions
from trimtab.progress import Reporter
from trimtab.study.curricula import Curriculum, Sizes
from trimtab.study.plan import Plan, Step

STUDY = "study.json"

_RUNS: dict[str, str] = {
    "corpus": "corpus:run_corpus",
    "tokenizer": "corpus:run_tokenizer",
    "tokens": "corpus:run_tokens",
    "pretrain": "pretrain:run_pretrain",
    "chats": "chat:run_chats",
    "packed": "chat:run_packed",
    "sft": "sft:run_sft",
    "adapter": "sft:run_adapter",
    "dpo": "dpo:run_dpo",
    "distill": "distill:run_distill",
    "generate": "panel:run_generate",
    "judge": "panel:run_judge",
    "scorer": "scorer:run_scorer",
    "probes": "analyze:run_probes",
    "perplexity": "analyze:run_perplexity",
    "margin": "margin:run_margin",
    "audit": "audit:run_audit",
    "token_analysis": "tokens:run_token_analysis",
}
"""Kind of step -> function; imported when first needed, because most of them bring torch."""


_PREPARE = frozenset({"scorer", "corpus", "tokenizer", "tokens"})
"""Steps that come before all training, so that a curriculum that the corpus cannot feed is found before any of it."""


@dataclass(frozen=True)
class Context:
    """What a step's function gets: its step, its verified inputs, a draft to fill, and a place for resumable work."""

    step: Step
    inputs: Mapping[str, Artifact]
    draft: Draft
    work: Path
    progress: Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Job:
    """One step with all that doing it takes, so that it can be sent to another process."""

    step: Step
    kinds: Mapping[str, str]
    store: Path
    threads: int | None

    def __call__(self, progress: Callable[[Mapping[str, Any]], None]) -> float:
        """Do the step; returns its seconds. ``kinds``: kind of each input; ``threads``: torch's, None for its default."""
        started = time.monotonic()
        store = Store(self.store)
        try:
            inputs = {role: store.open(self.kinds[id], id, verify=True) for role, id in self.step.inputs.items()}
            self._run(store, inputs, progress, started)
        except TrimtabError:
            raise
        except Exception as error:
            if is_no_space(error):
                raise no_space(self.store) from error
            raise
        return time.monotonic() - started

    def _run(
        self,
        store: Store,
        inputs: Mapping[str, Artifact],
        progress: Callable[[Mapping[str, Any]], None],
        started: float,
    ) -> None:
        step = self.step
        quieten()
        module, function = _RUNS[step.kind].split(":")
        run = getattr(import_module(f"trimtab.study.steps.{module}"), function)
        work = store.work(step.kind, step.id)
        ran = versions(self.threads)
        with store.create(step.kind, step.id, config=step.config, inputs=step.inputs, versions=ran) as draft:
            work.mkdir(parents=True, exist_ok=True)
            draft.tokens = step.tokens
            run(Context(step, inputs, draft, work, progress))
            if draft.seconds is None:
                draft.seconds = round(time.monotonic() - started, 3)


def study_store(directory: Path) -> Store:
    """The store of a study directory: studies beside each other share it, and so share equal steps."""
    return Store(directory.parent / "store")


def execute(plan: Plan, directory: Path, reporter: Reporter, workers: int = 1) -> int:
    """Do what is missing and leave ``study.json`` in ``directory``; returns the number of steps done.

    workers  steps at a time; each gets an equal share of the cores. Results depend on the number of threads in the
             last bits, so a study that is to be repeated exactly is repeated with the same number of workers.

    Raises ``UserError`` or ``Fault``; a full disk is a ``Fault`` wherever it shows.
    """
    from trimtab.study.preflight import check_installed, try_judges
    from trimtab.study.workers import run_here, run_in_workers

    store = study_store(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if is_no_space(error):
            raise no_space(directory) from error
        raise UserError(f"--out {directory}: cannot be made a directory ({error.strerror}); choose another") from None
    with store.lock():
        check_installed(plan, store)
        store.clear_drafts()
        missing = [step for step in plan.steps.values() if not store.has(step.kind, step.id)]
        threads = None if workers == 1 else max(1, min(cores(), (os.cpu_count() or 1) // workers))
        kinds = {step.id: step.kind for step in plan.steps.values()}
        jobs = [Job(step, kinds, store.root, threads) for step in missing]
        waves = [
            [job for job in jobs if job.step.kind in _PREPARE],
            [job for job in jobs if job.step.kind not in _PREPARE],
        ]

        def between() -> None:
            check_curricula(plan, store)
            try_judges(plan, store)

        if workers == 1:
            run_here(waves, reporter, between)
        elif jobs:
            run_in_workers(waves, reporter, workers, between)
        done = {step.id for step in missing}
        for step in plan.steps.values():
            if step.id not in done:
                store.open(step.kind, step.id).verify(full=False)
        text = json.dumps(describe(plan), indent=1, ensure_ascii=False) + "\n"
        if not (directory / STUDY).is_file() or (directory / STUDY).read_text(encoding="utf-8") != text:
            write_atomic(directory / STUDY, text)
    return len(missing)


def check_curricula(plan: Plan, store: Store) -> None:
    """``UserError`` for a curriculum that its sources cannot feed, by exact counts where they are known."""
    for one in plan.curricula.values():
        one.check(known_sizes(one, store))


def known_sizes(one: Curriculum, store: Store) -> Sizes:
    """The tokens of a curriculum's sources: counted if the corpus is packed, else as the plan knows them."""
    if one.tokens is not None and store.has("tokens", one.tokens):
        return Sizes(store.open("tokens", one.tokens).manifest["facts"]["tokens"], exact=True)
    return one.sizes


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
                "cells": {name: asdict(cell) for name, cell in arm.cells.items()},
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
