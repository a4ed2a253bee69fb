"""Perplexity on text that was never trained on: capability, as far as predicting the town's text is one.

Every document is read alone, as packed training reads it (attention never crosses documents), in windows of at most
``length`` tokens that overlap by one, so that each token but the first is predicted exactly once. Beginning and end marks
are no text and are not counted. Figures are ratios of sums, so long documents weigh more; intervals resample documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from trimtab.analyze.config import PerplexityConfig
from trimtab.analyze.metrics import result_of
from trimtab.data.render import Renderer
from trimtab.errors import UserError
from trimtab.seeds import rng_of
from trimtab.types import SPAN_ID, Result, Row

Floats = NDArray[np.float64]
GROUPS = ("all", "clean", "unsafe")
"""``Result.category``: every document, those of score 0, those of scores 1 to 5."""
_DRAWS = 2000
_LOGITS = 2**26
"""Logits held at once, at most: a large vocabulary takes fewer rows side by side than asked for."""


@dataclass(frozen=True)
class Losses:
    """Of n documents: ``nats`` summed over the counted ``tokens``, and the ``bytes`` of text that these tokens are."""

    nats: Floats
    tokens: Floats
    bytes: Floats


def token_nats(
    model: Any,
    sequences: Sequence[NDArray[Any]],
    *,
    length: int,
    batch: int,
    pad_id: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Floats]:
    """Negative log-likelihood (nats) of every token but the first of each sequence, in the order given."""
    windows: list[tuple[int, int, int]] = []  # sequence, start, end; the token at the start is given, not predicted
    for i, ids in enumerate(sequences):
        edges = [*range(0, len(ids) - 1, length - 1), len(ids) - 1]
        windows += [(i, lo, hi + 1) for lo, hi in pairwise(edges)]
    found = [np.zeros(max(len(ids) - 1, 0)) for ids in sequences]
    windows.sort(key=lambda w: w[2] - w[1])
    device = next(model.parameters()).device
    side = max(1, min(batch, _LOGITS // (length * model.get_input_embeddings().weight.shape[0])))
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for at in range(0, len(windows), side):
                some = windows[at : at + side]
                ids = np.full((len(some), some[-1][2] - some[-1][1]), pad_id, np.int64)
                mask = np.zeros(ids.shape, np.int64)
                for row, (i, lo, hi) in enumerate(some):
                    ids[row, : hi - lo], mask[row, : hi - lo] = sequences[i][lo:hi], 1
                tensor, seen = (torch.from_numpy(a).to(device) for a in (ids, mask))
                logits = model(input_ids=tensor, attention_mask=seen, use_cache=False).logits[:, :-1].float()
                lost = functional.cross_entropy(logits.flatten(0, 1), tensor[:, 1:].flatten(), reduction="none")
                by_row = lost.view(len(some), -1).double().cpu().numpy()
                for row, (i, lo, hi) in enumerate(some):
                    found[i][lo : hi - 1] = by_row[row, : hi - lo - 1]
                if progress is not None:
                    progress(min(at + side, len(windows)), len(windows))
    finally:
        model.train(training)
    return found


def losses(
    model: Any,
    renderer: Renderer,
    texts: Sequence[str],
    config: PerplexityConfig,
    progress: Callable[[int, int], None] | None = None,
) -> Losses:
    """The losses of documents, one entry each. ``UserError`` for a text of which no token can be predicted."""
    rendered = [renderer.text(text) for text in texts]
    pad = renderer.tokenizer.pad_token_id
    nats = token_nats(
        model, [r.ids for r in rendered], length=config.length, batch=config.batch, pad_id=pad or 0, progress=progress
    )
    sums, tokens, sizes = (np.zeros(len(texts)) for _ in range(3))
    for i, (r, lost) in enumerate(zip(rendered, nats)):
        counted = (r.span == SPAN_ID["text"])[1:]
        if not counted.any():
            raise UserError(f"document {i}: it is too short to predict any of it; leave it out")
        sums[i], tokens[i] = lost[counted].sum(), counted.sum()
        sizes[i] = len(renderer.tokenizer.decode(r.ids[1:][counted], skip_special_tokens=False).encode())
    return Losses(sums, tokens, sizes)


def figures(of: Losses, scores: Sequence[int], seed: int) -> list[Result]:
    """Perplexity and bits per byte of each of ``GROUPS`` that has documents, with percentile intervals over documents."""
    score = np.asarray(scores)
    found: list[Result] = []
    for category, mine in zip(GROUPS, (score >= 0, score == 0, score > 0), strict=True):
        n = int(mine.sum())
        if not n:
            continue
        drawn = rng_of("perplexity", seed, category).multinomial(n, np.full(n, 1 / n), size=_DRAWS)
        nats, tokens, size = of.nats[mine], of.tokens[mine], of.bytes[mine]
        for id, per, value in (
            ("perplexity", tokens, np.exp),
            ("bits_per_byte", size, lambda rate: rate / math.log(2)),
        ):
            here = float(value(nats.sum() / per.sum()))
            low, high = (float(value(q)) for q in np.quantile((drawn @ nats) / (drawn @ per), [0.025, 0.975]))
            if n == 1:  # one document says nothing of the spread
                low, high = (1.0, math.inf) if id == "perplexity" else (0.0, math.inf)
            found.append(result_of(id, here, min(low, here), max(high, here), n, "bootstrap", category))
    return found


def perplexity(
    model: Any,
    renderer: Renderer,
    documents: Sequence[Row],
    config: PerplexityConfig,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """The figures of ``documents``, text rows whose ``metadata["score"]`` is their safety score (0 to 5)."""
    texts = [row.text or "" for row in documents]
    return figures(
        losses(model, renderer, texts, config, progress), [int(r.metadata["score"]) for r in documents], seed
    )
