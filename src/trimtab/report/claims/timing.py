"""What the timing papers claim, in our own words, and which figures of a study each is read from (``reading`` says how).

Figures are first of the natural arms, as in the papers. There an earlier start also reads more of the interventions; so
where there are matched arms (the same dose in each) the same contrast is given for them, and it is the one that can
speak of timing alone. Arms, models and decoders are found by their settings and roles, never by their names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trimtab.report.claims.reading import (
    MARGIN,
    Claim,
    Figures,
    Part,
    Read,
    adjusted,
    estimate,
    figure,
)
from trimtab.report.contrasts import Terms, Values, merged, scaled, slope
from trimtab.report.data import Arm, ClaimReading, Place
from trimtab.report.panels import ANY, BENIGN, CONTRASTS, HELDOUT, SEEN, WRAPPED, Cells
from trimtab.types import Result

TIMING, PARENT = "arXiv 2601.07087", "arXiv 2504.16980"
HELDOUT_SPLIT = "heldout"
"""``Result.category`` of a probe that was trained on seen and tested on held-out hazards (``analyze.metrics``)."""
PLAIN = (HELDOUT, SEEN, ANY)
JAILBREAKS = (HELDOUT + WRAPPED, SEEN + WRAPPED, ANY + WRAPPED)
Exposure = Literal["natural", "matched"]
Reader = Callable[["Run", Exposure], Iterable[Part]]


@dataclass
class Run:
    """What the claims read: the arms that the timing lever makes, by start, and their cells.

    series  (exposure, before) -> start -> arm ids, one per seed
    probes  results of probes among others; ``places`` the columns of the grid
    """

    series: Mapping[tuple[str, str], Mapping[float, Sequence[str]]]
    cells: Cells
    places: Sequence[Place]
    probes: Sequence[Result] = ()
    main: str = "safe_only"

    @classmethod
    def of(
        cls, arms: Iterable[Arm], timing: Mapping[str, Mapping[str, Any]], cells: Cells, places: Sequence[Place],
        probes: Sequence[Result],
    ) -> Run:  # fmt: skip
        families: dict[tuple[str, str, str], list[str]] = {}
        for arm in arms:
            if arm.id in timing:
                families.setdefault(arm.family, []).append(arm.id)
        series: dict[tuple[str, str], dict[float, Sequence[str]]] = {}
        for ids in families.values():
            told = timing[ids[0]]
            series.setdefault((told["exposure"], told["before"]), {}).setdefault(told["start"], ids)
        befores = [before for exposure, before in series for _ in series[exposure, before]]
        main = max(dict.fromkeys(befores), key=befores.count) if befores else "safe_only"
        matched, natural = series.get(("matched", main)), series.get(("natural", main), {})
        # A dose that is not set is what a start at 0 reads, so the natural arm that starts there has it too.
        if matched and 0.0 in natural and all(timing[ids[0]]["dose"] is None for ids in matched.values()):
            matched.setdefault(0.0, natural[0.0])
        return cls(series, cells, places, probes, main)

    @property
    def sweeps(self) -> bool:
        return len({start for starts in self.series.values() for start in starts}) > 1

    def starts(self, exposure: Exposure) -> list[float]:
        """Starts of a series, in order; "never" reads no dose and is no matched arm."""
        found = sorted(self.series.get((exposure, self.main), {}))
        return [s for s in found if s < 1] if exposure == "matched" else found

    def place(self, role: str, kinds: Sequence[str]) -> Place | None:
        """The first column of a role, by the first decoder kind that was used."""
        for kind in kinds:
            for place in self.places:
                if place.role == role and place.kind == kind:
                    return place
        return None

    def values(
        self, start: float, place: Place, groups: Sequence[str], metric: str, exposure: Exposure, before: str = ""
    ) -> Values:
        arms = self.series.get((exposure, before or self.main), {}).get(start, ())
        within = [g for group in groups for g in self.cells.within(group)]
        return merged(*(self.cells.values(arms, place.stage, group, metric) for group in within))


SAMPLED = ("sampled", "greedy")
BEAM = ("safebeam",)


def _slope(
    run: Run, exposure: Exposure, roles: Sequence[str], kinds: Sequence[str], groups: Sequence[str], metric: str
) -> Terms:
    """Slope over the starts, averaged over the roles that were measured; nothing where there are not two starts."""
    parts: list[Terms] = []
    for role in roles:
        place = run.place(role, kinds)
        if place is None:
            continue
        found = [(s, run.values(s, place, groups, metric, exposure)) for s in run.starts(exposure)]
        at = [(s, values) for s, values in found if values]
        if len(at) > 1:
            parts.append(slope(at))
    return [term for part in parts for term in scaled(part, 1 / len(parts))]


def _robust(roles: Sequence[str], groups: Sequence[str] = PLAIN) -> Callable[[Run, Exposure], Iterable[Part]]:
    def read(run: Run, exposure: Exposure) -> Iterable[Part]:
        terms = _slope(run, exposure, roles, SAMPLED, groups, "risk_rate")
        yield "rise of the risk rate for a start one budget later", terms, "above"
        if terms:  # a slope alone would overlook that the first start is no better than the last
            yield "starts between less the start at 0 %", _between(run, exposure, roles, groups), "not below"

    return read


def _clearest(run: Run, exposure: Exposure) -> Iterable[Part]:
    after = _slope(run, exposure, ("benign",), SAMPLED, PLAIN, "risk_rate")
    before = _slope(run, exposure, ("base", "instruct"), SAMPLED, PLAIN, "risk_rate")
    yield (
        "that rise after benign finetuning less the rise before it",
        ([*after, *scaled(before, -1)] if after and before else []),
        "above",
    )


def _over_refusal(run: Run, exposure: Exposure) -> Iterable[Part]:
    for name, group, metric in (
        ("contrasts", CONTRASTS, "over_refusal_contrast_full"),
        ("benign requests", BENIGN, "over_refusal_benign_full"),
    ):
        terms = _slope(run, exposure, ("instruct",), SAMPLED, (group,), metric)
        yield f"rise for a start one budget earlier, {name}", scaled(terms, -1), "no rise"


def _steerable(run: Run, exposure: Exposure) -> Iterable[Part]:
    roles = [r for r in ("base", "instruct", "benign") if run.place(r, BEAM) and run.place(r, SAMPLED)]
    beam, plain = (_slope(run, exposure, roles, kinds, PLAIN, "risk_rate") for kinds in (BEAM, SAMPLED))
    yield (
        "rise of SafeBeam's change of the risk rate for a start one budget later",
        ([*beam, *scaled(plain, -1)] if beam and plain else []),
        "above",
    )


def _mean(
    run: Run, exposure: Exposure, places: Sequence[Place], groups: Sequence[str], starts: Sequence[float]
) -> Terms:
    """Mean risk rate over starts and places; nothing where one was not measured."""
    terms = [
        (1 / len(starts) / len(places), run.values(s, place, groups, "risk_rate", exposure))
        for s in starts for place in places
    ]  # fmt: skip
    return terms if all(values for _, values in terms) else []


def _less(
    run: Run, exposure: Exposure, places: Sequence[Place], groups: Sequence[str], a: Sequence[float], b: Sequence[float]
) -> Terms:
    """Mean risk rate of some starts less that of others."""
    if not (places and a and b):
        return []
    first, second = (_mean(run, exposure, places, groups, starts) for starts in (a, b))
    return [*first, *scaled(second, -1)] if first and second else []


def _placed(run: Run, roles: Sequence[str], kinds: Sequence[str]) -> list[Place]:
    return [place for role in roles if (place := run.place(role, kinds)) is not None]


def _between(run: Run, exposure: Exposure, roles: Sequence[str], groups: Sequence[str]) -> Terms:
    starts = run.starts(exposure)
    middle, zero = [s for s in starts if 0 < s < 1], [s for s in starts if s == 0]
    return _less(run, exposure, _placed(run, roles, SAMPLED), groups, middle, zero)


def _against(
    run: Run, exposure: Exposure, roles: Sequence[str], kinds: Sequence[str], best: Literal["middle", "zero"]
) -> Iterable[Part]:
    """The starts that are said to be best against the others, averaged over roles; each of the others must be riskier."""
    places, starts = _placed(run, roles, kinds), run.starts(exposure)
    zero, never = [s for s in starts if s == 0], [s for s in starts if s == 1]
    middle = [s for s in starts if 0 < s < 1]
    if best == "middle":
        yield "start at 0 % less the starts between", _less(run, exposure, places, PLAIN, zero, middle), "above"
        yield "never less the starts between", _less(run, exposure, places, PLAIN, never, middle), "above"
    else:
        yield "starts between less the start at 0 %", _less(run, exposure, places, PLAIN, middle, zero), "above"
        yield "never less the start at 0 %", _less(run, exposure, places, PLAIN, never, zero), "above"


def _beam_lowers(run: Run, exposure: Exposure) -> Iterable[Part]:
    found = []
    for role in ("base", "instruct", "benign"):
        beam, plain = run.place(role, BEAM), run.place(role, SAMPLED)
        for start in run.starts(exposure):
            if beam is not None and plain is not None and start < 1:
                a, b = (run.values(start, p, PLAIN, "risk_rate", exposure) for p in (beam, plain))
                if a and b:
                    found.append((a, b))
    yield (
        "SafeBeam less ordinary decoding, mean over starts before 100 % and stages",
        [term for a, b in found for term in ((1 / len(found), a), (-1 / len(found), b))],
        "below",
    )


def _safe_only_worse(run: Run, exposure: Exposure) -> Iterable[Part]:
    place = run.place("benign", SAMPLED)
    if place is not None and exposure == "natural":
        safe, raw = (run.values(1.0, place, PLAIN, "risk_rate", exposure, b) for b in ("safe_only", "raw"))
        yield (
            "score-0 text only less raw text, no interventions",
            ([(1.0, safe), (-1.0, raw)] if safe and raw else []),
            "above",
        )


def _interventions_help(run: Run, exposure: Exposure) -> Iterable[Part]:
    place = run.place("benign", SAMPLED)
    if place is not None and exposure == "natural":
        never, first = (run.values(s, place, PLAIN, "risk_rate", exposure) for s in (1.0, 0.0))
        yield "never less from the start", ([(1.0, never), (-1.0, first)] if never and first else []), "above"


def _probes(run: Run, exposure: Exposure) -> Iterable[Part]:
    """Slope of the probes' AUROC over the start, averaged over the models; each seed is one value."""
    wanted = [r for r in run.probes if r.metric == "probe_auroc" and not math.isnan(r.value)]
    split = HELDOUT_SPLIT if any(r.category == HELDOUT_SPLIT for r in wanted) else "all"
    cells: dict[str, dict[float, dict[int, dict[str, float]]]] = {}
    for start in run.starts(exposure):
        arms = run.series[exposure, run.main][start]
        for r in wanted:
            if r.arm in arms and r.category == split:
                cells.setdefault(r.stage, {}).setdefault(start, {})[run.cells.seeds[r.arm]] = {"": r.value}
    parts = [slope(sorted(at.items())) for at in cells.values() if len(at) > 1]
    yield (
        "rise of the probes' AUROC for a start one budget later",
        [term for part in parts for term in scaled(part, 1 / len(parts))],
        "below",
    )


V1, V2 = "v1", "v2"
_RISK = "Risk rate on plain hazards (seen and held out together)"
RISES = "Agrees if the risk rate rises with a later start, and the starts between are not clearly safer than 0 %."
CLAIMS: tuple[Claim[Reader], ...] = (
    Claim(
        "earlier", "An earlier start makes the model more robust.", TIMING,
        {V1: "Earlier is generally more robust.", V2: "Withdrawn: no single start is best."},
        f"{_RISK}, ordinary decoding; base, instruct and benignly finetuned model, mean.",
        RISES,
        _robust(("base", "instruct", "benign")),
        needs="two starts",
    ),
    Claim(
        "after-benign", "An earlier start keeps the model safer through benign finetuning.", TIMING,
        {V1: "Yes, and clearest there.", V2: "Revised: a start after 20 to 60 % is often best."},
        f"{_RISK}, ordinary decoding, after benign finetuning.",
        RISES,
        _robust(("benign",)),
        needs="two starts and a benignly finetuned model",
    ),
    Claim(
        "clearest", "The effect of the start is clearest after benign finetuning.", TIMING,
        {V1: "Yes.", V2: "Yes, of the starts that it finds best."},
        f"{_RISK}, ordinary decoding: slope after benign finetuning against that of base and instruct model.",
        "Agrees if the slope is steeper after benign finetuning.", _clearest,
        needs="two starts, a benignly finetuned model and one before it",
    ),
    Claim(
        "middle", "Decoded by top-k, a start after 20 to 60 % of the budget is best, most of all after benign finetuning.",
        TIMING, {V1: "Not claimed: earlier is better.", V2: "Often so."},
        f"{_RISK}, ordinary decoding, after benign finetuning: both ends against the starts between them.",
        "Agrees if both ends are riskier than the starts between.",
        lambda run, exposure: _against(run, exposure, ("benign",), SAMPLED, "middle"),
        needs="starts at 0 %, between, and never, and a benignly finetuned model",
    ),
    Claim(
        "beam-zero", "Decoded by SafeBeam, a start at 0 % is best.", TIMING,
        {V1: "Implied: earlier is more steerable.", V2: "Yes."},
        f"{_RISK}, SafeBeam; base, instruct and benignly finetuned model, mean: later starts against 0 %.",
        "Agrees if the starts between and never are both riskier than 0 %.",
        lambda run, exposure: _against(run, exposure, ("base", "instruct", "benign"), BEAM, "zero"),
        needs="a SafeBeam decoder and starts at 0 %, between, and never",
    ),
    Claim(
        "over-refusal", "An earlier start does not make the model refuse more harmless requests.", TIMING,
        {V1: "No rise.", V2: "No longer in the abstract."},
        "Outright refusals of contrast and of benign requests, instruct model, ordinary decoding.",
        f"Agrees if the interval of the rise stays below {100 * MARGIN:.0f} points, for both.", _over_refusal,
        needs="two starts and contrast or benign requests to the instruct model",
    ),
    Claim(
        "steerable", "An earlier start makes the model easier to steer at inference (SafeBeam).", TIMING,
        {V1: "Yes.", V2: "Kept as: under SafeBeam 0 % is best."},
        f"{_RISK}: SafeBeam less ordinary decoding, and how that changes with the start; mean over the models.",
        "Agrees if SafeBeam lowers the risk rate less with a later start.", _steerable,
        confounded="A model whose risk rate is low already cannot be moved far: read it beside the rates themselves.",
        needs="a SafeBeam decoder beside another, and two starts",
    ),
    Claim(
        "jailbreaks", "An earlier start makes the model more robust to jailbreaks.", TIMING,
        {V1: "Yes.", V2: "No longer in the abstract."},
        "Risk rate on wrapped or attacked hazards, instruct model, ordinary decoding.",
        RISES,
        _robust(("instruct",), JAILBREAKS),
        needs="two starts and wrapped hazards put to the instruct model",
    ),
    Claim(
        "probes", "An earlier start separates safe from harmful requests better inside the model.", TIMING,
        {V1: "Yes.", V2: "Yes: a cleaner separation by linear probes."},
        "AUROC of linear probes (layer chosen on the training folds), mean over the probed models; tested on held-out hazards "
        "where that was measured.",
        "Agrees if the AUROC falls with a later start.", _probes,
        needs="two starts and a probes stage",
    ),
    Claim(
        "interventions", "Rephrased text and refusals in pretraining lower the risk after benign finetuning.", PARENT,
        {V1: "Built upon.", V2: "Built upon."},
        f"{_RISK}, ordinary decoding, after benign finetuning: score-0 text only against interventions from the start.",
        "Agrees if never is riskier than a start at 0 %.", _interventions_help, by_timing=False,
        confounded="The two arms differ in what replaces the unsafe text from the first token on; this is what the claim "
        "is about, dose and timing together.",
        needs="starts at 0 % and never, and a benignly finetuned model",
    ),
    Claim(
        "beam", "SafeBeam lowers the attack success of models that learned the tag.", PARENT,
        {V1: "Built upon.", V2: "Built upon."},
        f"{_RISK}: SafeBeam against ordinary decoding, same prompts and models.",
        "Agrees if SafeBeam's risk rate is lower.", _beam_lowers, by_timing=False,
        confounded="Whether what SafeBeam avoids harm by still helps is not in this figure; read it beside over-refusal "
        "and accuracy.",
        needs="a SafeBeam decoder beside another",
    ),
    Claim(
        "score-0", "Pretraining on score-0 text alone is worse after benign finetuning than on raw text.", PARENT,
        {V1: "Built upon.", V2: "Built upon."},
        f"{_RISK}, ordinary decoding, after benign finetuning: `before: safe_only` against `before: raw`, both never.",
        "Agrees if score-0 text alone is riskier.", _safe_only_worse, by_timing=False,
        needs="two arms that never start, one with `before: raw`, and a benignly finetuned model",
    ),
)  # fmt: skip


def figures(run: Run) -> list[Read]:
    """Every claim with its figures; empty where the study does not vary the start."""
    return [(claim, *_figures(claim, run)) for claim in CLAIMS] if run.sweeps else []


def read_claims(run: Run) -> list[ClaimReading]:
    """Every claim with what the study says of it; empty where the study does not vary the start."""
    return adjusted(figures(run))


def _figures(claim: Claim[Reader], run: Run) -> tuple[Figures, list[str]]:
    found: Figures = []
    missing: list[str] = []
    exposures: tuple[Exposure, ...] = ("natural", "matched") if claim.by_timing else ("natural",)
    for exposure in exposures:
        for label, terms, side in claim.read(run, exposure):
            made = estimate(terms, key=f"{claim.id} {exposure} {label}")
            if made is None and exposure == "natural" and side != "not below":
                missing.append(label)
            if made is not None:
                found.append(figure(made, label, side, exposure, decides=exposure == "natural"))
    if found and not any(f["decides"] for f in found):
        found = [{**f, "decides": True} for f in found]  # only matched arms: they decide
        missing = [label for label in missing if label not in {f["label"] for f in found}]
    return found, missing
