"""What the training tests share, and what they run in other processes: a tiny model, tiny data, a short run.

``python tests/tiny_training.py WORK OUT SETTINGS PAUSE`` trains in a process of its own (killed by one test,
run on two ranks by another) and writes the final weights to OUT.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.data.mixture import Mixture, Phase
from trimtab.data.pack import Packed
from trimtab.data.store import Mixed, RowStore
from trimtab.train.config import TrainConfig
from trimtab.train.loop import TrainResult, train
from trimtab.types import IGNORE, SPAN_ID

VOCAB, LENGTH, STEPS = 64, 24, 12


def tiny_model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                **{
                    "vocab_size": VOCAB,
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "max_position_embeddings": 64,
                    "tie_word_embeddings": True,
                    "attention_dropout": 0.1,
                    **changes,
                }
            )
        )


def rows_of(seed: int, rows: int, source: int = 0) -> Packed:
    """Rows of three pieces of 6 to 10 tokens (prompt, prefix, body) and padding; ids count up, so they can be
    learnt."""
    rng = np.random.default_rng(seed)
    shape = (rows, LENGTH)
    ids, position = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    span = np.full(shape, SPAN_ID["pad"], np.uint8)
    for row in range(rows):
        at = 0
        for _ in range(3):
            size = min(int(rng.integers(6, 11)), LENGTH - at)
            ids[row, at : at + size] = (int(rng.integers(VOCAB)) + np.arange(size) * (1 + source)) % VOCAB
            position[row, at : at + size] = np.arange(size)
            names = ["prompt"] * 3 + ["prefix"] * 2 + ["body"] * 10
            span[row, at : at + size] = [SPAN_ID[n] for n in names[:size]]
            at += size
        position[row, at:] = np.arange(LENGTH - at)
    trained = (span == SPAN_ID["prefix"]) | (span == SPAN_ID["body"])
    trained &= position > 0
    labels = np.where(trained, ids, np.int32(IGNORE))
    return Packed(ids, labels, position, np.full(shape, source, np.int16), span)


def tiny_data(root: Path, later: dict[str, float] | None = None) -> Mixed:
    """Two sources, 3 : 1; from position 48 on (step 6) other weights if ``later`` is given."""
    stores = {
        name: RowStore.write(root / name, rows_of(i, 30 + i, i), ["up", "skip"], vocab=VOCAB, tokenizer="t")
        for i, name in enumerate(("up", "skip"))
    }
    phases = [Phase(0, {"up": 0.75, "skip": 0.25})] + ([Phase(48, later)] if later else [])
    return Mixed(stores, Mixture({n: len(s) for n, s in stores.items()}, phases, seed=1))


def config_of(**changes: Any) -> TrainConfig:
    return TrainConfig(
        **{"rows_per_step": 8, "lr": 5e-3, "log_every": 1, "checkpoint_every": 0, "warmup": 0.1, **changes}
    )


def run(work: Path, model: Any = None, data: Any = None, **changes: Any) -> TrainResult:
    """A run of 12 steps; keywords of ``train`` are picked out, the rest are settings."""
    names = ("total_steps", "stop_step", "seed", "resume", "progress")
    own = {key: changes.pop(key) for key in names if key in changes}
    own = {"total_steps": STEPS, "seed": 7, **own}
    model = tiny_model() if model is None else model
    data = tiny_data(work.parent / "data") if data is None else data
    return train(model, data, config_of(**changes), work=work, **own)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def log_of(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]


def main() -> None:
    work, out, settings, pause = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), float(sys.argv[4])
    torch.set_num_threads(1)
    model = tiny_model(attention_dropout=settings.pop("dropout", 0.1))

    class Slow(Mixed):
        def batch(self, lo: int, hi: int) -> Any:
            time.sleep(pause)  # so that a kill can be aimed
            return super().batch(lo, hi)

    with tempfile.TemporaryDirectory() as root:
        data = tiny_data(Path(root))
        data.__class__ = Slow
        run(work, model, data, **settings)
    if int(os.environ.get("RANK", "0")) == 0:
        save_file(weights(model), out)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
