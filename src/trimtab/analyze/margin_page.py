"""Margins as one self-contained HTML page: the points on two axes, and their silhouettes as bars; no script, no network.

Every string is data: it is escaped. Modes differ in shape as well as in colour.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

_SIZE, _PAD, _ROW = 320.0, 14.0, 96.0
_COLOURS = 6
_SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
_STYLE = """
:root{color-scheme:light dark;--ink:#1c1d20;--paper:#fff;--soft:#5d6068;--line:#d4d6db;--m0:#0b6e99;--m1:#b3401f;--m2:#3f7d2c;
--m3:#7a4fa3;--m4:#8a6d00;--m5:#a12f6b}
@media(prefers-color-scheme:dark){:root{--ink:#ececee;--paper:#17181b;--soft:#a2a5ad;--line:#3a3c42;--m0:#58b7e0;--m1:#f08a63;
--m2:#86c96f;--m3:#c09be6;--m4:#dcc05a;--m5:#ee83b6}}
body{margin:2rem auto;max-width:62rem;padding:0 1rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;margin:0 0 .3rem}h2{font-size:1.15rem;margin:2rem 0 .2rem;border-top:1px solid var(--line);padding-top:1rem}
p{margin:.2rem 0 .6rem;color:var(--soft)}
.plots{display:flex;flex-wrap:wrap;gap:1.5rem}
svg{width:20rem;max-width:100%;height:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
td,th{padding:.1rem .9rem .1rem 0;text-align:left;font-weight:400}th{color:var(--soft)}
.axis{stroke:var(--line);fill:none}.label{fill:var(--soft);font-size:11px}
"""


def page(told: Mapping[str, Any], title: str) -> str:
    """The page of what ``margin.json`` holds: a section for each set of points."""
    modes = told["modes"]
    by = ", ".join(f"{mode} ({told['asked'][mode]})" for mode in modes)
    body = "".join(_section(figure, modes) for figure in told["figures"])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>{html.escape(title)}</h1><p>Safety alignment margin: the mean silhouette of {told['prompts']} prompts, each "
        f"asked in {html.escape(by)}. 1: the modes lie far apart; 0: they overlap; below 0: points lie nearer to another "
        f"mode than to their own.</p>{body}</main></body></html>\n"
    )


def _section(figure: Mapping[str, Any], modes: Sequence[str]) -> str:
    what = "logits" if figure["layer"] is None else f"layer {figure['layer']}"
    heading = f"{what}, token {figure['token']}, {figure['distance']}"
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{part['value']:.3f}</td><td>{part['low']:.3f} to {part['high']:.3f}</td>"
        f"<td>{part['n']}</td></tr>"
        for name, part in figure["margins"].items()
        if part["n"]
    )
    table = f"<table><tr><th>of</th><th>margin</th><th>95 %</th><th>prompts</th></tr>{rows}</table>"
    return (
        f"<section><h2>{heading}</h2>{_legend(modes)}"
        f'<div class="plots">{_scatter(figure, modes)}{_bars(figure, modes)}{table}</div></section>'
    )


def _mark(mode: int, x: float, y: float, size: float = 3.5) -> str:
    """One point of a mode: its shape and its colour."""
    paint = f'style="fill:var(--m{mode % _COLOURS});fill-opacity:.65"'
    line = f'style="stroke:var(--m{mode % _COLOURS});stroke-width:1.4;fill:none"'
    a, b, c, d = (f"{v:.1f}" for v in (x - size, x + size, y - size, y + size))
    shape = _SHAPES[mode % len(_SHAPES)]
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" {paint}/>'
    if shape == "ring":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" {line}/>'
    if shape == "cross":
        return f'<path d="M{a} {c}L{b} {d}M{b} {c}L{a} {d}" {line}/>'
    corners = {
        "square": f"M{a} {c}H{b}V{d}H{a}Z",
        "triangle": f"M{x:.1f} {c}L{b} {d}H{a}Z",
        "diamond": f"M{x:.1f} {c}L{b} {y:.1f}L{x:.1f} {d}L{a} {y:.1f}Z",
    }
    return f'<path d="{corners[shape]}" {paint}/>'


def _legend(modes: Sequence[str]) -> str:
    signs = "".join(
        f'<span><svg style="width:14px" viewBox="0 0 14 14" aria-hidden="true">{_mark(m, 7, 7, 4)}</svg> '
        f"{html.escape(mode)} </span>"
        for m, mode in enumerate(modes)
    )
    return f"<p>{signs}</p>"


def _scatter(figure: Mapping[str, Any], modes: Sequence[str]) -> str:
    points = figure["points"]
    reach = max((abs(p[axis]) for p in points for axis in "xy"), default=0) or 1.0
    middle = _SIZE / 2
    scale = (middle - _PAD) / reach  # one scale for both axes: distances are what is looked at
    marks = "".join(_mark(modes.index(p["mode"]), middle + p["x"] * scale, middle - p["y"] * scale) for p in points)
    first, second = (f"{100 * share:.0f} %" for share in figure["variance"])
    return (
        f'<svg viewBox="0 0 {_SIZE:g} {_SIZE:g}" role="img" aria-label="Points on two principal axes, {len(points)} of them">'
        f'<path class="axis" d="M0 {middle:g}H{_SIZE:g}M{middle:g} 0V{_SIZE:g}"/>{marks}'
        f'<text class="label" x="{_SIZE - 4:g}" y="{middle - 4:g}" text-anchor="end">{first} of the variance</text>'
        f'<text class="label" x="{middle + 4:g}" y="11">{second}</text></svg>'
    )


def _bars(figure: Mapping[str, Any], modes: Sequence[str]) -> str:
    """Silhouettes of each mode, largest first, as one filled step line from 0."""
    height = _ROW * len(modes)
    zero, half = _SIZE / 2, _SIZE / 2 - _PAD
    parts = []
    for m, mode in enumerate(modes):
        values = sorted((p["s"] for p in figure["points"] if p["mode"] == mode), reverse=True)
        step = (_ROW - 10) / max(1, len(values))
        top = m * _ROW + 5
        path = "".join(f"H{zero + v * half:.1f}V{top + (i + 1) * step:.1f}" for i, v in enumerate(values))
        parts.append(
            f'<path d="M{zero:g} {top:g}{path}H{zero:g}Z" style="fill:var(--m{m % _COLOURS});fill-opacity:.65"/>'
            f'<text class="label" x="4" y="{top + 12:g}">{html.escape(mode)}</text>'
        )
    return (
        f'<svg viewBox="0 0 {_SIZE:g} {height + 16:g}" role="img" aria-label="Silhouettes from -1 to 1, by mode">'
        f'<path class="axis" d="M{zero:g} 0V{height:g}"/>{"".join(parts)}'
        f'<text class="label" x="{_PAD:g}" y="{height + 12:g}">-1</text>'
        f'<text class="label" x="{zero:g}" y="{height + 12:g}" text-anchor="middle">0</text>'
        f'<text class="label" x="{_SIZE - _PAD:g}" y="{height + 12:g}" text-anchor="end">1</text></svg>'
    )
