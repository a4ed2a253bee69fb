"""Two arms side by side on the same prompts: what rose, what fell, and whether that could be chance.

Everything is paired. Single 0/1 answers, and prompts broken or not by an attack, get Newcombe's interval and McNemar's exact
test; scores, repeated samples and what they say together (distinct answers, pass@k) get a bootstrap and a sign-flip test of
whole prompts. ``category`` names the groups of ``evaluate.figures``: overall, ``Row.category``, ``task:NAME``,
``policy:NAME``, ``attack:NAME`` and ``attack:any``.

An attack that adapts to the model sends each arm other words. Its answers then cannot be paired one by one, and ``compare``
says so; its prompts can, by ``asr``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from trimtab.errors import UserError
from trimtab.evaluate import stats
from trimtab.evaluate.metrics import METRICS, Metric, Record, Score, by_pair, in_group, metric_of, scores
from trimtab.evaluate.repeats import at_k_of
from trimtab.seeds import rng_of

COMPARABLE = tuple(id for id, metric in METRICS.items() if not math.isinf(metric.range[1]))
"""Metrics of which a pair has a value in both arms. Queries to success are left out: prompts that both arms broke are
a chosen few. ``safe_at_k``, ``cons_safe_at_k`` and ``pass_at_k`` are comparable too (``comparable``)."""


def comparable(metric: str) -> bool:
    """Whether two arms can be compared by a metric of this id."""
    return metric in COMPARABLE or at_k_of(metric) is not None


@dataclass(frozen=True, slots=True)
class Comparison:
    """What changed from ``a`` to ``b`` on the same prompts.

    n             prompts that are scored in both; ``unscored`` pairs are left out and counted
    difference    value_b - value_a, with its 95 % interval named by ``interval`` (newcombe or cluster-bootstrap)
    p, test       mcnemar-exact for single 0/1 answers or prompts, else sign-flip of whole prompts; ``p_holm`` within its
                  family
    up, down      pairs whose value rose or fell from a to b; ``discordant`` are their (row id, sample), falls first; for a
                  metric of whole prompts (asr) a pair is (prompt id, 0)
    detectable    smallest difference that this many pairs would show with 80 % power (None: not for this metric, or none)
    """

    metric: str
    category: str | None
    n: int
    unscored: int
    value_a: float
    value_b: float
    difference: float
    low: float
    high: float
    interval: str
    p: float
    test: str
    up: int
    down: int
    discordant: tuple[tuple[str, int], ...]
    detectable: float | None
    p_holm: float | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; NaN (nothing was scored in both) is None."""
        data = asdict(self)
        data["discordant"] = [list(pair) for pair in self.discordant]
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in data.items()}


def compare(
    a: Sequence[Record],
    b: Sequence[Record],
    metric: str,
    *,
    category: str | None = None,
    draws: int = stats.DRAWS,
) -> Comparison:
    """``b`` against ``a`` on one metric, paired by (row id, sample), or by prompt for a metric of whole prompts (asr,
    distinct answers, pass@k).

    ``category``: the group of rows compared, as in ``metrics.in_group``; None is the plain prompts. ``UserError`` when the
    two do not hold the same pairs of the same prompts, when no row has the metric, or when it cannot be compared.
    """
    if not comparable(metric):
        raise UserError(f"metric: {metric!r} cannot be compared; use one of {', '.join(COMPARABLE)}")
    spec = metric_of(metric)
    chosen = [[r for r in records if in_group(r.row, category) and spec.of(r)] for records in (a, b)]
    for records in chosen:
        by_pair(records)
    first, second = ({s.pair: s for s in scores(spec, records)} for records in chosen)
    for missing, side in ((first.keys() - second.keys(), "second"), (second.keys() - first.keys(), "first")):
        if missing:
            names = ", ".join(f"{row} (sample {sample})" for row, sample in sorted(missing)[:5])
            raise UserError(
                f"compare: {len(missing)} answers have no partner in the {side} arm: {names}; compare arms that were "
                "evaluated on the same panel"
            )
    if not first:
        where = "" if category is None else f" in {category!r}"
        raise UserError(f"compare: no row{where} has the metric {metric!r}")
    _same_prompts(spec, *chosen)
    pairs = [(first[pair], second[pair]) for pair in sorted(first)]
    return _compared(spec, category, pairs, draws)


def _same_prompts(metric: Metric, a: Sequence[Record], b: Sequence[Record]) -> None:
    """Every row in both arms has one content; for a metric of whole prompts the attempts may differ, as those of an
    attack that adapts to the model do."""
    one, other = (
        {r.row.id: r.generation.row_hash for r in records if metric.whole is None or "attack" not in r.row.metadata}
        for records in (a, b)
    )
    for row in sorted(one.keys() & other.keys()):
        if one[row] != other[row]:
            raise UserError(
                f"compare: row {row!r} is not the same prompt in both arms (its content hash differs); if an attack wrote "
                "it for each arm, compare 'asr'"
            )


def _compared(metric: Metric, category: str | None, pairs: Sequence[tuple[Score, Score]], draws: int) -> Comparison:
    told = [(s.pair, s.prompt, s.value, t.value) for s, t in pairs if s.value is not None and t.value is not None]
    prompts = [prompt for _, prompt, _, _ in told]
    x, y = (np.array([t[i] for t in told], dtype=np.float64) for i in (2, 3))
    n = len(set(prompts))
    rose, fell = int((y > x).sum()), int((y < x).sum())
    order = sorted((float(after - before), pair) for (pair, _, _, _), before, after in zip(told, x, y))
    width = metric.range[1] - metric.range[0]
    low, high, p, detectable = -width, width, math.nan, None
    single = metric.binary and n == len(told)
    interval, test = ("newcombe", "mcnemar-exact") if single else ("cluster-bootstrap", "sign-flip")
    if single and n:
        both, neither = int((x * y).sum()), int(((1 - x) * (1 - y)).sum())
        low, high = stats.newcombe_paired(both, rose, fell, neither)
        p = float(stats.mcnemar_exact(rose, fell))
        least = stats.smallest_detectable_difference(n, (rose + fell) / n)
        detectable = None if math.isnan(least) else least
    elif n:
        key = ("compare", metric.id, category)
        low, high = stats.paired_bootstrap(x, y, prompts, rng=rng_of(*key, "ci"), bounds=metric.range, draws=draws)
        p = stats.sign_flip_test(y - x, prompts, rng=rng_of(*key, "p"), draws=draws)
    mean_x, mean_y = (float(v.mean()) if n else math.nan for v in (x, y))
    return Comparison(
        metric.id, category, n, len(pairs) - len(told), mean_x, mean_y, float((y - x).mean()) if n else math.nan,
        low, high, interval, p, test, rose, fell, tuple(pair for change, pair in order if change), detectable,
    )  # fmt: skip


def compare_family(
    a: Sequence[Record],
    b: Sequence[Record],
    family: Iterable[tuple[str, str | None]],
    *,
    draws: int = stats.DRAWS,
) -> list[Comparison]:
    """Several comparisons, (metric, category) each, with Holm's adjustment over those that could be made."""
    made = [compare(a, b, metric, category=category, draws=draws) for metric, category in family]
    told = [c.p for c in made if not math.isnan(c.p)]
    adjusted = iter(stats.holm(told).tolist())
    return [c if math.isnan(c.p) else replace(c, p_holm=next(adjusted)) for c in made]
