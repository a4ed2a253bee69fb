"""The tables of an evaluation's report: facts, judges, figures by task, category and attack, and rates beside their bounds."""

from __future__ import annotations

from typing import Any

from trimtab.report.data import ReportData
from trimtab.report.view import Cell, Measure, View

ATTACK_METRICS = ("asr", "hit_rate", "queries_to_success")
SCOPES = {
    "all": "Over all plain prompts", "task": "By task", "category": "By category", "policy": "By policy",
    "attack": "By attack",
}  # fmt: skip


def scopes(view: View) -> list[dict[str, Any]]:
    """An evaluation's tables, one for each way of grouping the prompts; under each metric a row for each group. Every
    metric over all prompts; of the groups the headline (of attacks, what their own section does not tell)."""
    columns = [c for group in view.groups for c in view.columns(group)]
    tables = []
    for scope, title in SCOPES.items():
        metrics: dict[str, list[Measure]] = {}
        for measure in view.measures:
            shown = scope == "all" or view.is_headline(measure.metric)
            told = scope == "attack" and measure.metric in ("risk_rate", *ATTACK_METRICS)
            if view.scope(measure) == scope and shown and not told:
                metrics.setdefault(measure.metric, []).append(measure)
        sections = [
            {
                "title": view.label(metric),
                "best": view.direction(metric),
                "rows": [(view.place(m.category), [view.cell(m, c) for c in columns]) for m in measures],
            }
            for metric, measures in metrics.items()
        ]
        if sections:
            tables.append({"scope": scope, "title": title, "columns": columns, "sections": sections})
    return tables


def described(view: View) -> tuple[list[str], list[str]]:
    """The metrics to explain at once, and those to fold away: of an evaluation what is neither drawn first nor of attacks,
    of a grid what it has no table for."""
    metrics = list(view.data.metrics)
    if view.data.places:
        inside = {m.metric for m in view.measures} - {m.metric for m in view.measures if m.stage in _stages(view)}
        first = [m for m in metrics if view.is_headline(m) or m in inside]
        return first, [m for m in metrics if m not in first]
    if view.data.kind == "study":
        return metrics, []
    first = [m for m in metrics if view.is_headline(m) or m in ATTACK_METRICS]
    return first, [m for m in metrics if m not in first]


def _stages(view: View) -> set[str]:
    return {place.stage for place in view.data.places}


def fact_rows(data: ReportData) -> list[tuple[str, list[str], bool]]:
    """(what, its value for each arm, whether they differ), in the order of the first arm that has it."""
    names = list(dict.fromkeys(name for facts in data.facts.values() for name in facts))
    rows = []
    for name in names:
        values = [_short(data.facts.get(arm.id, {}).get(name, "–")) for arm in data.arms]
        rows.append((name, values, len(set(values)) > 1 and name != "model"))
    return rows


def _short(value: str) -> str:
    """A hash cut to what tells it from others; the whole is among the hashes at the end."""
    return f"{value[:16]}…" if len(value) == 64 and set(value) <= set("0123456789abcdef") else value


def judge_rows(view: View) -> list[dict[str, Any]]:
    """The judges; one that several models share, with the same card, is one row."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for judge in view.data.judges:
        label = view.family(judge["arm"]).label
        row = rows.setdefault((judge["id"], judge["card"]), {**judge, "answers": 0, "label": ""})
        row["answers"] += judge["answers"]
        row["label"] = f"{row['label']}, {label}" if row["label"] else label
    return list(rows.values())


def beside(view: View) -> dict[str, list[dict[str, Any]]]:
    """Each rate beside its bounds and its correction, wherever an answer was left unscored or a correction is known:
    "all" plain prompts, and "groups" (tasks, where there are several, and what is a rate of attacks)."""
    found: dict[str, list[dict[str, Any]]] = {"all": [], "groups": []}
    bounded = [m for m in view.data.bounds if view.is_headline(m)]
    for metric in dict.fromkeys([*bounded, *view.data.corrected]):
        names = [*view.data.bounds.get(metric, ("", "")), view.data.corrected.get(metric, "")]
        mine = [m for m in view.measures if m.metric == metric]
        tasks = sum(view.scope(m) == "task" for m in mine)
        for measure in mine:
            scope = view.scope(measure)
            kept = {"all": True, "task": tasks > 1, "attack": metric in ATTACK_METRICS}.get(scope, False)
            rows = []
            for column in (c for group in view.groups for c in view.columns(group)):
                cell = view.cell(measure, column)
                more = [view.cell(Measure(n, measure.category, measure.stage), column) if n else None for n in names]
                if cell is not None and kept and (more[2] is not None or (cell.unscored and any(more))):
                    rows.append(
                        {"column": column, "cells": [cell, *(more if cell.unscored else [None, None, more[2]])]}
                    )
            if rows:
                title = " · ".join(p for p in (view.label(metric), view.place(measure.category)) if p)
                found["all" if scope == "all" else "groups"].append({"title": title, "rows": rows})
    return found


def attack_tables(view: View) -> list[dict[str, Any]]:
    """For each arm and mode that was attacked: what each attack achieved, and the queries that it was given."""
    tables = []
    for column in (c for group in view.groups for c in view.columns(group)):
        attacked = list(dict.fromkeys(m.category for m in view.measures if view.scope(m) == "attack"))
        rows = []
        for name in attacked:
            cells: list[Cell | None] = [
                next((c for m in _measures(view, metric, name) if (c := view.cell(m, column)) is not None), None)
                for metric in ATTACK_METRICS
            ]
            if any(cells):
                budget = next((s.budget for c in cells if c for s in c.seeds if s.budget is not None), None)
                rows.append({"attack": view.place(name), "cells": cells, "budget": budget})
        if rows:
            plain = view.cell(Measure("risk_rate", "", ""), column)
            tables.append({"column": column, "rows": rows, "plain": plain})
    return tables


def _measures(view: View, metric: str, category: str) -> list[Measure]:
    return [m for m in view.measures if m.metric == metric and m.category == category]
