"""What papers claim, beside what a study saw: ``reading`` reads any claim; each lever's are in the file of its name."""

from __future__ import annotations

from trimtab.report.claims import modes, prefix, timing
from trimtab.report.claims.reading import adjusted
from trimtab.report.data import ClaimReading

__all__ = ["modes", "prefix", "read", "timing"]


def read(timing_run: timing.Run, prefix_run: prefix.Run, modes_run: modes.Run) -> list[ClaimReading]:
    """Every claim of the levers that the study pulls, adjusted over all of them together."""
    return adjusted([*timing.figures(timing_run), *prefix.figures(prefix_run), *modes.figures(modes_run)])
