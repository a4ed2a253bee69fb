"""The training loop, for pretraining and SFT alike (DESIGN, decision 4).

Step ``s`` trains on the rows at positions ``[s * rows_per_step, (s + 1) * rows_per_step)`` of the data. Its
loss is the summed loss of the trained tokens over their number in this *global* batch, so that neither the
world size nor the number of micro-batches changes it. Everything a step needs follows from (seed, step): a
run that is killed and started again, or trained in segments, ends with the same weights, optimizer and log,
bit for bit (on CPU, same world size and thread count).

What is given up: no sampler, no epochs, no evaluation in the loop; DPO is TRL's. Runs on one process, and on
several under ``torchrun`` or ``accelerate launch`` (DDP).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from trimtab.data.store import Batch
from trimtab.errors import Fault, UserError
from trimtab.seeds import seed_of
from trimtab.train import state
from trimtab.train.config import TrainConfig
from trimtab.train.log import RunLog, flat
from trimtab.train.loss import Figures, GroupGradients, Micro, TrainedPositions, logit_gradients, token_losses
from trimtab.train.schedule import lr_at
from trimtab.train.setup import accelerator_of, adamw, own_memory, recompute
from trimtab.types import SPANS

# Settings that change what is written down, not what is trained.
_SILENT = {"log_every", "checkpoint_every", "gradients_by", "gradients_every", "tracker"}


class Data(Protocol):
    """What the loop reads from; ``data.store.Mixed`` is one."""

    def batch(self, lo: int, hi: int) -> Batch:
        """The rows at positions [lo, hi)."""

    def fingerprint(self, upto: int | None = None) -> str:
        """Changes if any row before position ``upto`` does."""


@dataclass
class TrainResult:
    """A finished call of ``train``: steps done so far (of the whole budget), tokens of these steps (padding
    included), seconds of this call, the last step's figures (as in the log) and the step this call began
    at."""

    steps: int
    tokens: int
    seconds: float
    metrics: dict[str, Any]
    began_at: int
    _save: Callable[[Path], None] = field(repr=False)

    def save_state(self, path: Path) -> None:
        """Write the optimizer's state to the directory ``path``, for ``train(resume=path)``; every rank calls
        it."""
        self._save(path)


def train(
    model: nn.Module,
    data: Data,
    config: TrainConfig,
    *,
    total_steps: int,
    seed: int,
    work: Path,
    stop_step: int | None = None,
    resume: Path | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> TrainResult:
    """Train ``model`` (a transformers causal LM, wrapped by ``lora.attach`` or not) in place.

    total_steps  the whole token budget in steps; the learning rate is that of this budget
    stop_step    stop before this step (a trunk shared by several arms); default: the end
    work         directory of checkpoints, ``log.jsonl`` and ``timing.jsonl``; a checkpoint found here is gone
                 on from
    resume       state directory of the segment before (``TrainResult.save_state``), with ``model`` as it left
                 it
    progress     gets ``{step, total, tokens, tokens_per_second, loss, lr, eta_seconds}`` about twice a second

    UserError for settings, data or states that do not fit each other; Fault for a loss that is not finite and
    for files that cannot be written.
    """
    stop = total_steps if stop_step is None else stop_step
    if not 0 < stop <= total_steps:
        raise UserError(f"stop_step is {stop}; it must lie between 1 and total_steps ({total_steps})")
    if (config.lora is not None) != hasattr(model, "peft_config"):
        raise UserError("'lora' and the model disagree: wrap the model with train.lora.attach, or unset 'lora'")
    accelerator = accelerator_of(config, work)
    main = accelerator.is_main_process
    if config.activation_checkpointing:
        recompute(model, True)
    parameters = own_memory(model)
    wrapped, optimizer = accelerator.prepare(model, adamw(parameters, config, accelerator.device))

    def identity(step: int) -> dict[str, Any]:
        plain = {key: value for key, value in config.plain().items() if key not in _SILENT}
        rows = data.fingerprint(step * config.rows_per_step)
        return {"config": plain, "total_steps": total_steps, "seed": seed, "data": rows}

    def save(path: Path, step: int, weights: bool) -> None:
        if main:
            state.save(path, parameters, optimizer, step=step, identity=identity(step), weights=weights)
        accelerator.wait_for_everyone()

    start, notes = state.restore(work, resume, parameters, optimizer, identity)
    if start > stop:
        raise UserError(f"the state in {work} is of step {start}, past stop_step ({stop}); use another directory")
    accelerator.wait_for_everyone()  # every rank has read before the main one cuts and prunes
    step_tokens = config.rows_per_step * data.batch(0, 1).input_ids.shape[1]
    log = RunLog(work, start, notes) if main else None
    head = TrainedPositions(model)
    run = _Run(accelerator, wrapped, optimizer, parameters, head, data, config, total_steps, seed, step_tokens)
    mode, began, shown = model.training, time.perf_counter(), 0.0
    metrics: dict[str, Any] = {}
    model.train()
    try:
        with torch.random.fork_rng():
            for step in range(start, stop):
                done = step + 1
                by = config.gradients_by if done % config.gradients_every == 0 else "none"
                due = done % config.log_every == 0 or done in (1, total_steps) or by != "none"
                loss, record = run.step(step, full=due or done == stop, by=by)
                seconds = time.perf_counter() - began
                speed = (done - start) * step_tokens / seconds
                if record:
                    metrics = record
                    if log and due:
                        log.write(record, seconds, speed)
                        accelerator.log(flat(record), step=done)
                if progress and main and (seconds - shown > 0.5 or done == stop):
                    shown = seconds
                    progress(
                        {
                            "step": done,
                            "total": total_steps,
                            "tokens": done * step_tokens,
                            "tokens_per_second": speed,
                            "loss": loss,
                            "lr": lr_at(step, total_steps, config),
                            "eta_seconds": (stop - done) * seconds / (done - start),
                        }
                    )
                if config.checkpoint_every and done % config.checkpoint_every == 0 and done < stop:
                    if log:
                        log.sync()  # a checkpoint must not outlive the lines before it
                    save(state.checkpoint_path(work, done), done, True)
                    if main:
                        state.prune(work)
    finally:
        run.head.close()
        model.train(mode)
        if config.activation_checkpointing:
            recompute(model, False)
        if log:
            log.close()
        for tracker in accelerator.trackers:
            tracker.finish()
    return TrainResult(
        steps=stop,
        tokens=stop * step_tokens,
        seconds=time.perf_counter() - began,
        metrics=metrics,
        began_at=start,
        _save=lambda path: save(path, stop, False),
    )


@dataclass
class _Run:
    """The objects of one call, and a step of it."""

    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    parameters: dict[str, nn.Parameter]
    head: TrainedPositions
    data: Data
    config: TrainConfig
    total: int
    seed: int
    step_tokens: int

    def step(self, step: int, *, full: bool, by: str) -> tuple[float, dict[str, Any] | None]:
        """One optimizer step: the loss per trained token and, if ``full``, the figures for the log.

        by  also take each group's gradient norm, by "source" or "span"
        """
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        mine = self.config.rows_per_step // world
        size = mine // self.config.accumulate
        lo = step * self.config.rows_per_step + rank * mine
        batch = self.data.batch(lo, lo + mine)
        device = self.accelerator.device
        micros = [Micro.of(batch.rows(i, i + size), device) for i in range(0, mine, size)]
        count = int(self._sum(sum(len(m.source) for m in micros))[0])
        if not count:
            raise Fault(f"step {step + 1} has no trained token in its {self.config.rows_per_step} rows")

        torch.manual_seed(seed_of("train", self.seed, step, rank))  # dropout
        figures = Figures(batch.sources)
        groups = batch.sources if by == "source" else SPANS
        gradients = None if by == "none" else GroupGradients(groups, list(self.parameters.values()))
        losses: list[Tensor] = []
        for i, micro in enumerate(micros):
            hold = nullcontext() if i + 1 == len(micros) else self.accelerator.no_sync(self.model)
            with hold:
                logits, nll = token_losses(self.model, self.head, micro, bf16=self.config.precision == "bf16")
                if gradients:
                    gradients.add(nll, getattr(micro, by), count)
                if full:
                    figures.add(micro, nll, logit_gradients(logits, micro.target))
                losses.append(nll.detach())
                # DDP takes the mean over ranks; the loss is a sum over them.
                (nll.sum() * (world / count)).backward()
        total = float(self._sum(sum(float(nll.sum()) for nll in losses))[0])
        norm = float(self.accelerator.clip_grad_norm_(self.parameters.values(), self.config.clip))
        if not (math.isfinite(total) and math.isfinite(norm)):
            self._not_finite(step, batch.sources, micros, losses, total)
        rate = lr_at(step, self.total, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not full:
            return total / count, None

        figures.sums = self._sum(figures.sums)
        norms = None
        if gradients:
            gradients.flat = self.accelerator.reduce(gradients.flat, "sum")
            norms = gradients.norms()
        return total / count, {
            "step": step + 1,
            "tokens": (step + 1) * self.step_tokens,
            "trained_tokens": count,
            "loss": total / count,
            "lr": rate,
            "grad_norm": norm,
            "source": figures.record("source", norms if by == "source" else None),
            "span": figures.record("span", norms if by == "span" else None),
        }

    def _sum(self, values: Any) -> NDArray[np.float64]:
        """Sums over the ranks, float64."""
        array = np.atleast_1d(np.asarray(values, np.float64))
        if self.accelerator.num_processes == 1:
            return array
        total = self.accelerator.reduce(torch.from_numpy(array).to(self.accelerator.device), "sum")
        return total.cpu().numpy()

    def _not_finite(
        self, step: int, sources: tuple[str, ...], micros: list[Micro], losses: list[Tensor], total: float
    ) -> NoReturn:
        figures = Figures(sources)
        for micro, nll in zip(micros, losses, strict=True):
            figures.add(micro, nll)
        figures.sums = self._sum(figures.sums)
        what = "gradient" if math.isfinite(total) else "loss"
        raise Fault(
            f"the {what} of step {step + 1} is not finite; the worst loss is of source {figures.worst()!r}; "
            "look at its rows, or lower lr (this step has not changed the weights)"
        )
