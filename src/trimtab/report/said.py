"""The findings of the prefix lever, in plain words: what each arm group gained or lost from its lowest ratio to its highest."""

from __future__ import annotations

import math
from collections.abc import Sequence

from trimtab.report.data import Finding, RatioCurve
from trimtab.report.ratios import main_curves

_KINDS = ("sampled", "greedy", "safebeam", "safebeam+", "")
MOST = 3
"""Groups of prompts that one finding speaks of."""


def findings(curves: Sequence[RatioCurve]) -> list[Finding]:
    """One for each arm group (and form of the lever), and at last how many trends there are and how many are clear."""
    leading: list[Finding] = []
    for group in dict.fromkeys(c.group for c in curves):
        main = _together(main_curves(curves, group))
        for form in dict.fromkeys(c.series for c in main if c.pooled > 1) or dict.fromkeys(c.series for c in main):
            mine = [c for c in main if c.series == form]
            kind = min((c.kind for c in mine), key=_KINDS.index)
            told = [c for c in mine if c.kind == kind][:MOST]
            leading.append(Finding(f"{_heading(group, form)}: {' '.join(_sentence(c) for c in told)}"))
    return [*leading, _overall(curves)] if leading else []


def _together(curves: Sequence[RatioCurve]) -> list[RatioCurve]:
    """The curves of several series together where there are such, else each by itself."""
    return [c for c in curves if c.pooled > 1] or list(curves)


def _heading(group: str, form: str) -> str:
    return f"{group[:1].upper()}{group[1:]}" + (f" ({form})" if form else "")


def _sentence(c: RatioCurve) -> str:
    first, last = (f"{100 * r:g} %" for r in (c.ratios[0], c.ratios[-1]))
    ends, trend = c.ends, c.trend
    value, low, high = (100 * ends[k] for k in ("difference", "low", "high"))
    if math.isnan(value):
        return f"{c.label} on {c.task} could not be compared from {first} to {last} of prefixes."
    clear = low > 0 or high < 0
    up, down = ("rose by", "fell by") if c.direction == "lower" else ("gained", "lost")
    moved = (
        f"{up if value > 0 else down} {abs(value):.1f} points"
        if clear
        else f"showed no clear change ({value:+.1f} points)"
    )
    text = (
        f"{c.label} on {c.task} {moved} from {first} to {last} of prefixes ({_percent(c.values[0])} to "
        f"{_percent(c.values[-1])}; 95 % interval of the difference {low:+.1f} to {high:+.1f}; n = {ends['n']}, "
        f"{ends['seeds']} seed{'s' if ends['seeds'] != 1 else ''})"
    )
    if len(c.ratios) > 2 and not math.isnan(trend["difference"]):
        rise = 100 * trend["difference"]
        adjusted = trend.get("p_holm")
        held = "" if adjusted is None else f", Holm p {adjusted:.3f}" if adjusted >= 0.001 else ", Holm p < 0.001"
        text += f"; along the line through all ratios {rise:+.1f}{held}"
        if c.best is not None and c.best not in (c.ratios[0], c.ratios[-1]):
            text += f"; highest at {100 * c.best:g} % ({_percent(max(c.values))}), picked after looking"
    return f"{text}."


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _overall(curves: Sequence[RatioCurve]) -> Finding:
    """How many trends were tested, and how many hold."""
    single = [c for c in curves if c.pooled == 1 and c.share]
    together = [c for c in curves if c.pooled > 1]
    told = together or single
    tested = [c for c in told if c.trend["p"] == c.trend["p"]]
    apart = sum(1 for c in tested if c.trend["low"] > 0 or c.trend["high"] < 0)
    held = sum(1 for c in tested if (c.trend.get("p_holm") or 1) < 0.05)
    chance = math.ceil(0.05 * len(tested))
    sizes = "with the lines of a group taken together, " if together else ""
    return Finding(
        f"Of {len(tested)} trends over the ratio ({sizes}every measure and decoder counted) {apart} "
        f"{'has' if apart == 1 else 'have'} an interval clear of zero (about {chance} would by chance alone) and {held} "
        f"{'holds' if held == 1 else 'hold'} after Holm's adjustment."
    )
