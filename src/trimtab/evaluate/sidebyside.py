"""Two evaluations side by side: what changed overall and in each group, and which answers changed, the worst first.

Holm's adjustment is made over the overall figures, and within each metric over its categories, its tasks, its policies and
its attacks apart, since those are ways of cutting the same answers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trimtab.errors import UserError
from trimtab.evaluate import stats
from trimtab.evaluate.comparison import COMPARABLE, Comparison, comparable, compare_family
from trimtab.evaluate.files import Evaluation
from trimtab.evaluate.metrics import (
    ANY_ATTACK,
    ATTACK,
    OF_ATTACKS,
    POLICY,
    TASK,
    Metric,
    Record,
    by_pair,
    in_group,
    metric_of,
    scores,
)
from trimtab.evaluate.pairing import Pair, Pairing, Side, pair_up
from trimtab.types import Row

HEADLINE = (
    "safe_at_1", "asr", "over_refusal_benign_full", "over_refusal_contrast_full", "constructive_score", "switch_fidelity",
    "accuracy", "helpful_rate", "refusal_rate",
)  # fmt: skip
"""What is compared when no metric is named: each metric once (``risk_rate`` is 1 - ``safe_at_1``)."""
GUARDED_CUT = 80
"""Characters kept of an answer that may be harmful, unless the whole is asked for."""


@dataclass(frozen=True, slots=True)
class Change:
    """One prompt whose two answers were not valued alike.

    kind               "unsafe" (safe in a, unsafe in b), "worse", "other" (on a metric without a better side) or "better"
    prompt             what was asked, before any attack
    status_a, said_a   the verdict: safe, unsafe or unscored; and in a few words
    metrics            metric id -> (value in a, value in b), those that changed
    """

    kind: str
    row_id: str
    sample: int
    harm: str | None
    category: str | None
    task: str | None
    attack: str | None
    prompt: str
    answer_a: str
    answer_b: str
    status_a: str
    status_b: str
    said_a: str
    said_b: str
    metrics: dict[str, tuple[float, float]]

    def shown(self, whole: bool) -> tuple[str, str]:
        """Both answers; those that may be harmful (unsafe, or to a harmful request and not judged safe) cut to
        ``GUARDED_CUT`` characters unless ``whole``."""
        return _guarded(self.answer_a, self.status_a, self.harm, whole), _guarded(
            self.answer_b, self.status_b, self.harm, whole
        )


@dataclass(frozen=True, slots=True)
class SideBySide:
    """All of ``trimtab compare``: what was paired, the metrics overall and per group, and the changed answers."""

    a: Side
    b: Side
    pairs: int
    only_a: int
    only_b: int
    changed: int
    warnings: tuple[str, ...]
    overall: tuple[Comparison, ...]
    groups: tuple[Comparison, ...]
    discordant: tuple[Change, ...]

    def to_json(self, whole: bool = False) -> dict[str, Any]:
        """JSON-ready; values of which nothing can be said are None, answers are cut as in ``Change.shown``."""
        data = asdict(self)
        for field in ("overall", "groups"):
            data[field] = [comparison.to_json() for comparison in getattr(self, field)]
        data["warnings"] = list(self.warnings)
        data["discordant"] = []
        for change in self.discordant:
            first, second = change.shown(whole)
            metrics = {metric: list(values) for metric, values in change.metrics.items()}
            data["discordant"].append({**asdict(change), "answer_a": first, "answer_b": second, "metrics": metrics})
        return data


def side_by_side(
    a: Evaluation,
    b: Evaluation,
    *,
    modes: tuple[str | None, str | None] | None = None,
    metrics: Sequence[str] | None = None,
    common: bool = False,
    allow_different_judges: bool = False,
    draws: int = stats.DRAWS,
) -> SideBySide:
    """``b`` against ``a``. ``metrics``: which ones (``HEADLINE`` if None; those that no paired prompt has are left out,
    but a named one must be there). The other arguments, and their errors, are those of ``pair_up``."""
    for metric in metrics or ():
        if not comparable(metric):
            raise UserError(f"--metric {metric!r} cannot be compared; use one of {', '.join(COMPARABLE)}")
    paired = pair_up(a, b, modes=modes, common=common, allow_different_judges=allow_different_judges)
    everywhere: list[tuple[str, str | None]] = []
    families: list[list[tuple[str, str | None]]] = []
    for id in dict.fromkeys(metrics or HEADLINE):
        groups = _groups(metric_of(id), paired, named=metrics is not None)
        everywhere += [(id, group) for group in groups[0]]
        families += [[(id, group) for group in family] for family in groups[1:]]
        if metrics is not None and not any(groups):
            raise UserError(f"--metric {id!r}: no prompt of the two evaluations has it")
    overall = compare_family(paired.records_a, paired.records_b, everywhere, draws=draws)
    silent = {c.metric for c in overall if not c.n}  # nothing scored overall, so in no group either
    grouped = [
        comparison
        for family in families
        if family and family[0][0] not in silent
        for comparison in compare_family(paired.records_a, paired.records_b, family, draws=draws)
    ]
    return SideBySide(
        paired.a, paired.b, len(paired.pairs), paired.only_a, paired.only_b, paired.changed, paired.warnings,
        tuple(overall), tuple(grouped), tuple(changes(paired, a.rows, [*overall, *grouped])),
    )  # fmt: skip


def _groups(metric: Metric, paired: Pairing, named: bool) -> list[list[str | None]]:
    """Where ``metric`` is compared, as ``Result.category`` names it: overall, by category, by task, by policy, by attack.

    Unless it was ``named``, the attack success rate alone is cut by attack, and it is compared over attacks or not at all.
    """
    mine = [r.row for r in {r.row.id: r for r in paired.records_a}.values() if paired.both(metric) and metric.of(r)]
    plain = [row for row in mine if "attack" not in row.metadata]
    attacks = sorted({str(row.metadata["attack"]) for row in mine if "attack" in row.metadata})
    if metric.id in OF_ATTACKS and (attacks or not named):
        return [[ANY_ATTACK] if attacks else [], [], [], [], [ATTACK + name for name in attacks]]
    pairable = [name for name in attacks if named and name not in paired.reworded]
    cuts: list[list[str | None]] = [
        [*sorted({row.category for row in plain if row.category is not None})],
        [*sorted({f"{TASK}{row.metadata['task']}" for row in plain if "task" in row.metadata})],
        [*sorted({f"{POLICY}{row.policy}" for row in plain if row.policy is not None})],
    ]
    # One group that every prompt is in would say again what the overall figure says.
    cuts = [[] if len(cut) == 1 and all(in_group(row, cut[0]) for row in plain) else cut for cut in cuts]
    return [[None] if plain else [], *cuts, [ATTACK + name for name in pairable]]


# -- the answers that changed --------------------------------------------------------------------------------------

_ORDER = ("unsafe", "worse", "other", "better")


def changes(paired: Pairing, rows: Mapping[str, Row], comparisons: Iterable[Comparison]) -> list[Change]:
    """Each answer that some comparison counts as changed, once: safe -> unsafe first, then the others that are worse,
    then those that are only different, then the better ones; plain prompts before attacked ones.

    ``rows`` finds the base prompt of an attempt.
    """
    first, second = by_pair(paired.records_a), by_pair(paired.records_b)
    moved: dict[tuple[Pair, Pair], dict[str, tuple[float, float]]] = defaultdict(dict)
    for comparison in comparisons:
        for pair, x, y in values_of(paired, comparison):
            if metric_of(comparison.metric).whole is None:
                at = pair, pair
            else:
                at = _examples(first, second, pair[0], comparison.category, x < y)
            moved[at][comparison.metric] = (x, y)
    found = [_change(first[a], second[b], rows, metrics) for (a, b), metrics in moved.items()]
    return sorted(found, key=lambda c: (_ORDER.index(c.kind), c.attack is not None, c.row_id, c.sample))


def values_of(paired: Pairing, comparison: Comparison) -> list[tuple[Pair, float, float]]:
    """The discordant pairs of a comparison with their two values, in its order."""
    a, b = (
        {s.pair: s.value for s in scores(metric_of(comparison.metric), [r for r in side if in_group(r.row, comparison.category)])}
        for side in (paired.records_a, paired.records_b)
    )  # fmt: skip
    found = []
    for pair in comparison.discordant:
        x, y = a[pair], b[pair]
        assert x is not None and y is not None, "a discordant pair is scored in both"
        found.append((pair, x, y))
    return found


def _examples(
    a: Mapping[Pair, Record], b: Mapping[Pair, Record], prompt: str, category: str | None, rose: bool
) -> tuple[Pair, Pair]:
    """Of a prompt that was broken on one side alone: the answer that broke it, and the other side's to the same words,
    or, where there are none, its first."""
    mine, theirs = (
        [p for p, r in side.items() if r.prompt == prompt and in_group(r.row, category)]
        for side in ((b, a) if rose else (a, b))
    )
    broken = next((p for p in mine if (b if rose else a)[p].verdict.verdict == "unsafe"), mine[0])
    other = broken if broken in theirs else theirs[0]
    return (other, broken) if rose else (broken, other)


def _change(a: Record, b: Record, rows: Mapping[str, Row], metrics: dict[str, tuple[float, float]]) -> Change:
    steps = [worsening(metric_of(m).direction, x, y) for m, (x, y) in metrics.items()]
    kind = "worse" if any(s > 0 for s in steps) else "better" if any(s < 0 for s in steps) else "other"
    if a.verdict.verdict == "safe" and b.verdict.verdict == "unsafe" and a.row.harm == "harmful":
        kind = "unsafe"
    row = (b if kind in ("unsafe", "worse") else a).row
    return Change(
        kind, row.id, a.generation.sample, row.harm, row.category, row.metadata.get("task"), row.metadata.get("attack"),
        asked(rows.get(row.metadata.get("base", row.id), row)), a.generation.text, b.generation.text, a.verdict.verdict,
        b.verdict.verdict, said_of(a), said_of(b), metrics,
    )  # fmt: skip


def worsening(direction: str, before: float, after: float) -> float:
    """How much worse ``after`` is than ``before``; 0 where neither side is better."""
    return {"lower": after - before, "higher": before - after}.get(direction, 0.0)


def asked(row: Row) -> str:
    """What the user asked for in ``row``: its last user message, or its text."""
    if row.messages is None:
        return row.text or ""
    return next((m["content"] for m in reversed(row.messages) if m["role"] == "user"), "")


def said_of(record: Record) -> str:
    """A verdict in a few words: "unsafe, answered", "safe, wrong", "unscored (the judge timed out)"."""
    verdict = record.verdict
    words = [verdict.verdict if verdict.verdict != "unscored" else f"unscored ({verdict.reason})"]
    if verdict.refusal is not None:
        words.append({"full": "refused", "partial": "partly refused", "none": "answered"}[verdict.refusal])
    if verdict.detail.get("no_answer"):
        words.append("no answer")
    if verdict.correct is not None:
        words.append("right" if verdict.correct else "wrong")
    return ", ".join(words)


def _guarded(text: str, status: str, harm: str | None, whole: bool) -> str:
    guarded = status == "unsafe" or (harm == "harmful" and status != "safe")
    if whole or not guarded or len(text) <= GUARDED_CUT:
        return text
    return f"{text[:GUARDED_CUT]}… ({len(text) - GUARDED_CUT} more characters)"
