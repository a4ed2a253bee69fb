"""matplotlib -> small inline SVG: text stays text, colours are CSS variables (so figures follow the page's scheme),
ids are unique on the page, and the same drawing gives the same bytes.

Drawing uses marker colours (``INK``, ``series(3)``, ...) that are exchanged for ``var(--...)`` afterwards; matplotlib
never sees the real palette, the style sheet owns it. matplotlib is imported on first use: it is slow to load.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable
from typing import Any

from markupsafe import Markup, escape

INK, MUTED, RULE, PAPER = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
SERIES = 8
_MARKS = {INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper"} | {f"#0a0c{i:02x}": f"c{i}" for i in range(SERIES)}
_DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (7, 2, 1.5, 2), (9, 3), (3, 1))

WIDTH = 360
"""Figures are this wide in their own units (about CSS pixels): they shrink little on a phone."""
FONT = 11.0


def series(i: int) -> str:
    """The marker colour of the i-th series; they repeat after eight, and ``dash`` then tells them apart."""
    return f"#0a0c{i % SERIES:02x}"


def dash(i: int) -> tuple[float, ...]:
    """The dash pattern of the i-th line, so that colour is never the only cue."""
    return _DASHES[(i + i // SERIES) % len(_DASHES)]


def linestyle(i: int) -> Any:
    """``dash`` as matplotlib takes it."""
    return (0, dash(i)) if dash(i) else "-"


def swatch(i: int, kind: str) -> Markup:
    """The legend's sign for the i-th series; ``kind`` is "line" or "area"."""
    if kind == "area":
        mark = f'<rect width="14" height="10" y="1" style="fill: var(--c{i % SERIES})"/>'
    else:
        dashes = f"; stroke-dasharray: {' '.join(f'{d:g}' for d in dash(i))}" if dash(i) else ""
        mark = f'<line x1="0" x2="28" y1="6" y2="6" style="stroke: var(--c{i % SERIES}); stroke-width: 2.5{dashes}"/>'
    return Markup(
        f'<svg class="swatch" width="{14 if kind == "area" else 28}" height="12" aria-hidden="true">{mark}</svg>'
    )


_SHAPES = {
    "o": '<circle cx="6" cy="6" r="4.5"/>',
    "s": '<rect x="2" y="2" width="8" height="8"/>',
    "^": '<path d="M6 1 L11 10.5 L1 10.5 Z"/>',
    "D": '<path d="M6 1 L11 6 L6 11 L1 6 Z"/>',
    "v": '<path d="M6 11 L11 1.5 L1 1.5 Z"/>',
}


def mark(i: int, shape: str) -> Markup:
    """The legend's sign for the i-th series of points, by matplotlib's letter for their shape."""
    drawn = _SHAPES.get(shape, _SHAPES["o"])
    return Markup(
        f'<svg class="swatch" width="12" height="12" aria-hidden="true" style="fill: var(--c{i % SERIES})">{drawn}</svg>'
    )


def draw(key: str, height: float, paint: Callable[[Any], None], title: str, alt: str, width: float = WIDTH) -> Markup:
    """Paint on a figure of ``width`` x ``height`` units; returns inline SVG whose ids start with ``key``.

    ``paint(figure)`` draws with the marker colours. ``title`` and ``alt`` become <title> and <desc>.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings = {k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith(("backend", "interactive"))}
    settings |= {
        "svg.fonttype": "none",
        "svg.hashsalt": "trimtab",
        "text.parse_math": False,
        "text.usetex": False,
        "axes.formatter.use_mathtext": False,
        "font.family": ["DejaVu Sans"],
        "font.size": FONT,
        "text.color": INK,
        "axes.labelcolor": MUTED,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "axes.edgecolor": RULE,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "axes.unicode_minus": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "path.simplify": False,
    }
    quiet, level = logging.getLogger("matplotlib"), logging.getLogger("matplotlib").level
    buffer = io.StringIO()
    with matplotlib.rc_context(settings):
        quiet.setLevel(logging.ERROR)
        try:
            figure = Figure(figsize=(width / 72, height / 72), dpi=72)
            FigureCanvasSVG(figure)
            paint(figure)
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        finally:
            quiet.setLevel(level)
    return Markup(_tidy(buffer.getvalue(), key, width, height, title, alt))


def axes(figure: Any, left: float, bottom: float, right: float, top: float) -> Any:
    """Axes with margins in the figure's own units."""
    width, height = (72 * inches for inches in figure.get_size_inches())
    return figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    )


def _tidy(svg: str, key: str, width: float, height: float, title: str, alt: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.S)
    used = set(re.findall(r'(?:url\(#|href="#)([\w.]+)', svg))
    svg = re.sub(r"<[^>]+>", lambda tag: _tag(tag[0], key, used), svg)  # tags only: text stays as it was given
    body = svg[svg.index(">") + 1 : svg.rindex("</svg>")]
    body = re.sub(r">\s+<", "><", body).replace("\n", " ").strip()
    while "<g></g>" in body:
        body = body.replace("<g></g>", "")
    return (
        f'<svg class="plot" viewBox="0 0 {width:g} {height:g}" role="img" aria-labelledby="{key}-title {key}-desc">'
        f'<title id="{key}-title">{escape(title)}</title><desc id="{key}-desc">{escape(alt)}</desc>{body}</svg>'
    )


def _tag(tag: str, key: str, used: set[str]) -> str:
    tag = re.sub(r' id="([\w.]+)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", tag)
    tag = re.sub(r'(url\(#|href="#)([\w.]+)', rf"\g<1>{key}-\2", tag).replace("xlink:href", "href")
    tag = re.sub(r"font-family: (?:'[^']*'|[^;\"'])*; ?", "", tag)
    tag = re.sub(r' transform="rotate\(-?0 [^)]*\)"', "", tag)
    tag = re.sub(r' (d|x|y|width|height|transform)="([^"]*)"', lambda m: f' {m[1]}="{_short(m[2])}"', tag)
    for mark, name in _MARKS.items():
        tag = tag.replace(mark, f"var(--{name})")
    return tag


def _short(numbers: str) -> str:
    """Coordinates to a tenth of a unit: a third of the bytes, no visible difference."""
    return re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.1f}".removesuffix(".0"), numbers)
