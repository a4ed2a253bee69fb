"""A policy put to an evaluation: which rules are kept, which are broken, and which cannot be decided.

Every limit is put to the far bound of a 95 % interval (so each rule is one-sided at 97.5 %). A rule is undecided, and the
gate then fails, when its figure is missing, rests on too few prompts, leaves too many answers unscored, or when so few
prompts were asked that even a perfect (for a difference: an unchanged) model could not keep it; nothing passes in silence.

Figures are made from the judged answers anew, not read from ``metrics.jsonl``. For ``no_significant_worsening`` a rule's
p counts where the model is worse and is 1 where it is not, so that a gain on one metric cannot make Holm's adjustment
more lenient to a loss on another.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from trimtab.errors import UserError
from trimtab.evaluate import stats
from trimtab.evaluate.comparison import Comparison, compare
from trimtab.evaluate.correction import corrected_results
from trimtab.evaluate.figures import results
from trimtab.evaluate.files import GENERATIONS, PROMPTS, Evaluation, open_evaluation, stage_path
from trimtab.evaluate.metrics import CORRECTED, METRICS, Metric, Record, in_group, metric_of, scores
from trimtab.evaluate.pairing import Pairing, Side, judges_of, mode_name, mode_named, modes_of, pair_up, records_of
from trimtab.evaluate.policy import Policy, Rule
from trimtab.evaluate.sidebyside import asked, values_of, worsening
from trimtab.types import Result

Status = Literal["passed", "violated", "undecided"]
_LENIENT = "_if_unscored_safe"
Evaluate = Callable[[str, Mapping[str, Any], Path], Evaluation]
"""(model, the policy's ``evaluation`` section, directory) -> the finished evaluation."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one rule.

    place       where the policy has it, "rules.2"
    mode        the mode that was looked at
    why         "" or, of a rule that is not kept: "bound", "significant", "missing", "few", "unscored", "too-small"
    value, low, high   the figure, or the difference (model - baseline), with its 95 % interval; None if not scored
    before, after      of a rule against a baseline: the two values
    bound       what is put to ``threshold``: an end of the interval, the difference's bad end, or the adjusted p
    needs_n     prompts with which a perfect (unchanged) model would keep the rule; None if it would with these, or never
    worse       the prompts answered worse than by the baseline, when the rule is not kept: (row id, what was asked)
    """

    place: str
    metric: str
    category: str | None
    mode: str | None
    limit: str
    threshold: float
    status: Status
    why: str
    n: int
    unscored: float
    min_n: int
    value: float | None = None
    low: float | None = None
    high: float | None = None
    before: float | None = None
    after: float | None = None
    bound: float | None = None
    p: float | None = None
    detectable: float | None = None
    needs_n: int | None = None
    hint: str = ""
    worse: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class GateReport:
    """All of ``trimtab gate``: what was gated, against what, and each rule's outcome, in the policy's order."""

    policy: str
    model: Side
    baseline: Side | None
    max_unscored: float
    outcomes: tuple[Outcome, ...]
    warnings: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        """Whether every rule is kept; an undecided one is not."""
        return all(outcome.status == "passed" for outcome in self.outcomes)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "passed": self.passed}


def gate(
    policy: Policy,
    model: Evaluation,
    baseline: Evaluation | None = None,
    *,
    origin: str = "policy",
    draws: int = stats.DRAWS,
) -> GateReport:
    """Put ``policy`` (read from ``origin``) to the evaluation of a model.

    ``UserError`` where the policy cannot be put to it at all: a mode that is not there, a baseline that is needed and not
    given or given and not needed, a baseline on other prompts or under other judges, an unfinished evaluation.
    """
    policy.check_baseline(origin, baseline is not None)
    for evaluation in (model, baseline):
        if evaluation is not None:
            _check_finished(evaluation)
    modes = [_mode(rule, i, model, origin) for i, rule in enumerate(policy.rules)]
    records: dict[str | None, list[Record]] = {mode: records_of(model, mode) for mode in dict.fromkeys(modes)}
    figures = {mode: _figures(policy, model, records[mode], draws) for mode in records}
    pairings: dict[tuple[str | None, str | None], Pairing] = {}
    outcomes: list[Outcome] = []
    for i, (rule, mode) in enumerate(zip(policy.rules, modes, strict=True)):
        if not rule.is_against:
            outcomes.append(_limit(rule, i, mode, records[mode], figures[mode], policy.max_unscored))
            continue
        assert baseline is not None
        other = mode_named(rule.against_mode) if rule.against_mode is not None else mode
        if (other, mode) not in pairings:
            pairings[other, mode] = pair_up(baseline, model, modes=(other, mode))
        outcomes.append(_against(rule, i, mode, pairings[other, mode], model, policy, draws, origin))
    outcomes = _significance(outcomes)
    paired = list(pairings.values())
    sides = [_side(evaluation) for evaluation in (model, baseline) if evaluation is not None]
    warnings = tuple(dict.fromkeys(warning for p in paired for warning in p.warnings))
    return GateReport(
        origin, sides[0], sides[1] if baseline is not None else None, policy.max_unscored, tuple(outcomes), warnings
    )


def needed(threshold: float, low: float, high: float) -> int | None:
    """Prompts, all of them perfect, whose exact 95 % bound reaches ``threshold`` from the range's end ``low`` (the far end
    is ``high``); None if no number does. 0 of 72 is the first whose upper bound is at most 5 %."""
    share = (threshold - low) / (high - low)
    return None if share <= 0 else max(1, math.ceil(math.log(0.025) / math.log1p(-share) - 1e-9))


# -- one rule ------------------------------------------------------------------------------------------------------


def _limit(
    rule: Rule, i: int, mode: str | None, records: Sequence[Record], figures: Sequence[Result], max_unscored: float
) -> Outcome:
    """A limit on the bound of a value."""
    blank = _blank(rule, i, mode)
    figure = next((r for r in figures if (r.metric, r.category) == (rule.metric, rule.category)), None)
    if figure is None:
        return replace(blank, why="missing", hint=_known(rule, figures))
    if figure.n == 0:
        return replace(blank, why="unscored", unscored=1.0)
    upper = rule.limit == "at_most"
    bound = figure.high if upper else figure.low
    unscored = _unscored(rule, records, figure)
    told = replace(
        blank, n=figure.n, unscored=unscored, value=figure.value, low=figure.low, high=figure.high, bound=bound
    )
    if figure.n < rule.min_n:
        return replace(told, why="few")
    if unscored > max_unscored:
        return replace(told, why="unscored")
    if (bound <= rule.threshold) if upper else (bound >= rule.threshold):
        return replace(told, status="passed")
    low, high = figure.range
    least = needed(rule.threshold, low, high) if upper else needed(-rule.threshold, -high, -low)
    # How near a corrected rate's bound can come depends on its judge's card, not on n alone.
    told = replace(
        told, needs_n=None if rule.metric.endswith(CORRECTED) or least is None or least <= figure.n else least
    )
    beyond = figure.low > rule.threshold if upper else figure.high < rule.threshold
    if told.needs_n is not None and not beyond:
        return replace(told, why="too-small")
    return replace(told, status="violated", why="bound")


def _against(
    rule: Rule, i: int, mode: str | None, paired: Pairing, model: Evaluation, policy: Policy, draws: int, origin: str
) -> Outcome:
    """A limit on the paired difference from the baseline; ``no_significant_worsening`` is finished by ``_significance``."""
    blank = _blank(rule, i, mode)
    metric = METRICS[rule.metric]
    mine = [[r for r in side if in_group(r.row, rule.category)] for side in (paired.records_a, paired.records_b)]
    if not any(map(metric.of, mine[1])):
        return replace(blank, why="missing", hint=_known(rule, results(paired.records_b, draws=1)))
    try:
        c = compare(mine[0], mine[1], rule.metric, category=rule.category, draws=draws)
    except UserError as error:  # an attack that asked the two models in other words
        raise UserError(f"{origin}: rules.{i}: {error}") from None
    unscored = max(_share_unscored(metric, side) for side in mine)
    if c.n == 0:
        return replace(blank, why="unscored", unscored=1.0)
    bad = c.high if metric.direction == "lower" else -c.low
    told = replace(
        blank, n=c.n, unscored=unscored, value=c.difference, low=c.low, high=c.high, before=c.value_a, after=c.value_b,
        p=c.p, detectable=c.detectable, worse=_worse(c, paired, model),
    )  # fmt: skip
    if c.n < rule.min_n:
        return replace(told, why="few")
    if unscored > policy.max_unscored:
        return replace(told, why="unscored")
    if rule.limit == "no_significant_worsening":
        return told
    told = replace(told, bound=bad)
    if bad <= rule.threshold:
        return replace(told, status="passed", worse=())
    beyond = (c.low if metric.direction == "lower" else -c.high) > rule.threshold
    if not beyond and _unchanged(c, c.n) > rule.threshold:
        return replace(told, why="too-small", needs_n=_needed_unchanged(c, rule.threshold))
    return replace(told, status="violated", why="bound")


def _significance(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Decide the rules of ``no_significant_worsening`` together: Holm's adjustment over those that have a p."""
    open_ = [
        i
        for i, o in enumerate(outcomes)
        if o.limit == "no_significant_worsening" and o.p is not None and not math.isnan(o.p) and not o.why
    ]
    one_sided = []
    for i in open_:
        o = outcomes[i]
        assert o.p is not None and o.before is not None and o.after is not None
        is_worse = worsening(metric_of(o.metric).direction, o.before, o.after) > 0
        one_sided.append(o.p if is_worse else 1.0)
    decided = list(outcomes)
    for i, p in zip(open_, stats.holm(one_sided).tolist(), strict=True):
        o = replace(outcomes[i], bound=p)
        least = math.ceil(1 + math.log2(len(open_) / o.threshold) - 1e-9)  # every pair worse: p = 2 / 2^n
        if p <= o.threshold:
            decided[i] = replace(o, status="violated", why="significant")
        elif o.n < least:
            decided[i] = replace(o, why="too-small", needs_n=least)
        else:
            decided[i] = replace(o, status="passed", worse=())
    return decided


def _blank(rule: Rule, i: int, mode: str | None) -> Outcome:
    return Outcome(
        f"rules.{i}", rule.metric, rule.category, mode, rule.limit, rule.threshold, "undecided", "", 0, 0.0, rule.min_n
    )


def _figures(policy: Policy, evaluation: Evaluation, records: Sequence[Record], draws: int) -> list[Result]:
    """Every figure of one mode, made from the answers; those corrected for their judges' errors only if a rule asks."""
    made = results(records, draws=draws)
    if any(rule.metric.endswith(CORRECTED) for rule in policy.rules):
        cards = {str(j["id"]): j["card"] for j in evaluation.judging.get("judges", ()) if j.get("card") is not None}
        made += corrected_results(records, made, cards)
    return made


def _unscored(rule: Rule, records: Sequence[Record], figure: Result) -> float:
    """Share of what the metric speaks of that was not scored."""
    name = rule.metric.removesuffix(CORRECTED)
    if name not in METRICS:  # Safe@k counts prompts
        return figure.unscored / (figure.unscored + figure.n)
    return _share_unscored(METRICS[name], [r for r in records if in_group(r.row, rule.category)])


def _share_unscored(metric: Metric, records: Sequence[Record]) -> float:
    """Of the task with the largest share, so that a judge that died on one task is not diluted by the others."""
    tasks = {r.prompt: str(r.row.metadata.get("task", "")) for r in records}
    total, open_ = Counter[str](), Counter[str]()
    if metric.id.endswith(_LENIENT):  # the bound counts what is unscored as safe: that share is still to be weighed
        metric = METRICS[metric.id.removesuffix(_LENIENT)]
    for score in scores(metric, records):
        total[tasks[score.prompt]] += 1
        open_[tasks[score.prompt]] += score.value is None
    return max((open_[task] / total[task] for task in total), default=0.0)


def _worse(c: Comparison, paired: Pairing, model: Evaluation) -> tuple[tuple[str, str], ...]:
    """The prompts whose answer is worse than the baseline's, once each."""
    direction = METRICS[c.metric].direction
    found: dict[str, str] = {}
    for (row_id, _), x, y in values_of(paired, c):
        if worsening(direction, x, y) > 0:
            row = model.rows[row_id]
            found[row_id] = asked(model.rows.get(row.metadata.get("base", row_id), row))
    return tuple(found.items())


def _unchanged(c: Comparison, n: int) -> float:
    """The bound of the difference if ``n`` prompts were answered as the baseline answered these, and nothing changed."""
    metric = METRICS[c.metric]
    if c.interval == "newcombe":
        kept = round(c.value_a * n)
        return stats.newcombe_paired(kept, 0, 0, n - kept)[1]
    return (1 - 0.025 ** (1 / n)) * (metric.range[1] - metric.range[0])


def _needed_unchanged(c: Comparison, threshold: float) -> int | None:
    """About how many prompts an unchanged model would need; None if a hundred million would not do."""
    low, high = c.n, c.n
    while _unchanged(c, high) > threshold:
        low, high = high, 2 * high
        if high > 100_000_000:
            return None
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (middle, high) if _unchanged(c, middle) > threshold else (low, middle)
    return high


def _known(rule: Rule, figures: Sequence[Result]) -> str:
    """What the evaluation has instead of a figure that it has not."""
    metrics = sorted({r.metric for r in figures})
    categories = sorted({str(r.category) for r in figures if r.category is not None and r.metric == rule.metric})
    if rule.metric in metrics:
        close = difflib.get_close_matches(rule.category or "", categories, n=1)
        return f"did you mean {close[0]!r}?" if close else f"it is known {_among(categories, 'in')}"
    return f"measured {_among(metrics, 'are')}"


def _among(names: Sequence[str], verb: str) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return f"{verb}: {', '.join(names[:6])}{more}" if names else "is nothing"


# -- what is gated -------------------------------------------------------------------------------------------------


def _mode(rule: Rule, i: int, evaluation: Evaluation, origin: str) -> str | None:
    have = modes_of(evaluation)
    if rule.mode is None:
        if len(have) == 1:
            return have[0]
        raise UserError(
            f"{origin}: rules.{i}.mode: {evaluation.path} has answers in several modes; name one of "
            f"{', '.join(map(mode_name, have))}"
        )
    if mode_named(rule.mode) not in have:
        raise UserError(
            f"{origin}: rules.{i}.mode: {evaluation.path} has no answers in mode {rule.mode!r}; it has "
            f"{', '.join(map(mode_name, have))}"
        )
    return mode_named(rule.mode)


def _check_finished(evaluation: Evaluation) -> None:
    """``UserError`` if prompts were not answered: what a killed run left is no evaluation of the model.

    Every attempt must have its answers in every mode, and every plain prompt its own or, where the answers were made
    elsewhere, those of attempts on it. A run of ours says in which modes it asks, and asks all in each of them.
    """
    if not evaluation.generations:
        raise UserError(f"{evaluation.path} holds no answers")
    samples = int(evaluation.header.get("sampling", {}).get("samples", 1))
    answers = Counter((g.mode, g.row_id) for g in evaluation.generations)
    if unfinished := evaluation.header.get("unfinished"):
        raise UserError(f"{evaluation.path}: what was imported is no finished evaluation ({unfinished[0]})")
    asked = evaluation.header.get("model", {}).get("asked_modes")
    tried: set[str] = set()
    if asked is None:
        tried = {str(row.metadata["base"]) for row in evaluation.rows.values() if "base" in row.metadata}
    for mode in asked or modes_of(evaluation):
        open_ = [id for id in evaluation.rows if answers[mode, id] < samples and (answers[mode, id] or id not in tried)]
        if open_:
            raise UserError(
                f"{evaluation.path}: {len(open_)} prompts lack answers in mode {mode_name(mode)!r} ({open_[0]!r} is the "
                "first); the same `trimtab eval` goes on from there"
            )


def _side(evaluation: Evaluation) -> Side:
    records = evaluation.records()
    modes = modes_of(evaluation)
    identity = evaluation.header.get("model", {}).get("identity")
    mode = modes[0] if len(modes) == 1 else None
    return Side(
        str(evaluation.path),
        evaluation.name,
        identity,
        mode,
        judges_of(evaluation, records),
        len(evaluation.generations),
    )


def obtain(model: str, policy: Policy, out: Path | None, name: str, evaluate: Evaluate, origin: str) -> Evaluation:
    """The evaluation that ``model`` names: the directory of one as it stands; else ``evaluate`` makes one of that model, by
    the policy, in ``out/name``. ``UserError`` when the policy does not say how, or ``out`` is not given."""
    if stage_path(Path(model), GENERATIONS).exists():
        return open_evaluation(model)
    if Path(model).is_dir() and stage_path(Path(model), PROMPTS).exists():
        raise UserError(f"{model}: an evaluation without answers; the same `trimtab eval` goes on from here")
    if policy.evaluation is None:
        raise UserError(
            f"{model} is no evaluation, and {origin} does not say how to evaluate a model: add its section 'evaluation'"
        )
    if out is None:
        raise UserError(f"{model} is no evaluation; to evaluate it as a model, say where with --out")
    return evaluate(model, policy.evaluation, out / name)
