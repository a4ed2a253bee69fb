"""What papers claim, beside what a study saw: ``reading`` reads any claim, ``timing`` and ``prefix`` hold those of each lever."""

from __future__ import annotations

from trimtab.report.claims import prefix, timing
from trimtab.report.claims.reading import adjusted
from trimtab.report.data import ClaimReading

__all__ = ["prefix", "read", "timing"]


def read(timing_run: timing.Run, prefix_run: prefix.Run) -> list[ClaimReading]:
    """Every claim of the levers that the study pulls, adjusted over all of them together."""
    return adjusted([*timing.figures(timing_run), *prefix.figures(prefix_run)])
