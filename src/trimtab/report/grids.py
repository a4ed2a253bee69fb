"""The grids of a study whose arms were measured at many places: arms down, model x decoder across, a figure per cell.

They are HTML tables, not drawings: they wrap, print and can be read aloud, and eighteen arms at twelve places are some
tens of kilobytes. A cell's shade is its value; every cell keeps its interval, n stands over the column. Also here: how far
SafeBeam moves each arm, the details per place (folded), and what each arm read.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from trimtab.report import format as fmt
from trimtab.report.data import ClaimReading, Place
from trimtab.report.view import Cell, Column, Family, Measure, View

FIRST = ("risk_rate", "over_refusal_contrast_full", "over_refusal_benign_full", "accuracy")
"""Metrics that the grid has tables for, in this order; then those of models without answers."""
WIDE = 10
"""Columns at most of a table: more do not fit the page."""


@dataclass(frozen=True)
class Shown:
    """One cell: figures, interval beneath, shade from -1 (blue) over 0 to 1 (orange), and what hovering says."""

    text: str
    sub: str
    shade: float
    title: str = ""
    clear: bool = False


@dataclass(frozen=True)
class Grid:
    """One table: ``heads`` are (model, its columns' number); ``columns`` (decoder, n); ``sections`` (heading, rows)."""

    title: str
    note: str
    heads: Sequence[tuple[str, int]]
    columns: Sequence[tuple[str, str]]
    sections: Sequence[tuple[str, Sequence[tuple[str, str, Sequence[Shown | None]]]]]
    metric: str = ""


def grids(view: View) -> list[Grid]:
    """A grid for each metric and group of prompts that was measured, the risk rate first, then what it cost."""
    from trimtab.report.panels import metrics_of  # slow to import, and only a grid needs it

    found = []
    for metric in FIRST:
        for group in (g for g in view.data.groups if metric in metrics_of(g)):
            places = [p for p in view.data.places if _any(view, metric, group, p.stage)]
            found += [_grid(view, metric, group, some) for some in _fitting(places)]
    return [grid for grid in found if grid.sections]


def _fitting(places: Sequence[Place]) -> list[list[Place]]:
    """The places in tables of at most ``WIDE`` columns, the decoders of one model together."""
    tables: list[list[Place]] = []
    for _, same in groupby(places, key=lambda p: (p.panel, p.model)):
        some = list(same)
        if tables and len(tables[-1]) + len(some) <= WIDE:
            tables[-1] += some
        else:
            tables.append(some)
    return tables


def models(view: View) -> list[Grid]:
    """The same for figures of models without answers (perplexity, probes): a column per model and category (which text,
    which split), or a table per category where that would be too wide."""
    if not view.data.places:
        return []
    stages = {p.stage for p in view.data.places}
    kinds: dict[tuple[str, str], list[str]] = {}
    for m in view.measures:
        if m.stage and m.stage not in stages:
            kinds.setdefault((m.metric, m.category), []).append(m.stage)
    models = list(dict.fromkeys(stage for at in kinds.values() for stage in at))
    found = []
    for metric in dict.fromkeys(metric for metric, _ in kinds):
        mine = [category for m, category in kinds if m == metric]
        several = len(mine) > 1 and len(mine) * len(models) <= WIDE
        for group in [mine] if several else [[category] for category in mine]:
            columns = [
                (Place(s, "", s, _split(category) if several else ""), category)
                for s in models for category in group if s in kinds[metric, category]
            ]  # fmt: skip
            found.append(_table(view, metric, "" if several else _split(group[0]), columns))
    return found


def _split(category: str) -> str:
    """The category of a figure of a model without answers, in words (``analyze.metrics``)."""
    left, _, task = category.partition("loso:")
    named = {"heldout": "held-out hazards", "mean": "mean over tokens", "last": "last token"}
    return f"{task} left out" if task and not left else named.get(category, category)


def _any(view: View, metric: str, group: str, stage: str) -> bool:
    return any(m == Measure(metric, group, stage) for m in view.measures)


def _grid(view: View, metric: str, group: str, places: Sequence[Place]) -> Grid:
    return _table(view, metric, group, [(place, group) for place in places], view.in_series)


def _table(
    view: View, metric: str, group: str, across: Sequence[tuple[Place, str]], left: Collection[str] = ()
) -> Grid:
    """A grid of one metric with a column for each (place, category); ``group`` is what its title names; families in
    ``left`` have no row."""
    share = view.share(metric)
    lower = view.direction(metric).startswith("lower")
    families = [(h, [c for f in some if f.id not in left for c in _columns(view, f)]) for h, some in view.ordered()]
    found = {
        (place.stage, category, column.family.id, column.mode): cell
        for place, category in across
        for _, columns in families
        for column in columns
        if (cell := view.cell(Measure(metric, category, place.stage), column)) is not None
    }
    scored = [cell for cell in found.values() if cell.scored]
    few = bool(scored) and all(cell.small for cell in scored)
    sections = []
    for heading, columns in families:
        rows = []
        for column in columns:
            line = [
                None if cell is None else _shown(cell, lower, few)
                for place, category in across
                for cell in [found.get((place.stage, category, column.family.id, column.mode))]
            ]
            if any(line):
                rows.append((column.label, _beside(view, column.family), line))
        if rows:
            sections.append((heading, rows))
    heads, names = _heads([place for place, _ in across])
    of = [[cell for key, cell in found.items() if key[:2] == (p.stage, category)] for p, category in across]
    ns = [_span([n for cell in some for n in cell.n]) for some in of]
    parts = (
        view.direction(metric),
        "" if share else "not in percent",
        f"fewer than {fmt.SMALL_N} in every cell" if few else "",
    )
    note = "; ".join(p for p in parts if p)
    title = " · ".join(p for p in (view.label(metric), group) if p)
    return Grid(title, note, heads, list(zip(names, ns)), sections if len(sections) > 1 else _bare(sections), metric)


def _bare(sections: list[Any]) -> list[Any]:
    return [("", rows) for _, rows in sections]


def _columns(view: View, family: Family) -> list[Column]:
    modes = list(dict.fromkeys(mode for _, arm, mode in view.cells if arm == family.id)) or [None]
    return [Column(family, mode) for mode in modes]


def _heads(places: Sequence[Place]) -> tuple[list[tuple[str, int]], list[str]]:
    """Models over their decoders; panels that ask one model twice are told apart."""
    panels = len({p.panel for p in places}) > 1
    heads: list[tuple[str, int]] = []
    for place in places:
        name = " · ".join(p for p in (place.panel if panels else "", place.model or place.stage) if p)
        if heads and heads[-1][0] == name:
            heads[-1] = name, heads[-1][1] + 1
        else:
            heads.append((name, 1))
    return heads, [place.decoder for place in places]


def _shown(cell: Cell, lower: bool, few: bool) -> Shown:
    """``few``: all cells of the table have a small n, which is then said once instead of by a star in each."""
    notes = ", ".join(cell.notes)
    if not cell.scored:
        return Shown("–", "not scored", 0.0, notes)
    write = fmt.percent if cell.share else fmt.number
    shade = (cell.value if lower else -cell.value) if cell.share else 0.0
    mark = "*" if cell.small and not few else ""
    return Shown(f"{write(cell.value)}{mark}", f"{write(cell.low)}–{write(cell.high)}", round(shade, 3), notes)


def _beside(view: View, family: Family) -> str:
    """What stands under an arm's name: its seeds, and of which arm it is a twin."""
    seeds = f"{len(family.arms)} seeds" if len(family.arms) > 1 else ""
    twin = view.twin(family)
    return ", ".join(p for p in (seeds, "" if twin is None else f"= {twin.label}") if p)


def _span(ns: Sequence[int]) -> str:
    if not ns:
        return ""
    return f"n {min(ns)}" if min(ns) == max(ns) else f"n {min(ns)}–{max(ns)}"


# -- how far SafeBeam moves each arm ---------------------------------------------------------------------------------


def steering(view: View) -> list[Grid]:
    """A table for each group of hazards and each form of SafeBeam: arms down, model x decoder that it is set against
    across."""
    found = []
    rows = view.data.steering
    for group, beam in dict.fromkeys((r["group"], r["decoder"]) for r in rows):
        here = [r for r in rows if (r["group"], r["decoder"]) == (group, beam)]
        mine = {(r["arm"], r["model"], r["from"], r["panel"]): r for r in here}
        columns = list(dict.fromkeys((panel, model, start) for _, model, start, panel in mine))
        order = list(dict.fromkeys(p.model for p in view.data.places))
        columns.sort(key=lambda c: order.index(c[1]) if c[1] in order else len(order))
        sections = []
        for heading, families in view.ordered():
            lines = []
            for family in families:
                line = [_moved(mine.get((family.id, model, start, panel))) for panel, model, start in columns]
                if any(line):
                    lines.append((family.label, _beside(view, family), line))
            if lines:
                sections.append((heading, lines))
        places = [Place(f"{panel}{model}{start}", panel, model, f"less {start}") for panel, model, start in columns]
        heads, names = _heads(places)
        ns = [_span([r["n"] for key, r in mine.items() if key[1:] == (m, s, p)]) for p, m, s in columns]
        note = "points; below zero: it lowers it; in bold: the interval is clear of zero"
        title = f"Change of the {view.label('risk_rate')} by {beam} · {group}"
        several = len(sections) > 1
        found.append(
            Grid(title, note, heads, list(zip(names, ns)), sections if several else _bare(sections), "risk_rate")
        )
    return found


def _moved(row: Mapping[str, Any] | None) -> Shown | None:
    if row is None:
        return None
    value, low, high = (float(row[k]) for k in ("difference", "low", "high"))
    if math.isnan(value):
        return Shown("–", "not scored", 0.0)
    plus = "+" if value > 0 else ""
    title = f"n {row['n']}; {row['interval']}" + (
        "; each seed: " + ", ".join(fmt.percent(v) for _, v in row["each"]) if row["seeds"] > 1 else ""
    )
    ends = f"{fmt.percent(low)} to {fmt.percent(high)}"
    return Shown(f"{plus}{fmt.percent(value)}", ends, round(value, 3), title, low > 0 or high < 0)


# -- details, folded away --------------------------------------------------------------------------------------------


def details(view: View) -> list[tuple[str, list[dict[str, Any]]]]:
    """(model, [its decoders' tables]): the headline measures by task, arms across, and every seed's own value."""
    from trimtab.report.panels import metrics_of

    columns = [
        c for _, families in view.ordered() for f in families if f.id not in view.in_series for c in _columns(view, f)
    ]
    found: dict[str, list[dict[str, Any]]] = {}
    for place in view.data.places:
        rows = []
        for measure in view.measures:
            if measure.stage == place.stage and view.is_headline(measure.metric):
                cells = [view.cell(measure, c) for c in columns]
                in_grid = measure.category in view.data.groups and measure.metric in metrics_of(measure.category)
                if any(cells) and not in_grid:
                    rows.append({"measure": measure, "cells": cells, "best": view.direction(measure.metric)})
        if rows:
            found.setdefault(place.model, []).append(
                {"decoder": place.decoder or place.stage, "columns": columns, "rows": rows}
            )
    return list(found.items())


def doses(view: View) -> dict[str, Any] | None:
    """Tokens and passes of every source in every arm: what the arms really differ in."""
    told = view.data.doses
    if not told:
        return None
    sources = list(dict.fromkeys(row["source"] for rows in told.values() for row in rows))
    sections = []
    for heading, families in view.ordered():
        lines: list[tuple[str, str, list[dict[str, Any] | None], str]] = []
        for family in families:
            arm = next((i for i in family.ids if i in told), None)
            if arm is None:
                continue
            mine = {row["source"]: row for row in told[arm]}
            total = sum(row["tokens"] for row in mine.values())
            cells = [
                None
                if name not in mine
                else {
                    "tokens": fmt.si(mine[name]["tokens"]),
                    "share": fmt.percent(mine[name]["tokens"] / total) if total else "–",
                    "epochs": None if mine[name]["epochs"] is None else f"{mine[name]['epochs']:.2f}",
                }
                for name in sources
            ]
            twin = view.twin(family)
            line = ("" if twin is None else f"= {twin.label}", cells, fmt.si(total))
            if family.id in view.in_series and lines and lines[-1][1:] == line:
                continue  # ratios of one series read the same
            lines.append((family.label, *line))
        if lines:
            sections.append((heading, lines))
    return {"sources": sources, "sections": sections}


def claims(view: View) -> dict[str, Any] | None:
    """The claims as rows of a table for each set of papers whose versions stand beside each other; the versions in the
    order in which they are first named."""
    told = view.data.claims
    if not told:
        return None
    tables: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for claim in told:
        tables.setdefault(tuple(claim.versions), []).append(_claim(claim))
    tested = sum(1 for claim in told if claim.reading != "not measured")
    series = {f["series"] for claim in told for f in claim.figures}
    return {
        "tables": list(tables.items()), "tested": tested, "all": len(told), "seeds": len(view.data.seeds) or 1,
        "timing": bool(series & {"natural", "matched"}),
    }  # fmt: skip


def _claim(claim: ClaimReading) -> dict[str, Any]:
    deciding = sum(1 for f in claim.figures if f["decides"])
    several = len({g["series"] for g in claim.figures}) > 1
    figures = [
        {
            "label": f["label"],
            "series": f["series"] if several or f["series"] == "matched" else "",
            "text": _changed(f),
            "n": f"n {f['n']}, " if f["n"] else "",
            "seeds": f"{f['seeds']} seed{'' if f['seeds'] == 1 else 's'}",
            "p": "" if f.get("p_holm") is None else f"Holm p {fmt.p_value(f['p_holm'])}",
            "decides": f["decides"],
            "alone": f.get("reading", "") if f["decides"] and deciding > 1 else "",
        }
        for f in claim.figures
    ]
    held = next((f.get("p_holm") for f in claim.figures if f.get("p_holm") is not None), None)
    doubt = claim.reading in ("agrees", "disagrees") and held is not None and held >= 0.05
    return {"claim": claim, "figures": figures, "doubt": doubt}


def _changed(f: Mapping[str, Any]) -> str:
    """A claim's figure: points, or how much more in percent ("+60 % [37, 89]") where it is a ratio less one."""
    value, low, high = (f["difference"], f["low"], f["high"]) if not math.isnan(f["low"]) else (f["difference"],) * 3
    text = fmt.difference(value, low, high, True)
    if f.get("unit") == "ratio":
        plus = "+" if value > 0 else ""
        ends = [f"{100 * v:.0f}".replace("-", fmt.MINUS) for v in (value, low, high)]
        text = f"{plus}{ends[0]}{fmt.NBSP}% [{ends[1]},{fmt.NBSP}{ends[2]}]"
    if f.get("unit") == "score":
        text = fmt.difference(value, low, high, False)
    return text if not math.isnan(f["low"]) else f"{text.split(' [')[0]}, no interval"


def rows(view: View) -> list[dict[str, Any]]:
    """Steering, doses, claims and layer curves as rows for ``figures.csv`` (the grid's cells are its "shown" rows)."""
    found: list[dict[str, Any]] = []
    for r in view.data.steering:
        found.append({
            "section": "steering", "arm": r["arm"], "label": view.family(r["arm"]).label, "stage": r["model"],
            "task": r["group"], "metric": r["metric"], "series": f"{r['decoder']} less {r['from']}",
            "value": r["difference"], **{k: r[k] for k in ("low", "high", "n", "p", "interval")},
        })  # fmt: skip
    for arm, mine in view.data.doses.items():
        for row in mine:
            found.append({
                "section": "dose", "arm": arm, "label": view.family(arm).label, "series": row["source"],
                "value": row["tokens"], "x": row["epochs"],
            })  # fmt: skip
    for claim in view.data.claims:
        for f in claim.figures:
            found.append({
                "section": "claim", "label": claim.text, "group": claim.source, "series": f["label"], "mode": f["series"],
                "task": claim.reading, "value": f["difference"],
                **{k: f.get(k) for k in ("low", "high", "n", "p", "p_holm", "interval")},
            })  # fmt: skip
    for c in view.data.probes:
        for i, (layer, value) in enumerate(zip(c.layers, c.values)):
            found.append({
                "section": "layer", "arm": c.arm, "label": view.family(c.arm).label, "stage": c.stage, "task": c.panel,
                "metric": c.metric, "series": c.series, "x": layer, "value": value,
                "low": c.low[i] if c.low else None, "high": c.high[i] if c.high else None,
            })  # fmt: skip
    return found
