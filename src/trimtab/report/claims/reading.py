"""How a claim of a paper is read from a study.

Every claim is a linear contrast of measured cells: a slope over the starts, ratios above 0 % less 0 %, a decoder against
another. It is read by the interval of that contrast (``contrasts``): on the claimed side it agrees, on the other it
disagrees, across zero it cannot tell; "no rise" agrees only where the interval stays below ``MARGIN``, "within" (equivalence)
only where all of it lies within ``EQUAL`` of zero. p-values are adjusted (Holm) over all claims that were tested.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from trimtab.evaluate import stats
from trimtab.report.contrasts import Estimate, Terms, contrast
from trimtab.report.data import ClaimReading

MARGIN = 0.05
"""A rise of at most so much counts as none (a share: five points)."""
EQUAL = 0.02
"""A difference of less than so much either way counts as none."""
Side = Literal["above", "below", "no rise", "not below", "within"]
Part = tuple[str, Terms, Side]
"""One figure of a claim: what it is called, its contrast, and on which side of zero it agrees. "not below" is no test of
its own: it only forbids a claim that its contrast clearly speaks against."""
How = TypeVar("How")


@dataclass(frozen=True)
class Claim(Generic[How]):
    """One claim; ``read`` gives its figures, all of which must agree; those without terms were not measured.

    versions    what each version of the paper says: heading -> statement
    about       the figures that it is about; ``rule``: how they are read; ``needs``: what a study must have
    confounded  what else differs between the compared arms
    by_timing   whether arms of matched exposure are read too
    """

    id: str
    text: str
    source: str
    versions: Mapping[str, str]
    about: str
    rule: str
    read: How
    by_timing: bool = True
    confounded: str = ""
    needs: str = field(default="")


Measured = tuple[str, Estimate | None, Side, bool, str]
"""A figure: label, estimate (None: not measured), claimed side, whether it decides, unit."""
Figures = list[dict[str, Any]]
Read = tuple[Claim[Any], Figures, list[str]]
"""A claim, its figures, and the labels of those that were not measured."""


def figure(
    made: Estimate, label: str, side: Side, series: str = "", *, decides: bool = True, unit: str = "points"
) -> dict[str, Any]:
    """One figure as kept in ``ClaimReading.figures``; ``unit``: "points" of a share, "ratio" (0.2: a fifth more) or "score"."""
    return {"label": label, "series": series, "decides": decides, "side": side, "unit": unit, **made.plain()}


def estimate(terms: Terms, *, key: str) -> Estimate | None:
    """The contrast of a claim's part; None where it has no terms, or nothing that all of them measured."""
    return contrast(terms, key=f"claim {key}") if terms else None


def read_all(claims: Iterable[Claim[Callable[[Any], Iterable[Measured]]]], run: Any) -> list[Read]:
    """Every claim with its figures of a run; where none that decides was measured, the others do."""
    read: list[Read] = []
    for claim in claims:
        found: Figures = []
        missing: list[str] = []
        for label, made, side, decides, unit in claim.read(run):
            if made is not None:
                found.append(figure(made, label, side, decides=decides, unit=unit))
            elif decides:
                missing.append(label)
        if not any(f["decides"] for f in found):
            found = [{**f, "decides": True} for f in found]
        read.append((claim, found, missing))
    return read


def adjusted(read: Iterable[Read]) -> list[ClaimReading]:
    """Every claim with what its figures say of it, and the p that its reading rests on, adjusted over all of them."""
    told = [
        (claim, [{**f, "reading": side_of(f["side"], f)} for f in figures], missing) for claim, figures, missing in read
    ]
    tests = [rests_on(figures) for _, figures, _ in told]
    holm = iter(stats.holm([test[1] for test in tests if test is not None]).tolist() if any(tests) else [])
    return [
        _reading(claim, figures, missing if figures else [], None if test is None else (test[0], next(holm)))
        for (claim, figures, missing), test in zip(told, tests)
    ]


def rests_on(figures: Sequence[Mapping[str, Any]]) -> tuple[int, float] | None:
    """The figure whose test a claim's reading rests on, by its place, and the claim's p before adjustment for other claims.

    All figures must hold for a claim to agree: its p is then the largest, as it is where nothing can be told. One is
    enough to disagree: the smallest of those that do, times the number that could have. "no rise" and "within" that agree,
    and "not below" that does not forbid, rest on no test of zero.
    """
    decides = [(i, f) for i, f in enumerate(figures) if f["decides"]]
    against = [(f["p"], i) for i, f in decides if f["reading"] == "disagrees" and not math.isnan(f["p"])]
    if against:
        p, i = min(against)
        return i, min(1.0, p * len(decides))
    tests = [(f["p"], i) for i, f in decides if f["side"] in ("above", "below") and not math.isnan(f["p"])]
    if not tests:
        return None
    p, i = max(tests)
    return i, p


def _reading(
    claim: Claim[Any], figures: Figures, missing: Sequence[str], test: tuple[int, float] | None
) -> ClaimReading:
    reading = _said([f for f in figures if f["decides"]])
    if reading == "agrees" and missing:
        reading = "cannot tell"
    matched = [f for f in figures if not f["decides"] and f["series"] == "matched"]
    kept = [{**f, "p_holm": test[1] if test is not None and i == test[0] else None} for i, f in enumerate(figures)]
    lacks = f"Not measured, so the claim as a whole cannot be told: {'; '.join(missing)}." if missing else ""
    caveats = " ".join(part for part in (lacks, claim.confounded) if part)
    return ClaimReading(
        claim.text, claim.source, claim.about, claim.rule, dict(claim.versions), reading, kept,
        caveats if figures else f"It needs {claim.needs}.", _said(matched) if matched else "",
    )  # fmt: skip


def _said(figures: Sequence[Mapping[str, Any]]) -> str:
    """All must agree; one that disagrees is enough to disagree."""
    said = [f["reading"] for f in figures]
    if not said:
        return "not measured"
    return "agrees" if set(said) == {"agrees"} else "disagrees" if "disagrees" in said else "cannot tell"


def side_of(side: Side, f: Mapping[str, Any]) -> str:
    """What one figure says by its interval alone."""
    low, high = f["low"], f["high"]
    if math.isnan(low) or math.isnan(high):
        return "cannot tell"
    if side == "not below":
        return "disagrees" if high < 0 else "agrees"
    if side == "within":
        return (
            "agrees"
            if low > -EQUAL and high < EQUAL
            else "disagrees"
            if low > EQUAL or high < -EQUAL
            else "cannot tell"
        )
    if side == "no rise":
        return "agrees" if high < MARGIN else "disagrees" if low > 0 else "cannot tell"
    if low <= 0 <= high:
        return "cannot tell"
    return "agrees" if (low > 0) == (side == "above") else "disagrees"
