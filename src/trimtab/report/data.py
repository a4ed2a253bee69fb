"""What a report is made of: plain dataclasses that a study or an evaluation fills and ``html.write_report`` draws.

Everything is JSON-ready (``ReportData.to_json`` / ``from_json``), so a report can be rebuilt from its own
``results.json``. ``check`` refuses data that contradicts itself (a result of an arm that is not listed, a finding
without figures) instead of drawing a report with a silent hole.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from trimtab.errors import UserError
from trimtab.levers.modes import shown
from trimtab.report.modedata import ModeArm, ModeFigure
from trimtab.types import Result, Verdict

if TYPE_CHECKING:
    from trimtab.evaluate.comparison import Comparison

Scalar = str | int | float | bool | None
KINDS = ("study", "evaluation")
FORMAT = 1
"""Version of ``results.json``."""


@dataclass(frozen=True)
class Arm:
    """One arm of the study, or one seed of one: arms that differ in ``id`` and ``seed`` alone are shown as one.

    group     what the arm varies: "timing", "prefix", "mode" or any other heading
    settings  only the fields that differ between the arms of the study, e.g. {"timing.start": 0.2}
    """

    id: str
    label: str
    group: str
    settings: Mapping[str, Scalar] = field(default_factory=dict)
    seed: int = 0

    @property
    def family(self) -> tuple[str, str, str]:
        """What several seeds of one arm share."""
        return self.group, self.label, repr(sorted(self.settings.items()))


@dataclass(frozen=True)
class Cost:
    """One step of the study. ``tokens`` trained or generated, ``seconds`` of wall time, ``peak_memory`` in bytes."""

    step: str
    kind: str
    arms: Sequence[str]
    tokens: int
    flops: float
    seconds: float
    peak_memory: int | None = None
    cached: bool = False


@dataclass(frozen=True)
class Sample:
    """One prompt and what each arm answered.

    answers  arm id -> list of answers (one per mode, where an arm has modes); each a dict with text, verdict
             (safe | unsafe | unscored), refusal (full | partial | none | None), mode (or None); optional are correct,
             constructive (0 to 2), reason (the judge's) and withheld (characters of a harmful answer that were left
             out). A single dict is taken as a list of one.
    why      why it is shown, where it was not chosen blindly
    """

    task: str
    row_id: str
    prompt: Sequence[Mapping[str, str]]
    harm: str | None
    answers: Mapping[str, Any]
    why: str = ""

    def __post_init__(self) -> None:
        listed = {arm: [a] if isinstance(a, Mapping) else list(a) for arm, a in self.answers.items()}
        object.__setattr__(self, "answers", listed)


@dataclass(frozen=True)
class Finding:
    """One sentence of the findings. The report prints the figures of ``metric`` for ``arms`` beneath it.

    ``category``, ``stage`` and ``mode`` narrow those figures, None takes all; an empty ``metric`` prints none.
    """

    text: str
    arms: Sequence[str] = ()
    metric: str = ""
    category: str | None = None
    stage: str | None = None
    mode: str | None = None

    def matches(self, result: Result) -> bool:
        wanted = ((self.category, result.category), (self.stage, result.stage), (self.mode, result.mode))
        return result.metric == self.metric and all(want is None or want == has for want, has in wanted)


def comparison_row(c: Comparison, a: str, b: str, task: str, **place: Any) -> dict[str, Any]:
    """One entry of ``ReportData.comparisons``: arm ``b`` against arm ``a``; ``place`` holds the mode and the like."""
    return {
        "metric": c.metric,
        "a": a,
        "b": b,
        "task": task,
        **place,
        "n": c.n,
        "difference": c.difference,
        "low": c.low,
        "high": c.high,
        "p": c.p,
        "p_holm": c.p_holm,
        "discordant": c.up + c.down,
        "detectable": c.detectable,
        "unscored": c.unscored,
    }


@dataclass(frozen=True)
class Matrix:
    """Mode asked x behaviour shown, in answers: ``counts[i][j]`` answers to ``modes[i]`` showed ``behaviours[j]``."""

    arm: str
    task: str
    modes: Sequence[str]
    behaviours: Sequence[str]
    counts: Sequence[Sequence[int]]

    @classmethod
    def of(cls, arm: str, task: str, shown: Iterable[tuple[str, str]]) -> Matrix:
        """Count (mode asked, behaviour shown) pairs; modes in order of appearance, behaviours as in BEHAVIOURS."""
        count = Counter(shown)
        modes = list(dict.fromkeys(mode for mode, _ in count))
        seen = {behaviour for _, behaviour in count}
        behaviours = [b for b in BEHAVIOURS if b in seen] + sorted(seen - set(BEHAVIOURS))
        return cls(arm, task, modes, behaviours, [[count[m, b] for b in behaviours] for m in modes])


@dataclass(frozen=True)
class Place:
    """Where a ``Result.stage`` stands in a grid: a model's stage, and the decoder that its answers were drawn with.

    role  base | instruct | benign | hostile: which link of the chain the model is ("" unknown)
    kind  safebeam | safebeam+ (not by the paper's rule alone) | sampled | greedy ("" for a measurement without answers, such as
          probes)
    """

    stage: str
    panel: str
    model: str
    decoder: str = ""
    role: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Curve:
    """One curve over a model's layers, of one arm and seed.

    series     what is probed: a pooling of the states ("mean", "last"), or a baseline ("words", "shuffled")
    panel      the split: "all" (cross-validated), "heldout", "loso:TASK"
    metric     auroc or tpr_at_1fpr
    low, high  95 % interval per layer; empty: none
    """

    arm: str
    stage: str
    panel: str
    metric: str
    series: str
    layers: Sequence[int]
    values: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class RatioCurve:
    """One metric over the ratios of the prefix lever: arms that are equal in everything but the ratio.

    group, series  the arm group, and what else sets these arms apart ("" for nothing): the size of the model, the form of
                   the lever
    place, task    where it was measured (``Place.stage``; "training" for a figure of the log) and the group of prompts
    arms           the first arm of each ratio
    values         of each ratio, in [low, high] (95 %, as ``View`` folds seeds); NaN ends where one seed knows no interval
    trend          the change along the least-squares line from the first ratio to the last: an ``Estimate`` and p_holm
    ends           the last ratio less the first, paired
    pooled         how many series these are together (1: one by itself, drawn)
    share          whether values are shares, written in percent
    unscored       answers at all ratios and seeds that no judge could tell; they are in no value
    """

    group: str
    series: str
    place: str
    kind: str
    task: str
    metric: str
    label: str
    direction: str
    arms: Sequence[str]
    ratios: Sequence[float]
    values: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    n: int
    seeds: int
    trend: Mapping[str, Any]
    ends: Mapping[str, Any]
    mode: str | None = None
    pooled: int = 1
    share: bool = True
    unscored: int = 0

    @property
    def shape(self) -> str:
        """Whether the values only rise or only fall from ratio to ratio."""
        steps = [b - a for a, b in zip(self.values, self.values[1:])]
        if all(step >= 0 for step in steps) and any(steps):
            return "never falls"
        return "never rises" if all(step <= 0 for step in steps) and any(steps) else "neither" if any(steps) else "flat"

    @property
    def best(self) -> float | None:
        """The ratio of the best value; None where no way is better, or all are equal."""
        if self.direction not in ("higher", "lower") or len(set(self.values)) == 1:
            return None
        pick = max if self.direction == "higher" else min
        return self.ratios[self.values.index(pick(self.values))]


@dataclass(frozen=True)
class SpanCurve:
    """Prefix and body over one training, mean over the seeds, in bins of training tokens.

    tokens      trained on at each point
    loss        span -> mean loss of its tokens; None where a bin has none
    token_share, gradient_share  of the prefix among prefix and body tokens: how many they are, and how much of the gradient
                they carry (``measure``: "gradient norm", or "logit gradient", summed over tokens)
    """

    arm: str
    group: str
    series: str
    ratio: float
    tokens: Sequence[float]
    loss: Mapping[str, Sequence[float | None]]
    token_share: Sequence[float | None]
    gradient_share: Sequence[float | None]
    measure: str


READINGS = ("agrees", "disagrees", "cannot tell", "not measured")


@dataclass(frozen=True)
class ClaimReading:
    """A claim of a paper beside what this study found.

    about       the figures that it is about, in words; ``rule``: how they are read
    versions    what each version says of it, in our words: heading -> statement
    figures     what this run gives: label, difference, low, high, p, p_holm (None but for the one that the reading rests on),
                n, seeds, interval, decides, reading (of this figure alone)
    confounded  what else differs between the compared arms; "" for nothing known
    matched     the same reading of the arms of matched exposure alone; "" where there are none
    """

    text: str
    source: str
    about: str
    rule: str
    versions: Mapping[str, str]
    reading: str
    figures: Sequence[Mapping[str, Any]] = ()
    confounded: str = ""
    matched: str = ""


BEHAVIOURS = ("positive", "negative", "rejective", "other", "answered", "unscored")


def behaviour_of(harm: str | None, verdict: Verdict) -> str:
    """The behaviour that an answer showed, for ``Matrix.of``: as the mode lever tells it (``levers.modes.shown``). Where its
    judge could not tell, an answer that did not refuse is "answered", and one of which nothing is known "unscored"."""
    return shown(harm, verdict) or ("answered" if verdict.refusal in ("none", "partial") else "unscored")


@dataclass
class ReportData:
    """Everything in a report.

    kind         "study", or "evaluation": arms are then the evaluated models, and ``Result.category`` names a group of
                 prompts as ``evaluate.metrics`` does (None: all plain ones; ``task:``, ``attack:``; else a category)
    summary      paragraphs in plain words
    levers       which levers the study pulls: "timing", "prefix", "mode"; each is explained in the report
    metrics      metric id -> {"label", "description", "direction": higher | lower | none}
    headline     metric ids drawn first and unfolded; empty: all of them
    comparisons  paired differences: metric, a, b (arm ids), task (or category), n, difference (b minus a, on the
                 metric's range), low, high, p, p_holm, discordant (pairs, or how many); optional stage, seed,
                 mode (or mode_a, mode_b)
    curves       arm id -> rows of a training log: tokens, loss, by_source and by_span ({name: {loss, ...}}), and an
                 optional "stage" (stages are drawn apart)
    exposure     arm id -> [{"tokens": tokens seen at the end of the interval, "shares": {source: share in it}}]
    glance       what -> figure, for the line of large figures; empty: those of a study
    facts        arm id -> {what: value}: how each model was evaluated
    judges       one row per judge and arm: arm, name, id, sources, answers, card (a sentence)
    bounds       metric id -> [metric id, metric id]: its value with all unscored answers counted safe, counted unsafe
    corrected    metric id -> metric id of the same rate, corrected for its judge's errors
    places       of a study with a panel of models and decoders: its columns, in order; their results are a grid
    groups       the groups of prompts that the grid has a table for, most telling first (``Result.category``)
    same         arm id -> an arm before it that is the same training (all their artefacts are one)
    timing       arm id -> its timing settings (start, exposure, ...), where the study varies them
    steering     how far a decoder moves an arm: rows like ``comparisons`` with arm, model, decoder, from, group
    probes       curves over layers
    prefix       arm id -> its prefix settings (stage, ratio, capability, ...), where the study varies them
    ratios       metrics over the ratios of the prefix lever
    spans        prefix and body over the trainings of the prefix lever
    tokens       rows of token analyses: arm, stage, ratio, and ``ranking`` (``ranking.json``, cut to what a page can show)
    doses        arm id -> [{"source", "tokens", "epochs"}] read in pretraining
    claims       claims of papers beside this study's figures
    mode_arms    the tuned models of a study of modes, and how each is told its mode
    mode_figures every figure of the section on modes (``modes``)
    projections  points of the safety alignment margin, first seed (``margins``)
    """

    name: str
    title: str
    question: str = ""
    summary: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    levers: list[str] = field(default_factory=list)
    arms: list[Arm] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    metrics: dict[str, dict[str, str]] = field(default_factory=dict)
    headline: list[str] = field(default_factory=list)
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    matrices: list[Matrix] = field(default_factory=list)
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    exposure: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    costs: list[Cost] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    recipe_yaml: str = ""
    hashes: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    kind: str = "study"
    glance: dict[str, str] = field(default_factory=dict)
    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    judges: list[dict[str, Any]] = field(default_factory=list)
    bounds: dict[str, list[str]] = field(default_factory=dict)
    corrected: dict[str, str] = field(default_factory=dict)
    places: list[Place] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    same: dict[str, str] = field(default_factory=dict)
    timing: dict[str, dict[str, Any]] = field(default_factory=dict)
    steering: list[dict[str, Any]] = field(default_factory=list)
    probes: list[Curve] = field(default_factory=list)
    prefix: dict[str, dict[str, Any]] = field(default_factory=dict)
    ratios: list[RatioCurve] = field(default_factory=list)
    spans: list[SpanCurve] = field(default_factory=list)
    tokens: list[dict[str, Any]] = field(default_factory=list)
    doses: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    claims: list[ClaimReading] = field(default_factory=list)
    mode_arms: list[ModeArm] = field(default_factory=list)
    mode_figures: list[ModeFigure] = field(default_factory=list)
    projections: list[dict[str, Any]] = field(default_factory=list)

    def check(self) -> None:
        """Raise ``UserError`` naming the field that contradicts the list of arms, or a finding without figures."""
        if self.kind not in KINDS:
            raise UserError(f"report {self.name!r}: kind: {self.kind!r} is none of {', '.join(KINDS)}")
        ids = [arm.id for arm in self.arms]
        twice = sorted(i for i, n in Counter(ids).items() if n > 1)
        if twice:
            raise UserError(f"report {self.name!r}: arms: id {twice[0]!r} is given twice; ids must differ")
        named = (
            [("results", r.arm) for r in self.results]
            + [("comparisons", str(c.get(side))) for c in self.comparisons for side in "ab"]
            + [("matrices", m.arm) for m in self.matrices]
            + [("curves", a) for a in self.curves]
            + [("exposure", a) for a in self.exposure]
            + [("costs", a) for c in self.costs for a in c.arms]
            + [("facts", a) for a in self.facts]
            + [("timing", a) for a in self.timing]
            + [("same", a) for pair in self.same.items() for a in pair]
            + [("steering", str(s.get("arm"))) for s in self.steering]
            + [("probes", c.arm) for c in self.probes]
            + [("doses", a) for a in self.doses]
            + [("prefix", a) for a in self.prefix]
            + [("ratios", a) for c in self.ratios for a in c.arms]
            + [("spans", c.arm) for c in self.spans]
            + [("tokens", str(t.get("arm"))) for t in self.tokens]
            + [("mode_arms", a) for m in self.mode_arms for a in m.ids]
            + [("mode_figures", m.arm) for m in self.mode_figures]
            + [("judges", str(j.get("arm"))) for j in self.judges]
            + [("samples", a) for s in self.samples for a in s.answers]
            + [("findings", a) for f in self.findings for a in f.arms]
        )
        for where, arm in named:
            if arm not in ids:
                raise UserError(f"report {self.name!r}: {where}: no arm {arm!r}; list it under arms")
        for finding in self.findings:
            if finding.metric and not any(finding.matches(r) for r in self.results):
                raise UserError(
                    f"report {self.name!r}: findings: no result of metric {finding.metric!r} for {finding.text!r}"
                )
        for claim in self.claims:
            if claim.reading not in READINGS:
                raise UserError(f"report {self.name!r}: claims: {claim.reading!r} is none of {', '.join(READINGS)}")
        for result in self.results:
            if result.low > result.high:  # a bootstrap interval may miss its value by a hair, but is never reversed
                where = f"{result.metric} of {result.arm}"
                raise UserError(f"report {self.name!r}: results: {where}: the interval's low end is above its high end")

    def to_json(self) -> dict[str, Any]:
        """JSON-ready dict; numbers that JSON cannot hold (NaN, infinity) become the strings "nan", "inf", "-inf"."""
        data: dict[str, Any] = _jsonable({f.name: getattr(self, f.name) for f in fields(self)})
        return {"format": FORMAT, **data}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ReportData:
        """Inverse of ``to_json``; an unknown field or version is a ``UserError``."""
        values = dict(data)
        if values.pop("format", FORMAT) != FORMAT:
            raise UserError(
                f"report data has format {data['format']!r}, this version reads {FORMAT}; run the study again"
            )
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(f"report data: unknown field {unknown[0]!r}")
        try:
            for name, make in _PARTS.items():
                if name in values:
                    values[name] = [make(**part) for part in values[name]]
            for name in ("probes", "ratios"):
                values[name] = [
                    replace(c, **{k: [_number(v) for v in getattr(c, k)] for k in ("values", "low", "high")})
                    for c in values.get(name, [])
                ]
            values["mode_figures"] = [
                replace(f, **{k: _number(getattr(f, k)) for k in ("value", "low", "high")})
                for f in values.get("mode_figures", [])
            ]
            values["results"] = [_result(r) for r in values.get("results", [])]
            figures: list[Any] = [f for claim in values.get("claims", []) for f in claim.figures]
            figures += [f for curve in values["ratios"] for f in (curve.trend, curve.ends)]
            for row in [*values.get("comparisons", []), *values.get("steering", []), *figures]:
                row.update({k: _number(v) for k, v in row.items() if k in _NUMBERS})
                if "each" in row:
                    row["each"] = [[seed, _number(v)] for seed, v in row["each"]]
            return cls(**values)
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"report data: {error}") from error


_PARTS: dict[str, Any] = {
    "arms": Arm, "findings": Finding, "matrices": Matrix, "costs": Cost, "samples": Sample,
    "places": Place, "probes": Curve, "claims": ClaimReading, "ratios": RatioCurve, "spans": SpanCurve,
    "mode_arms": ModeArm, "mode_figures": ModeFigure,
}  # fmt: skip
_NUMBERS = ("difference", "low", "high", "p", "p_holm")


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: _jsonable(getattr(value, f.name)) for f in fields(value)}
    return value


def _number(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value


def _result(data: Mapping[str, Any]) -> Result:
    values = {k: _number(v) for k, v in data.items()}
    if "range" in values:
        low, high = (_number(v) for v in values["range"])
        values["range"] = (low, high)
    return Result(**values)
