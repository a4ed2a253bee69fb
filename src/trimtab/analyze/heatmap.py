"""Rows of tokens as one self-contained HTML page, a token's box the darker the larger its value; no script, no network.

Every string of a row is data: it is escaped, and stands in text and in attributes only.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

TITLES = {
    "loss": ("Loss", "nats: how unlikely the token was"),
    "logit_grad": ("Logit gradient", "‖p − y‖: 0 when the token was certain, √2 at most"),
    "head_grad": ("Head gradient", "‖p − y‖ ‖h‖: the pull on the output layer alone"),
    "grad_norm": ("Gradient", "the norm over all measured parameters"),
}
_SPANS = {
    "prefix": "prefix",
    "body": "body",
    "think": "reasoning",
    "prompt": "prompt",
    "control": "control",
    "structure": "structure",
    "tag": "tag",
    "text": "text",
}
_STYLE = """
:root{color-scheme:light dark;--ink:#1c1d20;--paper:#fff;--soft:#5d6068;--line:#d4d6db;--heat:217 72 15;--prefix:#0b6e99}
@media(prefers-color-scheme:dark){:root{--ink:#ececee;--paper:#17181b;--soft:#a2a5ad;--line:#3a3c42;--heat:235 110 50;
--prefix:#58b7e0}}
body{margin:2rem auto;max-width:62rem;padding:0 1rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;margin:0 0 .3rem}h2{font-size:1.15rem;margin:2rem 0 .2rem;border-top:1px solid var(--line);padding-top:1rem}
h3{font-size:.85rem;font-weight:600;color:var(--soft);margin:.9rem 0 .2rem;overflow-wrap:anywhere}
p{margin:.2rem 0 .6rem;color:var(--soft)}
.row{font:14px/2.1 ui-monospace,SFMono-Regular,Menlo,monospace;overflow-wrap:anywhere;margin:0;
color:var(--ink)}
.t{background:rgb(var(--heat)/calc(var(--v)*.62));border-radius:.2rem;padding:.15rem .12rem;margin-right:1px;white-space:pre-wrap;
-webkit-box-decoration-break:clone;box-decoration-break:clone}
.u{color:var(--soft)}
.prefix{border-bottom:3px solid var(--prefix);border-radius:.2rem .2rem 0 0}
.think{border-bottom:3px dotted var(--soft)}
.legend{display:flex;flex-wrap:wrap;gap:.4rem 1.2rem;align-items:center;font-size:.85rem;color:var(--soft);margin:.3rem 0}
.bar{display:inline-block;width:9rem;height:.8rem;border:1px solid var(--line);border-radius:.2rem;vertical-align:-.1rem;
background:linear-gradient(90deg,rgb(var(--heat)/0),rgb(var(--heat)/.62))}
"""


def heatmap(ranking: Mapping[str, Any], title: str) -> str:
    """The page of a ranking's sequences (``token_report.ranking``), one block for each measure, the last first."""
    sequences = ranking["sequences"]
    body = "".join(_block(name, sequences, ranking) for name in reversed(ranking["measures"])) if sequences else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>{html.escape(title)}</h1><p>{_method(ranking)}</p>{body or '<p>No rows were kept to be shown.</p>'}"
        "</main></body></html>\n"
    )


def _method(ranking: Mapping[str, Any]) -> str:
    method = ranking["method"]
    if "grad_norm" not in ranking["measures"]:
        how = ""
    elif method["exact"]:
        how = " Gradients are exact, one backward pass per token."
    else:
        error = 100 / (2 * method["projections"]) ** 0.5
        how = f" Gradients are estimated by {method['projections']} projections, each within about {error:.0f} %."
    return (
        f"{len(ranking['sequences'])} of {ranking['rows']} rows. Shaded tokens are trained; grey ones are only read. A space "
        f"that begins a token is shown as ␣; each token's value is in its title.{how}"
    )


def _block(name: str, sequences: Sequence[Mapping[str, Any]], ranking: Mapping[str, Any]) -> str:
    title, about = TITLES[name]
    values = [v for one in sequences for v in one["values"][name] if v is not None]
    top = float(np.quantile(values, 0.98)) or 1.0  # a single token must not leave all others white
    spans = ranking["spans"]
    means = ", ".join(f"{span} {spans[span][name][0]:.3g}" for span in ("prefix", "body") if span in spans)
    marks = '<span><span class="t prefix" style="--v:0">prefix</span></span>'
    if any("think" in one["spans"] for one in sequences):
        marks += '<span><span class="t think" style="--v:0">reasoning</span></span>'
    legend = (
        f'<div class="legend"><span>0 <span class="bar" role="img" aria-label="scale from 0 to {top:.3g}"></span> {top:.3g} and '
        f'more</span>{marks}<span class="u">not trained</span>'
        + (f"<span>mean of all rows: {means}</span>" if means else "")
        + "</div>"
    )
    rows = "".join(_row(one, name, top) for one in sequences)
    return f"<section><h2>{title}</h2><p>{about}</p>{legend}{rows}</section>"


def _row(one: Mapping[str, Any], name: str, top: float) -> str:
    boxes = []
    for token, span, value in zip(one["tokens"], one["spans"], one["values"][name], strict=True):
        shown = html.escape("␣" + token[1:] if token.startswith(" ") else token)
        said = _SPANS.get(span, span)
        kind = {"prefix": " prefix", "think": " think"}.get(span, "")
        if value is None:
            boxes.append(f'<span class="t u{kind}" style="--v:0" title="{said}, not trained">{shown}</span>')
        else:
            heat = min(max(value / top, 0.0), 1.0)
            boxes.append(f'<span class="t{kind}" style="--v:{heat:.2f}" title="{said}: {value:.3g}">{shown}</span>')
    return f'<h3>{html.escape(one["row_id"])}</h3><p class="row">{"<wbr>".join(boxes)}</p>'
