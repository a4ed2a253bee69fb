"""AUROC and the true positive rate at a false positive rate, with intervals from resampling whole groups.

Both are read off one sorted list, for all resamples at once: a resample is a weight per row, the times that its group was
drawn. Equal scores count half in the AUROC, and pass a threshold together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab.evaluate.stats import clopper_pearson

Floats = NDArray[np.float64]
FPR = 0.01
"""The false positive rate at which the true positive rate is read."""
_TAIL = 0.025


@dataclass(frozen=True)
class Estimate:
    """A value in [0, 1] with its 95 % interval; all NaN (the interval: 0 to 1) where a class has no row."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Separation:
    """How far scores tell positives from negatives."""

    auroc: Estimate
    tpr: Estimate
    positives: int
    negatives: int

    @property
    def strict(self) -> bool:
        """Whether the true positive rate is that at no false alarm at all, negatives being fewer than 1 / FPR."""
        return self.negatives < round(1 / FPR)


def cluster_weights(groups: NDArray[Any], draws: int, rng: np.random.Generator) -> Floats:
    """float64[draws, n]: how often each row occurs when as many groups as there are are drawn with replacement."""
    names, of = np.unique(groups, return_inverse=True)
    k = len(names)
    drawn = rng.multinomial(k, np.full(k, 1 / k), size=draws) if k else np.zeros((draws, 0))
    weights: Floats = drawn[:, of].astype(np.float64)
    return weights


def curve_figures(scores: NDArray[Any], positive: NDArray[np.bool_], weights: Floats) -> tuple[Floats, Floats]:
    """AUROC and true positive rate at ``FPR``, float64[draws] each, one value for each row of ``weights`` [draws, n].

    The rate is the largest over thresholds whose false positive rate is at most ``FPR``; with fewer than 1 / ``FPR``
    negatives that means no false alarm. NaN for a draw that lacks a class.
    """
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    ranked = np.asarray(scores, np.float64)[order]
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # the last row of each run of equal scores
    w = weights[:, order]
    is_positive = positive[order]
    hits = np.cumsum(w * is_positive, axis=1)[:, ends]
    alarms = np.cumsum(w * ~is_positive, axis=1)[:, ends]
    p, n = hits[:, -1], alarms[:, -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        gained = np.diff(hits, axis=1, prepend=0.0)
        tied = np.diff(alarms, axis=1, prepend=0.0)
        area = np.sum(gained * (n[:, None] - alarms + tied / 2), axis=1) / (p * n)
        allowed = alarms <= FPR * n[:, None] + 1e-9
        rate = np.max(np.where(allowed, hits, 0.0), axis=1) / p
    lacks = (p == 0) | (n == 0)
    return np.where(lacks, np.nan, area), np.where(lacks, np.nan, rate)


def separation(scores: NDArray[Any], positive: NDArray[np.bool_], groups: NDArray[Any], weights: Floats) -> Separation:
    """Both figures of ``scores`` [n] with intervals; ``weights`` [draws, n] are ``cluster_weights`` of the groups.

    Intervals are percentiles of the resamples. Where no resample differs a bootstrap sees no spread, and the interval is
    opened by an exact bound: with the AUROC at 1 (or 0), m pairs of a positive and a negative out of 2m groups that share
    none are independent, and all are in order; the true positive rate is bounded as k of the groups that have positives.
    """
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        nothing = Estimate(float("nan"), 0.0, 1.0)
        return Separation(nothing, nothing, positives, negatives)
    area, rate = (float(v[0]) for v in curve_figures(scores, positive, np.ones((1, len(scores)))))
    areas, rates = curve_figures(scores, positive, weights)
    having = len(np.unique(groups[positive]))
    lacking = len(np.unique(groups[~positive]))
    pairs = max(1, min(having, lacking, len(np.unique(groups)) // 2))
    return Separation(
        _bounded(area, areas, pairs), _bounded(rate, rates, having), positives, negatives
    )  # fmt: skip


def percentiles(draws: Floats, most: tuple[float, float] = (0.0, 1.0)) -> tuple[float, float]:
    """The central 95 % of the draws that have a value; ``most`` where fewer than half have one."""
    told = draws[~np.isnan(draws)]
    if len(told) < max(2, len(draws) / 2):
        return most
    low, high = np.quantile(told, [_TAIL, 1 - _TAIL])
    return float(low), float(high)


def _bounded(value: float, draws: Floats, units: int) -> Estimate:
    low, high = percentiles(draws)
    if high - low < 1e-12 and value in (0.0, 1.0):
        exact = clopper_pearson(int(value) * units, units)
        low, high = float(exact[0]), float(exact[1])
    return Estimate(value, min(low, value), max(high, value))
