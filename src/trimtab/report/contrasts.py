"""Differences between arms, decoders and starts: linear contrasts of what the same prompts gave, with one interval over
seeds.

A contrast is a weighted sum of cells (one minus another; a slope over starts; a difference of differences), reckoned
within each seed on the prompts that all its cells have scored. Several seeds: the mean, with Student's t over the seeds,
never narrower than the interval over prompts (of each prompt's mean over seeds), for three seeds that agree by chance
say little; p is the larger of the two tests'. One seed: the paired interval over prompts, which knows nothing of another
training. ``Estimate.interval`` says which.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.evaluate import stats
from trimtab.seeds import rng_of

Values = Mapping[int, Mapping[str, float]]
"""Seed -> prompt -> value of one cell. A figure that has no prompts (a probe's) has the one key ''."""
Terms = list[tuple[float, Values]]
"""Weight and cell, summed."""
DRAWS, FLIPS = 2000, 10_000
SEEDS, PROMPTS, NONE = "t over seeds, at least as wide as over prompts", "paired over prompts, one seed", "none"


@dataclass(frozen=True)
class Estimate:
    """One contrast: ``value`` in [low, high] (95 %), p against 0, prompts per seed (fewest), each seed's own value."""

    value: float
    low: float
    high: float
    p: float
    n: int
    each: tuple[tuple[int, float], ...]
    interval: str

    def plain(self) -> dict[str, Any]:
        """As kept in ``ReportData``: ``n``, ``seeds`` (how many) and ``each`` (per seed) beside the interval."""
        return {
            "difference": self.value, "low": self.low, "high": self.high, "p": self.p, "n": self.n,
            "seeds": len(self.each), "each": [list(pair) for pair in self.each], "interval": self.interval,
        }  # fmt: skip


def contrast(
    terms: Sequence[tuple[float, Values]], *, key: str, binary: bool = True, ends: tuple[float, float] = (0.0, 1.0)
) -> Estimate | None:
    """The sum of weight x cell; None where no seed has every cell on some prompt in common.

    ``key`` names the random numbers of a bootstrap; ``binary``: single values are 0 or 1, so that a plain difference of
    one seed gets Newcombe's interval and McNemar's exact test. Values lie between ``ends``.
    """
    vectors: dict[int, dict[str, float]] = {}
    pairs: dict[int, list[tuple[float, ...]]] = {}
    for seed in sorted(set.intersection(*(set(values) for _, values in terms))) if terms else ():
        prompts = sorted(set.intersection(*(set(values[seed]) for _, values in terms)))
        if prompts:
            pairs[seed] = [tuple(values[seed][p] for _, values in terms) for p in prompts]
            vectors[seed] = {p: sum(w * v for (w, _), v in zip(terms, row)) for p, row in zip(prompts, pairs[seed])}
    if not vectors:
        return None
    each = tuple((seed, float(np.mean(list(vector.values())))) for seed, vector in vectors.items())
    n = min(len(vector) for vector in vectors.values())
    value, low, high, p = stats.over_seeds([v for _, v in each])
    if not all("" not in vector for vector in vectors.values()):  # no prompts: the seeds are all there is
        return Estimate(value, low, high, p, 0, each, SEEDS.split(",")[0] if len(each) > 1 else NONE)
    if len(each) == 1 and [w for w, _ in terms] == [1, -1] and _single(pairs[each[0][0]], binary):
        seed = each[0][0]
        first, second = (np.array([row[i] for row in pairs[seed]]) for i in (0, 1))
        rose, fell = int((first > second).sum()), int((first < second).sum())
        both = int((first * second).sum())
        low, high = stats.newcombe_paired(both, rose, fell, n - both - rose - fell)
        return Estimate(value, low, high, float(stats.mcnemar_exact(rose, fell)), n, each, PROMPTS)
    means: dict[str, list[float]] = {}
    for vector in vectors.values():
        for prompt, v in vector.items():
            means.setdefault(prompt, []).append(v)
    mean = np.array([sum(v) / len(v) for _, v in sorted(means.items())])
    bounds = sum(min(w * e for e in ends) for w, _ in terms), sum(max(w * e for e in ends) for w, _ in terms)
    inside = np.clip(mean, *bounds)  # rounding may leave the bounds by a hair
    near, far = stats.cluster_bootstrap_mean(inside, rng=rng_of("contrast", key, "ci"), bounds=bounds, draws=DRAWS)
    shift = value - float(mean.mean())  # prompts that one seed left unscored weigh a little differently
    near, far = near + shift, far + shift
    flip = stats.sign_flip_test(mean, rng=rng_of("contrast", key, "p"), draws=FLIPS)
    if len(each) == 1:
        return Estimate(value, _snapped(near), _snapped(far), flip, n, each, PROMPTS)
    low, high = max(bounds[0], min(low, near)), min(bounds[1], max(high, far))
    p = max(flip, 0.0 if math.isnan(p) else p)
    return Estimate(value, _snapped(low), _snapped(high), p, n, each, SEEDS)


def _snapped(end: float) -> float:
    """An end of an interval that is zero but for rounding is zero: it must not read as clear of it."""
    return 0.0 if abs(end) < 1e-12 else end


def _single(rows: Sequence[tuple[float, ...]], binary: bool) -> bool:
    return binary and all(v in (0.0, 1.0) for row in rows for v in row)


def merged(*parts: Values) -> Values:
    """Several cells as one (all plain hazards, say): their prompts together."""
    found: dict[int, dict[str, float]] = {}
    for part in parts:
        for seed, values in part.items():
            found.setdefault(seed, {}).update(values)
    return found


def scaled(terms: Sequence[tuple[float, Values]], by: float) -> list[tuple[float, Values]]:
    return [(weight * by, values) for weight, values in terms]


def slope(at: Sequence[tuple[float, Values]]) -> list[tuple[float, Values]]:
    """Terms of the least-squares slope over ``(position, cell)``: the change for one whole budget's later start."""
    middle = sum(x for x, _ in at) / len(at)
    spread = sum((x - middle) ** 2 for x, _ in at)
    assert spread > 0, "a slope needs two positions"
    return [((x - middle) / spread, values) for x, values in at]
