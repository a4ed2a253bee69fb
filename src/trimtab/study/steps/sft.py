"""Step ``sft``: train on packed chats; leaves a tuned bundle."""

from __future__ import annotations

from trimtab.data.mixture import Mixture, Phase
from trimtab.data.store import Mixed, RowStore
from trimtab.errors import UserError
from trimtab.levers.modes import Switch
from trimtab.machine import peak_memory
from trimtab.models.load import load
from trimtab.models.tokens import add_control_tokens, controls_of, merge_adapter
from trimtab.study.execute import Context
from trimtab.study.steps.common import (
    carried_switch,
    check_length,
    check_unchanged,
    cost_of,
    save_tuned,
    start_model,
    tokenizer_hash,
)
from trimtab.train.config import TrainConfig
from trimtab.train.log import seconds_of
from trimtab.train.loop import train
from trimtab.train.lora import attach


def run_sft(context: Context) -> None:
    """Train on the packed chats; leaves the bundle in ``model/``, and the log."""
    check_unchanged(context)
    config = context.step.config
    settings = TrainConfig.model_validate(config["train"])
    store = RowStore.open(context.inputs["packed"].path / "store")
    controls: dict[str, int] = store.meta["meta"]["controls"]
    model, tokenizer = load(start_model(context))
    # Ids are given in the order of names, so the names go in by the ids that the data has.
    new = [name for name in sorted(controls, key=controls.__getitem__) if name not in controls_of(tokenizer)]
    if new:
        add_control_tokens(tokenizer, model, new, seed=config["seed"])
    assert controls_of(tokenizer) == controls, "the control tokens of the data and of the model differ"
    if tokenizer_hash(tokenizer) != store.meta["tokenizer"]:
        raise UserError(f"stage {context.step.name!r}: the chats were rendered with another tokenizer than the model's")
    check_length(context, model, store.length)
    if settings.lora is not None:
        model = attach(model, settings.lora, list(controls.values()), seed=config["seed"])
    mixture = Mixture({"chats": len(store)}, [Phase(0, {"chats": 1.0})], seed=config["seed"])
    total = max(1, round(len(store) * config["epochs"] / settings.rows_per_step))
    with peak_memory() as peak:
        result = train(
            model,
            Mixed({"chats": store}, mixture),
            settings,
            total_steps=total,
            seed=config["seed"],
            work=context.work,
            progress=context.progress,
        )
    if settings.lora is not None:
        model = merge_adapter(model)
    kept = store.meta["meta"]["switch"]
    switch = Switch.model_validate(kept) if kept is not None else carried_switch(context)
    save_tuned(context, model, tokenizer, controls, switch)
    draft, rows = context.draft, total * settings.rows_per_step
    draft.tokens = rows * store.length
    draft.facts = {
        "shape": context.step.shape,
        "steps": total,
        "rows": len(store),
        "resumed": result.began_at > 0,
        "cost": cost_of(
            context,
            tokens=draft.tokens,
            trained_tokens=round(store.meta["trained_tokens"] * rows / len(store)),
            steps=total,
            seconds=seconds_of(context.work),
            peak=peak,
        ),
    }
