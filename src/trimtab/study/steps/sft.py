"""Steps ``sft`` and ``adapter``: train on packed chats; leave a tuned bundle, or the same weights with an adapter beside them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from trimtab.data.mixture import Mixture, Phase
from trimtab.data.store import Batch, Mixed, RowStore
from trimtab.errors import Fault, UserError
from trimtab.levers.modes import Switch
from trimtab.machine import Peak, peak_memory
from trimtab.models.adapters import save_with_adapter
from trimtab.models.load import load
from trimtab.models.tokens import add_control_tokens, controls_of, merge_adapter
from trimtab.study.execute import Context
from trimtab.study.steps.common import (
    check_length,
    check_unchanged,
    cost_of,
    save_tuned,
    start_model,
    tokenizer_hash,
)
from trimtab.train.config import TrainConfig
from trimtab.train.log import seconds_of
from trimtab.train.loop import TrainResult, train
from trimtab.train.lora import attach
from trimtab.types import IGNORE


@dataclass(frozen=True)
class _Tuning:
    """Packed chats and the model that is trained on them. ``trained``: mode -> its rows among the chats."""

    context: Context
    settings: TrainConfig
    store: RowStore
    trained: Mapping[str, int]

    @classmethod
    def of(cls, context: Context) -> _Tuning:
        check_unchanged(context)
        packed = context.inputs["packed"]
        facts = packed.manifest.get("facts") or {}
        settings = TrainConfig.model_validate(context.step.config["train"])
        return cls(context, settings, RowStore.open(packed.path / "store"), facts.get("modes") or {})

    @property
    def controls(self) -> dict[str, int]:
        return dict(self.store.meta["meta"]["controls"])

    @property
    def switch(self) -> Switch | None:
        """How the modes of the chats are told; None for chats without the mode lever."""
        kept = self.store.meta["meta"]["switch"]
        return None if kept is None else Switch.model_validate(kept)

    @property
    def steps(self) -> int:
        return max(1, round(len(self.store) * self.context.step.config["epochs"] / self.settings.rows_per_step))

    def check(self, model: Any, tokenizer: Any) -> None:
        """``UserError`` where the rows do not fit the model."""
        stage, store = f"stage {self.context.step.name!r}", self.store
        assert controls_of(tokenizer) == self.controls, "the control tokens of the data and of the model differ"
        if tokenizer_hash(tokenizer) != store.meta["tokenizer"]:
            raise UserError(f"{stage}: the chats were rendered with another tokenizer than the model's")
        check_length(self.context, model, store.length)

    @property
    def data(self) -> Mixed:
        mixture = Mixture({"chats": len(self.store)}, [Phase(0, {"chats": 1.0})], seed=self.context.step.config["seed"])
        return Mixed({"chats": self.store}, mixture)

    def train(self, model: Any) -> TrainResult:
        """Train ``model`` (with its adapters attached, where the settings have some) in place."""
        return train(
            model,
            self.data,
            self.settings,
            total_steps=self.steps,
            seed=self.context.step.config["seed"],
            work=self.context.work,
            progress=self.context.progress,
        )

    def finish(self, result: TrainResult, peak: Peak) -> None:
        """What is told of the step."""
        context, draft, rows, data = self.context, self.context.draft, self.settings.rows_per_step, self.data
        draft.tokens = self.steps * rows * self.store.length
        draft.facts = {
            "shape": context.step.shape,
            "steps": self.steps,
            "rows": len(self.store),
            "resumed": result.began_at > 0,
            "cost": cost_of(
                context,
                tokens=draft.tokens,
                trained_tokens=sum(_trained(data.batch(n * rows, (n + 1) * rows)) for n in range(self.steps)),
                steps=self.steps,
                seconds=seconds_of(context.work),
                peak=peak,
            ),
        }


def run_sft(context: Context) -> None:
    """Train on the packed chats; leaves the bundle in ``model/``, and the log.

    Its modes are those that the weights were trained on; without the mode lever they are those of the model before, whose
    adapters, if it has some, go with it.
    """
    tuning = _Tuning.of(context)
    seed, controls = context.step.config["seed"], tuning.controls
    model, tokenizer = load(start_model(context))
    # Ids are given in the order of names, so the names go in by the ids that the data has.
    new = [name for name in sorted(controls, key=controls.__getitem__) if name not in controls_of(tokenizer)]
    if new:
        add_control_tokens(tokenizer, model, new, seed=seed)
    tuning.check(model, tokenizer)
    if tuning.settings.lora is not None:
        model = attach(model, tuning.settings.lora, list(controls.values()), seed=seed)
    with peak_memory() as peak:
        result = tuning.train(model)
    if tuning.settings.lora is not None:
        model = merge_adapter(model)
    switch = tuning.switch
    if switch is not None:  # a mode without rows is none of this model's
        switch = switch.model_copy(
            update={"modes": {name: told for name, told in switch.modes.items() if tuning.trained.get(name)}}
        )
    save_tuned(context, model, tokenizer, controls, switch)
    tuning.finish(result, peak)


def run_adapter(context: Context) -> None:
    """Train an adapter for one mode on the frozen weights of ``model``; leaves the bundle with it in ``model/``, and the log.

    ``UserError`` where the chats have no rows of the mode; ``Fault`` if the training touched the weights.
    """
    tuning = _Tuning.of(context)
    config, base = context.step.config, context.inputs["model"].path / "model"
    (mode,) = config["modes"]
    stage = f"stage {context.step.name!r}"
    switch = tuning.switch
    assert switch is not None and tuning.settings.lora is not None
    if not tuning.trained.get(mode):
        raise UserError(
            f"{stage}: there are no rows of mode {mode!r}, which is kept apart; bring rows with that mode, or leave it out "
            "of 'modes.names'"
        )
    model, tokenizer = load(base)
    tuning.check(model, tokenizer)
    before = _fingerprint(model)
    wrapped = attach(model, tuning.settings.lora, list(tuning.controls.values()), seed=config["seed"])
    with peak_memory() as peak:
        result = tuning.train(wrapped)
    told = {"step": context.step.id, "inputs": dict(context.step.inputs), "seed": config["seed"]}
    save_with_adapter(base, context.draft.path / "model", mode, wrapped, told, switch)
    if _fingerprint(wrapped.unload()) != before:
        raise Fault(f"{stage}: training the adapter changed the weights below it; the bundle is not saved")
    shutil.copyfile(context.work / "log.jsonl", context.draft.path / "log.jsonl")
    tuning.finish(result, peak)


def _fingerprint(model: Any) -> str:
    """sha256 over a model's parameters, bit by bit."""
    found = hashlib.sha256()
    for name, weight in model.named_parameters():
        found.update(name.encode())
        found.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def _trained(batch: Batch) -> int:
    """Tokens that the loss counts."""
    return int((batch.labels[:, 1:] != IGNORE).sum())
