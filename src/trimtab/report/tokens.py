"""Token analyses drawn: which tokens lead the ranking, what the spans and positions carry, and a few sequences as heat-maps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.report import format as fmt
from trimtab.report import svg
from trimtab.report.figures import Figure, Legend
from trimtab.report.ranking import MEASURES
from trimtab.report.view import View

HEATED = 6
"""Analyses whose sequences the page shows; the others' are in their artefacts."""
DRAWN = ("loss", "grad_norm")
HEIGHT = 190.0


@dataclass(frozen=True)
class Token:
    """One box of a heat-map; ``shade`` 0 to 1, or None for a token that was not trained on."""

    text: str
    span: str
    shade: float | None
    title: str


@dataclass(frozen=True)
class Analysis:
    """One analysed arm: its spans, ranked tokens and positions, and heat-maps (row id, measure, boxes)."""

    title: str
    method: str
    measures: Sequence[str]
    spans: Sequence[tuple[str, int, Sequence[str]]]
    tokens: Sequence[Mapping[str, Any]]
    distinct: int
    positions: Sequence[Figure]
    maps: Sequence[tuple[str, str, Sequence[Token]]]


def analyses(view: View) -> list[Analysis]:
    """Every analysis of the first seed, in the order of the arms."""
    return [_analysis(view, row, i) for i, row in enumerate(view.data.tokens)]


def _analysis(view: View, row: Mapping[str, Any], i: int) -> Analysis:
    told = row["ranking"]
    measures = list(told["measures"])
    family = view.family(row["arm"])
    title = " · ".join(dict.fromkeys(p for p in (family.group, family.label, row["stage"]) if p))
    spans = [
        (name, int(of["count"]), [_told(of.get(m)) for m in measures]) for name, of in sorted(told["spans"].items(), reverse=True)
    ]  # fmt: skip
    tokens = [
        {
            "rank": t["rank"], "text": _written(t["token"]), "span": t["span"], "count": t["count"], "cue": t["cue"],
            "values": [_told(t.get(m)) for m in measures],
            "ratio": _times((t.get("ratio") or {}).get("grad_norm")),
        }
        for t in told["tokens"]
    ]  # fmt: skip
    figures = [_positions(f"k{i}{m[0]}", m, told["positions"]) for m in DRAWN if m in measures]
    maps = [_map(s) for s in told["sequences"]] if i < HEATED else []
    return Analysis(
        title, _method(told), [MEASURES[m] for m in measures], spans, tokens, told["distinct"],
        [f for f in figures if f is not None], maps,
    )  # fmt: skip


def _method(told: Mapping[str, Any]) -> str:
    method = told["method"]
    how = "exact, one backward pass per token" if method.get("exact") else ""
    if not how and method.get("projections"):
        how = f"estimated by {method['projections']} random projections"
    return f"{told['rows']} rows" + (f"; gradient norms {how}" if how else "")


def _told(value: Sequence[float | None] | None) -> str:
    """A mean with its interval, or a dash for what is not known."""
    if value is None or value[0] is None:
        return "–"
    low, high = value[1:]
    if low is None or high is None:
        return fmt.number(value[0])
    return f"{fmt.number(value[0])} [{fmt.number(low)},{fmt.NBSP}{fmt.number(high)}]"


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}{fmt.NBSP}×"


def _written(token: str) -> str:
    """A token with what cannot be seen written out: leading blanks as open boxes, line ends as returns."""
    text = fmt.visible(token).replace("\n", "⏎").replace("\t", "⇥")
    bare = text.lstrip(" ")
    return "␣" * (len(text) - len(bare)) + bare if bare else "␣" * len(text)


def _positions(key: str, measure: str, positions: Sequence[Mapping[str, Any]]) -> Figure | None:
    """A measure over the position within its span, prefix and body."""
    lines, places = [], {"prefix": 0, "body": 1}
    for span in places:
        some = [p for p in positions if p["span"] == span and p.get(measure) and p[measure][0] is not None]
        if some:
            lines.append((span, sorted(some, key=lambda p: p["position"])))
    if not lines:
        return None

    def paint(figure: Any) -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        ax = svg.axes(figure, 42, 34, 10, 8)
        for span, some in lines:
            i = places[span]
            xs = [p["position"] for p in some]
            mean, low, high = ([_end(p[measure], k) for p in some] for k in range(3))
            ax.fill_between(xs, low, high, color=svg.series(i), alpha=0.15, lw=0)
            ax.plot(xs, mean, color=svg.series(i), ls=svg.linestyle(i), lw=1.7, marker="o", ms=2.5)
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(4))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: fmt.number(v)))
        ax.set_xlabel("position in the span, tokens", size=svg.FONT - 1)
        ax.tick_params(length=3, color=svg.RULE, labelsize=svg.FONT - 0.5)
        ax.grid(axis="y", color=svg.RULE, lw=0.8)
        ax.set_axisbelow(True)

    name = MEASURES[measure]
    title = f"{name[:1].upper()}{name[1:]} by position"
    spoken = "; ".join(f"{span}: {fmt.number(some[0][measure][0])} at its first token" for span, some in lines)
    legend = [Legend(svg.swatch(places[span], "line"), span) for span, _ in lines]
    return Figure(
        key, title, "means, bands their 95 % interval", svg.draw(key, HEIGHT, paint, title, f"{spoken}."), legend
    )


def _end(value: Sequence[float | None], k: int) -> float:
    """The k-th of (mean, low, high); the mean for an end that is not known."""
    end = value[k]
    return float(value[0] if end is None else end)  # type: ignore[arg-type]


def _map(sequence: Mapping[str, Any]) -> tuple[str, str, list[Token]]:
    """A sequence as boxes shaded by its gradient norms (by loss where there are none), from 0 to the largest."""
    values = sequence["values"]
    measure = next((m for m in ("grad_norm", "loss") if any(v is not None for v in values.get(m, ()))), "loss")
    told = values.get(measure) or [None] * len(sequence["tokens"])
    top = max((v for v in told if v is not None), default=0.0) or 1.0
    boxes = []
    for i, (token, span, trained) in enumerate(zip(sequence["tokens"], sequence["spans"], sequence["trained"])):
        value = told[i] if trained else None
        parts = [span] + [
            f"{MEASURES[m]} {fmt.number(v)}" for m in ("grad_norm", "loss") if m in values and (v := values[m][i]) is not None
        ]  # fmt: skip
        parts += [] if trained else ["not trained on"]
        shade = None if value is None else round(math.sqrt(max(0.0, value / top)), 2)  # equal steps to the eye
        boxes.append(Token(fmt.visible(token).replace("\n", "⏎"), span, shade, ", ".join(parts)))
    return str(sequence["row_id"]), MEASURES[measure], boxes


def rows(told: Iterable[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    """Rows of ``figures.csv``: spans, the tokens that the page lists, and positions."""
    for row in told:
        ranking = row["ranking"]
        parts = [("token span", name, of) for name, of in ranking["spans"].items()]
        parts += [("token", f"{t['span']}: {t['token']}", t) for t in ranking["tokens"]]
        parts += [("token position", p["span"], p) for p in ranking["positions"]]
        for section, series, of in parts:
            for measure in ranking["measures"]:
                value = of.get(measure)
                if value is not None and value[0] is not None:
                    yield {
                        "section": section, "arm": row["arm"], "stage": row["stage"], "series": series, "metric": measure,
                        "x": of.get("position", of.get("rank")), "value": value[0], "low": value[1], "high": value[2],
                        "n": of["count"],
                    }  # fmt: skip
