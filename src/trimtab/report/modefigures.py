"""The figures of how well a switch holds: the paper's table, fidelity, fallback, attacks, policies and capability."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from trimtab.evaluate.metrics import METRICS
from trimtab.evaluate.targets import NO_MODE
from trimtab.levers.modes import CONDITIONS as OTHERS
from trimtab.report.contrasts import contrast
from trimtab.report.data import Matrix, behaviour_of
from trimtab.report.modedata import ModeFigure
from trimtab.report.modes import PLAIN, UNASKED, Subject, of_estimate
from trimtab.types import HARMS

CONDITIONS = (NO_MODE, *OTHERS)
"""Ways of asking without a mode, as a table lists them."""
CLASSES = ("harmful", "contrast", "benign")
ALL = "all prompts"
DROP = "drop"
ALL_WRAPS = "all of them"
assert set(CLASSES) == set(HARMS)


def name_of(mode: str | None) -> str:
    return NO_MODE if mode is None else mode


def mode_named(name: str) -> str | None:
    return None if name == NO_MODE else name


def of_class(harm: str) -> Any:
    """Rows of a class of prompts, or of all."""
    return None if harm == ALL else lambda row: row.harm == harm


def figures(subjects: Sequence[Subject]) -> list[ModeFigure]:
    """Every figure of how the subjects answer."""
    wraps = common(subjects)
    found: list[ModeFigure | None] = []
    for s in subjects:
        for made in (_paper(s, wraps), _fidelity(s), _fallback(s), _attacked(s, wraps), _policies(s), _capability(s)):
            found += made
    return [figure for figure in found if figure is not None]


def common(subjects: Sequence[Subject]) -> list[str]:
    """The wrappers and attacks that every subject was asked in, of those that were asked in any: what is lost to them all can
    be compared."""
    asked = [s.wrappings for s in subjects if s.wrappings]
    return [w for w in asked[0] if all(w in others for others in asked)] if asked else []


def _paper(s: Subject, wraps: Sequence[str]) -> Iterator[ModeFigure | None]:
    """What the paper's tables hold: the constructive score in positive mode and by each fallback, the negative and the
    rejective mode, the drop under attack (the margin is ``margins``')."""
    yield s.figure(("paper", "", "positive"), "constructive_score", s.mode("positive"))
    for condition in CONDITIONS if s.arm.modes else ():
        yield s.figure(("paper", "", condition), "constructive_score", mode_named(condition))
    yield s.figure(("paper", "", "negative"), "switch_fidelity", s.mode("negative"), where=of_class("harmful"))
    yield s.figure(
        ("paper", "", "negative, harmless"), "switch_fidelity", s.mode("negative"), where=of_class("contrast")
    )
    yield s.figure(("paper", "", "rejective"), "switch_fidelity", s.mode("rejective"), where=of_class("harmful"))
    yield _drop(s, ("paper", "", DROP), "constructive_score", wraps)


def _drop(s: Subject, place: tuple[str, str, str], metric: str, wraps: Sequence[str]) -> ModeFigure | None:
    """Points lost in positive mode when the same prompts are wrapped and attacked, all ways together."""
    mode = s.mode("positive")
    plain, attacked = s.values(metric, mode)[0], s.values(metric, mode, wraps)[0]
    if not (plain and attacked):
        return None
    made = contrast([(1.0, plain), (-1.0, attacked)], key=f"drop {s.arm.arm} {metric}", binary=METRICS[metric].binary)
    return None if made is None else of_estimate(s.arm.arm, place, made)


def _fidelity(s: Subject) -> Iterator[ModeFigure | None]:
    for mode in s.asked if s.arm.modes else ():
        for harm in (ALL, *CLASSES):
            yield s.figure(("fidelity", name_of(mode), harm), "switch_fidelity", mode, where=of_class(harm))


def _fallback(s: Subject) -> Iterator[ModeFigure | None]:
    """Every way of asking without a mode beside the positive mode, and what it changes on the same prompts."""
    positive = s.mode("positive")
    if not s.arm.modes or positive is None or positive == UNASKED:
        return
    for mode in (positive, *(mode_named(c) for c in CONDITIONS)):
        row = name_of(mode)
        for metric in ("switch_fidelity", "constructive_score", "risk_rate"):
            yield s.figure(("fallback", row, metric), metric, mode)
        ours, theirs = (s.values("risk_rate", m)[0] for m in (mode, positive))
        if mode != positive and ours and theirs:
            made = contrast([(1.0, ours), (-1.0, theirs)], key=f"fallback {s.arm.arm} {row}")
            if made is not None:
                yield of_estimate(s.arm.arm, ("fallback", row, "more risk"), made)


def _attacked(s: Subject, wraps: Sequence[str]) -> Iterator[ModeFigure | None]:
    """In positive mode: plain, in each wrapper and attack, and in all that every arm was asked in; then the drop."""
    mode = s.mode("positive")
    if mode == UNASKED or not s.wrappings:
        return
    for metric in ("constructive_score", "risk_rate"):
        table = f"attack {metric}"
        yield s.figure((table, "", "plain"), metric, mode)
        for wrap in s.wrappings:
            yield s.figure((table, "", wrap), metric, mode, (wrap,))
        if len(wraps) > 1:
            yield s.figure((table, "", ALL_WRAPS), metric, mode, wraps)
        yield _drop(s, (table, "", DROP), metric, wraps)


def _policies(s: Subject) -> Iterator[ModeFigure | None]:
    """The constructive score and the fidelity under each policy, per mode."""
    policies = sorted({r.row.policy for records in s.records.values() for r in records if r.row.policy is not None})
    for policy in policies:
        for mode in s.asked:
            for metric in ("constructive_score", "switch_fidelity"):
                here = ("policy", name_of(mode) if s.arm.modes else "", f"{policy}: {metric}")
                yield s.figure(here, metric, mode, where=lambda row, p=policy: row.policy == p)  # type: ignore[misc]


def _capability(s: Subject) -> Iterator[ModeFigure | None]:
    """What a mode still can, and how often it refuses what it need not."""
    for mode in s.asked:
        row = name_of(mode) if s.arm.modes else ""
        for metric in ("accuracy", "over_refusal_contrast_full", "over_refusal_benign_full", "cosa_score"):
            yield s.figure(("capability", row, metric), metric, mode)


def matrices(subjects: Sequence[Subject]) -> list[Matrix]:
    """Mode asked x behaviour shown for each class of plain prompts, summed over the seeds."""
    found = []
    for s in subjects:
        for harm in CLASSES if s.arm.modes and len(s.asked) > 1 else ():
            shown = [
                (name_of(mode), behaviour_of(r.row.harm, r.verdict))
                for mode in s.asked
                for _, r in s.of(mode, (PLAIN,), of_class(harm))
            ]
            if shown:
                found.append(Matrix.of(s.arm.arm, f"{harm} prompts", shown))
    return found
