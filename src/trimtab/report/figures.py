"""The figures of a report: mode x behaviour matrices, loss curves and exposure (forest plots: ``forests.py``).

Each is small, about as wide as a phone, so that a page sets them side by side and a phone stacks them. A figure
carries its legend as data (the page draws it as text that wraps) and every number in it as rows for ``figures.csv``.
Curves are averaged in at most ``POINTS`` bins of tokens; the training logs keep every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from trimtab.report import format as fmt
from trimtab.report import svg
from trimtab.report.data import Matrix
from trimtab.report.view import Family, View

POINTS = 100
Point = tuple[float, float]


@dataclass(frozen=True)
class Legend:
    sign: Markup
    text: str


@dataclass
class Figure:
    """One drawn figure; ``key`` is its id on the page and in ``figures.csv``."""

    key: str
    title: str
    note: str
    svg: Markup
    legend: list[Legend] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)


def matrices(view: View) -> list[Figure]:
    """Mode asked x behaviour shown, one figure per arm and task; cells give the share and the count."""
    return [_matrix(view, matrix, f"m{i + 1}") for i, matrix in enumerate(view.data.matrices)]


def _matrix(view: View, matrix: Matrix, key: str) -> Figure:
    left, top, row = 76.0, 22.0, 38.0
    columns, height = len(matrix.behaviours), top + row * len(matrix.modes) + 4
    width = max(svg.WIDTH, left + 2 + 56 * columns)  # room for a behaviour's name
    totals = [sum(counts) for counts in matrix.counts]
    rows = []

    def paint(figure: Any) -> None:
        from matplotlib.patches import Rectangle

        ax = svg.axes(figure, 0, 0, 0, 0)
        ax.set_axis_off()
        ax.set_xlim(0, width)
        ax.set_ylim(height, 0)
        cell = (width - left - 2) / max(columns, 1)
        for j, behaviour in enumerate(matrix.behaviours):
            text = fmt.one_line(behaviour, max(6, int(cell / 5.7)))
            ax.text(left + cell * (j + 0.5), top - 8, text, ha="center", color=svg.MUTED, size=svg.FONT - 1)
        for i, mode in enumerate(matrix.modes):
            y = top + row * i
            ax.text(left - 8, y + row / 2 - 2, fmt.one_line(mode, 13), ha="right", color=svg.INK)
            ax.text(left - 8, y + row / 2 + 11, f"n {totals[i]}", ha="right", color=svg.MUTED, size=svg.FONT - 1.5)
            for j, count in enumerate(matrix.counts[i]):
                x, part = left + cell * j, count / totals[i] if totals[i] else 0.0
                box: Any = {"xy": (x + 1, y + 1), "width": cell - 2, "height": row - 2}
                ax.add_patch(Rectangle(**box, facecolor=svg.series(0), alpha=round(0.5 * part, 3), lw=0))
                ax.add_patch(Rectangle(**box, facecolor="none", edgecolor=svg.RULE, lw=0.8))
                weight = "bold" if part >= 0.5 else "normal"
                text = f"{fmt.percent(part)}{fmt.NBSP}%" if totals[i] else "–"
                ax.text(x + cell / 2, y + row / 2 + 4, text, ha="center", color=svg.INK, weight=weight)

    for i, mode in enumerate(matrix.modes):
        for j, behaviour in enumerate(matrix.behaviours):
            part = matrix.counts[i][j] / totals[i] if totals[i] else math.nan
            rows.append(
                {
                    "section": "matrix",
                    "figure": key,
                    "arm": matrix.arm,
                    "task": matrix.task,
                    "mode": mode,
                    "series": behaviour,
                    "value": part,
                    "n": totals[i],
                    "x": matrix.counts[i][j],
                }
            )
    title = f"{view.family(matrix.arm).label}: {matrix.task}"
    spoken = "; ".join(
        f"{mode} asked: " + ", ".join(f"{c} of {totals[i]} {b}" for b, c in zip(matrix.behaviours, matrix.counts[i]))
        for i, mode in enumerate(matrix.modes)
    )
    alt = fmt.visible(f"Rows: mode asked. Columns: behaviour shown. {spoken}.")
    return Figure(key, fmt.visible(title), "", svg.draw(key, height, paint, fmt.visible(title), alt, width), rows=rows)


@dataclass(frozen=True)
class Line:
    """One curve; ``place`` picks colour and dashes. Several seeds of an arm are several runs of one line."""

    label: str
    place: int
    runs: Sequence[tuple[str, Sequence[Point]]]


def losses(view: View) -> tuple[list[Figure], list[Figure]]:
    """Loss over tokens: (all arms of a group together, each arm by source and by span), per training stage.

    Arms that share a step share its log; such a curve is drawn once and named after all of them.
    """
    together: list[Figure] = []
    apart: list[Figure] = []
    curves = view.data.curves
    places = _places(
        name for rows in curves.values() for row in rows for kind in _KINDS for name in row.get(kind) or {}
    )
    drawn: list[Any] = []
    for stage in dict.fromkeys(str(row.get("stage") or "") for rows in curves.values() for row in rows):
        for group, name, families, leads in _units(view):
            lines, runs_of = [], []
            for members in _alike(families, lambda f, s=stage: [_rows(view, i, s) for i in f.ids]):  # type: ignore[misc]
                runs = [(i, _points(_rows(view, i, stage), lambda r: r.get("loss"))) for i in members[0].ids]
                label = _names(members, families) + (" (one run)" if len(members) > 1 else "")
                place = families.index(members[0]) if name else members[0].colour
                lines.append(Line(label, place, [(i, points) for i, points in runs if points]))
                runs_of.append([points for _, points in runs])
            lines = [line for line in lines if line.runs]
            if lines and not (name and runs_of in drawn):  # series of several groups may share their pretraining
                drawn.append(runs_of)
                title = " · ".join(p for p in (group, name, stage) if p)
                where, letter = (together, "l") if leads else (apart, "o")
                where.append(
                    _curves(f"{letter}{len(where) + 1}", f"Loss: {title}", "all training tokens", lines, group)
                )
        for kind, words in _KINDS.items():
            kin = _alike(view.families, lambda f, s=stage: _rows(view, f.id, s))  # type: ignore[misc]
            parts = [
                (members, _parts(_rows(view, members[0].id, stage), kind, members[0].id, places)) for members in kin
            ]
            bounds = _span(line for _, some in parts for line in some)  # one scale, so that arms can be compared
            for members, some in parts:
                if some:
                    first = members[0]
                    seed = f", seed {first.arms[0].seed}" if len(first.arms) > 1 else ""
                    title = " · ".join(p for p in (first.label, stage) if p)
                    note = f"{words}{seed}{_shared_with(members)}"
                    apart.append(_curves(f"s{len(apart) + 1}", title, note, some, first.group, bounds))
    return together, apart


def _alike(families: Sequence[Family], rows_of: Callable[[Family], Any]) -> list[list[Family]]:
    """Families with the same rows, together; those without rows are left out."""
    found: list[tuple[Any, list[Family]]] = []
    for family in families:
        rows = rows_of(family)
        if not any(rows):
            continue
        members = next((members for known, members in found if known == rows), None)
        if members is None:
            found.append((rows, [family]))
        else:
            members.append(family)
    return [members for _, members in found]


FEW = 4
"""Names of arms at most that a figure lists."""


def _units(view: View) -> list[tuple[str, str, list[Family], bool]]:
    """(group, series, families, whether it is drawn first): the arms whose losses share a figure. Of the prefix lever each
    series by itself, that of the heaviest model first; else all arms of a group."""
    found: list[tuple[str, str, list[Family], bool]] = []
    for group in view.groups:
        told = [(name, arm) for where, name, arm in view.of_series if where == group]
        names = list(dict.fromkeys(name for name, _ in told))
        found += [
            (group, name or "all ratios", [view.family(arm) for n, arm in told if n == name], name == names[-1])
            for name in names
        ]
        rest = [f for f in view.members(group) if f.id not in {arm for _, arm in told}]
        if rest:
            found.append((group, "", rest, True))
    return found


def _names(members: Sequence[Family], families: Sequence[Family]) -> str:
    if len(members) == len(families) > FEW:
        return "all of them"
    some = ", ".join(f.label for f in members[:FEW])
    return f"{some} and {len(members) - FEW} more" if len(members) > FEW else some


def _shared_with(members: Sequence[Family]) -> str:
    return f"; the same run for {_names(members[1:], [])}" if len(members) > 1 else ""


_KINDS = {"by_source": "loss by source", "by_span": "loss by span"}


def _rows(view: View, arm: str, stage: str | None = None) -> list[dict[str, Any]]:
    rows = view.data.curves.get(arm, [])
    return rows if stage is None else [r for r in rows if str(r.get("stage") or "") == stage]


def _parts(rows: list[dict[str, Any]], kind: str, arm: str, places: Mapping[str, int]) -> list[Line]:
    names = [n for n in places if any(n in (row.get(kind) or {}) for row in rows)]
    lines = []
    for name in names:
        points = _points(rows, lambda r, n=name: (r.get(kind, {}).get(n) or {}).get("loss"))  # type: ignore[misc]
        if points:
            lines.append(Line(name, places[name], [(arm, points)]))
    return lines


def _points(rows: Sequence[Mapping[str, Any]], pick: Callable[[Mapping[str, Any]], Any]) -> list[Point]:
    """(tokens, mean loss) in at most POINTS bins of equal token width; rows without a finite loss are left out."""
    raw = [(float(r["tokens"]), float(v)) for r in rows if isinstance(v := pick(r), (int, float)) and math.isfinite(v)]
    if len(raw) <= POINTS:
        return raw
    first, last = raw[0][0], max(raw[-1][0], raw[0][0] + 1)
    bins: dict[int, list[Point]] = {}
    for x, y in raw:
        bins.setdefault(min(POINTS - 1, int((x - first) / (last - first) * POINTS)), []).append((x, y))
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for _, b in sorted(bins.items())]


def _span(lines: Iterable[Line]) -> Point:
    """Lowest and highest value of some curves."""
    values = [y for line in lines for _, points in line.runs for _, y in points] or [0.0]
    return min(values), max(values)


def _curves(key: str, title: str, note: str, lines: Sequence[Line], group: str, bounds: Point | None = None) -> Figure:
    height = 210.0
    low, high = bounds or _span(lines)

    def paint(figure: Any) -> None:
        ax = svg.axes(figure, 42, 34, 10, 8)
        for line in lines:
            for _, points in line.runs:
                xs, ys = [p[0] for p in points], [p[1] for p in points]
                mark = "o" if len(points) == 1 else None
                ax.plot(xs, ys, color=svg.series(line.place), ls=svg.linestyle(line.place), lw=1.7, marker=mark)
        _token_axes(ax)
        ax.set_ylim(max(0.0, low - 0.08 * (high - low)) if low >= 0 else low, high + 0.05 * (high - low) + 1e-9)

    ends = "; ".join(
        f"{line.label}: {fmt.number(line.runs[0][1][0][1])} to {fmt.number(line.runs[0][1][-1][1])}" for line in lines
    )
    alt = fmt.visible(f"Training loss in nats per token against training tokens, first to last. {ends}.")
    rows = [
        {
            "section": "loss",
            "figure": key,
            "arm": arm,
            "group": group,
            "series": line.label,
            "x": x,
            "value": y,
            "metric": note,
        }
        for line in lines
        for arm, points in line.runs
        for x, y in points
    ]
    legend = [Legend(svg.swatch(line.place, "line"), line.label) for line in lines]
    title = fmt.visible(title)
    return Figure(key, title, note, svg.draw(key, height, paint, title, alt), legend, rows)


def exposures(view: View) -> list[Figure]:
    """Share of each source in what was read, over training tokens, on the same axes; equal arms share one figure."""
    places = _places(name for rows in view.data.exposure.values() for row in rows for name in row["shares"])
    end = max((float(r["tokens"]) for rows in view.data.exposure.values() for r in rows), default=1.0)
    figures: list[Figure] = []
    arms = {f.id: next((i for i in f.ids if view.data.exposure.get(i)), "") for f in view.families}
    for members in _alike(view.families, lambda f: view.data.exposure.get(arms[f.id], [])):
        arm = arms[members[0].id]
        figures.append(_exposure(f"e{len(figures) + 1}", members, arm, view.data.exposure[arm], places, end))
    return figures


def _exposure(
    key: str,
    members: Sequence[Family],
    arm: str,
    rows: Sequence[Mapping[str, Any]],
    places: Mapping[str, int],
    end: float,
) -> Figure:
    family = members[0]
    names = [n for n in places if any(n in r["shares"] for r in rows)]
    ends = [float(r["tokens"]) for r in rows]
    stack = [[float(r["shares"].get(n, 0.0)) for r in rows] for n in names]

    def paint(figure: Any) -> None:
        ax = svg.axes(figure, 42, 34, 10, 8)
        edges = [0.0, *ends]
        bottom = [0.0] * len(rows)
        for name, shares in zip(names, stack):
            top = [a + b for a, b in zip(bottom, shares)]
            # one polygon of steps: each interval is flat, as the mixture is within it
            ax.stairs(top, edges, baseline=bottom, fill=True, color=svg.series(places[name]), lw=0)
            ax.stairs(top, edges, baseline=None, color=svg.PAPER, lw=0.8)
            bottom = top
        ax.set_xlim(0, end)
        ax.set_ylim(0, max(1.0, *bottom))
        _token_axes(ax, grid=False)
        ax.set_yticks([0, 0.5, 1], [f"0{fmt.NBSP}%", f"50{fmt.NBSP}%", f"100{fmt.NBSP}%"])

    width = [b - a for a, b in zip([0.0, *ends], ends)]
    means = {n: sum(s * w for s, w in zip(stack[i], width)) / max(sum(width), 1e-9) for i, n in enumerate(names)}
    spoken = ", ".join(f"{name} {fmt.percent(mean)} %" for name, mean in means.items())
    alt = fmt.visible(f"Stacked shares of the sources over training tokens. Over the whole budget: {spoken}.")
    table = [
        {
            "section": "exposure",
            "figure": key,
            "arm": arm,
            "label": ", ".join(f.label for f in members),
            "group": family.group,
            "series": name,
            "x": x,
            "value": v,
        }
        for name, shares in zip(names, stack)
        for x, v in zip(ends, shares)
    ]
    legend = [Legend(svg.swatch(places[n], "area"), f"{n}, {fmt.percent(means[n])}{fmt.NBSP}%") for n in names]
    title = fmt.visible(family.label)
    note = _shared_with(members).removeprefix("; ")
    return Figure(key, title, note, svg.draw(key, 190, paint, f"Exposure: {title}", alt), legend, table)


def _places(names: Iterator[str]) -> dict[str, int]:
    """A colour place for every name, by first appearance, the same in every figure."""
    return {name: i for i, name in enumerate(dict.fromkeys(names))}


def _token_axes(ax: Any, grid: bool = True) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(4, min_n_ticks=2))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: fmt.si(v)))
    ax.yaxis.set_major_locator(MaxNLocator(4))
    ax.set_xlabel("training tokens", size=svg.FONT - 1)
    ax.tick_params(length=3, color=svg.RULE, labelsize=svg.FONT - 0.5)
    if grid:
        ax.grid(axis="y", color=svg.RULE, lw=0.8)
        ax.set_axisbelow(True)
