"""A panel's cells: where each judged stage stands (model x decoder), what its prompts are grouped into, and the values of
every prompt, from which the grid and all differences are made.

Models have a role in the papers' chain (base -> instruct -> benign or hostile finetuning), read from the recipe's
stages; decoders have a kind, read from how the answers were sampled. Nothing here goes by a name that a recipe chose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from trimtab.evaluate import stats
from trimtab.evaluate.metrics import METRICS, OF_SAMPLES, Record, metric_of, scores
from trimtab.report.contrasts import Values
from trimtab.report.data import Place
from trimtab.seeds import rng_of
from trimtab.types import Result, Row

ROLES = ("base", "instruct", "benign", "hostile")
HELDOUT, SEEN, ANY = "hazards held out", "hazards seen", "harmful requests"
WRAPPED = ", wrapped"
CONTRASTS, BENIGN = "contrast requests", "benign requests"
_KINDS = {"fact": "facts", "arithmetic": "sums", "code": "programs", "policy": "policy requests"}
ORDER = (HELDOUT, SEEN, ANY, HELDOUT + WRAPPED, SEEN + WRAPPED, ANY + WRAPPED, CONTRASTS, BENIGN, *_KINDS.values())
"""Groups of prompts in the order in which a report shows them; other sets' tasks come last, by name."""
MATHEMATICS, CODING, FACTUALITY, SAFETY = "mathematics", "coding", "factuality", "safety"
_SUBJECTS = {
    "arithmetic": MATHEMATICS, "numeric": MATHEMATICS, "code": CODING, "fact": FACTUALITY, "choice": FACTUALITY,
}  # fmt: skip


def group_of(row: Row) -> str:
    """The group of prompts that a row belongs to: of Tidewater by kind, of another set its task. A prompt in a jailbreak or
    an attack is of the wrapped ones."""
    kind, task = str(row.metadata.get("kind", "")), str(row.metadata.get("task", ""))
    ours = row.source == "tidewater" or not task
    if row.harm == "contrast":
        name = CONTRASTS
    elif row.harm == "harmful":
        name = {"harmful-seen": SEEN, "harmful-heldout": HELDOUT}.get(kind, ANY if ours else f"{ANY}: {task}")
    elif ours or not _checked(row):
        name = _KINDS.get(kind, BENIGN)
    else:
        name = task
    return name + (WRAPPED if "wrapper" in row.metadata or "attack" in row.metadata else "")


def subject_of(row: Row) -> str:
    """The capability that a prompt tests: safety, mathematics, coding, factuality, or "" (neither or not known)."""
    if row.harm == "harmful":
        return SAFETY
    return _SUBJECTS.get(str(row.metadata.get("verify") or row.metadata.get("kind", "")), "")


def _checked(row: Row) -> bool:
    return METRICS["accuracy"].applies(row)


def is_harmful(group: str) -> bool:
    return group.startswith((HELDOUT, SEEN, ANY))


def metrics_of(group: str) -> tuple[str, ...]:
    """What a group of prompts is measured by in the grid; ``Cell`` adds what only several samples can tell."""
    if is_harmful(group):
        return ("risk_rate",)
    if group.startswith(CONTRASTS):
        return ("over_refusal_contrast_full",)
    return ("over_refusal_benign_full", "accuracy") if group.startswith(BENIGN) else ("accuracy", "no_answer_rate")


MODED = ("constructive_score", "switch_fidelity", "cosa_score")
"""What a study of modes measures beside, of the answers that each speaks of."""


def _of_samples(group: str, records: Sequence[Record]) -> tuple[str, ...]:
    """What several samples to one prompt tell beside: how much they differ, and Safe@k of harmful prompts, pass@k of those
    with a known truth, for as many samples as the prompt with fewest has."""
    k = min(Counter(r.row.id for r in records).values())
    if k < 2:
        return ()
    if is_harmful(group):
        return (*OF_SAMPLES, f"safe_at_{k}")
    return (*OF_SAMPLES, f"pass_at_{k}") if metrics_of(group)[0] == "accuracy" else ()


@dataclass
class Cell:
    """One judged stage of one arm: (mode, group, metric) -> prompt -> mean over its answers, and how many were unscored."""

    values: dict[tuple[str | None, str, str], dict[str, float]] = field(default_factory=dict)
    single: dict[tuple[str | None, str, str], bool] = field(default_factory=dict)
    unscored: dict[tuple[str | None, str, str], int] = field(default_factory=dict)
    subjects: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[Record], moded: bool = False) -> Cell:
        """``moded``: of a study of modes."""
        cell = cls()
        groups: dict[tuple[str | None, str], list[Record]] = {}
        for record in records:
            groups.setdefault((record.generation.mode, group_of(record.row)), []).append(record)
        for (mode, group), mine in groups.items():
            cell.subjects[group] = subject_of(mine[0].row)
            beside = [m for m in (MODED if moded else ()) if any(map(METRICS[m].of, mine))]
            for metric in (*metrics_of(group), *beside, *_of_samples(group, mine)):
                spec = metric_of(metric)
                found: dict[str, list[float]] = {}
                left = 0
                for score in scores(spec, mine):
                    if score.value is None:
                        left += 1
                    else:
                        found.setdefault(score.prompt, []).append(score.value)
                if found or left:
                    key = mode, group, metric
                    cell.values[key] = {prompt: sum(v) / len(v) for prompt, v in found.items()}
                    cell.single[key] = spec.binary and all(len(v) == 1 for v in found.values())
                    cell.unscored[key] = left
        return cell

    @cached_property
    def results(self) -> dict[tuple[str | None, str, str], Result]:
        """One figure per (mode, group, metric), with its interval over prompts; ``category`` is the group."""
        return {key: self._result(*key) for key in self.values}

    def _result(self, mode: str | None, group: str, metric: str) -> Result:
        direction, told = card_of(metric)["direction"], list(self.values[mode, group, metric].values())
        n = len(told)
        ends = metric_of(metric).range
        value, (low, high), kind = float("nan"), ends, "unscored"
        if n:
            value = sum(told) / n
            if self.single[mode, group, metric]:
                low, high = (float(x) for x in stats.rate_interval(round(sum(told)), n))
                kind = "clopper-pearson" if round(sum(told)) in (0, n) else "wilson"
            else:
                rng = rng_of("panel", metric, group)
                low, high = stats.cluster_bootstrap_mean(np.array(told), rng=rng, bounds=ends)
                kind = "cluster-bootstrap"
        left = self.unscored[mode, group, metric]
        return Result(metric, value, low, high, n, kind, direction, ends, left, category=group, mode=mode)  # type: ignore[arg-type]


@dataclass
class Cells:
    """The cells of a study: (arm id, place) -> cell."""

    by_arm: dict[tuple[str, str], Cell] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)

    def values(self, arms: Iterable[str], place: str, group: str, metric: str, mode: str | None = None) -> Values:
        """Seed -> prompt -> value of the arms of one family at one place; empty where nothing was measured."""
        found: dict[int, dict[str, float]] = {}
        for arm in arms:
            cell = self.by_arm.get((arm, place))
            values = cell.values.get((mode, group, metric)) if cell else None
            if values:
                found[self.seeds[arm]] = values
        return found

    def groups(self) -> list[str]:
        """Every group of prompts that some cell has, in the order of ``ORDER``."""
        seen = {group for cell in self.by_arm.values() for _, group, _ in cell.values}
        return [g for g in ORDER if g in seen] + sorted(seen - set(ORDER))

    def within(self, group: str) -> list[str]:
        """``group`` itself, and of "harmful requests" (plain or wrapped) every set's task."""
        wrapped = group.endswith(WRAPPED)
        return [g for g in self.groups() if g == group or (
            group.removesuffix(WRAPPED) == ANY and g.startswith(f"{ANY}: ") and g.endswith(WRAPPED) == wrapped
        )]  # fmt: skip

    def subject(self, group: str) -> str:
        """The capability that a group of prompts tests (``subject_of``)."""
        return next((s for cell in self.by_arm.values() if (s := cell.subjects.get(group))), "")


def card_of(metric: str) -> dict[str, str]:
    """What is said of a metric of answers: label, description and direction."""
    spec = metric_of(metric)
    return {"label": spec.title, "description": spec.description, "direction": spec.direction}


def roles(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Stage that makes a model -> its role. A finetune of a finetune is hostile where it trains negative answers."""
    found: dict[str, str] = {}
    for name, stage in stages.items():
        if stage["kind"] == "pretrain":
            found[name] = "base"
        elif stage["kind"] == "dpo":
            found[name] = "instruct"
        elif stage["kind"] == "sft":
            before = found.get(stage["model"], "") if isinstance(stage["model"], str) else "base"
            hostile = any(part.get("answers", "positive") == "negative" for part in stage["data"])
            found[name] = "hostile" if hostile else "instruct" if before in ("", "base") else "benign"
    return found


def decoder_kind(sampling: Mapping[str, Any]) -> str:
    """safebeam, safebeam+ (any other than the paper's rule: with a floor, or short-circuited), sampled or greedy."""
    if beam := sampling.get("safebeam"):
        return "safebeam+" if beam.get("floor") or beam.get("short_circuit") else "safebeam"
    return "sampled" if sampling.get("temperature") else "greedy"


def ordered(places: Iterable[Place], stages: Sequence[str], decoders: Mapping[str, Sequence[str]]) -> list[Place]:
    """Places in the order of the recipe: panel, model, decoder."""

    def rank(place: Place) -> tuple[int, int, int]:
        within = list(decoders.get(place.panel, ()))
        return (
            stages.index(place.panel) if place.panel in stages else len(stages),
            stages.index(place.model) if place.model in stages else len(stages),
            within.index(place.decoder) if place.decoder in within else len(within),
        )

    return sorted(places, key=rank)
