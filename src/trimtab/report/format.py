"""How numbers and strange characters are written, everywhere in a report.

A share is a percentage with its interval, "42 % [31, 54]"; near 0 and 100 one decimal is kept, so 0 of 100 reads
"0 % [0, 3.6]". Characters that could hide or reorder text are written out, so a sample shows what it holds.
"""

from __future__ import annotations

import math
import re

NBSP = "\u00a0"
MINUS = "\u2212"
SMALL_N = 30
"""Below this many rows an interval is flagged as resting on few rows."""

_STRANGE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """``text`` with control, zero-width, bidirectional and tag characters written as <U+202E> (in angle brackets that
    are not HTML's); tab, newline, and the joiners that emoji and some scripts need stay as they are."""
    return _STRANGE.sub(lambda m: f"\u27e8U+{ord(m[0]):04X}\u27e9", text.replace("\r\n", "\n"))


def one_line(text: str, limit: int) -> str:
    """``visible`` on one line, cut to ``limit`` characters with an ellipsis."""
    line = " ".join(visible(text).split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def percent(share: float) -> str:
    """A share in [-1, 1] as a percentage without its sign: 0.036 -> "3.6", 0.42 -> "42", 0.0002 -> "< 0.1"."""
    if math.isnan(share):
        return "–"
    points = round(abs(100 * share), 9)  # an interval's end may miss 0 or 100 by rounding alone
    sign = MINUS if share < 0 else ""
    if points in (0.0, 100.0):
        return f"{sign if points else ''}{points:.0f}"
    if points < 0.05:
        return f"{sign}<{NBSP}0.1"
    if 99.95 <= points < 100:
        return f"{sign}>{NBSP}99.9"
    if points < 9.95 or 90 < points < 100:
        return f"{sign}{points:.1f}".removesuffix(".0")
    return f"{sign}{points:.0f}"


def number(value: float, digits: int = 3) -> str:
    """A plain number to three significant digits."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else (MINUS if value < 0 else "") + "∞"
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    if places > 6 or abs(value) >= 1e7:
        return f"{value:.{digits - 1}e}".replace("-", MINUS)
    return f"{value:.{places}f}".replace("-", MINUS)


def estimate(value: float, low: float, high: float, share: bool) -> str:
    """A value with its interval: "42 % [31, 54]" for a share, "3.21 [3.10, 3.35]" for anything else."""
    if math.isnan(value):
        return "not scored"
    if share:
        return f"{percent(value)}{NBSP}% [{percent(low)},{NBSP}{percent(high)}]"
    return f"{number(value)} [{number(low)},{NBSP}{number(high)}]"


def difference(value: float, low: float, high: float, share: bool) -> str:
    """A signed difference: "−12 points [−20, −4]" for shares, a signed number otherwise."""
    if math.isnan(value):
        return "not scored"
    write = percent if share else number
    plus = "+" if value > 0 else ""
    unit = f"{NBSP}points" if share else ""
    return f"{plus}{write(value)}{unit} [{write(low)},{NBSP}{write(high)}]"


def p_value(p: float | None) -> str:
    """A p-value to two digits; very small ones as a bound."""
    if p is None or math.isnan(p):
        return "–"
    return f"<{NBSP}0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


_SI = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def si(value: float, unit: str = "") -> str:
    """1234567 -> "1.23 M"; with a unit, "1.23 MFLOP"."""
    for size, letter in _SI:
        if abs(value) >= size:
            scaled = value / size
            text = number(scaled)
            return f"{text.rstrip('0').rstrip('.') if '.' in text else text}{NBSP}{letter}{unit}"
    return f"{number(value) if value % 1 else int(value)}{NBSP}{unit}".rstrip(NBSP)


def seconds(value: float) -> str:
    """Wall time: "0.4 s", "12 s", "3 min 12 s", "2 h 05 min"."""
    if value < 9.95:
        return f"{value:.1f}{NBSP}s"
    whole = round(value)
    if whole < 60:
        return f"{whole}{NBSP}s"
    if whole < 3600:
        return f"{whole // 60}{NBSP}min {whole % 60:02d}{NBSP}s"
    return f"{whole // 3600}{NBSP}h {whole % 3600 // 60:02d}{NBSP}min"


def memory(value: int | None) -> str:
    """Bytes in GB (10^9)."""
    return "–" if value is None else f"{value / 1e9:.2f}{NBSP}GB"


def setting(value: object) -> str:
    """A setting as one would write it in the recipe."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
