"""Prefix and body while a model trains: the loss of each, and the prefix's share of the gradient beside that of the tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from trimtab.report import format as fmt
from trimtab.report import svg
from trimtab.report.data import SpanCurve
from trimtab.report.figures import Figure, Legend
from trimtab.report.view import View

MIDDLE = 0.5
"""The ratio that is drawn of each arm group, or the nearest to it."""
HEIGHT = 190.0


def figures(view: View) -> list[Figure]:
    """Two figures for each arm group, of its last series (the heaviest model) at the ratio nearest to one half."""
    found: list[Figure] = []
    curves = view.data.spans
    for group in dict.fromkeys(c.group for c in curves):
        mine = [c for c in curves if c.group == group]
        last = [c for c in mine if c.series == mine[-1].series]
        one = min(last, key=lambda c: (abs(c.ratio - MIDDLE), c.ratio))
        name = " · ".join(p for p in (group, one.series, f"{100 * one.ratio:g} % prefixed") if p)
        loss = [("prefix", one.loss["prefix"]), ("body", one.loss["body"])]
        found.append(_figure(f"q{len(found) + 1}", f"Loss: {name}", "nats per token", one.tokens, loss, share=False))
        parts = [("of the gradient", one.gradient_share), ("of the tokens", one.token_share)]
        note = f"of prefix and body together; gradient: {one.measure}{', summed over tokens' if one.measure[0] == 'l' else ''}"
        found.append(_figure(f"q{len(found) + 1}", f"Share of the prefix: {name}", note, one.tokens, parts, share=True))
    return found


def _figure(
    key: str, title: str, note: str, tokens: Sequence[float], lines: Sequence[tuple[str, Sequence[float | None]]], *, share: bool
) -> Figure:  # fmt: skip
    def paint(figure: Any) -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        ax = svg.axes(figure, 42, 34, 10, 8)
        for i, (_, values) in enumerate(lines):
            some = [(x, y) for x, y in zip(tokens, values) if y is not None]
            xs, ys = [x for x, _ in some], [y for _, y in some]
            ax.plot(xs, ys, color=svg.series(i), ls=svg.linestyle(i), lw=1.7, marker="o" if len(xs) == 1 else None)
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator(4, min_n_ticks=2))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: fmt.si(v)))
        ax.yaxis.set_major_locator(MaxNLocator(4))
        ax.yaxis.set_major_formatter(
            FuncFormatter(lambda v, _: f"{100 * v:.0f}{fmt.NBSP}%" if share else fmt.number(v))
        )
        ax.set_xlabel("training tokens", size=svg.FONT - 1)
        ax.tick_params(length=3, color=svg.RULE, labelsize=svg.FONT - 0.5)
        ax.grid(axis="y", color=svg.RULE, lw=0.8)
        ax.set_axisbelow(True)

    ends = "; ".join(
        f"{name}: {fmt.number(told[0])} to {fmt.number(told[-1])}"
        for name, values in lines
        if (told := [v for v in values if v is not None])
    )
    title, alt = fmt.visible(title), fmt.visible(f"{title} against training tokens, first to last. {ends}.")
    legend = [Legend(svg.swatch(i, "line"), name) for i, (name, _) in enumerate(lines)]
    return Figure(key, title, note, svg.draw(key, HEIGHT, paint, title, alt), legend)


def rows(curves: Iterable[SpanCurve]) -> Iterable[dict[str, Any]]:
    """Rows of ``figures.csv``, of every arm, drawn or not."""
    for c in curves:
        shared = {"section": "span", "arm": c.arm, "group": c.group, "label": c.series}
        parts = {
            "loss, prefix": c.loss["prefix"], "loss, body": c.loss["body"], "prefix's share of tokens": c.token_share,
            f"prefix's share of the {c.measure}": c.gradient_share,
        }  # fmt: skip
        for name, values in parts.items():
            for x, value in zip(c.tokens, values):
                if value is not None:
                    yield {**shared, "series": name, "x": x, "value": value}
