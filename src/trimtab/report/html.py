"""``write_report``: a study or evaluations as one HTML file that opens anywhere, with its figures as CSV and JSON.

The file is whole in itself: style and figures are inline, there is no script and nothing is fetched. Everything that
came from data is escaped by the template (autoescape) after strange characters were written out. The same data gives
the same bytes. All three files are rendered before the first is written, each is replaced in one step, and
``report.html`` comes last: a failure leaves the old report as it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from trimtab.artifact import write_atomic
from trimtab.report import curves, export, grids, modedraw, spans, tokens
from trimtab.report import figures as figs
from trimtab.report import format as fmt
from trimtab.report.data import Cost, ReportData, Sample
from trimtab.report.forests import attack_figures, forests
from trimtab.report.layers import layer_figures
from trimtab.report.tables import attack_tables, beside, described, fact_rows, judge_rows, scopes
from trimtab.report.view import View
from trimtab.report.words import explain

PAGE = Path(__file__).parent / "page"
MANY_FINDINGS = 12
"""From here on findings are folded."""
OPEN_SAMPLES = 3
MANY_STEPS = 40
"""More steps than this are summed up by kind, and listed folded away."""
MANY_ARMS = 24
"""More arms than this are listed folded away."""
ANSWER_LIMIT = 4000
"""Characters of one answer or message that the page shows; ``results.json`` holds all of it."""


def write_report(data: ReportData, out: Path) -> Path:
    """Write ``report.html``, ``figures.csv`` and ``results.json`` into ``out``; returns the path of the first.

    Raises ``UserError`` where the data contradicts itself and ``Fault`` on a full disk; existing files then stay.
    """
    data.check()
    view = View(data)
    page, rows = render(view)
    files = {
        "figures.csv": export.write_csv(rows),
        "results.json": json.dumps(
            data.to_json(), indent=None if data.places else 1, ensure_ascii=False, allow_nan=False
        )
        + "\n",
        "report.html": page,
    }
    encoded = {name: text.encode("utf-8", "backslashreplace") for name, text in files.items()}
    for name, content in encoded.items():
        write_atomic(out / name, content)
    return out / "report.html"


def render(view: View) -> tuple[str, list[dict[str, Any]]]:
    """The page, and the rows of ``figures.csv``."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    drawn_measures, matrices = forests(view), figs.matrices(view)
    together, apart = figs.losses(view)
    exposures = figs.exposures(view)
    layers = layer_figures(view)
    ratios, span_figures = curves.groups(view), spans.figures(view)
    modes = modedraw.section(view, matrices)
    gridded = bool(view.data.places)
    comparisons = [_comparison(view, c) for c in view.data.comparisons]
    env = Environment(
        loader=FileSystemLoader(PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda v: fmt.visible(v) if isinstance(v, str) and not isinstance(v, Markup) else v,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    data = view.data
    page = env.get_template("page.html.jinja").render(
        data=data,
        view=view,
        fmt=fmt,
        style=Markup((PAGE / "style.css").read_text(encoding="utf-8")),
        levers=explain(data.levers),
        findings=[(finding, *view.evidence(finding)) for finding in data.findings],
        many_findings=MANY_FINDINGS,
        totals=_totals(data.costs, data.same),
        arms=_arms(view),
        tables=[_table(view, group) for group in view.groups] if data.kind == "study" and not gridded else [],
        grids=grids.grids(view),
        model_grids=grids.models(view),
        steering=grids.steering(view),
        details=grids.details(view),
        doses=grids.doses(view),
        claims=grids.claims(view),
        layers=layers,
        ratios=ratios,
        spans=span_figures,
        analyses=tokens.analyses(view),
        open_analysis=next((i for i, row in enumerate(data.tokens, 1) if row["ratio"]), 1),
        gridded=gridded,
        scopes=[] if data.kind == "study" else scopes(view),
        described=described(view),
        facts=fact_rows(data),
        judges=judge_rows(view),
        beside=beside(view),
        attacks=attack_figures(view),
        attack_tables=attack_tables(view),
        headline=[figure for measure, figure in drawn_measures if view.is_headline(measure.metric)],
        further=[figure for measure, figure in drawn_measures if not view.is_headline(measure.metric)],
        matrices=matrices,
        modes=modes,
        fidelity=modedraw.fidelity(view),
        losses=together,
        losses_apart=apart,
        exposures=exposures,
        exposure_rows=_side_by_side(view, exposures),
        comparisons=comparisons,
        comparisons_by=_by_model(view, comparisons) if gridded else [],
        kinds=_kinds(data.costs),
        many_steps=MANY_STEPS,
        many_arms=MANY_ARMS,
        intervals=sorted({name for cell in view.cells.values() for name in cell.intervals}),
        costs=data.costs,
        samples=[_sample(view, sample) for sample in data.samples],
        open_samples=OPEN_SAMPLES,
    )
    page = page.lstrip()
    drawn = [*matrices, *together, *apart, *exposures, *(modes["projections"] if modes else ())]
    keys = {measure: figure.key for measure, figure in drawn_measures}
    return page, [
        *export.result_rows(view, keys),
        *export.comparison_rows(data),
        *(r for f in drawn for r in f.rows),
        *grids.rows(view),
        *curves.rows(data.ratios),
        *spans.rows(data.spans),
        *tokens.rows(data.tokens),
        *export.mode_rows(view),
        *export.cost_rows(data.costs),
    ]


def _arms(view: View) -> list[dict[str, Any]]:
    """The overview: every arm, what sets it apart, its seeds and the tokens of the steps it needs."""
    rows = []
    for family in view.families:
        steps = [c for c in view.data.costs if set(c.arms) & set(family.ids)]
        rows.append(
            {
                "label": family.label,
                "ids": family.ids,
                "group": family.group,
                "twin": "" if (twin := view.twin(family)) is None else twin.label,
                "settings": [(k, fmt.setting(v)) for k, v in family.arms[0].settings.items()],
                "seeds": [arm.seed for arm in family.arms]
                if len(family.arms) > 1
                else view.data.seeds or [family.arms[0].seed],
                "tokens": sum(c.tokens for c in steps),
                "figures": sum(1 for _, arm, _ in view.cells if arm == family.id),
            }
        )
    return rows


def _table(view: View, group: str) -> dict[str, Any]:
    """One group's results: arms (and modes) across, measures down; an empty cell says that nothing was measured."""
    columns = view.columns(group)
    rows = []
    for measure in view.measures:
        cells = [view.cell(measure, column) for column in columns]
        if any(cell is not None for cell in cells):
            rows.append({"measure": measure, "cells": cells, "best": view.direction(measure.metric)})
    settings = list(dict.fromkeys(k for f in view.members(group) for k in f.arms[0].settings))
    shown = [
        (
            key,
            [fmt.setting(c.family.arms[0].settings[key]) if key in c.family.arms[0].settings else "–" for c in columns],
        )
        for key in settings
    ]
    return {"group": group, "columns": columns, "rows": rows, "settings": shown}


def _comparison(view: View, c: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the paired differences; ``reading`` says in words what the Holm-adjusted test supports."""
    metric, value = str(c.get("metric", "")), _float(c.get("difference"))
    share, p = view.share(metric), c.get("p_holm", c.get("p"))
    better = {"higher is better": 1, "lower is better": -1}.get(view.direction(metric), 0)
    reading = "no clear difference"
    if math.isnan(value):
        reading = "not scored"
    elif p is not None and not math.isnan(p) and p < 0.05 and value:
        reading = "rose" if value > 0 else "fell"
        if better:
            reading += ": better" if value * better > 0 else ": worse"
    mode = c.get("mode")
    sides = [
        " · ".join(p for p in (view.family(str(c[side])).label, str(c.get(f"mode_{side}") or mode or "")) if p)
        for side in "ab"
    ]
    where = view.place(c.get("task") or c.get("category") or "")
    what = [view.label(metric), where, c.get("stage") or ""]
    what += [f"seed {c['seed']}"] if c.get("seed") is not None else []
    seeds = int(c.get("seeds") or 1)
    each = ", ".join(f"{fmt.percent(v) if share else fmt.number(v)}" for _, v in c.get("each") or ())
    return {
        "arm": str(c.get("b")),
        "what": what[0],
        "where": " · ".join(str(w) for w in what[1:] if w),
        "a": sides[0],
        "b": sides[1],
        "difference": fmt.difference(value, _float(c.get("low")), _float(c.get("high")), share),
        "p": fmt.p_value(c.get("p")),
        "p_holm": fmt.p_value(c.get("p_holm")),
        "n": c.get("n"),
        "small": (c.get("n") or 0) < fmt.SMALL_N,
        "discordant": export.count(c.get("discordant")),
        "stage": c.get("stage") or "",
        "seeds": seeds,
        "each": each if seeds > 1 else "",
        "headline": view.is_headline(metric),
        "reading": reading,
        "is_clear": reading not in ("no clear difference", "not scored"),
    }


def _by_model(view: View, rows: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The paired differences of a grid by the model that they are of; of the prefix lever by arm group and series. Clear
    ones come first."""
    model = {place.stage: place.model or place.stage for place in view.data.places}
    series = {arm: f"{group} · {name}" if name else group for group, name, arm in view.of_series}
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(series.get(row["arm"]) or model.get(row["stage"], row["stage"]), []).append(row)
    return [(name, sorted(some, key=lambda row: not row["is_clear"])) for name, some in found.items()]


def _side_by_side(view: View, figures: list[figs.Figure]) -> list[list[figs.Figure | None]]:
    """Exposure of the timing arms in pairs, natural beside matched, a row per start; [] where nothing is matched."""
    told = view.data.timing
    if len({t["exposure"] for t in told.values()}) < 2:
        return []
    pairs: dict[tuple[float, str], list[figs.Figure | None]] = {}
    rest: list[list[figs.Figure | None]] = []
    for figure in figures:
        timing = told.get(str(figure.rows[0]["arm"])) if figure.rows else None
        if timing is None:
            rest.append([figure, None])
            continue
        pair = pairs.setdefault((timing["start"], timing["before"]), [None, None])
        pair[timing["exposure"] == "matched"] = figure
    return [pairs[key] for key in sorted(pairs)] + rest


def _kinds(costs: Iterable[Cost]) -> list[dict[str, Any]]:
    """Steps summed up by kind."""
    found: dict[str, dict[str, Any]] = {}
    for c in costs:
        row = found.setdefault(
            c.kind, {"kind": c.kind, "steps": 0, "tokens": 0, "flops": 0.0, "seconds": 0.0, "cached": 0}
        )
        row["steps"] += 1
        row["tokens"] += c.tokens
        row["flops"] += c.flops
        row["seconds"] += c.seconds
        row["cached"] += c.cached
    return list(found.values())


def _totals(costs: Iterable[Cost], same: Mapping[str, str]) -> dict[str, Any] | None:
    """Sums over the steps as done, and as if every arm but those that are another's training had done its steps alone."""
    steps = list(costs)
    if not steps:
        return None
    times = [max(len(set(c.arms) - set(same)), 1) for c in steps]
    return {
        "tokens": sum(c.tokens for c in steps),
        "flops": sum(c.flops for c in steps),
        "seconds": sum(c.seconds for c in steps),
        "peak": max((c.peak_memory for c in steps if c.peak_memory is not None), default=None),
        "alone_tokens": sum(c.tokens * t for c, t in zip(steps, times)),
        "alone_flops": sum(c.flops * t for c, t in zip(steps, times)),
        "alone_seconds": sum(c.seconds * t for c, t in zip(steps, times)),
        "cached": sum(c.cached for c in steps),
        "steps": len(steps),
    }


def _sample(view: View, sample: Sample) -> dict[str, Any]:
    answers = [
        {
            "correct": None,
            "constructive": None,
            "withheld": 0,
            "reason": "",
            **answer,
            **_cut(str(answer.get("text") or "")),
            "label": view.names(view.family(arm)),
            "group": view.family(arm).group,
        }
        for arm in [i for f in view.families for i in f.ids if i in sample.answers]
        for answer in sample.answers[arm]
    ]
    prompt = [{"role": str(m.get("role", "")), **_cut(str(m.get("content", "")))} for m in sample.prompt]
    asked = next((str(m.get("content", "")) for m in reversed(sample.prompt) if m.get("role") == "user"), sample.row_id)
    return {"sample": sample, "asked": fmt.one_line(asked, 120), "prompt": prompt, "answers": answers}


def _cut(text: str) -> dict[str, Any]:
    return {"text": text[:ANSWER_LIMIT], "more": max(0, len(text) - ANSWER_LIMIT)}


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)
