"""The drawings of the section on modes: margins as bars, points in two dimensions, and risk over further finetuning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from trimtab.report import format as fmt
from trimtab.report import svg
from trimtab.report.figures import Figure, Legend
from trimtab.report.modedata import BASE, ModeFigure
from trimtab.report.modepage import (
    ABSENT,
    CAPABILITY_COLUMNS,
    FALLBACK_COLUMNS,
    Cell,
    Row,
    Shown,
    Table,
    attacks,
    audit,
    cell_of,
    cost,
    margins,
    paper,
    yields,
)
from trimtab.report.view import View

ROW, FOOT = 32.0, 26.0
_BY = {"reserved": "token", "string": "string", "words": "instruction"}
_MARKS = ("o", "s", "^", "D", "v")


def bars(shown: Shown) -> list[Figure]:
    """The margin of every arm, one figure per margin."""
    found: list[Figure] = []
    for name in dict.fromkeys(r for t, _, r, _ in shown.by if t == "margin"):
        told = [(arm, f) for arm in shown.arms if (f := shown.by.get(("margin", arm.arm, name, "all"))) is not None]
        lines = [(arm.label, f) for arm, f in told if not math.isnan(f.value)]
        if lines:
            found.append(_bars(f"mg{len(found) + 1}", name, lines))
    return found


def _bars(key: str, name: str, lines: Sequence[tuple[str, ModeFigure]]) -> Figure:
    height = 6 + ROW * len(lines) + FOOT
    ends = [v for _, f in lines for v in (0.0, f.value, f.low, f.high) if not math.isnan(v)]
    low, high = min(ends), max(ends)
    room = 0.06 * (high - low or 1.0)

    def paint(figure: Any) -> None:
        ax = svg.axes(figure, 6, FOOT, 6, 2)
        ax.set_xlim(low - (room if low < 0 else 0), high + room)
        ax.set_ylim(height - FOOT - 2, 0)
        wide = ax.get_yaxis_transform()
        for i, (label, f) in enumerate(lines):
            y = 4 + ROW * i
            text = cell_of(f).text.rstrip("*") + (
                "" if math.isnan(f.low) else f" [{cell_of(f).sub.replace(' to ', ', ')}]"
            )
            ax.text(0, y + 9, fmt.one_line(label, 34), transform=wide, color=svg.INK)
            ax.text(1, y + 9, text, transform=wide, color=svg.INK, ha="right")
            ax.barh(y + 20, f.value, height=8, color=svg.series(0), alpha=0.75)
            if not math.isnan(f.low):
                ax.plot([f.low, f.high], [y + 20, y + 20], color=svg.INK, lw=1.4, solid_capstyle="butt")
        ax.axvline(0, color=svg.INK, lw=0.8)
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
        ax.tick_params(axis="x", length=0, pad=5)
        ax.get_xticklabels()[0].set_ha("left")
        ax.grid(axis="x", color=svg.RULE, lw=0.8)
        ax.set_axisbelow(True)

    alt = "; ".join(f"{label}: {fmt.number(f.value, 3)}, n {f.n}" for label, f in lines)
    title = fmt.visible(f"Safety alignment margin: {name}")
    drawn = svg.draw(key, height, paint, title, fmt.visible(f"Bars per arm. {alt}."))
    return Figure(key, title, "mean silhouette; lines: 95 % intervals", drawn)


def projections(shown: Shown) -> tuple[list[Legend], list[Figure]]:
    """The points of each arm in two dimensions, coloured and shaped by mode; the legend that all share."""
    told = shown.view.data.projections
    modes = list(dict.fromkeys(p[0] for one in told for p in one["points"]))
    legend = [Legend(svg.mark(modes.index(m), _MARKS[modes.index(m) % len(_MARKS)]), m) for m in modes]
    return legend, [_projection(shown, f"mp{i + 1}", one, modes) for i, one in enumerate(told)]


def _projection(shown: Shown, key: str, one: dict[str, Any], modes: Sequence[str]) -> Figure:
    height, width = 215.0, 255.0
    label = shown.view.family(one["arm"]).label
    variance = [v for v in one["variance"] if isinstance(v, float | int)]
    asked = sorted(set(one["asked"].values()))

    def paint(figure: Any) -> None:
        ax = svg.axes(figure, 4, 4, 4, 4)
        for i, mode in enumerate(modes):
            mine = [p for p in one["points"] if p[0] == mode]
            ax.plot(
                [p[2] for p in mine], [p[3] for p in mine], ls="", marker=_MARKS[i % len(_MARKS)], ms=5.5, mew=0.5,
                color=svg.series(i), alpha=0.7, mec=svg.PAPER,
            )  # fmt: skip
        ax.set_xticks([])
        ax.set_yticks([])
        for side in ("top", "right"):
            ax.spines[side].set_visible(True)

    counts = ", ".join(f"{mode} {sum(p[0] == mode for p in one['points'])}" for mode in modes)
    alt = fmt.visible(f"Points by mode in two dimensions: {counts}.")
    share = f"{fmt.percent(sum(variance[:2]))} % of the variance" if variance else ""
    note = "; ".join(p for p in (f"asked by {', '.join(_BY.get(a, a) for a in asked)}" if asked else "", share) if p)
    title = fmt.visible(label)
    rows = [
        {"section": "projection", "figure": key, "arm": one["arm"], "mode": p[0], "task": p[1], "series": one["name"], "x": p[2],
         "value": p[3], "metric": "place in two dimensions"}
        for p in one["points"]
    ]  # fmt: skip
    return Figure(key, title, note, svg.draw(key, height, paint, title, alt, width), rows=rows)


def tampering(shown: Shown) -> list[Figure]:
    """Risk over the steps of further finetuning, a line per arm: hostile, then benign; without a token, then in positive
    mode."""
    found: list[Figure] = []
    for kind in ("hostile", "benign"):
        for column in ("without a token", "in positive mode"):
            lines = []
            for i, arm in enumerate(shown.arms):
                mine = [f for (t, a, _, c), f in shown.by.items() if (t, a, c) == (f"tamper {kind}", arm.arm, column)]
                points = sorted((f for f in mine if not math.isnan(f.value)), key=lambda f: f.x or 0.0)
                if len(points) > 1:
                    lines.append((i, arm.label, points))
            if lines:
                found.append(_tamper(f"mt{len(found) + 1}", kind, column, lines))
    return found


def _tamper(key: str, kind: str, column: str, lines: Sequence[tuple[int, str, Sequence[ModeFigure]]]) -> Figure:
    height = 215.0
    widest = max(f.x or 0.0 for _, _, points in lines for f in points) or 1.0

    def paint(figure: Any) -> None:
        ax = svg.axes(figure, 42, 34, 10, 8)
        for n, (place, _, points) in enumerate(lines):
            shift = 0.008 * widest * (n - (len(lines) - 1) / 2)  # beside each other, so that no interval is hidden
            xs = [(f.x or 0.0) + shift for f in points]
            ax.plot(
                xs,
                [f.value for f in points],
                color=svg.series(place),
                ls=svg.linestyle(place),
                lw=1.7,
                marker="o",
                ms=4,
            )
            for x, f in zip(xs, points):
                if not math.isnan(f.low):
                    ax.plot([x, x], [f.low, f.high], color=svg.series(place), lw=1.1, solid_capstyle="butt")
        ax.set_ylim(-0.02, 1.02)
        ax.set_yticks([0, 0.5, 1], [f"0{fmt.NBSP}%", f"50{fmt.NBSP}%", f"100{fmt.NBSP}%"])
        ax.set_xlabel("steps of finetuning", color=svg.MUTED)
        ax.grid(axis="y", color=svg.RULE, lw=0.8)
        ax.set_axisbelow(True)

    ends = "; ".join(
        f"{label}: {fmt.percent(points[0].value)} to {fmt.percent(points[-1].value)} %" for _, label, points in lines
    )
    alt = fmt.visible(f"Risk rate against steps of {kind} finetuning, first to last. {ends}.")
    title = f"{kind.capitalize()} finetuning: risk {column}"
    legend = [Legend(svg.swatch(place, "line"), label) for place, label, _ in lines]
    return Figure(
        key, title, "harmful prompts; lines: 95 % intervals", svg.draw(key, height, paint, title, alt), legend
    )


# -- the section ---------------------------------------------------------------------------------------------------------


def section(view: View, matrices: Sequence[Figure]) -> dict[str, Any] | None:
    """All that the section on modes shows; None for a study without modes."""
    shown = Shown(view)
    if not shown.arms:
        return None
    by_arm: dict[str, list[Figure]] = {}
    start = {arm.arm for arm in shown.arms if arm.form == BASE}  # what is co-trained is shown first
    for matrix, figure in sorted(zip(view.data.matrices, matrices, strict=True), key=lambda pair: pair[0].arm in start):
        by_arm.setdefault(view.family(matrix.arm).label, []).append(figure)
    legend, points = projections(shown)
    classes = {c: (c.capitalize(), "% that fit") for c in shown.columns("fidelity")}
    policies = {c: (c.split(": ")[0], metric_name(view, c.split(": ")[1]) + ", %") for c in shown.columns("policy")}
    by_mode = "Mean over seeds with 95 % intervals."
    told = [(arm.label, ", ".join(p for p in (arm.told or arm.form, f"stage {arm.stage}") if p)) for arm in shown.arms]
    return {
        "arms": told, "paper": paper(shown), "matrices": list(by_arm.items()), "cost": cost(shown),
        "bars": bars(shown), "legend": legend, "projections": points, "margins": margins(shown),
        "audit": audit(shown),
        "attacks": attacks(shown),
        "tampering": tampering(shown), "yields": yields(shown),
        "fidelity": shown.per_row("fidelity", classes, "Switch fidelity", by_mode, "Asked with"),
        "fallback": shown.per_row("fallback", FALLBACK_COLUMNS, "Fallback", by_mode, "Asked with"),
        "capability": shown.per_row("capability", CAPABILITY_COLUMNS, "Capability and over-refusal", by_mode, "Asked with"),
        "policies": shown.per_row("policy", policies, "By policy", by_mode, "Asked with"),
    }  # fmt: skip


def metric_name(view: View, metric: str) -> str:
    return view.label(metric).removesuffix(" score")


def fidelity(view: View) -> Table | None:
    """Of evaluations: switch fidelity of each model and mode, over all plain prompts and by task."""
    mine = [m for m in view.measures if m.metric == "switch_fidelity" and view.scope(m) in ("all", "task")]
    if view.data.kind == "study" or not mine:
        return None
    rows = []
    for column in (c for group in view.groups for c in view.columns(group)):
        cells = [view.cell(measure, column) for measure in mine]
        if any(cells):
            rows.append(Row(column.family.label, column.mode or "no mode", [_evaluated(cell) for cell in cells]))
    heads = [("All", "% that fit") if view.scope(m) == "all" else (view.place(m.category), "% that fit") for m in mine]
    return Table("Switch fidelity", "Plain prompts; 95 % intervals beneath.", heads, [("", rows)], "Model and mode")


def _evaluated(cell: Any) -> Cell:
    if cell is None:
        return ABSENT
    if not cell.scored:
        return Cell("not scored", "", ", ".join(cell.notes), True)
    ends = f"{fmt.percent(cell.low)} to {fmt.percent(cell.high)}"
    return Cell(f"{fmt.percent(cell.value)}{'*' if cell.small else ''}", ends, ", ".join(cell.notes))
