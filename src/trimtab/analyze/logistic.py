"""The probe itself: a standardised, L2-penalised logistic regression, by Newton's method.

scikit-learn's fits the same optimum (a test holds that) at three to ten times the cost: a probing of one small model is
some hundreds of fits of a few hundred rows, where its checks and its first-order steps weigh most. Classes weigh the
same whatever their sizes, so that scores of different folds share one zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.special import expit

Floats = NDArray[np.float64]
_STEPS = 50
_TOLERANCE = 1e-8
_UNPENALISED = 1e-9
"""Penalty of the intercept: none, but for keeping the system solvable."""


def fit_scores(train: NDArray[Any], labels: NDArray[np.bool_], test: NDArray[Any], l2: float) -> Floats:
    """Log odds of True for the rows of ``test`` [m, d], after fitting ``train`` [n, d] with ``labels`` [n].

    Features are centred and scaled by the training rows; one that does not vary there counts for nothing. The weights w
    and the intercept minimise sum of c_i log(1 + exp(-s_i m_i)) + l2/2 |w|^2, with s_i = +-1, m_i the margin and c_i the
    balanced class weights n / (2 n_class); l2 is 1 / C of scikit-learn. ``ValueError`` where a class has no row.
    """
    x, z = _scaled(train, test)
    y = np.asarray(labels, np.float64)
    if not 0 < y.sum() < len(y):
        raise ValueError("a probe needs rows of both classes")
    if x.shape[1] > x.shape[0]:
        # The weights lie in the span of the rows: a rotation onto it changes nothing and leaves n features at most.
        _, _, basis = np.linalg.svd(x, full_matrices=False)
        x, z = x @ basis.T, z @ basis.T
    weights = _newton(np.column_stack([x, np.ones(len(x))]), y, l2)
    scores: Floats = z @ weights[:-1] + weights[-1]
    return scores


def _scaled(train: NDArray[Any], test: NDArray[Any]) -> tuple[Floats, Floats]:
    x, z = np.asarray(train, np.float64), np.asarray(test, np.float64)
    centre, spread = x.mean(0), x.std(0)
    # Rounding leaves a trace of spread in a feature that is constant; scaled up it would be noise.
    flat = spread <= 1e-6 * np.maximum(1e-6, np.abs(centre))
    scale = np.where(flat, 0.0, 1.0 / np.where(flat, 1.0, spread))
    return (x - centre) * scale, (z - centre) * scale


def _newton(x: Floats, y: Floats, l2: float) -> Floats:
    """The weights; the last column of ``x`` is the intercept's. Steps are halved until they descend."""
    n, d = x.shape
    cost = np.where(y > 0, n / (2 * y.sum()), n / (2 * (n - y.sum())))
    penalty = np.full(d, l2)
    penalty[-1] = _UNPENALISED
    diagonal = np.diag_indices(d)

    def loss(w: Floats, margin: Floats) -> float:
        return float(cost @ (np.logaddexp(0.0, margin) - y * margin) + 0.5 * (penalty @ (w * w)))

    w, margin = np.zeros(d), np.zeros(n)
    now = loss(w, margin)
    for _ in range(_STEPS):
        p = expit(margin)
        gradient = x.T @ (cost * (p - y)) + penalty * w
        half = x * np.sqrt(cost * p * (1 - p))[:, None]
        curvature = half.T @ half
        curvature[diagonal] += penalty
        step = cho_solve(cho_factor(curvature, lower=True, overwrite_a=True, check_finite=False), gradient)
        fall = float(gradient @ step)
        if fall <= _TOLERANCE * max(1.0, now):
            break
        along, size = x @ step, 1.0
        while (then := loss(w - size * step, margin - size * along)) > now - 1e-4 * size * fall and size > 1e-6:
            size /= 2
        w, margin, now = w - size * step, margin - size * along, then
    return w
