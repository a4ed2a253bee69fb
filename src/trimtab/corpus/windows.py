"""Long texts in windows: the score of a text is the highest of its windows' (2504.16980, app. B.3)."""

from __future__ import annotations

OVERLAP = 8
"""Neighbouring windows share one part in so many, so that a sentence on the edge is read whole."""


def windows(text: str, size: int) -> list[str]:
    """``text`` in windows of at most ``size`` characters, each beginning in the one before; cut at white space if any is
    in a window's last quarter. A text that fits is its own only window."""
    assert size >= OVERLAP
    found: list[str] = []
    start = 0
    while start + size < len(text):
        end = start + size
        cut = max(text.rfind(blank, start + size * 3 // 4, end) for blank in " \n\t")
        end = cut + 1 if cut >= 0 else end
        found.append(text[start:end])
        start = end - size // OVERLAP
    return [*found, text[start:]]
