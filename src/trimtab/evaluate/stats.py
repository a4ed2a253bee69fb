"""The statistics behind every figure: intervals for rates, paired differences, exact tests, agreement.

Rates get score or exact intervals, differences are paired (DESIGN, decision 8), and anything whose rows
share a prompt is resampled by prompt. Every function takes counts or arrays, vectorises where that makes
sense, raises ``ValueError`` on input that cannot be, and gives NaN (never 0) where there is nothing to
estimate from. Only ``scipy.special`` is used, so that importing this costs milliseconds; agreement with
scipy, statsmodels and published examples, and the coverage of each interval, are held by tests.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special

Floats = npt.NDArray[np.float64]
Interval = tuple[Floats, Floats]
DRAWS = 10_000
"""Resamples of a bootstrap or a permutation test: Monte Carlo error of a 2.5 % tail is then below 0.2
points."""


def _level(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    return 1 - level


def _counts(**named: Any) -> list[Floats]:
    """Whole, finite, non-negative numbers, broadcast against each other."""
    for name, value in named.items():
        array = np.asarray(value, dtype=np.float64)
        if not np.all(np.isfinite(array)) or np.any(array < 0) or np.any(array != np.floor(array)):
            raise ValueError(f"{name} must be whole numbers >= 0, got {value!r}")
    return list(np.broadcast_arrays(*(np.asarray(v, dtype=np.float64) for v in named.values())))


def _rates(k: Any, n: Any) -> tuple[Floats, Floats]:
    kk, nn = _counts(k=k, n=n)
    if np.any(kk > nn):
        raise ValueError("k must not exceed n")
    return kk, nn


def _z(level: float) -> float:
    return float(special.ndtri(1 - _level(level) / 2))


def wilson(k: Any, n: Any, level: float = 0.95) -> Interval:
    """Wilson's score interval for ``k`` of ``n`` (Wilson 1927); shapes broadcast, n = 0 gives NaN."""
    k, n = _rates(k, n)
    z = _z(level)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = k / n
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At the edges the algebra gives exactly 0 and 1; rounding must not push the bound past them.
    low = np.where(n == 0, np.nan, np.where(k == 0, 0.0, np.clip(centre - half, 0, 1)))
    high = np.where(n == 0, np.nan, np.where(k == n, 1.0, np.clip(centre + half, 0, 1)))
    return low, high


def clopper_pearson(k: Any, n: Any, level: float = 0.95) -> Interval:
    """The exact (conservative) interval of Clopper and Pearson (1934): 0 of 100 gives [0, 0.036]; n = 0
    gives NaN."""
    k, n = _rates(k, n)
    alpha = _level(level)
    with np.errstate(invalid="ignore"):
        low = np.where(k == 0, 0.0, special.betaincinv(np.maximum(k, 1), n - k + 1, alpha / 2))
        high = np.where(k == n, 1.0, special.betaincinv(k + 1, np.maximum(n - k, 1), 1 - alpha / 2))
    return np.where(n == 0, np.nan, low), np.where(n == 0, np.nan, high)


def rate_interval(k: Any, n: Any, level: float = 0.95) -> Interval:
    """The interval that a rate is printed with: Clopper and Pearson's where none or all of ``n`` count, else
    Wilson's.

    A reader who checks "0 of 100" against the exact bound, 3.6 %, must find it.
    """
    k, n = _rates(k, n)
    edge = (k == 0) | (k == n)
    score, exact = wilson(k, n, level), clopper_pearson(k, n, level)
    return np.where(edge, exact[0], score[0]), np.where(edge, exact[1], score[1])


def mcnemar_exact(b: Any, c: Any) -> Floats:
    """Two-sided exact McNemar p from the discordant counts ``b`` and ``c``; no discordant pair gives 1."""
    b, c = _counts(b=b, c=c)
    p = 2 * special.bdtr(np.minimum(b, c), (b + c).astype(np.int64), 0.5)
    return np.where(b + c == 0, 1.0, np.minimum(1.0, p))


def newcombe_paired(
    both: int, only_first: int, only_second: int, neither: int, level: float = 0.95
) -> tuple[float, float]:
    """Interval for p1 - p2 = (only_first - only_second) / n of two paired proportions.

    Newcombe (1998), "Improved confidence intervals for the difference between binomial proportions based on
    paired data", Statistics in Medicine 17, 2635-2650, method 10: Wilson limits squared and added, with the
    continuity-corrected phi. It does not collapse when no pair is discordant. n = 0 gives NaN.
    """
    a, b, c, d = (float(x) for x in _counts(both=both, only_first=only_first, only_second=only_second, neither=neither))
    n = a + b + c + d
    if n == 0:
        return float("nan"), float("nan")
    p1, p2 = (a + b) / n, (a + c) / n
    (l1, u1), (l2, u2) = ((float(x) for x in wilson(k, n, level)) for k in (a + b, a + c))
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    cross = a * d - b * c
    corrected = max(cross - n / 2, 0.0) if cross > 0 else cross
    phi = corrected / np.sqrt(margins) if margins > 0 else 0.0
    down, up = p1 - l1, u2 - p2
    low = p1 - p2 - np.sqrt(max(down**2 - 2 * phi * down * up + up**2, 0.0))
    down, up = u1 - p1, p2 - l2
    high = p1 - p2 + np.sqrt(max(down**2 - 2 * phi * down * up + up**2, 0.0))
    return max(-1.0, float(low)), min(1.0, float(high))


def smallest_detectable_difference(n: int, discordant: float, level: float = 0.95, power: float = 0.8) -> float:
    """The smallest |p1 - p2| that McNemar's test at ``1 - level`` finds with ``power`` in ``n`` pairs.

    Solves n = (z_a sqrt(psi) + z_b sqrt(psi - d^2))^2 / d^2 for d (Connor 1987, Biometrics 43, 207-211), psi
    being the share of discordant pairs (``discordant``, usually the observed one). A difference cannot
    exceed psi, so where the solution would, psi = d is taken (all discordant pairs one way). NaN where even
    d = 1 would not be found, and n = 0.
    """
    (n_pairs,) = (int(x) for x in _counts(n=n))
    if not 0 <= discordant <= 1 or not 0 < power < 1:
        raise ValueError(f"discordant must lie in [0, 1] and power in (0, 1), got {discordant} and {power}")
    za, zb = _z(level), float(special.ndtri(power))
    if n_pairs <= za * za:
        return float("nan")
    root = za * np.sqrt(n_pairs) + zb * np.sqrt(n_pairs + zb**2 - za**2)
    d = np.sqrt(discordant) * root / (n_pairs + zb**2)
    if 0 < d <= discordant:
        return float(d)
    low, high = 0.0, 1.0
    for _ in range(60):  # sqrt(n d) - z_a - z_b sqrt(1 - d) rises with d
        mid = (low + high) / 2
        low, high = (mid, high) if np.sqrt(n_pairs * mid) < za + zb * np.sqrt(1 - mid) else (low, mid)
    return high


def holm(pvalues: Any) -> Floats:
    """Holm's (1979) step-down adjusted p values, in the order given."""
    p = np.asarray(pvalues, dtype=np.float64)
    if p.ndim != 1 or np.any(~((p >= 0) & (p <= 1))):
        raise ValueError("pvalues must be one row of numbers between 0 and 1")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)) if len(p) else p
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def _group(values: Any, clusters: Sequence[Hashable] | None) -> tuple[Floats, Floats]:
    """Sum and count of ``values`` within each cluster."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not np.all(np.isfinite(x)):
        raise ValueError("values must be one row of finite numbers (leave unscored items out)")
    if clusters is None:
        return x, np.ones(len(x))
    if len(clusters) != len(x):
        raise ValueError(f"{len(x)} values but {len(clusters)} cluster names")
    index: dict[Hashable, int] = {}
    of = np.fromiter((index.setdefault(c, len(index)) for c in clusters), dtype=np.int64, count=len(x))
    total, size = np.bincount(of, weights=x), np.bincount(of)
    return total.astype(np.float64), size.astype(np.float64)


def cluster_bootstrap_mean(
    values: Any,
    clusters: Sequence[Hashable] | None = None,
    *,
    rng: np.random.Generator,
    bounds: tuple[float, float] | None = None,
    draws: int = DRAWS,
    level: float = 0.95,
) -> tuple[float, float]:
    """BCa interval (Efron 1987) for the mean of ``values``, resampling whole clusters (prompts).

    Its level is widened for few clusters as Hesterberg (2015, The American Statistician 69, 371-386, sec. 4) does
    for percentile intervals: Student's quantile times sqrt(n / (n - 1)) in place of the normal one. Without it
    ten pairs of prompts cover 84 to 93 %, with it 87 to 97 % (tests/test_coverage.py).

    Clusters with equal sum and size are interchangeable, so each draw is one multinomial over the distinct
    pairs: the result does not depend on the order of the rows. When all clusters agree a bootstrap sees no
    spread at all; with ``bounds`` (the metric's range) the interval is then opened by the exact share u = 1
    - (alpha/2)^(1/clusters) of clusters that may yet lie at the far end of the range (the Clopper-Pearson
    bound for 0 of n). One cluster, or none, says nothing of the spread: the whole of ``bounds``, or NaN
    without them.
    """
    alpha = _level(level)
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    total, size = _group(values, clusters)
    groups = len(total)
    if groups < 2:
        return bounds if bounds is not None and groups else (float("nan"), float("nan"))
    mean = float(total.sum() / size.sum())
    if bounds is not None and not bounds[0] <= mean <= bounds[1]:
        raise ValueError(f"the mean {mean} lies outside the range {bounds}")
    pairs, number = np.unique(np.stack([total, size], axis=1), axis=0, return_counts=True)
    if np.ptp(total / size) < 1e-12:
        share = 0.0 if bounds is None else 1 - (alpha / 2) ** (1 / groups)
        low, high = bounds or (mean, mean)
        return mean - share * (mean - low), mean + share * (high - mean)
    drawn = rng.multinomial(groups, number / groups, size=draws) @ pairs
    boot = np.sort(drawn[:, 0] / drawn[:, 1])
    # Ties count half: means of 0/1 items fall on a lattice, and "<" alone would bias the correction.
    tol = 1e-12 * max(1.0, abs(mean))
    ranks = np.searchsorted(boot, mean - tol), np.searchsorted(boot, mean + tol, side="right")
    below = sum(ranks) / (2 * draws)
    bias = float(special.ndtri(np.clip(below, 1 / (2 * draws), 1 - 1 / (2 * draws))))
    left_out = (total.sum() - pairs[:, 0]) / (size.sum() - pairs[:, 1])
    dev = np.average(left_out, weights=number) - left_out
    spread = float(number @ dev**2)
    skew = float(number @ dev**3) / (6 * spread**1.5) if spread > 0 else 0.0
    wide = float(special.stdtrit(groups - 1, 1 - alpha / 2)) * np.sqrt(groups / (groups - 1))
    z = np.array([-wide, wide])
    at = special.ndtr(bias + (bias + z) / (1 - skew * (bias + z)))
    low, high = np.quantile(boot, at)
    return float(low), float(high)


def paired_bootstrap(
    first: Any,
    second: Any,
    clusters: Sequence[Hashable] | None = None,
    *,
    rng: np.random.Generator,
    bounds: tuple[float, float] | None = None,
    draws: int = DRAWS,
    level: float = 0.95,
) -> tuple[float, float]:
    """Interval for mean(second - first) over paired items, clustered by prompt; ``bounds`` is the range of
    one side."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired items must match: {a.shape} against {b.shape}")
    width = None if bounds is None else (bounds[0] - bounds[1], bounds[1] - bounds[0])
    return cluster_bootstrap_mean(b - a, clusters, rng=rng, bounds=width, draws=draws, level=level)


def sign_flip_test(
    differences: Any,
    clusters: Sequence[Hashable] | None = None,
    *,
    rng: np.random.Generator,
    draws: int = DRAWS,
) -> float:
    """Two-sided permutation p for mean difference 0, flipping whole clusters: the test for scores and
    repeated samples.

    For single 0/1 items it is McNemar's exact test up to Monte Carlo error; (hits + 1) / (draws + 1) keeps
    it valid at any number of draws. No non-zero difference gives 1.
    """
    total, _ = _group(differences, clusters)
    total = total[np.abs(total) > 1e-12]
    if not len(total):
        return 1.0
    sizes, number = np.unique(np.abs(np.round(total, 12)), return_counts=True)
    # Equal sizes flip alike, so one binomial per distinct size replaces one coin per cluster.
    heads = rng.binomial(number, 0.5, size=(draws, len(number)))
    flipped = np.abs((2 * heads - number) @ sizes)
    return float((np.count_nonzero(flipped >= abs(total.sum()) - 1e-9) + 1) / (draws + 1))


def over_seeds(values: Any, level: float = 0.95) -> tuple[float, float, float, float]:
    """Mean of one value per seed (a rate, or a paired difference) with Student's interval, df = seeds - 1: (mean, low,
    high, p), p two-sided against 0.

    It takes the seeds as drawn from all seeds, so it covers what another training would change; the prompts are held
    fixed. One seed says nothing of that: interval and p are NaN. Seeds without any spread give an interval of no width
    and no p (NaN); a caller who prints one must widen it (``report.contrasts`` takes the interval over prompts then).
    """
    alpha = _level(level)
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not np.all(np.isfinite(x)):
        raise ValueError("values must be one row of finite numbers, one per seed")
    if not len(x):
        return (float("nan"),) * 4
    mean = float(x.mean())
    if len(x) == 1:
        return mean, float("nan"), float("nan"), float("nan")
    error = float(x.std(ddof=1) / np.sqrt(len(x)))
    if error <= 1e-12 * max(1.0, abs(mean)):
        return mean, mean, mean, float("nan")
    half = float(special.stdtrit(len(x) - 1, 1 - alpha / 2)) * error
    return mean, mean - half, mean + half, float(2 * special.stdtr(len(x) - 1, -abs(mean) / error))


def safe_at_k(c: Any, n: Any, k: int) -> Floats:
    """Unbiased chance that all of ``k`` samples are safe, from ``c`` safe of ``n``: C(c,k)/C(n,k); NaN where
    n < k.

    Safe@k of SafeChain (2502.12025). Not pass@k, which asks for one success.
    """
    return cons_safe_at_k(c, n, k, need=k)


def cons_safe_at_k(c: Any, n: Any, k: int, need: int | None = None) -> Floats:
    """Unbiased chance that at least ``need`` of ``k`` samples are safe (hypergeometric); NaN where n < k.

    By default ``need`` is half of k, rounded up: ConsSafe@k of SafeChain (2502.12025), "at least K/2".
    """
    c, n = _rates(c, n)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    need = (k + 1) // 2 if need is None else need
    with np.errstate(divide="ignore", invalid="ignore"):
        ways = np.zeros(c.shape)
        for j in range(need, k + 1):
            possible = (c >= j) & (n - c >= k - j)
            ways = ways + np.where(possible, special.binom(c, j) * special.binom(n - c, k - j), 0.0)
        # A sum of shares may round to a little more than 1.
        return np.where(n < k, np.nan, np.minimum(ways / special.binom(n, k), 1.0))


def pass_at_k(c: Any, n: Any, k: int) -> Floats:
    """Unbiased chance that at least one of ``k`` samples is right, from ``c`` right of ``n``: 1 - C(n-c,k)/C(n,k); NaN
    where n < k (Chen et al., 2107.03374, eq. 1)."""
    c, n = _rates(c, n)
    return 1 - safe_at_k(n - c, n, k)


def cohen_kappa(
    first: Sequence[Hashable], second: Sequence[Hashable], level: float = 0.95
) -> tuple[float, float, float]:
    """Cohen's kappa of two raters with its interval: (kappa, low, high).

    Large-sample standard error of Fleiss, Cohen and Everitt (1969), taken, with the centre, from the table plus
    two items spread evenly over its cells: as it stands that error is 0 for raters who always agree, and the
    interval of 30 such items would be [1, 1] (tests/test_coverage.py measures both). NaN for no items, or where
    both raters gave one and the same label throughout (chance agreement is then 1 and kappa undefined).
    """
    _level(level)
    if len(first) != len(second):
        raise ValueError(f"{len(first)} labels against {len(second)}")
    labels = {label: i for i, label in enumerate(dict.fromkeys([*first, *second]))}
    table = np.zeros((len(labels), len(labels)))
    for x, y in zip(first, second):
        table[labels[x], labels[y]] += 1
    if table.sum() == 0 or len(labels) == 1:
        return (float("nan"),) * 3
    kappa, _ = kappa_and_error(table)
    centre, error = kappa_and_error(table + 2 / table.size)
    half = _z(level) * error
    return kappa, max(-1.0, min(kappa, centre - half)), min(1.0, max(kappa, centre + half))


def kappa_and_error(table: Floats) -> tuple[float, float]:
    """Kappa of a square table of counts and its large-sample standard error (Fleiss, Cohen and Everitt 1969)."""
    n = table.sum()
    p = table / n
    row, col, agree = p.sum(1), p.sum(0), np.diag(p)
    seen, chance = float(agree.sum()), float(row @ col)
    kappa = (seen - chance) / (1 - chance)
    one = np.sum(agree * (1 - (row + col) * (1 - kappa)) ** 2)
    cross = p * (row[None, :] + col[:, None]) ** 2
    two = (1 - kappa) ** 2 * (cross.sum() - np.diag(cross).sum())
    three = (kappa - chance * (1 - kappa)) ** 2
    return kappa, float(np.sqrt(max(one + two - three, 0.0) / n)) / (1 - chance)
