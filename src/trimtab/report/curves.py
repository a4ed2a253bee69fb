"""Ratio curves drawn and tabled: for each arm group its figures, what the whole way of the ratio bought, and every value."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.report import format as fmt
from trimtab.report import svg
from trimtab.report.data import RatioCurve
from trimtab.report.figures import Figure, Legend
from trimtab.report.grids import WIDE, Grid, Shown
from trimtab.report.view import View

HEIGHT, DODGE, LINE = 214.0, 2.4, 12.5
"""Of a figure; percent of the ratio between the points of neighbouring series; between labels at the lines' ends."""
LABEL = 16
"""Characters of a label at a line's end; the legend has the whole."""
TRAINING = "training"


@dataclass(frozen=True)
class Group:
    """One arm group's part of the section: figures that lead and further ones, and its tables."""

    name: str
    leading: Sequence[Figure]
    further: Sequence[Figure]
    bought: Sequence[Mapping[str, Any]]
    bought_further: Sequence[Mapping[str, Any]]
    values: Sequence[Grid]


def groups(view: View) -> list[Group]:
    """The section on ratios, an entry for each arm group that varies them."""
    found = []
    curves = view.data.ratios
    count = 0
    for name in dict.fromkeys(c.group for c in curves):
        mine = [c for c in curves if c.group == name]
        lead = _leading(mine)
        leading: list[Figure] = []
        further: list[Figure] = []
        for key in dict.fromkeys(map(_key, mine)):
            some = [c for c in mine if _key(c) == key and c.pooled == 1]
            if some:
                count += 1
                same = [c for c in mine if c.metric == some[0].metric and c.pooled == 1]
                drawn = _figure(f"r{count}", some, _bounds(same), _order(mine))
                (leading if key in lead else further).append(drawn)
        rows = [(_key(c) in lead, _row(c)) for c in sorted(mine, key=lambda c: (-c.pooled,))]
        found.append(Group(
            name, leading, further, [r for first, r in rows if first], [r for first, r in rows if not first],
            _grids(mine),
        ))  # fmt: skip
    return found


def _key(c: RatioCurve) -> tuple[str, str, str, str | None]:
    return c.metric, c.task, c.place, c.mode


def _leading(mine: Sequence[RatioCurve]) -> set[tuple[str, str, str, str | None]]:
    """What a group's figures and table begin with: Safe@1, or accuracy where nothing harmful was asked."""
    first = "safe_at_1" if any(c.metric == "safe_at_1" for c in mine) else "accuracy"
    found = {_key(c) for c in mine if c.metric == first}
    return found or {_key(c) for c in mine}


def _order(mine: Sequence[RatioCurve]) -> list[str]:
    """The single series of a group: their place picks colour and dashes in all its figures."""
    return list(dict.fromkeys(c.series for c in mine if c.pooled == 1))


def _bounds(curves: Sequence[RatioCurve]) -> tuple[float, float]:
    """One scale for a metric of a group: all values and ends of intervals, at least a fifth of the range for a share."""
    told = [v for c in curves for some in (c.values, c.low, c.high) for v in some if math.isfinite(v)]
    low, high = min(told, default=0.0), max(told, default=1.0)
    room = 0.06 * (high - low) or 0.05
    low, high = low - room, high + room
    if all(c.share for c in curves):
        middle = (low + high) / 2
        low, high = min(low, middle - 0.1), max(high, middle + 0.1)
        return max(-0.02, low), min(1.02, high)
    return low, high


def _figure(key: str, curves: Sequence[RatioCurve], bounds: tuple[float, float], order: Sequence[str]) -> Figure:
    first = curves[0]
    labels = {c.series: fmt.one_line(c.series, LABEL) for c in curves} if len(curves) > 1 else {}
    right = 12.0 + 7.0 * max((len(text) for text in labels.values()), default=0)

    def paint(figure: Any) -> None:
        ax = svg.axes(figure, 42, 34, right, 8)
        for c in curves:
            place = order.index(c.series)
            colour, shift = svg.series(place), DODGE * (order.index(c.series) - (len(order) - 1) / 2)
            xs = [100 * r + shift for r in c.ratios]
            ax.plot(xs, c.values, color=colour, ls=svg.linestyle(place), lw=1.7, marker="o", ms=4.5, zorder=3)
            for x, low, high in zip(xs, c.low, c.high):
                if math.isfinite(low) and high > low:
                    ax.plot([x, x], [low, high], color=colour, lw=1.5, alpha=0.75, solid_capstyle="butt", zorder=2)
        _axes(ax, curves, bounds)
        if labels:
            _ends(ax, curves, labels, order, bounds)

    title = fmt.visible(" · ".join(p for p in (_sentence_case(first.label), first.task) if p))
    left = sum(c.unscored for c in curves)
    note = "; ".join(p for p in (
        first.place, first.mode or "",
        {"higher": "higher is better", "lower": "lower is better"}.get(first.direction, ""),
        f"n {first.n}" if first.n else "", f"{first.seeds} seed{'s' if first.seeds != 1 else ''}",
            f"{left} answers unscored" if left else "",
    ) if p)  # fmt: skip
    spoken = "; ".join(f"{c.series or c.group}: {', '.join(_said(c))}" for c in curves)
    alt = fmt.visible(f"{first.label} against the ratio of prefixed training answers, with 95 % intervals. {spoken}.")
    legend = [Legend(svg.swatch(order.index(c.series), "line"), c.series or c.group) for c in curves]
    drawn = svg.draw(key, HEIGHT, paint, f"{title} · {first.place}", alt)
    return Figure(key, title, note, drawn, legend if len(curves) > 1 else [])


def _said(c: RatioCurve) -> list[str]:
    return [f"{100 * r:g} %: {_plain(v, c.share)}" for r, v in zip(c.ratios, c.values)]


def _sentence_case(text: str) -> str:
    return text[:1].upper() + text[1:]


def _axes(ax: Any, curves: Sequence[RatioCurve], bounds: tuple[float, float]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ratios = sorted({r for c in curves for r in c.ratios})
    ax.set_xticks([100 * r for r in ratios], [f"{100 * r:g}" for r in ratios])
    ax.set_xlim(100 * ratios[0] - 7, 100 * ratios[-1] + 7)
    ax.set_ylim(*bounds)
    ax.yaxis.set_major_locator(MaxNLocator(5))
    share = curves[0].share
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.0f}{fmt.NBSP}%" if share else fmt.number(v)))
    ax.set_xlabel("answers with a prefix in training, %", size=svg.FONT - 1)
    ax.tick_params(length=3, color=svg.RULE, labelsize=svg.FONT - 0.5)
    ax.grid(axis="y", color=svg.RULE, lw=0.8)
    ax.set_axisbelow(True)


def _ends(
    ax: Any, curves: Sequence[RatioCurve], labels: Mapping[str, str], order: Sequence[str], bounds: tuple[float, float]
) -> None:
    """A label at each line's end, pushed apart where they would lie on each other."""
    unit = (bounds[1] - bounds[0]) / (HEIGHT - 42)  # of the axis, per unit of the figure
    told = sorted(curves, key=lambda c: c.values[-1])
    at = [c.values[-1] for c in told]
    for i in range(1, len(at)):
        at[i] = max(at[i], at[i - 1] + LINE * unit)
    over = max(0.0, at[-1] - bounds[1] + 4 * unit)
    at = [y - over for y in at]
    for i in range(len(at) - 2, -1, -1):
        at[i] = min(at[i], at[i + 1] - LINE * unit)
    for c, y in zip(told, at):
        colour = svg.series(order.index(c.series))
        ax.text(
            1.02,
            y,
            labels[c.series],
            transform=ax.get_yaxis_transform(),
            color=colour,
            size=svg.FONT - 0.5,
            va="center",
        )


# -- tables ------------------------------------------------------------------------------------------------------------


def _plain(value: float, share: bool) -> str:
    return f"{fmt.percent(value)}{fmt.NBSP}%" if share else fmt.number(value)


def _row(c: RatioCurve) -> dict[str, Any]:
    """A row of "what the way from the lowest ratio to the highest bought"."""
    trend, ends = c.trend, c.ends
    adjusted = trend.get("p_holm")
    clear = adjusted is not None and adjusted < 0.05
    value = trend["difference"]
    reading = "no clear trend"
    if math.isnan(trend["low"]):
        reading = "one seed: no interval" if c.seeds < 2 else "no interval"
    elif clear and value:
        reading = "rises" if value > 0 else "falls"
        better = {"higher": 1, "lower": -1}.get(c.direction, 0)
        reading += "" if not better else ": better" if value * better > 0 else ": worse"
    elif trend["low"] > 0 or trend["high"] < 0:
        reading = "clear of zero alone, not after adjustment"
    best = c.best
    return {
        "what": c.label, "where": " · ".join(p for p in (c.task, c.place, c.mode or "") if p), "series": c.series,
        "pooled": c.pooled > 1, "from": _plain(c.values[0], c.share), "to": _plain(c.values[-1], c.share),
        "span": f"{100 * c.ratios[0]:g} to {100 * c.ratios[-1]:g}{fmt.NBSP}%", "ends": _change(ends, c.share),
        "trend": _change(trend, c.share), "p": fmt.p_value(trend["p"]), "p_holm": fmt.p_value(adjusted),
        "n": trend["n"] or "–", "seeds": trend["seeds"], "unscored": c.unscored, "shape": c.shape if len(c.ratios) > 2 else "–",
        "best": "–" if best is None or len(c.ratios) < 3 else f"{100 * best:g}{fmt.NBSP}%", "reading": reading,
        "is_clear": clear,
    }  # fmt: skip


def _change(f: Mapping[str, Any], share: bool) -> str:
    if math.isnan(f["difference"]):
        return "not measured"
    if math.isnan(f["low"]):
        said = fmt.difference(f["difference"], f["difference"], f["difference"], share)
        return said.split(" [")[0]
    return fmt.difference(f["difference"], f["low"], f["high"], share)


def _grids(mine: Sequence[RatioCurve]) -> list[Grid]:
    """Every value of a group: for each metric a table with its groups of prompts and series down, places and ratios across."""
    found = []
    for metric in dict.fromkeys(c.metric for c in mine if c.place != TRAINING):
        told = [c for c in mine if c.metric == metric and c.place != TRAINING]
        ratios = sorted({r for c in told for r in c.ratios})
        places = list(dict.fromkeys(c.place for c in told))
        each = max(1, WIDE // len(ratios))
        for i in range(0, len(places), each):
            some = places[i : i + each]
            found.append(_grid(told, some, ratios))
    return found


def _grid(told: Sequence[RatioCurve], places: Sequence[str], ratios: Sequence[float]) -> Grid:
    sections = []
    for task, mode in dict.fromkeys((c.task, c.mode) for c in told):
        rows = []
        for series in dict.fromkeys(c.series for c in told if (c.task, c.mode) == (task, mode)):
            mine = {c.place: c for c in told if (c.task, c.mode, c.series) == (task, mode, series)}
            cells = [_cell(mine.get(place), ratio) for place in places for ratio in ratios]
            if any(cells):
                one = next(iter(mine.values()))
                ns = sorted({c.n for c in mine.values()})
                n = "–".join(map(str, dict.fromkeys((ns[0], ns[-1]))))
                beside = f"n {n}, {one.seeds} seed{'s' if one.seeds != 1 else ''}"
                rows.append((series or one.group, beside, cells))
        sections.append((" · ".join(p for p in (task, mode or "") if p), rows))
    heads = [(place, len(ratios)) for place in places]
    columns = [(f"{100 * r:g} %", "") for _ in places for r in ratios]
    note = {"higher": "higher is better", "lower": "lower is better"}.get(told[0].direction, "")
    return Grid(_sentence_case(told[0].label), note, heads, columns, sections, told[0].metric)


def _cell(c: RatioCurve | None, ratio: float) -> Shown | None:
    if c is None or ratio not in c.ratios:
        return None
    i = c.ratios.index(ratio)
    value, low, high = c.values[i], c.low[i], c.high[i]
    shade = {"higher": -value, "lower": value}.get(c.direction, 0.0)
    return Shown(fmt.percent(value), f"{fmt.percent(low)}–{fmt.percent(high)}", round(shade, 3))


def rows(curves: Iterable[RatioCurve]) -> Iterable[dict[str, Any]]:
    """Rows of ``figures.csv``: every point ("ratio"), every trend and every difference of the ends."""
    for c in curves:
        shared = {
            "group": c.group, "label": c.series, "stage": c.place, "mode": c.mode, "task": c.task, "metric": c.metric,
        }  # fmt: skip
        for arm, ratio, value, low, high in zip(c.arms, c.ratios, c.values, c.low, c.high):
            yield {
                "section": "ratio",
                **shared,
                "arm": arm,
                "x": ratio,
                "value": value,
                "low": low,
                "high": high,
                "n": c.n,
            }
        for name, f in (("ratio trend", c.trend), ("ratio ends", c.ends)):
            yield {
                "section": name, **shared, "value": f["difference"],
                **{k: f.get(k) for k in ("low", "high", "n", "p", "p_holm", "interval")},
            }  # fmt: skip
