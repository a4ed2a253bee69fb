"""What the prefix paper claims (arXiv 2601.01624), in our own words, and which figures of a study each is read from.

The paper trains a model per capability and compares shares of prefixed answers with none, so a claim of a capability is
read from the arms whose sentences are that capability's, on prompts that test it: the ratios above 0 % less 0 %, averaged
over ratios and over what else is swept (sizes). Only the paper's main form of the lever decides; keyword sets, other
placements, primers and forced prefixes have their curves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.evaluate.stats import over_seeds
from trimtab.report.claims.reading import Claim, Measured, Read, Side, estimate, read_all
from trimtab.report.contrasts import NONE, SEEDS, Estimate, Terms, Values, merged
from trimtab.report.data import Place
from trimtab.report.panels import CODING, FACTUALITY, MATHEMATICS, SAFETY, WRAPPED, Cells
from trimtab.report.ranking import PAPER_CUES, is_cue
from trimtab.report.ratios import Series, shown

PAPER = "arXiv 2601.01624"
SAMPLED = ("sampled", "greedy")
_SENTENCES = {MATHEMATICS: ("reasoning", MATHEMATICS), CODING: (CODING,), FACTUALITY: (FACTUALITY,), SAFETY: (SAFETY,)}
"""Subject of prompts -> ``prefix.capability`` of the arms that are trained for it."""


@dataclass(frozen=True)
class Run:
    """What the claims read: the lever's series with their cells, token analyses (``gather``), and how hard a prefix token
    pulls beside a body token in training (arm -> ratio less one)."""

    series: Sequence[Series]
    cells: Cells
    places: Sequence[Place]
    rankings: Sequence[Mapping[str, Any]] = ()
    pulls: Mapping[str, float] = ()  # type: ignore[assignment]

    def main(self, subject: str) -> list[Series]:
        """The series in the paper's main form that are trained for a subject and have an arm without prefixes."""
        names = _SENTENCES[subject]
        return [s for s in self.series if s.prefix.plain and 0.0 in s.at and s.prefix.settings["capability"] in names]

    def place(self, series: Series, groups: Sequence[str], metric: str) -> Place | None:
        """Where a series was measured in some groups: the first place by ordinary sampling, else greedy."""
        for kind in SAMPLED:
            for place in self.places:
                if place.kind == kind and any(self.values(series, 0.0, place, g, metric) for g in groups):
                    return place
        return None

    def values(self, series: Series, ratio: float, place: Place, group: str, metric: str) -> Values:
        return shown(metric, self.cells.values(series.at[ratio], place.stage, group, metric))

    def groups(self, subject: str, wrapped: bool = False) -> list[str]:
        return [
            g for g in self.cells.groups() if self.cells.subject(g) == subject and g.endswith(WRAPPED) == wrapped
        ]  # fmt: skip


Reader = Callable[[Run], Iterable[Measured]]


def _change(run: Run, subject: str, metric: str, ratios: str = "above", wrapped: bool = False) -> Terms:
    """Mean over series and ratios above 0 (or the highest alone: "last") of the change from ratio 0."""
    groups = run.groups(subject, wrapped)
    terms: Terms = []
    told = [(s, place) for s in run.main(subject) if (place := run.place(s, groups, metric)) is not None]
    for series, place in told:
        at = {r: merged(*(run.values(series, r, place, g, metric) for g in groups)) for r in series.ratios}
        above = [r for r in series.ratios if r > 0 and at[r]]
        above = above if ratios == "above" else above[-1:]
        if at[0.0] and above:
            terms += [(1 / len(above) / len(told), at[r]) for r in above]
            terms.append((-1 / len(told), at[0.0]))
    return terms


def _raises(subject: str, metric: str, what: str, side: Side, wrapped: Sequence[bool] = (False,)) -> Reader:
    def read(run: Run) -> Iterable[Measured]:
        for inside in wrapped:
            name = f"{what}, wrapped requests" if inside else f"{what}, plain requests" if len(wrapped) > 1 else what
            key = f"prefix {subject} {metric} {inside}"
            yield (
                f"{name}: ratios above 0 % less 0 %",
                estimate(_change(run, subject, metric, wrapped=inside), key=key), side, True, "points",
            )  # fmt: skip
            last = estimate(_change(run, subject, metric, "last", inside), key=f"{key} last")
            if last is not None:
                yield f"{name}: highest ratio less 0 %", last, side, False, "points"

    return read


def _narrows(run: Run) -> Iterable[Measured]:
    for subject in (CODING, FACTUALITY):
        for metric, what, decides in (
            ("distinct_answers", "distinct answers", True), ("answer_entropy", "entropy of the answers", False),
        ):  # fmt: skip
            made = estimate(_change(run, subject, metric), key=f"prefix {subject} {metric}")
            if made is not None or decides:
                yield f"{what}, {subject}: ratios above 0 % less 0 %", made, "below", decides, "points"


def _over(seeds: Mapping[int, Sequence[tuple[float, float, float]]]) -> Estimate | None:
    """One estimate from (value, low, high) of each seed's arms: the mean, with Student's t over the seeds, never narrower
    than the seeds' own intervals; p from whichever is wider. None where there are no values."""
    told = {seed: [sum(x) / len(x) for x in zip(*rows)] for seed, rows in seeds.items() if rows}
    if not told:
        return None
    value, low, high, p = over_seeds([v for v, _, _ in told.values()])
    near, far = (sum(ends) / len(ends) for ends in ([t[1] for t in told.values()], [t[2] for t in told.values()]))
    if not math.isnan(near):
        low, high = (near, far) if math.isnan(low) else (min(low, near), max(high, far))
        z = abs(value) / max((far - near) / 3.92, 1e-12)
        inside = math.erfc(z / math.sqrt(2))
        p = inside if math.isnan(p) else max(p, inside)
    each = tuple((seed, v) for seed, (v, _, _) in sorted(told.items()))
    interval = (
        SEEDS.replace("prompts", "rows") if len(each) > 1 else NONE if math.isnan(near) else "over rows, one seed"
    )
    return Estimate(value, low, high, p, 0, each, interval)


def _less(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """a / b less one, for (mean, low, high) each; the interval takes the ends that are farthest apart."""
    return a[0] / b[0] - 1, a[1] / b[2] - 1, a[2] / b[1] - 1


def _gradients(run: Run) -> Iterable[Measured]:
    prefix: dict[int, list[tuple[float, float, float]]] = {}
    cues: dict[int, list[tuple[float, float, float]]] = {}
    for row in run.rankings:
        spans = row["ranking"]["spans"]
        pair = [spans.get(s, {}).get("grad_norm") for s in ("prefix", "body")]
        if any(p is None or p[0] is None or not p[1] for p in pair) or row["ratio"] == 0:
            continue
        prefix.setdefault(row["seed"], []).append(_less(*pair))
        mine = [t for t in row["ranking"]["tokens"] if t["span"] == "prefix" and is_cue(t["token"], PAPER_CUES)]
        # A token that occurs in one row alone has no interval, and cannot speak.
        mine = [t for t in mine if t.get("grad_norm") and None not in t["grad_norm"]]
        if mine:
            count = sum(t["count"] for t in mine)
            mean = [sum(t["count"] * t["grad_norm"][i] for t in mine) / count for i in range(3)]
            cues.setdefault(row["seed"], []).append(_less(mean, pair[0]))
    analysed = _over(prefix)
    trained: dict[int, list[tuple[float, float, float]]] = {}
    for arm, value in dict(run.pulls).items():
        trained.setdefault(run.cells.seeds[arm], []).append((value, math.nan, math.nan))
    pulled = _over(trained)
    yield "gradient norm of a prefix token against a body token", analysed, "above", True, "ratio"
    yield "of “revised” and “logical(ly)” against the other prefix tokens", _over(cues), "above", True, "ratio"
    if pulled is not None:
        yield (
            "logit gradient of a prefix token against a body token, mean over training",
            pulled,
            "above",
            False,
            "ratio",
        )


_OURS = (
    "Our sentences, models and Tidewater's prompts are not the paper's (R1-Distill 1.5B to 8B, GSM8K, WildJailbreak)."
)
_ABOUT = "Arms with that capability's sentences, ordinary sampling where there is any; mean over ratios and sizes."
CLAIMS: tuple[Claim[Reader], ...] = (
    Claim(
        "safety", "Safety sentences before training answers raise Safe@1.", PAPER,
        {"paper": "Up to +6 points (WildJailbreak, StrongREJECT)."}, f"Share of safe answers to harmful requests. {_ABOUT}",
        "Agrees if both plain and wrapped requests gain.",
        _raises(SAFETY, "risk_rate", "Safe@1", "above", (False, True)),
        confounded=f"{_OURS} A model that is nearly always safe already cannot gain.",
        needs="arms with safety sentences at several ratios, one of them 0, asked plain and wrapped harmful requests",
    ),
    Claim(
        "mathematics", "Reasoning sentences before training answers raise accuracy in mathematics.", PAPER,
        {"paper": "Up to +7 points (GSM8K)."}, f"Accuracy on problems with a number as answer. {_ABOUT}",
        "Agrees if accuracy is higher.", _raises(MATHEMATICS, "accuracy", "accuracy", "above"), confounded=_OURS,
        needs="arms with reasoning sentences at several ratios, one of them 0, asked mathematics",
    ),
    Claim(
        "coding", "In coding the gain is marginal, or it is a loss.", PAPER, {"paper": "Marginal or negative."},
        f"Accuracy on programs. {_ABOUT}", "Agrees if the interval of the change stays below 5 points.",
        _raises(CODING, "accuracy", "accuracy", "no rise"), confounded=_OURS,
        needs="arms with coding sentences at several ratios, one of them 0, asked programs",
    ),
    Claim(
        "factuality", "In factuality the gain is marginal, or it is a loss.", PAPER, {"paper": "Marginal or negative."},
        f"Accuracy on facts. {_ABOUT}", "Agrees if the interval of the change stays below 5 points.",
        _raises(FACTUALITY, "accuracy", "accuracy", "no rise"), confounded=_OURS,
        needs="arms with factuality sentences at several ratios, one of them 0, asked facts",
    ),
    Claim(
        "gradients", "Prefix tokens carry larger gradients than body tokens, single cue words most.", PAPER,
        {"paper": "Larger gradient magnitudes, as of “revised” and “logically”."},
        "Full-parameter gradient norm of single tokens (token analysis); 0.2 is a fifth larger.",
        "Agrees if prefix tokens are above body tokens, and the cue words above the other prefix tokens.", _gradients,
        confounded="A norm depends on when it is taken: a sentence that is learned by heart pulls no more.",
        needs="a token analysis of arms with prefixes in their data",
    ),
    Claim(
        "narrowing", "The loss in coding and factuality comes with a narrower search: answers vary less.", PAPER,
        {"paper": "Offered as the explanation."}, f"How much the answers to one prompt differ over several samples. {_ABOUT}",
        "Agrees if there are fewer distinct answers, in both.", _narrows,
        confounded="Read it beside accuracy: a model that is right more often varies less, too.",
        needs="coding and factuality arms, sampled several times per prompt",
    ),
)  # fmt: skip


def figures(run: Run) -> list[Read]:
    """Every claim with its figures; empty where the study does not vary the ratio."""
    if not run.series:
        return []
    return read_all(CLAIMS, run)
