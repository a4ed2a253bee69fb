"""Token analyses as a report keeps them: the ranked tokens, means by span and by position, and a few sequences.

``ranking.json`` is written by the ``token_analysis`` step; the artefact keeps every token, the page shows what is cut here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MEASURES = {
    "grad_norm": "gradient norm", "loss": "loss", "logit_grad": "logit gradient", "head_grad": "head gradient",
}  # fmt: skip
TOP, POSITIONS, SEQUENCES, LENGTH = 25, 48, 3, 120
DIGITS = 5
CUES = ("revis", "logical", "step", "reason", "careful", "risk", "safe", "fact", "check", "verif", "clear", "trace")
"""Beginnings of the words that open an answer with a cue; the paper names "revised" and "logically"."""
PAPER_CUES = ("revis", "logical")


def is_cue(token: str, cues: Sequence[str] = CUES) -> bool:
    """Whether a token is, or begins, one of the cue words; "Ġ" and "▁" are how tokenizers write a blank."""
    return token.strip().lstrip("Ġ▁").lower().startswith(tuple(cues))


def first_seeds(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The analyses of the first seed."""
    told = list(rows)
    first = min((row["seed"] for row in told), default=0)
    return [row for row in told if row["seed"] == first]


def cut(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with the tokens that lead the ranking and every cue word, the first positions, and short sequences."""
    told = row["ranking"]
    tokens = [t for i, t in enumerate(told["tokens"]) if i < TOP or is_cue(t["token"])]
    ranks = {id(t): i + 1 for i, t in enumerate(told["tokens"])}
    sequences = [
        {**{k: s[k][:LENGTH] for k in ("tokens", "spans", "trained")}, "row_id": s["row_id"],
         "values": {m: [_short(v) for v in values[:LENGTH]] for m, values in s["values"].items() if m in ("loss", "grad_norm")}}
        for s in told["sequences"][:SEQUENCES]
    ]  # fmt: skip
    kept = {
        "measures": [m for m in MEASURES if any((of.get(m) or [None])[0] is not None for of in told["spans"].values())],
        "method": told.get("method", {}),
        "rows": told.get("rows"),
        "distinct": len(told["tokens"]),
        "spans": told["spans"],
        "tokens": [{**t, "rank": ranks[id(t)], "cue": is_cue(t["token"])} for t in tokens],
        "positions": [p for p in told["positions"] if p["position"] < POSITIONS],
        "sequences": sequences,
    }
    return {k: row[k] for k in ("arm", "stage", "ratio")} | {"ranking": _rounded(kept)}


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return _short(value)
    if isinstance(value, Mapping):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, (list, tuple)) else value
