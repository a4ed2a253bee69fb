"""What each form of the lever cost, how a tuned model gives way to further finetuning, and what self-distillation kept.

A form's cost is that of its own training steps (sft, adapter, dpo): those between the model that all forms start from and the
tuned one, by what each step wrote of itself (``facts["cost"]``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from trimtab.evaluate.stats import rate_interval
from trimtab.report.modedata import DPO, ModeFigure
from trimtab.report.modes import UNASKED, Moded, Subject, of_seeds
from trimtab.report.pulled import tampering_of
from trimtab.types import Row

TRAINED = ("sft", "adapter", "dpo")
SUMMED = {
    "tokens": "count", "trained_tokens": "count", "steps": "count", "flops": "flops", "seconds": "seconds",
}  # fmt: skip
LARGEST = {"peak_bytes": "bytes", "models": "count"}
Json = Mapping[str, Any]


def chain_of(moded: Moded, arm: Json, stage: str) -> list[str]:
    """The training steps that lead to a stage's model, the last first; a model that is pretrained or loaded ends it."""
    steps, found = moded.study.steps, []
    id: str | None = arm["stages"].get(stage)
    while id is not None and steps[id]["kind"] in TRAINED:
        found.append(id)
        id = steps[id]["inputs"].get("model")
    return found


class Costs:
    """Arm id -> what its own training steps cost."""

    def __init__(self, moded: Moded) -> None:
        self.moded = moded
        of = {id: s.arm for s in moded.subjects for id in s.arm.ids}
        chains = {id: chain_of(moded, moded.by_id[id], about.stage) for id, about in of.items()}
        self.own: dict[str, list[str]] = {}
        for id, chain in chains.items():
            seed = moded.by_id[id]["seed"]
            beside = [set(c) for other, c in chains.items() if moded.by_id[other]["seed"] == seed and other != id]
            common = set.intersection(set(chain), *beside) if beside else set()
            self.own[id] = [step for step in chain if step not in common]

    def of(self, arm: str) -> dict[str, float | None]:
        """What an arm's steps cost together; None for what a step did not write. Empty: it has no steps of its own."""
        told = [self.moded.study.artifacts[id].manifest["facts"].get("cost") or {} for id in self.own[arm]]
        if not told:
            return {}
        found: dict[str, float | None] = {}
        for name in (*SUMMED, *LARGEST):
            values = [one.get(name) for one in told]
            fold = sum if name in SUMMED else max
            found[name] = None if any(v is None for v in values) else float(fold(v for v in values if v is not None))
        return found

    def data(self, arm: str) -> float | None:
        """Seconds of the distill steps that the arm's own training read; None where there are none."""
        study = self.moded.study
        read: set[str] = set()
        waiting = list(self.own[arm])
        while waiting:
            step = study.steps[waiting.pop()]
            for id in step["inputs"].values():
                if study.steps[id]["kind"] == "distill":
                    read.add(id)
                elif study.steps[id]["kind"] in ("packed", "chats"):
                    waiting.append(id)
        seconds = [study.artifacts[id].manifest["seconds"] or 0.0 for id in sorted(read)]
        return sum(seconds) if seconds else None

    def figures(self, subjects: Sequence[Subject]) -> Iterator[ModeFigure]:
        """Each cost, mean over seeds, and time, tokens and compute as shares of SFT+DPO's in the same seed."""
        base = next((s for s in subjects if s.arm.form == DPO), None)
        for s in subjects:
            told = [self.of(id) for id in s.arm.ids]
            for name, unit in {**SUMMED, **LARGEST}.items():
                values = [t[name] for t in told if t.get(name) is not None]
                if values:
                    yield of_seeds(s.arm.arm, ("cost", "", name), [float(v) for v in values if v is not None], unit)
            making = [v for id in s.arm.ids if (v := self.data(id)) is not None]
            if making:
                yield of_seeds(s.arm.arm, ("cost", "", "making its data"), making, "seconds")
            for name in ("seconds", "tokens", "flops") if base is not None else ():
                assert base is not None
                each = self.ratios(s, base, name)
                if each:
                    yield of_seeds(s.arm.arm, ("cost", "", f"{name} of {DPO}"), each, "ratio")

    def ratios(self, ours: Subject, theirs: Subject, name: str) -> list[float]:
        """A cost of one over that of another, seed by seed."""
        seeds = {self.moded.by_id[id]["seed"]: id for id in theirs.arm.ids}
        found = []
        for id in ours.arm.ids:
            other = seeds.get(self.moded.by_id[id]["seed"])
            a, b = self.of(id).get(name), None if other is None else self.of(other).get(name)
            if a is not None and b:
                found.append(a / b)
        return found


# -- finetuning that follows ---------------------------------------------------------------------------------------------


def tampered(moded: Moded, subject: Subject) -> Iterator[ModeFigure]:
    """Risk without a token (and in positive mode) after each further finetuning, by the steps that it took; the tuned model
    itself is the point at 0, on the prompts that the others were asked."""
    study = moded.study
    first = moded.by_id[subject.arm.arm]
    found = list(tampering_of(study.recipe, first, subject.arm.stage))
    for told in (True, False):
        mine = [t for t in found if t.hostile == told]
        kind = "hostile" if told else "benign"
        points = [(0.0, subject.arm.stage, subject)] if mine else []
        for one in mine:
            steps = [
                sum(_steps(study.artifacts[planned["stages"][s]].manifest) for s in one.chain)
                for id in subject.arm.ids
                if all(s in (planned := moded.by_id[id])["stages"] for s in one.chain)
            ]
            if steps:
                points.append((sum(steps) / len(steps), one.stage, moded.asked_of(subject, one.stage)))
        prompts = {r.row.id for x, _, asked in points if x for records in asked.records.values() for r in records}
        for x, stage, asked in points:
            for mode, column in _open(asked):
                made = asked.figure((f"tamper {kind}", stage, column), "risk_rate", mode, where=_among(prompts))
                if made is not None:
                    yield replace(made, x=x)


def _among(ids: set[str]) -> Callable[[Row], bool]:
    return lambda row: row.id in ids


def _open(asked: Subject) -> Iterator[tuple[str | None, str]]:
    """Ways of asking that are to be safe."""
    if None in asked.asked:
        yield None, "without a token"
    positive = asked.mode("positive")
    if positive not in (None, UNASKED):
        yield positive, "in positive mode"


def _steps(manifest: Json) -> int:
    return int(manifest["facts"].get("steps") or 0)


# -- self-distillation ---------------------------------------------------------------------------------------------------


def yields(moded: Moded) -> Iterator[ModeFigure]:
    """Share of the answers that a ``distill`` stage kept, by mode and class of prompts, summed over the seeds; the reasons
    of what was dropped are in the note. An arm that shares the step with one before it has none of its own."""
    study, done = moded.study, set[str]()
    for subject in moded.subjects:
        asked: dict[tuple[str, str, str], list[int]] = {}
        dropped: dict[tuple[str, str, str], dict[str, int]] = {}
        seeds: set[int] = set()
        for id in subject.arm.ids:
            planned = moded.by_id[id]
            for stage, artifact in study.of_kind(planned, "distill"):
                if artifact.id in done:
                    continue
                done.add(artifact.id)
                seeds.add(planned["seed"])
                for told in artifact.manifest["facts"]["yield"]:
                    place = (stage, told["mode"], told["harm"])
                    counts = asked.setdefault(place, [0, 0])
                    counts[0] += int(told["asked"])
                    counts[1] += int(told["kept"]["n"])
                    for reason, share in told["dropped"].items():
                        mine = dropped.setdefault(place, {})
                        mine[reason] = mine.get(reason, 0) + int(share["n"])
        for (stage, mode, harm), (n, kept) in asked.items():
            if n:
                yield _kept(
                    subject.arm.arm, stage, mode, harm, n, kept, dropped.get((stage, mode, harm), {}), len(seeds)
                )


def _kept(
    arm: str, stage: str, mode: str, harm: str, n: int, kept: int, dropped: Mapping[str, int], seeds: int
) -> ModeFigure:
    low, high = (float(end) for end in rate_interval(kept, n))
    note = "; ".join(f"{reason} {count}" for reason, count in sorted(dropped.items(), key=lambda item: -item[1]))
    return ModeFigure(
        f"yield {stage}", arm, mode, harm, kept / n, low, high, n, seeds, n - kept, "rate", "share", note=note
    )
