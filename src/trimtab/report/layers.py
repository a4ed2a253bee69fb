"""Probe curves: what a linear probe tells of harmful requests at each layer, a small multiple per model, split and metric.

One line per arm, the mean over its seeds, with a band of their interval; the baselines (the prompt's words, shuffled
labels) are grey and dashed, the mean over all arms. Layer 0 is the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trimtab.report import format as fmt
from trimtab.report import svg
from trimtab.report.data import Curve
from trimtab.report.figures import Figure, Legend
from trimtab.report.view import Family, View

SPLITS = {"all": "all requests", "heldout": "held-out hazards"}
METRICS = {"auroc": "AUROC", "tpr_at_1fpr": "TPR at 1 % FPR"}
POOLINGS = {"last": "last token", "mean": "mean over tokens"}
WIDTH = 255
"""Four stand side by side: all requests and held-out hazards, each with its detections."""
FIRST = "last"
"""The pooling whose detections are drawn too."""
BASELINES = {"words": "words of the prompt", "shuffled": "shuffled labels"}


def layer_figures(view: View) -> list[tuple[str, list[Legend], list[Figure]]]:
    """(pooling, the legend that its figures share, its figures): per model the AUROC and the detections, of all requests
    and then of the held-out hazards."""
    curves = view.data.probes
    stages = list(dict.fromkeys(c.stage for c in curves))
    found = []
    for pooling, words in POOLINGS.items():
        figures: list[Figure] = []
        for stage in stages:
            for split in SPLITS:
                for metric in METRICS if pooling == FIRST else ("auroc",):
                    mine = [c for c in curves if (c.stage, c.panel, c.metric) == (stage, split, metric)]
                    if any(c.series == pooling for c in mine):
                        figures.append(
                            _figure(view, f"y{pooling[0]}{len(figures) + 1}", stage, split, metric, pooling, mine)
                        )
        if figures:
            legend = max((figure.legend for figure in figures), key=len)
            found.append((words, legend, [replace(figure, legend=[]) for figure in figures]))
    return found


def _figure(view: View, key: str, stage: str, split: str, metric: str, pooling: str, curves: Sequence[Curve]) -> Figure:
    lines: list[tuple[Family, list[float], list[float], list[float], list[float]]] = []
    for family in (f for _, families in view.ordered() for f in families):
        mine = [c for c in curves if c.arm in family.ids and c.series == pooling]
        if mine and view.twin(family) is None:  # a twin's line would lie on its own
            lines.append((family, *_mean(mine)))
    grey = [(name, _mean(some)) for name in BASELINES if (some := [c for c in curves if c.series == name])]
    place = {family.id: i for i, (family, *_) in enumerate(lines)}

    def paint(figure: Any) -> None:
        ax = svg.axes(figure, 42, 34, 10, 8)
        for family, x, y, low, high in lines:
            colour, many = svg.series(place[family.id]), len(family.arms) > 1
            if many and low:
                ax.fill_between(x, low, high, color=colour, alpha=0.1, lw=0)
            ax.plot(x, y, color=colour, ls=svg.linestyle(place[family.id]), lw=1.7, marker="o", ms=3)
        for i, (_, (x, y, _, _)) in enumerate(grey):
            ax.plot(x, y, color=svg.MUTED, ls=(0, (4, 3)) if i == 0 else (0, (1, 2)), lw=1.4)
        bottom = 0.4 if metric == "auroc" and _lowest(lines, grey) >= 0.4 else 0.0
        ax.set_ylim(bottom, 1.02)
        ax.set_yticks([0.4, 0.6, 0.8, 1.0] if bottom else [0.0, 0.25, 0.5, 0.75, 1.0])
        depth = [int(v) for _, x, *_ in lines for v in x] or [0]
        ax.set_xticks(list(range(0, max(depth) + 1, 1 + max(depth) // 8)))
        ax.set_xlabel("layer", size=svg.FONT - 1)
        ax.tick_params(length=3, color=svg.RULE, labelsize=svg.FONT - 0.5)
        ax.grid(axis="y", color=svg.RULE, lw=0.8)
        ax.set_axisbelow(True)

    spoken = "; ".join(
        f"{name}: {', '.join(fmt.number(v, 2) for v in y)}"
        for name, y in [(view.names(f), y) for f, _, y, _, _ in lines] + [(BASELINES[n], y) for n, (_, y, _, _) in grey]
    )
    alt = fmt.visible(f"{METRICS[metric]} of a linear probe by layer, from the embedding up. {spoken}.")
    legend = [Legend(svg.swatch(place[f.id], "line"), view.names(f)) for f, *_ in lines]
    legend += [Legend(_grey(i), BASELINES[name]) for i, (name, _) in enumerate(grey)]
    title = fmt.visible(f"{stage} · {METRICS[metric]}")
    drawn = svg.draw(key, 170, paint, f"{title} · {SPLITS[split]}", alt, width=WIDTH)
    return Figure(key, title, SPLITS[split], drawn, legend)


def _grey(i: int) -> Any:
    from markupsafe import Markup

    dashes = "4 3" if i == 0 else "1 2"
    return Markup(
        '<svg class="swatch" width="28" height="12" aria-hidden="true"><line x1="0" x2="28" y1="6" y2="6" '
        f'style="stroke: var(--muted); stroke-width: 2; stroke-dasharray: {dashes}"/></svg>'
    )


def _mean(curves: Sequence[Curve]) -> tuple[list[float], list[float], list[float], list[float]]:
    """Layers, mean over seeds, and its interval (Student's t over the seeds; none for one)."""
    from trimtab.evaluate.stats import over_seeds

    x, y, low, high = [], [], [], []
    for i, layer in enumerate(curves[0].layers):
        values = [c.values[i] for c in curves if i < len(c.values) and math.isfinite(c.values[i])]
        if values:
            mean, bottom, top, _ = over_seeds(values)
            x.append(float(layer))
            y.append(mean)
            low.append(max(0.0, bottom) if math.isfinite(bottom) else mean)
            high.append(min(1.0, top) if math.isfinite(top) else mean)
    return x, y, low, high


def _lowest(lines: Sequence[Any], grey: Sequence[Any]) -> float:
    values = [v for _, _, y, _, _ in lines for v in y] + [v for _, (_, y, _, _) in grey for v in y]
    return min(values, default=0.0)
