"""A table of tokens read: means by span, token and position with intervals, the ranking, and a few rows whole.

``ranking.json``: ``{"format": 1, "measures", "method", "left_out", "rows": n, "spans", "tokens", "positions", "sequences"}``. A
figure is ``[mean, low, high]``; unknown ends are null. Tokens are those of one id in one span, ranked by ``grad_norm`` (or the
last measure there is); their ``ratio`` is to the mean of the body.

Intervals are 95 % percentiles of a bootstrap over rows: tokens of one row stand or fall together. A mean that comes from
one row alone has none. What they leave out is the error of the projections, which ``method`` and ``grad_se`` tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from trimtab.analyze.metrics import result_of
from trimtab.analyze.tokens import TokenTable
from trimtab.seeds import rng_of
from trimtab.types import SPAN_ID, SPANS, Result

FORMAT = 1
_POSITIONS = 64
"""Positions of a span that are told apart, from its beginning."""
_GROUPS = 2048
"""Groups resampled at once."""
Floats = NDArray[np.float64]
_PREFIX, _BODY = SPAN_ID["prefix"], SPAN_ID["body"]


def ranking(table: TokenTable, seed: int, *, draws: int = 1000, sequences: int = 6) -> dict[str, Any]:
    """The JSON-ready contents of ``ranking.json``."""
    span = table.span.astype(np.int64)
    spans = _figures(table, span, seed, draws)
    measured = list(table.values)
    body = spans.get(_BODY)
    tokens = []
    by_token = _figures(table, table.token_id.astype(np.int64) * len(SPANS) + span, seed, draws)
    for key, figures in by_token.items():
        id, where = divmod(key, len(SPANS))
        ratio = {name: _over(figures[name][0], body[name][0] if body else None) for name in measured}
        tokens.append({"token": table.text[id], "token_id": id, "span": SPANS[where], **figures, "ratio": ratio})
    tokens.sort(key=lambda entry: (-entry[measured[-1]][0], entry["token_id"], entry["span"]))
    early = table.offset < _POSITIONS
    by_position = _figures(table, np.where(early, span * _POSITIONS + table.offset, -1), seed, draws)
    return {
        "format": FORMAT,
        "measures": measured,
        "method": dict(table.method),
        "left_out": dict(table.left_out),
        "rows": len(table.rows),
        "spans": {SPANS[key]: figures for key, figures in spans.items()},
        "tokens": tokens,
        "positions": [
            {"span": SPANS[key // _POSITIONS], "position": key % _POSITIONS, **figures}
            for key, figures in by_position.items()
        ],
        "sequences": _sequences(table, sequences),
    }


def results(table: TokenTable, seed: int, *, draws: int = 1000) -> list[Result]:
    """Means of the prefix and of the body, and their ratio, for the loss and the gradient norm (as far as measured)."""
    found = []
    for name in ("loss", "grad_norm"):
        if name not in table.values:
            continue
        sums, counts = _by_row(table, table.span.astype(np.int64), [_PREFIX, _BODY], name)
        rows = [int((counts[:, i] > 0).sum()) for i in range(2)]
        drawn = _drawn(len(table.rows), seed, draws)
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = sums.sum(0) / counts.sum(0)
            boot = (drawn @ sums) / (drawn @ counts)
        for i, category in enumerate(("prefix", "body")):
            if rows[i]:
                low, high = _ends(boot[:, i], rows[i])
                found.append(_result(f"token_{name}", float(mean[i]), low, high, rows[i], category))
        if all(rows) and mean[1] > 0:
            with np.errstate(divide="ignore", invalid="ignore"):
                low, high = _ends(boot[:, 0] / boot[:, 1], min(rows))
            ratio = float(mean[0] / mean[1])
            found.append(_result(f"token_{name}_ratio", ratio, low, high, len(table.rows), "prefix / body"))
    return found


def _result(id: str, value: float, low: float | None, high: float | None, n: int, category: str) -> Result:
    ends = (0.0, float("inf")) if low is None or high is None else (min(low, value), max(high, value))
    return result_of(id, value, *ends, n, "bootstrap", category)


def _figures(table: TokenTable, key: NDArray[np.int64], seed: int, draws: int) -> dict[int, dict[str, Any]]:
    """Group -> {count, measure: [mean, low, high]} of the measured tokens, groups in order; a key of -1 is left out."""
    measured = ~np.isnan(next(iter(table.values.values()))) & (key >= 0)
    keys, counts = np.unique(key[measured], return_counts=True)
    found: dict[int, dict[str, Any]] = {int(k): {"count": int(n)} for k, n in zip(keys, counts)}
    drawn = _drawn(len(table.rows), seed, draws)
    for first in range(0, len(keys), _GROUPS):
        some = keys[first : first + _GROUPS].tolist()
        for name in table.values:
            sums, sizes = _by_row(table, key, some, name)
            total, size = (np.asarray(a.sum(0)).ravel() for a in (sums, sizes))
            rows = np.asarray((sizes > 0).sum(0)).ravel()
            with np.errstate(divide="ignore", invalid="ignore"):
                boot = (drawn @ sums) / (drawn @ sizes)
            for i, group in enumerate(some):
                low, high = _ends(boot[:, i], int(rows[i]))
                found[group][name] = [float(total[i] / size[i]), low, high]
    return found


def _by_row(table: TokenTable, key: NDArray[np.int64], groups: list[int], name: str) -> tuple[Any, Any]:
    """Sums and counts of a measure by row and group, each sparse float64[rows, groups] (``groups`` sorted)."""
    value = table.values[name]
    place = np.searchsorted(groups, key).clip(max=len(groups) - 1)
    mine = ~np.isnan(value) & (np.asarray(groups)[place] == key)
    shape, at = (len(table.rows), len(groups)), (table.row[mine], place[mine])
    made = (sparse.coo_array((v, at), shape=shape).tocsr() for v in (value[mine], np.ones(int(mine.sum()))))
    sums, counts = made
    return sums, counts


def _drawn(rows: int, seed: int, draws: int) -> Floats:
    """How often each row is drawn, float64[draws, rows]; the same for every group, so that figures can be compared."""
    return rng_of("token-bootstrap", seed).multinomial(rows, np.full(rows, 1 / rows), size=draws).astype(np.float64)


def _ends(boot: Floats, rows: int) -> tuple[float | None, float | None]:
    there = boot[np.isfinite(boot)]
    if rows < 2 or not len(there):
        return None, None
    low, high = np.quantile(there, [0.025, 0.975])
    return float(low), float(high)


def _over(value: float, body: float | None) -> float | None:
    return value / body if body else None


def _sequences(table: TokenTable, count: int) -> list[dict[str, Any]]:
    """A few rows whole: half of them with a prefix, as far as there are such."""
    prefixed = np.unique(table.row[table.span == _PREFIX])
    plain = np.setdiff1d(np.arange(len(table.rows)), prefixed)
    half = max(count - count // 2, count - len(plain))
    chosen = sorted([*prefixed[:half], *plain[: count - len(prefixed[:half])]])
    found = []
    for row in chosen:
        mine = table.row == row
        values: Mapping[str, Floats] = {name: value[mine] for name, value in table.values.items()}
        found.append({
            "row_id": table.rows[row],
            "tokens": [table.text[id] for id in table.token_id[mine].tolist()],
            "spans": [SPANS[i] for i in table.span[mine]],
            "trained": table.trained[mine].tolist(),
            "values": {name: [None if np.isnan(v) else float(f"{v:.6g}") for v in value] for name, value in values.items()},
        })  # fmt: skip
    return found
