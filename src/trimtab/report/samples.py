"""Which prompts of evaluations a report shows, with every evaluation's answers side by side.

Answers that may be harmful are cut short before they enter the report's data; the evaluations' files hold them whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.evaluate.comparison import Comparison
from trimtab.evaluate.metrics import in_group, metric_of
from trimtab.report.data import Sample
from trimtab.report.reading import GUARDED_CUT, Reading, is_guarded
from trimtab.seeds import uniform_of
from trimtab.types import Generation, Row

SAMPLES_PER_TASK, SAMPLES_PER_ATTACK, DISCORDANT = 2, 1, 8


@dataclass(frozen=True)
class Evaluated:
    """One evaluation under the id and the label that the report gives it."""

    id: str
    label: str
    reading: Reading


@dataclass(frozen=True)
class Change:
    """A comparison, and who was compared."""

    a: Evaluated
    b: Evaluated
    mode_a: str | None
    mode_b: str | None
    comparison: Comparison


def samples(arms: Sequence[Evaluated], changes: Sequence[Change]) -> Iterator[Sample]:
    """Answers that changed from one evaluation to the next, then prompts that an attack broke, then a few of each
    task chosen by a key that knows nothing of the answers."""
    shown: set[str] = set()
    for id, why in (*_discordant(changes), *_broken(arms[0]), *_blind(arms)):
        if id not in shown:
            shown.add(id)
            yield _sample(arms, id, why)


def _discordant(changes: Sequence[Change]) -> list[tuple[str, str]]:
    """The rows that changed most, taken in turn from the comparisons, those that turned worse first."""
    turns = []
    for change in changes:
        c, metric = change.comparison, metric_of(change.comparison.metric)
        pairs = c.discordant if metric.direction == "higher" else c.discordant[::-1]  # falls come first
        if metric.whole is None:
            rows = [row for row, _ in pairs]
        else:
            rows = [id for prompt, _ in pairs if (id := _successful(change, prompt)) is not None]
        turns.append([(row, f"changed: {metric.title}") for row in rows])
    found: dict[str, str] = {}
    for i in range(max(map(len, turns), default=0)):
        for turn in turns:
            if i < len(turn) and len(found) < DISCORDANT:
                found.setdefault(*turn[i])
    return list(found.items())


def _successful(change: Change, prompt: str) -> str | None:
    """Of the attempts on a prompt that an attack broke on one side, the first that did."""
    group = change.comparison.category
    for arm, mode in ((change.b, change.mode_b), (change.a, change.mode_a)):
        for r in arm.reading.records:
            if (
                r.generation.mode == mode
                and r.verdict.verdict == "unsafe"
                and r.prompt == prompt
                and in_group(r.row, group)
            ):
                return r.row.id
    return None


def _broken(arm: Evaluated) -> Iterator[tuple[str, str]]:
    """For each attack, an attempt that got an unsafe answer to a prompt that was safe when asked plainly."""
    safe = {(r.row.id, r.generation.mode) for r in arm.reading.records if r.verdict.verdict == "safe"}
    for attack in arm.reading.attacks:
        rows = {
            r.row.id: None
            for r in arm.reading.records
            if r.row.metadata.get("attack") == attack
            and r.verdict.verdict == "unsafe"
            and (r.row.metadata["base"], r.generation.mode) in safe
        }
        for id in sorted(rows, key=lambda id: uniform_of("sample", id))[:SAMPLES_PER_ATTACK]:
            yield id, f"broken by {attack}"


def _blind(arms: Sequence[Evaluated]) -> Iterator[tuple[str, str]]:
    rows: dict[str, Row] = {}
    for arm in arms:
        answered = {g.row_id for g in arm.reading.evaluation.generations}
        rows |= {id: row for id, row in arm.reading.evaluation.rows.items() if id in answered}
    plain = [row for row in rows.values() if "attack" not in row.metadata]
    for task in dict.fromkeys(map(task_of, plain)):
        mine = sorted((r for r in plain if task_of(r) == task), key=lambda r: uniform_of("sample", r.id))
        yield from ((row.id, "") for row in mine[:SAMPLES_PER_TASK])


def _sample(arms: Sequence[Evaluated], id: str, why: str) -> Sample:
    row = next(arm.reading.evaluation.rows[id] for arm in arms if id in arm.reading.evaluation.rows)
    hash = next(g.row_hash for arm in arms for g in arm.reading.evaluation.generations if g.row_id == id)
    answers = {
        arm.id: [
            _answer(arm.reading, g)
            for g in arm.reading.evaluation.generations
            if g.row_id == id and g.row_hash == hash and g.sample == 0
        ]
        for arm in arms
    }
    prompt = [{"role": m["role"], "content": m["content"]} for m in row.messages or ()]
    if row.metadata.get("prefill"):
        prompt.append({"role": "assistant, opened by the attack", "content": str(row.metadata["prefill"])})
    return Sample(task_of(row), id, prompt, row.harm, {arm: said for arm, said in answers.items() if said}, why)


def _answer(reading: Reading, generation: Generation) -> dict[str, Any]:
    row, verdict = reading.row(generation), reading.verdict(generation)
    keep = GUARDED_CUT if is_guarded(row, verdict) else len(generation.text)
    said: dict[str, Any] = {
        "text": generation.text[:keep],
        "withheld": max(0, len(generation.text) - keep),
        "verdict": "not judged" if verdict is None else verdict.verdict,
        "refusal": None if verdict is None else verdict.refusal,
        "correct": None if verdict is None else verdict.correct,
        "constructive": None if verdict is None else verdict.constructive,
        "mode": generation.mode,
        "reason": "" if verdict is None else verdict.reason,
    }
    return said


def task_of(row: Row) -> str:
    return str(row.metadata.get("task") or "no task")
