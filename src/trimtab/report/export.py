"""Every figure of a report as a row of ``figures.csv``: results as they came, figures as they are shown, and what is made of
them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from typing import Any

from trimtab.report import format as fmt
from trimtab.report.data import Cost, ReportData
from trimtab.report.view import Measure, View

_FIELDS = (
    "section",
    "figure",
    "arm",
    "label",
    "group",
    "stage",
    "mode",
    "task",
    "metric",
    "series",
    "seed",
    "x",
    "value",
    "low",
    "high",
    "n",
    "unscored",
    "interval",
    "p",
    "p_holm",
    "discordant",
    "seconds",
    "flops",
    "cached",
)


def result_rows(view: View, keys: Mapping[Measure, str]) -> Iterable[dict[str, Any]]:
    """Every result as it came ("result", each seed), then every figure as it is shown ("shown")."""
    for r in view.data.results:
        family = view.family(r.arm)
        yield {
            "section": "result",
            "figure": keys.get(Measure.of(r), ""),
            "arm": r.arm,
            "label": family.label,
            "group": family.group,
            "stage": r.stage,
            "mode": r.mode,
            "task": r.category,
            "metric": r.metric,
            "seed": r.seed,
            "value": r.value,
            "low": r.low,
            "high": r.high,
            "n": r.n,
            "unscored": r.unscored,
            "interval": r.interval,
        }
    for (measure, arm, mode), cell in view.cells.items():
        family = view.family(arm)
        yield {
            "section": "shown",
            "figure": keys.get(measure, ""),
            "arm": arm,
            "label": family.label,
            "group": family.group,
            "stage": measure.stage,
            "mode": mode,
            "task": measure.category,
            "metric": measure.metric,
            "value": cell.value,
            "low": cell.low,
            "high": cell.high,
            "n": cell.n[0],
            "unscored": cell.unscored,
            "interval": "+".join(cell.intervals),
        }


def mode_rows(view: View) -> Iterable[dict[str, Any]]:
    """Every figure of the section on modes: ``section`` is "mode", ``task`` the table, ``mode`` the row, ``metric`` the
    column."""
    for f in view.data.mode_figures:
        family = view.family(f.arm)
        yield {
            "section": "mode", "arm": f.arm, "label": family.label, "group": family.group, "task": f.table, "mode": f.row,
            "metric": f.column, "series": f.unit, "x": f.x, "value": f.value, "low": f.low, "high": f.high, "n": f.n,
            "unscored": f.unscored, "interval": f.interval,
        }  # fmt: skip


def comparison_rows(data: ReportData) -> Iterable[dict[str, Any]]:
    for c in data.comparisons:
        yield {
            "section": "comparison",
            "arm": c.get("a"),
            "series": c.get("b"),
            "task": c.get("task") or c.get("category"),
            "value": c.get("difference"),
            "discordant": count(c.get("discordant")),
            **{k: c.get(k) for k in ("stage", "mode", "metric", "seed", "low", "high", "n", "p", "p_holm", "interval")},
        }


def cost_rows(costs: Iterable[Cost]) -> Iterable[dict[str, Any]]:
    for c in costs:
        yield {
            "section": "cost",
            "series": c.step,
            "arm": " ".join(c.arms),
            "metric": c.kind,
            "x": c.peak_memory,
            "value": c.tokens,
            "flops": c.flops,
            "seconds": c.seconds,
            "cached": c.cached,
        }


def write_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, _FIELDS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: _csv_value(v) for k, v in row.items()})
    return buffer.getvalue()


def _csv_value(value: Any) -> Any:
    """Text that a spreadsheet would run as a formula gets a leading apostrophe; floats keep eight digits."""
    if isinstance(value, str):
        text = fmt.visible(value)
        return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\n") else text
    return f"{value:.8g}" if isinstance(value, float) else value


def count(value: Any) -> Any:
    """How many discordant pairs, where they are given one by one."""
    return len(value) if isinstance(value, (list, tuple)) else value
