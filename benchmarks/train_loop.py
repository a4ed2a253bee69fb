"""Is the loop as fast as a bare transformers loop? Median step times of both, taken in turns in one process.

``python benchmarks/train_loop.py [--steps 12] [--rows 32] [--trained 1.0] [--document 60]``

Same model (Llama, hidden 128, 4 layers, vocabulary 1536), same rows, same optimizer settings. The bare loop
calls ``model(input_ids, labels=labels)``, ``backward`` and ``AdamW.step``: no mask, so it looks across packed
documents, no clipping, no log. Ours does all that besides. Times are CPU times of one thread: a busy machine
counts little. ``bare+mask`` is the bare loop with the packed ``position_ids``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.data.store import Batch
from trimtab.train.config import TrainConfig
from trimtab.train.loop import train
from trimtab.types import IGNORE, SPAN_ID

VOCAB, LENGTH = 1536, 128


class Rows:
    """Random rows of packed documents, the same for every loop; ``hook`` is called before each batch."""

    def __init__(
        self, rows: int, steps: int, trained: float, document: int, hook: Callable[[], None] = lambda: None
    ) -> None:
        rng = np.random.default_rng(0)
        shape = (rows * steps, LENGTH)
        self.ids = rng.integers(0, VOCAB, shape).astype(np.int32)
        begins = rng.random(shape) < (1 / document if document else 0)
        begins[:, 0] = True
        column = np.arange(LENGTH)
        self.position = (column - np.maximum.accumulate(np.where(begins, column, 0), axis=1)).astype(np.int32)
        learn = (self.position > 0) & (rng.random(shape) < trained)
        self.labels = np.where(learn, self.ids, np.int32(IGNORE))
        self.source = (rng.random(shape) < 0.3).astype(np.int16)
        self.span = np.full(shape, SPAN_ID["text"], np.uint8)
        self.hook = hook

    def batch(self, lo: int, hi: int) -> Batch:
        if hi - lo > 1:  # the loop looks at one row first, for its length
            self.hook()
        part = slice(lo, hi)
        columns = (self.ids, self.labels, self.position, self.source, self.span)
        return Batch(*(c[part] for c in columns), sources=("a", "b"))

    def fingerprint(self, upto: int | None = None) -> str:
        return "benchmark"


def model_of() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
        )
    )


def bare(rows: Rows, size: int, packed: bool) -> Callable[[int], float]:
    """A step of the plain loop, timed."""
    model: Any = model_of().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)

    def step(index: int) -> float:
        began = time.process_time()
        batch = rows.batch(index * size, (index + 1) * size)
        inputs = {"input_ids": torch.from_numpy(batch.input_ids.astype(np.int64))}
        if packed:
            inputs |= {"position_ids": torch.from_numpy(batch.position_ids.astype(np.int64))}
        loss = model(**inputs, labels=torch.from_numpy(batch.labels.astype(np.int64)), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        return time.process_time() - began

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--trained", type=float, default=1.0, help="share of the tokens that are trained")
    parser.add_argument("--document", type=int, default=60, help="mean tokens of a document; 0: one per row")
    parser.add_argument("--log-every", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)

    rows = Rows(args.rows, args.steps, args.trained, args.document)
    loops = {"bare": bare(rows, args.rows, False), "bare+mask": bare(rows, args.rows, True)}
    times: dict[str, list[float]] = {"ours": [], **{name: [] for name in loops}}
    marks: list[float] = []  # when our loop asks for a batch; the other loops' time is taken out

    def between() -> None:
        now = time.process_time()
        if marks:
            times["ours"].append(now - marks[-1])
        step = len(marks)
        for name, loop in loops.items():
            times[name].append(loop(step))
        marks.append(time.process_time())

    ours = Rows(args.rows, args.steps, args.trained, args.document, between)
    config = TrainConfig(rows_per_step=args.rows, lr=3e-3, log_every=args.log_every, checkpoint_every=0)
    with tempfile.TemporaryDirectory() as work:
        train(model_of(), ours, config, total_steps=args.steps, seed=0, work=Path(work))
        times["ours"].append(time.process_time() - marks[-1])

    median = {name: statistics.median(values[2:]) for name, values in times.items()}
    for name, seconds in median.items():
        print(f"{name:10} {seconds * 1e3:8.1f} ms/step  {args.rows * LENGTH / seconds:9.0f} tokens/s")
    ratios = [a / b for a, b in zip(times["ours"][2:], times["bare"][2:], strict=True)]
    print(
        f"ours / bare {median['ours'] / median['bare']:.3f} (median of the steps' ratios {statistics.median(ratios):.3f})"
    )
    print(f"ours / bare+mask {median['ours'] / median['bare+mask']:.3f}")


if __name__ == "__main__":
    main()
