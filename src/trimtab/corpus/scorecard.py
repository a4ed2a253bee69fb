"""How good a scorer is: its levels against known ones, and what it misses from level 1 and from level 3 on.

``recall@k`` is the share, among texts whose true score is k or more, of those that the scorer gives k or more: how 2504.16980
(table 4) seems to count, where a detector that only says yes or no reaches different recalls at 1 and at 3. Its F1 is not
spelt out; here it is that of the same yes or no. A text without a score is a miss, and nobody's false alarm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from trimtab.corpus.documents import score_of
from trimtab.corpus.scorers import Scorer
from trimtab.errors import UserError
from trimtab.types import Row

THRESHOLDS = (1, 3)
_Z = 1.959963984540054  # the standard normal's 97.5 % point
_BATCH = 256


def score_card(scorer: Scorer, rows: Sequence[Row]) -> dict[str, Any]:
    """The card of a scorer on rows with ``text`` and a true ``metadata["score"]``; JSON-ready.

    confusion[true][said], 6 x 6; unscored[true] and their reasons; at "1" and "3": recall, precision (each value, low, high,
    k, n; 95 % Wilson) and f1; exact: share of all rows with the very level. A rate of nothing is None. ``UserError`` for no
    rows, and for a row without text or score.
    """
    if not rows:
        raise UserError("score card: no labelled texts")
    confusion = [[0] * 6 for _ in range(6)]
    unscored = [0] * 6
    reasons: dict[str, int] = {}
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        for row in batch:
            if row.text is None:
                raise UserError(f"score card: row {row.id!r} has no text")
        said = scorer.score([row.text or "" for row in batch], [row.metadata for row in batch])
        for row, scored in zip(batch, said, strict=True):
            true = score_of(row.metadata, row.id)
            if scored.score is None:
                unscored[true] += 1
                reasons[scored.reason] = reasons.get(scored.reason, 0) + 1
            else:
                confusion[true][scored.score] += 1
    return {
        "scorer": scorer.name,
        "identity": scorer.identity,
        "n": len(rows),
        "confusion": confusion,
        "unscored": unscored,
        "reasons": reasons,
        "exact": _rate(sum(confusion[level][level] for level in range(6)), len(rows)),
        "at": {str(k): _at(k, confusion, unscored) for k in THRESHOLDS},
    }


def _at(k: int, confusion: list[list[int]], unscored: list[int]) -> dict[str, Any]:
    hits = sum(sum(row[k:]) for row in confusion[k:])
    wanted = sum(sum(row) for row in confusion[k:]) + sum(unscored[k:])
    flagged = sum(sum(row[k:]) for row in confusion)
    both = wanted + flagged
    return {
        "recall": _rate(hits, wanted),
        "precision": _rate(hits, flagged),
        "f1": 2 * hits / both if both else None,
    }


def _rate(k: int, n: int) -> dict[str, Any]:
    low, high = wilson(k, n)
    return {"value": k / n if n else None, "low": low, "high": high, "k": k, "n": n}


def wilson(k: int, n: int) -> tuple[float | None, float | None]:
    """The 95 % interval of Wilson (1927) for ``k`` of ``n``, as ``evaluate.stats.wilson`` gives it on a floor above; None
    for n = 0."""
    if n == 0:
        return None, None
    p, scale = k / n, 1 + _Z * _Z / n
    centre = (p + _Z * _Z / (2 * n)) / scale
    half = _Z / scale * math.sqrt(p * (1 - p) / n + _Z * _Z / (4 * n * n))
    return 0.0 if k == 0 else max(centre - half, 0.0), 1.0 if k == n else min(centre + half, 1.0)


def card_table(card: dict[str, Any]) -> str:
    """The card as text, for a terminal."""
    width = max(6, len(str(card["n"])) + 1)
    head = "true \\ said" + "".join(f"{level:>{width}}" for level in range(6)) + f"{'none':>{width}}"
    lines = [f"{card['scorer']}: {card['n']} texts", head]
    for level, (row, none) in enumerate(zip(card["confusion"], card["unscored"])):
        lines.append(f"{level:>11}" + "".join(f"{n:>{width}}" for n in (*row, none)))
    for k, at in card["at"].items():
        f1 = "-" if at["f1"] is None else f"{at['f1']:.3f}"
        lines.append(f"recall@{k} {_shown(at['recall'])}  precision@{k} {_shown(at['precision'])}  F1 {f1}")
    lines.append(f"exact level {_shown(card['exact'])}")
    lines += [f"no score, {reason}: {n}" for reason, n in sorted(card["reasons"].items())]
    return "\n".join(lines)


def _shown(rate: dict[str, Any]) -> str:
    if rate["value"] is None:
        return "- (none)"
    return f"{rate['value']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}] ({rate['k']}/{rate['n']})"
