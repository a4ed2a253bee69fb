"""Direct preference optimisation (arXiv 2305.18290) through TRL: the baseline that the mode lever is compared with.

TRL's are the loss, the loop and the batches; ours are the ids (``data.render``: no text becomes structure), the order of the
pairs, the optimizer and its schedule, the clipping and the log, so that SFT and DPO are trained alike. Importing this
without TRL is a ``UserError``.

What makes it as fast as TRL can be, since its wall time is compared: the reference reads each pair once, before the first
step, whatever the number of passes (so one model is held, not two; with LoRA the reference is the model without its
adapter); batches are of about equal lengths; only answers are scored. What is given up: no checkpoints (a killed run
starts anew), one process.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, SequentialSampler
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from trimtab.data.render import Rendered
from trimtab.errors import Fault, UserError
from trimtab.seeds import rng_of, seed_of
from trimtab.train.config import TrainConfig
from trimtab.train.log import RunLog
from trimtab.train.schedule import lr_at
from trimtab.train.setup import adamw, own_memory, recompute

try:
    from trl import DPOConfig, DPOTrainer
    from trl.trainer import utils as trl_utils
    from trl.trainer.dpo_trainer import DataCollatorForPreference
except ImportError as error:
    raise UserError(f"the stage kind 'dpo' needs TRL ({error}): pip install 'trimtab[dpo]'") from None

_GROUP = 16
"""Batches whose pairs are sorted by length together."""
_READ = 4
"""The reference reads so many micro-batches at once: it keeps no activations."""
_FIGURES = {"margin": "margins", "accuracy": "accuracies", "chosen": "chosen", "rejected": "rejected"}
"""Name in the log -> TRL's, behind ``rewards/``."""


@dataclass(frozen=True)
class PairIds:
    """One rendered pair; an answer ends in the marker that ends its turn."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @classmethod
    def of(cls, chosen: Rendered, rejected: Rendered) -> PairIds:
        """From both conversations, each with its last answer trained: an answer starts where its first token is trained, or
        before where the two differ, and ends with its last trained token."""
        both = (chosen, rejected)
        starts = [int(np.argmax(one.trained)) for one in both]
        ends = [len(one.trained) - int(np.argmax(one.trained[::-1])) for one in both]
        size = min(starts)
        differ = np.flatnonzero(chosen.ids[:size] != rejected.ids[:size])
        size = int(differ[0]) if len(differ) else size
        answers = [one.ids[size:end].tolist() for one, end in zip(both, ends, strict=True)]
        return cls(chosen.ids[:size].tolist(), *answers)

    def __len__(self) -> int:
        """Tokens of the prompt with the longer answer."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True)
class DpoResult:
    """A finished training. tokens: that went through the model in training, padding included; read: through the
    reference; trained_tokens: of the answers; seconds: of the reference's passes and of the training."""

    steps: int
    tokens: int
    read: int
    trained_tokens: int
    seconds: float


def train_dpo(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[PairIds],
    config: TrainConfig,
    *,
    beta: float,
    loss: str,
    total_steps: int,
    seed: int,
    work: Path,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> DpoResult:
    """Train ``model`` (a transformers causal LM, wrapped by ``lora.attach`` or not) in place; a row of ``config`` is a pair.

    loss      ``sigmoid``, ``ipo`` (over the mean of an answer's tokens, as TRL has it) or ``hinge``
    work      directory of ``log.jsonl`` and ``timing.jsonl``; nothing else is written anywhere
    progress  as for ``train.loop.train``

    A line of the log has the means since the line before: ``loss``, and of the rewards (beta times the log-ratio to the
    reference) ``chosen``, ``rejected``, their difference ``margin``, and ``accuracy``, the share of pairs where it is positive.
    ``lr`` and ``grad_norm`` are of its own step.

    ``UserError`` for a model that cannot be trained so, ``Fault`` for a loss or gradient that is not finite.
    """
    adapted = hasattr(model, "peft_config")
    if (config.lora is not None) != adapted:
        raise UserError("'lora' and the model disagree: wrap the model with train.lora.attach, or unset 'lora'")
    base = model.get_base_model() if adapted else model
    if hasattr(base.get_output_embeddings(), "lora_A"):
        raise UserError("lora.targets: TRL would not train an adapter of the output layer; leave it out")
    work.mkdir(parents=True, exist_ok=True)
    steps = _Steps.of(pairs, config, total_steps, seed)
    args = _settings(config, work, beta=beta, loss=loss, total_steps=total_steps, seed=seed)
    parameters = own_memory(base)
    optimizer = adamw(parameters, config, args.device)
    schedule = LambdaLR(optimizer, lambda step: lr_at(min(step, total_steps - 1), total_steps, config) / config.lr)
    log, mode = RunLog(work, 0), model.training
    try:
        with torch.random.fork_rng(), _left_alone(base), _answers_alone():
            trainer = _Trainer(
                steps,
                model.disable_adapter if adapted else nullcontext,
                model=base.eval(),
                args=args,
                data_collator=DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id or 0),
                train_dataset=Dataset.from_list(
                    [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in pairs]
                ),
                processing_class=copy.deepcopy(tokenizer),  # TRL sets its padding
                optimizers=(optimizer, schedule),
            )
            trainer.processing_class = None  # else the special tokens of the model's config are changed after it
            for callback in (PrinterCallback, ProgressCallback):
                trainer.remove_callback(callback)
            trainer.add_callback(_Watch(trainer, config, log, progress))
            if config.activation_checkpointing:
                recompute(base, True)
            began = time.perf_counter()
            trainer.train()
            seconds = trainer.read_seconds + time.perf_counter() - began
    finally:
        log.close()
        recompute(base, False)
        model.train(mode)
    return DpoResult(total_steps, steps.tokens[-1], trainer.read, sum(steps.trained), seconds)


def order(lengths: Sequence[int], rows: int, steps: int, seed: int) -> list[int]:
    """The pairs of all steps, ``rows`` to a step, as indices into ``lengths``: pass after pass, each keyed by the seed.

    Within a pass, stretches of ``_GROUP`` batches are sorted by length, cut into batches and these shuffled, so that little is
    padded; where a pass ends within a step, the next one fills it.
    """
    found: list[int] = []
    number = 0
    while len(found) < rows * steps:
        rng = rng_of("dpo order", seed, number)
        drawn = rng.permutation(len(lengths)).tolist()
        head = min(-len(found) % rows, len(drawn))
        whole = head + (len(drawn) - head) // rows * rows
        found += drawn[:head]
        for start in range(head, whole, rows * _GROUP):
            group = sorted(drawn[start : min(start + rows * _GROUP, whole)], key=lambda i: lengths[i])
            for batch in rng.permutation(len(group) // rows).tolist():
                found += group[batch * rows : (batch + 1) * rows]
        found += drawn[whole:]
        number += 1
    return found[: rows * steps]


@dataclass(frozen=True)
class _Steps:
    """What each step trains on. order: pairs, one after another; tokens: through the model by the end of each step, padding
    included; trained: tokens of the answers of each step."""

    order: list[int]
    tokens: list[int]
    trained: list[int]
    lengths: list[int]

    @classmethod
    def of(cls, pairs: Sequence[PairIds], config: TrainConfig, total: int, seed: int) -> _Steps:
        rows, lengths = config.rows_per_step, [len(pair) for pair in pairs]
        size = rows // config.accumulate
        taken = order(lengths, rows, total, seed)
        micros = [2 * size * max(lengths[i] for i in taken[at : at + size]) for at in range(0, len(taken), size)]
        answers = [len(pairs[i].chosen) + len(pairs[i].rejected) for i in taken]
        return cls(
            order=taken,
            tokens=list(accumulate(sum(micros[at : at + config.accumulate]) for at in range(0, len(micros), config.accumulate))),
            trained=[sum(answers[at : at + rows]) for at in range(0, len(answers), rows)],
            lengths=lengths,
        )  # fmt: skip


def _settings(config: TrainConfig, work: Path, *, beta: float, loss: str, total_steps: int, seed: int) -> Any:
    """TRL's settings: ours where we have them, and no file, tracker, upload or sample of anything."""
    size = config.rows_per_step // config.accumulate
    args = DPOConfig(
        output_dir=str(work),
        beta=beta,
        loss_type=[loss],
        max_steps=total_steps,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=config.accumulate,
        max_grad_norm=config.clip,
        bf16=config.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,  # ours is switched on beside it, as for SFT
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=_READ * size,
        max_length=None,  # longer pairs were dropped and counted
        seed=seed_of("dpo", seed) % 2**32,
        logging_steps=config.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        log_level="error",
        disable_tqdm=True,
        report_to=[],
        save_strategy="no",
        dataloader_num_workers=0,
    )
    if args.n_gpu > 1:
        args._n_gpu = 1  # as SFT without a launcher: one device
    return args


@contextmanager
def _left_alone(model: Any) -> Iterator[None]:
    """Take back what TRL and Accelerate change in a model beside its weights: its settings, and what they hang on it, such
    as another ``forward``."""
    own = set(vars(model))
    kept = [(one, copy.deepcopy(vars(one))) for one in (model.config, model.generation_config)]
    try:
        yield
    finally:
        for one, settings in kept:
            vars(one).clear()
            vars(one).update(settings)
        for name in set(vars(model)) - own:
            vars(model).pop(name)


def _answers_alone() -> Any:
    """TRL scores only the answers where it has Triton, and prompts and padding too elsewhere (it keeps shapes constant for
    devices that compile). On a CPU that changes nothing but rounding and the time: with a vocabulary of 1,536 a twelfth of it
    went there, with 8,192 two fifths (4 layers of 128)."""
    return mock.patch.object(trl_utils, "_use_triton", lambda device: True, create=True)


class _Trainer(DPOTrainer):  # type: ignore[misc]
    """TRL's trainer on ids that are ours, in our order."""

    def __init__(self, steps: _Steps, reference: Callable[[], Any], **kw: Any) -> None:
        self.steps, self.reference = steps, reference
        self.read, self.read_seconds, self.last = 0, 0.0, math.nan
        super().__init__(**kw)

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """The pairs of every step in order, each with the reference's log-probabilities; TRL's own keeps them in a file."""
        began = time.perf_counter()
        used = sorted(set(self.steps.order), key=lambda i: (self.steps.lengths[i], i))
        loader = DataLoader(dataset.select(used), batch_size=batch_size, collate_fn=self.data_collator)
        chosen, rejected = ([0.0] * len(dataset) for _ in range(2))
        at = 0
        with self.reference():
            for batch in loader:
                self.read += batch["input_ids"].numel()
                found = self.compute_ref_log_probs(self.model, self._prepare_inputs(batch))
                for values, told in zip((chosen, rejected), found, strict=True):
                    for index, value in zip(used[at:], told.tolist(), strict=False):
                        values[index] = value
                at += batch_size
        self.read_seconds = time.perf_counter() - began
        full = dataset.add_column("ref_chosen_logps", chosen).add_column("ref_rejected_logps", rejected)
        return full.select(self.steps.order)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.steps.order)

    def _send_telemetry(self) -> None:
        """Nothing leaves the machine."""

    def training_step(self, *args: Any, **kw: Any) -> Any:
        loss = super().training_step(*args, **kw)
        self.last = float(loss) * self.args.gradient_accumulation_steps
        if not math.isfinite(self.last):
            raise Fault(f"the loss of step {self.state.global_step + 1} is not finite; look at its pairs, or lower lr")
        return loss


class _Watch(TrainerCallback):
    """Writes the log, and tells how far the training is."""

    def __init__(
        self, trainer: _Trainer, config: TrainConfig, log: RunLog, progress: Callable[[dict[str, Any]], None] | None
    ) -> None:
        self.trainer, self.config, self.log, self.progress = trainer, config, log, progress
        self.steps = trainer.steps
        self.began, self.shown = time.perf_counter(), 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        done, total = state.global_step, state.max_steps
        if done == total:
            control.should_log = True
        seconds = time.perf_counter() - self.began
        if self.progress and (seconds - self.shown > 0.5 or done == total):
            self.shown = seconds
            self.progress(
                {
                    "step": done,
                    "total": total,
                    "tokens": self.steps.tokens[done - 1],
                    "tokens_per_second": self.steps.tokens[done - 1] / seconds,
                    "loss": self.trainer.last,
                    "lr": lr_at(done - 1, total, self.config),
                    "eta_seconds": (total - done) * seconds / done,
                }
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kw: Any) -> None:
        if logs is None or "loss" not in logs:  # the summary at the end
            return
        done = state.global_step
        if not math.isfinite(logs["grad_norm"]):
            raise Fault(f"the gradient of step {done} is not finite; look at its pairs, or lower lr")
        record = {
            "step": done,
            "tokens": self.steps.tokens[done - 1],
            "trained_tokens": self.steps.trained[done - 1],
            "loss": logs["loss"],
            "lr": logs["learning_rate"],
            "grad_norm": logs["grad_norm"],
        } | {name: logs[f"rewards/{theirs}"] for name, theirs in _FIGURES.items()}
        seconds = time.perf_counter() - self.began
        self.log.write(record, seconds, self.steps.tokens[done - 1] / seconds)
