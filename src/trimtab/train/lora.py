"""Low-rank adapters through PEFT: attached before training, with the control tokens' embedding rows if asked
for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from trimtab.errors import UserError
from trimtab.models.tokens import trainable_rows
from trimtab.seeds import seed_of
from trimtab.train.config import LoraSettings


def attach(model: Any, settings: LoraSettings, control_ids: Sequence[int] = (), *, seed: int) -> PeftModel:
    """``model`` (a transformers causal LM, changed in place) wrapped with fresh adapters; only these are
    trainable.

    control_ids  ids whose embedding rows are trained too, if ``settings.train_control_rows``; the other rows
                 stay
    seed         keys the adapters' initial values, whatever the state of torch's generator

    UserError if a target matches no module.
    """
    rows = trainable_rows(model, control_ids).peft_kwargs if settings.train_control_rows and control_ids else {}
    targets: str | list[str] = list(settings.targets)
    if settings.targets == ("all-linear",):
        targets = "all-linear"
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # a float works; PEFT divides it by r
        lora_dropout=settings.dropout,
        target_modules=targets,
        **rows,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed_of("lora", seed))
        try:
            wrapped = get_peft_model(model, config)
        except ValueError as error:
            raise UserError(f"lora.targets {list(settings.targets)} do not fit this model: {error}") from None
    assert isinstance(wrapped, PeftModel)
    return wrapped
