"""A panel's cells: where each judged stage stands (model x decoder), what its prompts are grouped into, and the values of
every prompt, from which the grid and all differences are made.

Models have a role in the papers' chain (base -> instruct -> benign or hostile finetuning), read from the recipe's
stages; decoders have a kind, read from how the answers were sampled. Nothing here goes by a name that a recipe chose.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trimtab.evaluate import stats
from trimtab.evaluate.metrics import METRICS, Record, scores
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
"""Groups of prompts in the order in which a report shows them."""


def group_of(row: Row) -> str:
    """The group of prompts that a row belongs to; a prompt in a jailbreak or an attack is of the wrapped ones."""
    kind = str(row.metadata.get("kind", ""))
    if row.harm == "contrast":
        name = CONTRASTS
    elif row.harm == "harmful":
        name = {"harmful-seen": SEEN, "harmful-heldout": HELDOUT}.get(kind, ANY)
    else:
        name = _KINDS.get(kind, BENIGN)
    return name + (WRAPPED if "wrapper" in row.metadata or "attack" in row.metadata else "")


def metrics_of(group: str) -> tuple[str, ...]:
    """What a group of prompts is measured by in the grid."""
    if group.startswith((HELDOUT, SEEN, ANY)):
        return ("risk_rate",)
    if group.startswith(CONTRASTS):
        return ("over_refusal_contrast_full",)
    return ("over_refusal_benign_full", "accuracy") if group.startswith(BENIGN) else ("accuracy",)


@dataclass
class Cell:
    """One judged stage of one arm: (mode, group, metric) -> prompt -> mean over its answers, and how many were unscored."""

    values: dict[tuple[str | None, str, str], dict[str, float]] = field(default_factory=dict)
    single: dict[tuple[str | None, str, str], bool] = field(default_factory=dict)
    unscored: dict[tuple[str | None, str, str], int] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[Record]) -> Cell:
        cell = cls()
        groups: dict[tuple[str | None, str], list[Record]] = {}
        for record in records:
            groups.setdefault((record.generation.mode, group_of(record.row)), []).append(record)
        for (mode, group), mine in groups.items():
            for metric in metrics_of(group):
                found: dict[str, list[float]] = {}
                left = 0
                for score in scores(METRICS[metric], mine):
                    if score.value is None:
                        left += 1
                    else:
                        found.setdefault(score.prompt, []).append(score.value)
                if found or left:
                    key = mode, group, metric
                    cell.values[key] = {prompt: sum(v) / len(v) for prompt, v in found.items()}
                    cell.single[key] = METRICS[metric].binary and all(len(v) == 1 for v in found.values())
                    cell.unscored[key] = left
        return cell

    def results(self) -> Iterator[Result]:
        """One figure per group, with its interval over prompts; ``category`` is the group."""
        for (mode, group, metric), values in self.values.items():
            spec, told = METRICS[metric], list(values.values())
            n = len(told)
            value, low, high, kind = float("nan"), 0.0, 1.0, "unscored"
            if n:
                value = sum(told) / n
                if self.single[mode, group, metric]:
                    low, high = (float(x) for x in stats.rate_interval(round(sum(told)), n))
                    kind = "clopper-pearson" if round(sum(told)) in (0, n) else "wilson"
                else:
                    rng = rng_of("panel", metric, group)
                    low, high = stats.cluster_bootstrap_mean(np.array(told), rng=rng, bounds=(0.0, 1.0))
                    kind = "cluster-bootstrap"
            left = self.unscored[mode, group, metric]
            yield Result(
                metric, value, low, high, n, kind, spec.direction, unscored=left, category=group, mode=mode
            )  # fmt: skip


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


def roles(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Stage that makes a model -> its role. A finetune of a finetune is hostile where it trains negative answers."""
    found: dict[str, str] = {}
    for name, stage in stages.items():
        if stage["kind"] == "pretrain":
            found[name] = "base"
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


def timing_of(recipe: Mapping[str, Any], arm: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arm's timing settings (start, exposure, before, ramp), from the recipe, its group and what is swept; None for
    an arm whose group neither sets nor sweeps the timing, and for a curriculum that is spelt out."""
    group = next((g for g in recipe["arms"] if g["name"] == arm["group"]), None)
    stage = next((n for n in arm["stages"] if recipe["stages"].get(n, {}).get("kind") == "pretrain"), None)
    if group is None or stage is None:
        return None
    root = f"stages.{stage}.timing"
    timing = dict(recipe["stages"][stage].get("timing") or {})
    touched = False
    swept = {
        path: arm["settings"][short]
        for path in group["sweep"]
        for short in arm["settings"]
        if path == short or path.endswith(f".{short}")
    }
    for path, value in {**group["set"], **swept}.items():
        if path == root and isinstance(value, Mapping):
            timing, touched = {**timing, **value}, True
        elif path.startswith(f"{root}."):
            timing[path.removeprefix(f"{root}.")] = value
            touched = True
    if not touched or timing.get("phases"):
        return None
    kept = {k: timing.get(k, default) for k, default in _TIMING.items()}
    return {**kept, "start": float(kept["start"])}


_TIMING: dict[str, Any] = {"start": 0.0, "exposure": "natural", "before": "safe_only", "ramp": 0.0, "dose": None}


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
