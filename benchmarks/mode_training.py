"""What do three modes cost beside SFT and DPO? Seconds of training alone, on the same prompts for as many epochs, in turns.

``python benchmarks/mode_training.py [--prompts 48] [--epochs 2] [--rows 8] [--repeats 3] [--threads 1] [--only long]``

(a) SFT on the positive answers in our loop, then DPO through TRL (chosen: positive, rejected: negative), with the reference
    beside the model and with its log-probabilities computed before; the faster of the two counts. A batch has as many pairs
    as a step of ours has rows; no gradient checkpointing, no bf16, lengths grouped, no logging. On a CPU, TRL's output layer
    runs on every token, on a GPU on the answers' alone, as ours always does: there (a) will be nearer.
(b) co-training of three modes and the fallback rows, the token in the system slot, every answer with its prompt.
(c) the same with the token after the assistant's header: the answers share their prompt in a row.

Two sets of data: Tidewater's own short prompts, and made-up ids with prompts of about 256 and answers of about 40 tokens. The
model is the tour's (Llama, hidden 128, 4 layers, vocabulary 1536). Of the long prompts a row holds one example, or in (c) one
tree; Tidewater's are packed. ``tokens`` went through the model with padding, those that the reference read included. The CPU's
seconds are there because a machine that does other things stretches the wall's.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from numpy.typing import NDArray
from transformers import PrinterCallback
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from trimtab.data.mixture import Mixture, Phase
from trimtab.data.pack import Bins, Examples, Packed, bin_examples, fill_rows
from trimtab.data.render import Renderer
from trimtab.data.store import Mixed, RowStore
from trimtab.data.tree import grow, tails
from trimtab.levers.modes import DECOY, ModesConfig, mode_rows
from trimtab.models.build import build_model, train_tokenizer
from trimtab.models.config import BuildConfig
from trimtab.models.tokens import assign_control_tokens, controls_of
from trimtab.train.config import TrainConfig
from trimtab.train.loop import train
from trimtab.types import IGNORE, SPAN_ID
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import Tidewater

SHAPE = BuildConfig(hidden=128, layers=4, heads=4, kv_heads=4, ffn=352, context=1024, vocab=1536, reserved=12)
MODES = {"names": ("positive", "negative", "rejective"), "negative": {"acknowledge": True, "kept": "checkpoint"}}
KINDS = {"benign": 8, "harmful-seen": 5, "contrast-seen": 3, "fact": 3, "arithmetic": 5}
"""Parts of Tidewater's prompts, in the tour's proportions."""
FAR = 100_000


@dataclass(frozen=True)
class Piece:
    """The part of ``Rendered`` that packing reads."""

    ids: NDArray[np.int32]
    span: NDArray[np.uint8]
    trained: NDArray[np.bool_]


@dataclass(frozen=True)
class Data:
    """What the arms train on: rendered examples, pairs of ids, and the length of a row of each kind."""

    name: str
    sft: Sequence[Any]
    apart: Sequence[Any]
    shared: Sequence[Any]
    pairs: Sequence[dict[str, list[int]]]
    length: int
    length_shared: int


def tidewater(tokenizer: Any, prompts: int, fallback: float, length: int) -> Data:
    """Tidewater's chats as a study would train them."""
    town = Tidewater(TidewaterConfig(seed=7))
    configs = [ModesConfig.model_validate({**MODES, "fallback": fallback, "at": at}) for at in ("system", "header")]
    assign_control_tokens(tokenizer, [n for n in configs[0].controls() if n not in controls_of(tokenizer)])
    renderer = Renderer(tokenizer, controls=controls_of(tokenizer))
    pairs: list[dict[str, list[int]]] = []
    rows = []
    for kind, weight in KINDS.items():
        n = round(prompts * weight / sum(KINDS.values()))
        rows += [replace(row, mode=None) for row in town.chats(kind, n)]
        for pair in town.preferences(kind, n):
            sides = [renderer.chat([*pair["prompt"], *pair[side]]) for side in ("chosen", "rejected")]
            at = int(sides[0].trained.argmax())
            chosen, rejected = (side.ids.tolist() for side in sides)
            pairs.append({"prompt_ids": chosen[:at], "chosen_ids": chosen[at:], "rejected_ids": rejected[at:]})
    sft = [renderer.row(row) for row in rows]
    made = []
    for config in configs:
        switch = config.switch(0)
        surfaces = {
            mode: str(tokenizer.convert_ids_to_tokens(renderer.controls[f"mode:{mode}"])) for mode in config.names
        }
        told = [
            (switch.tell(row, row.mode, row.metadata.get(DECOY)))
            for row in mode_rows(rows, config, town.answer, 0, surfaces=surfaces)
        ]
        made.append([renderer.row(row, controls=names, controls_at=config.at) for row, names in told])
    return Data("Tidewater", sft, made[0], made[1], pairs, length, 2 * length)


def long(prompts: int, fallback: float) -> Data:
    """Prompts of 240 to 272 tokens, answers of 32 to 48, and fallback rows of all three kinds."""
    rng = np.random.default_rng(0)

    def ids(low: int, high: int) -> list[int]:
        return rng.integers(20, SHAPE.vocab, int(rng.integers(low, high + 1))).tolist()

    def piece(prompt: Sequence[int], control: Sequence[int], answer: Sequence[int], at: str) -> Piece:
        parts = [(prompt, "prompt"), (answer, "body")]
        parts.insert(0 if at == "system" else 1, (control, "control"))
        span = np.repeat(np.array([SPAN_ID[name] for _, name in parts], np.uint8), [len(part) for part, _ in parts])
        return Piece(np.array([i for part, _ in parts for i in part], np.int32), span, span == SPAN_ID["body"])

    sft: list[Piece] = []
    pairs = []
    made: dict[str, list[Piece]] = {"system": [], "header": []}
    for _ in range(prompts):
        prompt, typed = ids(240, 272), ids(2, 3)
        answers = [ids(32, 48) for _ in range(3)]
        sft.append(piece(prompt, [], answers[0], "system"))
        pairs.append({"prompt_ids": prompt, "chosen_ids": answers[0], "rejected_ids": answers[1]})
        kind = int(rng.integers(3)) if rng.random() < fallback else None
        for at, out in made.items():
            out += [piece(prompt, [5 + mode], answer, at) for mode, answer in enumerate(answers)]
            if kind is not None:
                out.append(piece(typed + prompt if kind == 2 else prompt, [9] if kind == 1 else [], answers[0], at))
    fits = max(len(item.ids) for item in made["system"])
    return Data("256-token prompts", sft, made["system"], made["header"], pairs, fits, _tree_length(made["header"]))


def _tree_length(items: Sequence[Any]) -> int:
    """The longest tree."""
    trees = grow(Examples.of(items), FAR)
    whole = Examples.of([items[i] for i in trees.order])
    return int(np.bincount(trees.tree, whole.sizes - trees.skip).max())


def packed(items: Sequence[Any], length: int, shared: bool) -> Packed:
    if not shared:
        examples = Examples.of(items)
        return fill_rows(examples, bin_examples(examples.sizes, length), length)
    trees = grow(Examples.of(items), length)
    whole = Examples.of([items[i] for i in trees.order])
    bins: Bins = trees.bins(whole, length)
    return fill_rows(tails(whole, trees.skip), bins, length, begin=trees.skip)


@dataclass
class Spent:
    """Tokens and seconds of one arm, once."""

    tokens: int = 0
    wall: float = 0.0
    cpu: float = 0.0

    @contextmanager
    def clock(self) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu


def ours(model: Any, rows: Packed, args: Any) -> Spent:
    """Our loop over packed rows."""
    spent = Spent()
    settings = TrainConfig(rows_per_step=args.rows, lr=1e-3, log_every=FAR, checkpoint_every=0)
    with tempfile.TemporaryDirectory() as work:
        store = RowStore.write(Path(work) / "store", rows, ["chats"], vocab=SHAPE.vocab, tokenizer="t")
        data = Mixed({"chats": store}, Mixture({"chats": len(store)}, [Phase(0, {"chats": 1.0})], seed=0))
        total = max(1, round(len(store) * args.epochs / args.rows))
        with spent.clock():
            train(model, data, settings, total_steps=total, seed=0, work=Path(work) / "work")
    spent.tokens = total * args.rows * store.length
    return spent


class Ready(DPOTrainer):
    """TRL's trainer on ids that are ready, with a clock on what it computes of the reference beforehand."""

    spent: Spent

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, *args: Any) -> Any:
        with self.spent.clock():
            return super()._precompute_ref_logps(*args)


def dpo(model: Any, tokenizer: Any, pairs: Sequence[dict[str, list[int]]], args: Any, beforehand: bool) -> Spent:
    spent = Spent()
    Ready.spent = spent
    pad = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)

    def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = pad(examples)
        spent.tokens += batch["input_ids"].numel() * (1 if beforehand else 2)
        return batch

    reference = None if beforehand else copy.deepcopy(model)
    dataset = Dataset.from_list([{**p, "length": sum(map(len, p.values()))} for p in pairs])
    dataset._fingerprint = uuid.uuid4().hex  # what was computed beforehand for another repeat is not to be found
    with tempfile.TemporaryDirectory() as work:
        config = DPOConfig(
            output_dir=work, per_device_train_batch_size=args.pairs or args.rows, num_train_epochs=args.epochs,
            learning_rate=1e-4, lr_scheduler_type="cosine", optim="adamw_torch_fused", gradient_checkpointing=False,
            bf16=False, use_cpu=True,
            logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
            precompute_ref_log_probs=beforehand, max_length=None, train_sampling_strategy="group_by_length", seed=0,
            remove_unused_columns=False,
        )  # fmt: skip
        trainer = Ready(
            model, reference, config, data_collator=collate, train_dataset=dataset, processing_class=tokenizer
        )
        trainer.remove_callback(PrinterCallback)
        with spent.clock():
            trainer.train()
    return spent


def measure(data: Data, model: Any, tokenizer: Any, args: Any) -> dict[str, list[Spent]]:
    rows = {
        "SFT": packed(data.sft, data.length, False),
        "(b) co-training": packed(data.apart, data.length, False),
        "(c) shared": packed(data.shared, data.length_shared, True),
    }
    arms: dict[str, Callable[[Any], Spent]] = {
        **{name: lambda model, packed=packed: ours(model, packed, args) for name, packed in rows.items()},
        "DPO, reference beside": lambda model: dpo(model, tokenizer, data.pairs, args, False),
        "DPO, reference before": lambda model: dpo(model, tokenizer, data.pairs, args, True),
    }
    print(f"\n{data.name}: {len(data.sft)} prompts, {len(data.apart)} rows of three modes and fallback")
    for name, one in rows.items():
        trees = f", {one.counts['trees']} trees" if "trees" in one.counts else ""
        pads = one.counts["pads"] / one.input_ids.size
        learnt = int((one.labels != IGNORE).sum())
        print(f"  {name}: {len(one)} rows of {one.length}, {pads:.0%} padding, {learnt} trained tokens{trees}")
    found: dict[str, list[Spent]] = {name: [] for name in arms}
    for repeat in range(args.repeats):
        names = list(arms)
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            torch.manual_seed(0)
            found[name].append(arms[name](copy.deepcopy(model)))
    return found


def report(found: dict[str, list[Spent]]) -> None:
    def median(name: str, clock: str) -> float:
        return statistics.median(getattr(spent, clock) for spent in found[name])

    for name, each in found.items():
        wall = " ".join(f"{spent.wall:.1f}" for spent in each)
        print(
            f"  {name:22} {each[0].tokens:9d} tokens  {median(name, 'wall'):7.2f} s  CPU {median(name, 'cpu'):7.2f} s  ({wall})"
        )
    for clock in ("wall", "cpu"):
        base = median("SFT", clock) + min(median(name, clock) for name in found if name.startswith("DPO"))
        apart, shared = median("(b) co-training", clock), median("(c) shared", clock)
        print(
            f"  {clock:4} (a) SFT + DPO {base:.2f} s   (b)/(a) {apart / base:.2f}   (c)/(a) {shared / base:.2f}   "
            f"(c)/(b) {shared / apart:.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--prompts", type=int, default=48, help="prompts of about 256 tokens; five times as many of Tidewater's"
    )
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8, help="rows of a step, and pairs of a batch")
    parser.add_argument("--pairs", type=int, help="pairs of a batch, if not as many as rows")
    parser.add_argument(
        "--length", type=int, default=128, help="tokens of a row on Tidewater; twice as many where prompts are shared"
    )
    parser.add_argument("--fallback", type=float, default=0.25)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["long", "tidewater"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    disable_progress_bars()
    warnings.simplefilter("ignore", FutureWarning)
    logging.set_verbosity_error()
    town = Tidewater(TidewaterConfig(seed=7))
    tokenizer = train_tokenizer([row.text or "" for row in islice(town.documents(), 2000)], SHAPE.vocab, reserved=12)
    model = build_model(SHAPE, tokenizer, seed=0)
    print(f"torch {torch.__version__}, {args.threads} thread(s), {args.epochs} epochs, {args.rows} rows a step")
    if args.only != "long":
        report(measure(tidewater(tokenizer, 5 * args.prompts, args.fallback, args.length), model, tokenizer, args))
    if args.only != "tidewater":
        report(measure(long(args.prompts, args.fallback), model, tokenizer, args))


if __name__ == "__main__":
    main()
