"""What the loop needs before its first step: the processes, the optimizer, and parameters in memory of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType
from torch import nn
from torch.optim import AdamW

from trimtab.errors import UserError
from trimtab.train.config import TrainConfig
from trimtab.train.log import flat


def adamw(parameters: dict[str, nn.Parameter], config: TrainConfig, device: torch.device) -> AdamW:
    """AdamW on the parameters by name; weight decay on matrices, not on norms and biases."""
    if not parameters:
        raise UserError("the model has no trainable parameter")
    for name, p in parameters.items():
        if p.dtype != torch.float32:
            raise UserError(f"{name} is {p.dtype}; load the model in float32 (precision 'bf16' is autocast)")
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = device.type in ("cpu", "cuda")
    return AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=fused)


def own_memory(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, sorted; each in memory that torch has aligned.

    Weights mapped from a file may start at any byte, and CPU kernels may round differently there: a model
    that was saved and loaded would then not train exactly like the one in memory.
    """
    for p in model.parameters():
        if p.device.type == "cpu":
            p.data = p.data.clone()
    return {name: p for name, p in sorted(model.named_parameters()) if p.requires_grad}


def recompute(model: Any, on: bool) -> None:
    """Activation checkpointing on or off; transformers has renamed its methods."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{name}_checkpointing_disable")()


def accelerator_of(config: TrainConfig, work: Path) -> Accelerator:
    """Accelerate's view of this process, for the kinds of run the loop supports; the tracker is opened."""
    if config.tracker and config.tracker not in get_available_trackers():
        raise UserError(f"tracker is {config.tracker!r}, but it is not installed; pip install it or unset 'tracker'")
    work.mkdir(parents=True, exist_ok=True)
    # Precision is the loop's (autocast), so that runs of one process may differ in it.
    accelerator = Accelerator(mixed_precision="no", log_with=config.tracker, project_dir=work)
    if accelerator.distributed_type not in (
        DistributedType.NO,
        DistributedType.MULTI_GPU,
        DistributedType.MULTI_CPU,
    ):
        raise UserError(
            f"{accelerator.distributed_type.value} is not supported by this loop yet; use one process or DDP"
        )
    if config.rows_per_step % (accelerator.num_processes * config.accumulate):
        raise UserError(
            f"rows_per_step ({config.rows_per_step}) must be a multiple of processes x accumulate "
            f"({accelerator.num_processes} x {config.accumulate})"
        )
    if config.tracker:
        accelerator.init_trackers("trimtab", config=flat(config.plain(), "config"))
    return accelerator
