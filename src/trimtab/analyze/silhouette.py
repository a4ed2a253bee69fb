"""Silhouettes of points that come as prompts x modes, and their intervals over prompts (Rousseeuw 1987; 2508.14904, sec. 3.3).

s = (b - a) / max(a, b): a is a point's mean distance to the other points of its mode, b the least of its mean distances to
the points of another mode; 0 where both are 0. All is read off one matrix of distances, for all resamples at once: a
resample is a weight per prompt. To itself a prompt counts once, however often it was drawn: its copies are left out of its
a, where zeros would make every mode look tighter than it is, and but one of them out of its b, where the same prompt's
answers in two modes lie closer together than those of different prompts.
Trades off: memory and time are quadratic in the number of points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trimtab.analyze.auroc import percentiles

Floats = NDArray[np.float64]
Distance = Literal["euclidean", "cosine"]
_COLUMNS = 4096
_NUMBERS = 4_000_000
"""Mean distances that are held at once while resampling."""
_SAME = 1e-11
"""Points whose squared distance is less than this share of their squared lengths are one point: the rest is rounding."""


@dataclass(frozen=True)
class Geometry:
    """n points seen by one distance.

    distances  float64[n, n], zero on the diagonal
    places     float64[n, 2]: the points on their first two principal axes
    variance   float64[2]: each axis's share of the variance
    """

    distances: Floats
    places: Floats
    variance: Floats


@dataclass(frozen=True)
class Margins:
    """Mean silhouettes with 95 % intervals; ``value``, ``low`` and ``high`` are float64[1 + modes], the first over all modes."""

    value: Floats
    low: Floats
    high: Floats


def gram_of(points: NDArray[Any]) -> Floats:
    """Inner products of points [n, features], float64[n, n]."""
    gram = np.zeros((len(points), len(points)))
    for start in range(0, points.shape[1], _COLUMNS):
        part = points[:, start : start + _COLUMNS].astype(np.float64)
        gram += part @ part.T
    return gram


def geometry(gram: Floats, distance: Distance) -> Geometry:
    """Distances and principal axes of points with these inner products. ``cosine``: 1 - cosine, axes of the points scaled to
    length 1; a point of length 0 is at distance 1 from all others."""
    if distance == "cosine":
        length = np.sqrt(np.maximum(gram.diagonal(), 0))
        scale = np.divide(1.0, length, out=np.zeros_like(length), where=length > 0)
        gram = gram * scale[:, None] * scale
        distances = np.clip(1 - gram, 0, 2)
        distances[distances < _SAME] = 0
    else:
        squares = gram.diagonal()
        both = squares[:, None] + squares
        apart = both - 2 * gram
        distances = np.sqrt(np.where(apart > _SAME * both, apart, 0.0))
    np.fill_diagonal(distances, 0)
    return Geometry(distances, *_axes(gram))


def _axes(gram: Floats) -> tuple[Floats, Floats]:
    """The first two principal components, as SVD of the centred points gives them: from their inner products, whose
    eigenvectors are its left vectors. Signs are fixed: the largest place on an axis is positive."""
    n = len(gram)
    centred = gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean()
    values, vectors = np.linalg.eigh(centred)
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    total = values.sum()
    places, share = np.zeros((n, 2)), np.zeros(2)
    if total <= _SAME * max(float(gram.trace()), 1e-300):
        return places, share
    for axis in range(min(2, n)):
        place = vectors[:, axis] * np.sqrt(values[axis])
        places[:, axis] = place * (np.sign(place[np.argmax(np.abs(place))]) or 1.0)
        share[axis] = values[axis] / total
    return places, share


def silhouettes(distances: Floats, modes: int, weights: Floats | None = None) -> Floats:
    """Silhouette of every point, float64[draws, prompts, modes].

    distances  float64[n, n] with n = prompts x modes, the modes of a prompt side by side
    weights    float64[draws, prompts]: how often each prompt was drawn; None: each once, one draw

    A point whose mode holds no other has 0, as in scikit-learn; so has one whose a and b are both 0.
    """
    prompts = len(distances) // modes
    weights = np.ones((1, prompts)) if weights is None else weights
    # [points, prompts, modes] -> sums over the prompts drawn, [draws, prompts, modes, modes]
    parts = distances.reshape(prompts * modes, prompts, modes).transpose(0, 2, 1)
    sums = (weights @ parts.reshape(-1, prompts).T).reshape(len(weights), prompts, modes, modes)
    others = (weights.sum(1)[:, None] - weights)[:, :, None]  # of each mode, drawn, but for the prompt's own
    alone = np.broadcast_to(others < 0.5, sums.shape[:3])
    own, each = np.arange(modes), np.arange(prompts)
    a = sums[:, :, own, own] / np.where(alone, 1.0, others)
    itself = distances.reshape(prompts, modes, prompts, modes)[each, :, each]
    means = (sums - (weights - 1)[:, :, None, None] * itself) / (others + 1)[..., None]
    means[:, :, own, own] = np.inf
    b = means.min(3)
    top = np.maximum(a, b)
    s = np.divide(b - a, top, out=np.zeros_like(a), where=top > 0)
    return np.where(alone, 0.0, s)


def margins(distances: Floats, modes: int, draws: int, rng: np.random.Generator) -> Margins:
    """Mean silhouettes over all points and by mode, with intervals from ``draws`` resamples of whole prompts.

    Percentiles; where no resample differs the interval is opened by the exact bound for prompts that may yet differ, as in
    ``evaluate.stats.cluster_bootstrap_mean``. A resample of one prompt alone says nothing and is left out. Needs two
    prompts and two modes.
    """
    prompts = len(distances) // modes
    assert prompts >= 2 and modes >= 2, "silhouettes need two prompts and two modes"
    value = _means(silhouettes(distances, modes), np.ones((1, prompts)))[0]
    weights = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=draws).astype(np.float64)
    block = max(1, _NUMBERS // (prompts * modes * modes))
    found = np.concatenate([
        _means(silhouettes(distances, modes, part), part)
        for part in (weights[start : start + block] for start in range(0, draws, block))
    ])  # fmt: skip
    found[(weights > 0).sum(1) < 2] = np.nan
    low, high = np.empty_like(value), np.empty_like(value)
    for i, mean in enumerate(value):
        told = found[:, i] - np.nanmean(found[:, i]) + mean
        low[i], high[i] = percentiles(told, (-1.0, 1.0))
        if high[i] - low[i] < 1e-12:
            share = 1 - 0.025 ** (1 / prompts)
            low[i], high[i] = mean - share * (mean + 1), mean + share * (1 - mean)
        low[i], high[i] = max(-1.0, min(low[i], mean)), min(1.0, max(high[i], mean))
    return Margins(value, low, high)


def _means(s: Floats, weights: Floats) -> Floats:
    """Mean silhouettes of every draw, float64[draws, 1 + modes]: over all modes, then of each."""
    each = np.einsum("dpm,dp->dm", s, weights) / weights.sum(1)[:, None]
    return np.concatenate([each.mean(1, keepdims=True), each], axis=1)
