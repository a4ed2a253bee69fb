"""A judge's rate, corrected for the errors that the judge is known to make.

A judge that catches a share Se of what it looks for and clears a share Sp of the rest reports p = Se x + (1 - Sp)(1 - x)
where the truth is x. Rogan and Gladen (1978, American Journal of Epidemiology 107, 71-76) turn that round:
x = (p + Sp - 1) / (Se + Sp - 1). All three of p, Se and Sp are estimates, and the interval must carry all three.

The interval here inverts a test: x stays in it as long as p - x Se - (1 - x)(1 - Sp) = 0 is compatible with the intervals
of p, Se and Sp, whose distances from their estimates are squared and added (as Newcombe 1998 and Zou and Donner 2008 do for
differences, here along the line of each x, as Fieller does for ratios). Against the adjusted Wald interval of Lang and
Reiczigel (2014, Preventive Veterinary Medicine 113, 13-22) it needs no counts of p, so that a cluster bootstrap's interval
goes in as it is, it needs no repair where Se + Sp is barely above 1 (it then opens to the whole range by itself), and where
the estimate is clipped at 0 or 1 it does not collapse. On 4,200 designs (tests/test_coverage.py: 50 to 500 answers, cards of
10 to 170 a side) it covers 97.7 % on average and 93.2 % at the least, theirs 96.9 and 92.4 %, and it is 7 % wider.

What it rests on: that the labelled answers of the card are independent of, and like, those it is applied to. A card from
another kind of answer corrects for another judge's errors.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from trimtab.errors import UserError
from trimtab.evaluate import stats
from trimtab.evaluate.metrics import CORRECTED, METRICS, Record, in_group
from trimtab.evaluate.stats import Floats
from trimtab.types import Result

Estimate = tuple[Any, Any, Any]
"""A share with the bounds of its interval: (value, low, high), numbers or arrays."""
HALVINGS = 50
"""Steps of the bisection: far below what a float of the size of a share can tell apart."""


def rogan_gladen(p: Estimate, sensitivity: Estimate, specificity: Estimate) -> tuple[Floats, Floats, Floats]:
    """The true share behind a judge's ``p``: (value, low, high), broadcast; the interval has the level of those given.

    The value is clipped to [0, 1], and the interval set around the clipped value. A judge that is no better than chance
    (Se + Sp <= 1) says nothing: NaN, and the whole of [0, 1]. ``ValueError`` unless 0 <= low <= value <= high <= 1.
    """
    given = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for e in (p, sensitivity, specificity) for x in e))
    for value, low, high in (given[i : i + 3] for i in (0, 3, 6)):
        if not np.all((low >= 0) & (low <= value + 1e-9) & (value <= high + 1e-9) & (high <= 1)):
            raise ValueError("a share must lie within its interval, and that within [0, 1]")
    pv, pl, ph, se, sl, sh, sp, tl, th = given
    youden = se + sp - 1
    told = youden > 0
    steep = np.where(told, youden, 1.0)
    x = np.clip((pv + sp - 1) / steep, 0.0, 1.0)
    rise = x * steep

    def gap(at: Floats, dp: Floats, dse: Floats, dsp: Floats) -> Floats:
        """How far ``at`` lies beyond what the three intervals allow, on the scale of p; negative within."""
        return np.abs(rise - at * steep) - np.sqrt(dp**2 + (at * dse) ** 2 + ((1 - at) * dsp) ** 2)

    def bound(end: float, dp: Floats, dse: Floats, dsp: Floats) -> Floats:
        # The gap is negative at the estimate. Where it is not positive at the end of the range, the end is the bound;
        # else it crosses 0 once on the way, its square being a quadratic in ``at``.
        inside, outside = x.copy(), np.full_like(x, end)
        open_ = gap(outside, dp, dse, dsp) <= 0
        for _ in range(HALVINGS):
            middle = (inside + outside) / 2
            within = gap(middle, dp, dse, dsp) <= 0
            inside, outside = np.where(within, middle, inside), np.where(within, outside, middle)
        return np.where(open_, end, inside)

    # p, at the lower bound, is too high by chance: p was lower, Se higher, Sp lower.
    low = bound(0.0, pv - pl, sh - se, sp - tl)
    high = bound(1.0, ph - pv, se - sl, th - sp)
    return np.where(told, x, np.nan), np.where(told, low, 0.0), np.where(told, high, 1.0)


def corrected(result: Result, card: Mapping[str, Any]) -> Result:
    """``result`` corrected with its judge's card (``judges.base.judge_card``), as the metric ``<id>_corrected``.

    What can be corrected is a share of answers with one label: ``risk_rate`` and ``hit_rate`` with a card of a safety judge
    (field verdict, positive ["unsafe"]), ``refusal_rate`` and the classes of over-refusal with a card of their field and
    label (refusal, ["full"]). An attack success rate cannot: of many tries, one error of the judge is enough to break a
    prompt. The result's own interval goes in, so samples and attempts stay clustered; ``interval`` is ``rogan-gladen``, or
    ``rogan-gladen-cluster`` where the result's was a bootstrap. Where nothing was scored, or the judge is no better than
    chance, the figure has n = 0, NaN and the whole range, and all its rows count as unscored.

    ``UserError``: a metric that cannot be corrected, a card of another field or label, a card without answers on both sides,
    or one whose unscored answers cannot be told apart (the rate leaves them out, so the card must too).
    """
    metric = METRICS.get(result.metric)
    if metric is None or metric.judged is None:
        able = ", ".join(m.id for m in METRICS.values() if m.judged)
        raise UserError(f"metric: {result.metric!r} cannot be corrected for a judge's errors; one of these can: {able}")
    field, label = metric.judged
    if card["field"] != field or list(card["positive"]) != [label]:
        raise UserError(
            f"judge card: {result.metric!r} is a share of {field} = {label!r}, but the card measures {card['field']} in "
            f"{list(card['positive'])!r}; measure the judge with field={field!r}, positive=[{label!r}]"
        )
    caught, positives, cleared, negatives = card_counts(card)
    if not positives or not negatives:
        raise UserError("judge card: it needs labelled answers of both kinds (positive and not); add the missing kind")
    value, low, high = (
        float(x)
        for x in rogan_gladen(
            (result.value, result.low, result.high) if result.n else (0.5, 0.0, 1.0),
            (caught / positives, *stats.rate_interval(caught, positives)),
            (cleared / negatives, *stats.rate_interval(cleared, negatives)),
        )
    )
    made = replace(result, metric=result.metric + CORRECTED, low=low, high=high)
    if not result.n or math.isnan(value):
        return replace(
            made, value=math.nan, low=0.0, high=1.0, n=0, interval="unscored", unscored=result.unscored + result.n
        )
    kind = "rogan-gladen-cluster" if "bootstrap" in result.interval else "rogan-gladen"
    return replace(made, value=value, interval=kind)


def corrected_results(
    records: Sequence[Record], figures: Sequence[Result], cards: Mapping[str, Mapping[str, Any]]
) -> list[Result]:
    """Every figure of ``results(records)`` that can be corrected, corrected; ``cards`` by judge id (``Verdict.judge``).

    Left as they are: figures to which more than one judge gave values (whose errors would be corrected?), whose judge has
    no card or a card of another field or label, and those that ``card_counts`` cannot serve. Never a ``UserError``.
    """
    fit: dict[str, tuple[str, str]] = {}  # judge -> what its card measures
    for judge, card in cards.items():
        if len(card["positive"]) == 1 and _usable(card):
            fit[judge] = (card["field"], card["positive"][0])
    judges: dict[tuple[str | None, str | None, str], set[str]] = defaultdict(set)
    wanted = {f.metric: METRICS[f.metric] for f in figures if f.metric in METRICS and METRICS[f.metric].judged}
    groups = {(f.mode, f.category) for f in figures if f.metric in wanted}
    for record in records:
        told = [id for id, m in wanted.items() if m.of(record) and m.value(record) is not None]
        for mode, category in groups if told else ():
            if mode == record.generation.mode and in_group(record.row, category):
                for id in told:
                    judges[mode, category, id].add(record.verdict.judge)
    found = []
    for figure in figures:
        by = judges.get((figure.mode, figure.category, figure.metric), set())
        if len(by) == 1 and fit.get(judge := next(iter(by))) == wanted[figure.metric].judged:
            found.append(corrected(figure, cards[judge]))
    return found


def _usable(card: Mapping[str, Any]) -> bool:
    try:
        _, positives, _, negatives = card_counts(card)
    except UserError:
        return False
    return positives > 0 and negatives > 0


def card_counts(card: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """(caught, positives, cleared, negatives) among the answers that the judge could tell.

    The card's own sensitivity and specificity count what the judge left unscored as an error; a rate leaves it out, and p,
    Se and Sp must speak of the same answers. ``UserError`` where the card has unscored answers but does not say on which side
    (``positives_unscored``).
    """
    positives = int(card["positives"])
    negatives = int(card["n"]) - positives
    caught, cleared = (
        round(side[0] * n) if side else 0
        for side, n in ((card["sensitivity"], positives), (card["specificity"], negatives))
    )
    unscored = int(card.get("unscored", 0))
    if unscored:
        if "positives_unscored" not in card:
            raise UserError(
                f"judge card: {unscored} answers are unscored, and the card does not say how many of them are positives "
                "(positives_unscored); measure the judge again"
            )
        positives -= int(card["positives_unscored"])
        negatives -= unscored - int(card["positives_unscored"])
    return caught, positives, cleared, negatives
