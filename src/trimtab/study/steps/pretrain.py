"""Step ``pretrain``: one segment of a pretraining run, from the start or from where the segment before it ended."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import AutoTokenizer

from trimtab.artifact import sha256_file
from trimtab.data.mixture import Mixture, Phase
from trimtab.data.store import Mixed, RowStore
from trimtab.errors import UserError
from trimtab.models.build import build_model
from trimtab.models.config import BuildConfig
from trimtab.models.load import load
from trimtab.study.execute import Context
from trimtab.study.steps.common import check_unchanged
from trimtab.train.config import TrainConfig
from trimtab.train.loop import train


def run_pretrain(context: Context) -> None:
    """Train steps ``from``..``to`` of ``total_steps``; leaves the model, the optimiser's state and the log."""
    config = context.step.config
    build, settings = BuildConfig.model_validate(config["model"]), TrainConfig.model_validate(config["train"])
    check_unchanged(context)
    directory = context.inputs["tokenizer"].path
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokens = Path(config["store"]["path"]) if "store" in config else context.inputs["tokens"].path
    phases = [Phase(row, weights) for row, weights in config["phases"]]
    stores = {name: _open(tokens, name) for name in sorted({n for p in phases for n in p.weights})}
    for name, store in stores.items():
        if store.meta["tokenizer"] != sha256_file(directory / "tokenizer.json"):
            raise UserError(f"{tokens / name} was made with another tokenizer than {directory}; build the store again")
    mixture = Mixture({name: len(store) for name, store in stores.items()}, phases, seed=config["seed"])
    previous = context.inputs.get("previous")
    if previous is None:
        model = build_model(build, tokenizer, config["seed"])
    else:
        model = load(previous.path / "model")[0]
    result = train(
        model,
        Mixed(stores, mixture),
        settings,
        total_steps=config["total_steps"],
        stop_step=config["to"],
        seed=config["seed"],
        work=context.work,
        resume=previous.path / "trainer" if previous else None,
        progress=context.progress,
    )
    draft = context.draft
    model.save_pretrained(draft.path / "model")
    tokenizer.save_pretrained(draft.path / "model")
    result.save_state(draft.path / "trainer")
    shutil.copyfile(context.work / "log.jsonl", draft.path / "log.jsonl")
    rows = settings.rows_per_step
    used = mixture.counts(config["from"] * rows, config["to"] * rows)
    draft.tokens = (config["to"] - config["from"]) * rows * config["length"]
    draft.facts = {
        "resumed": result.began_at > config["from"],
        "shape": context.step.shape,
        "rows": used,
        "epochs": {name: round(mixture.counts(0, config["to"] * rows)[name] / len(stores[name]), 4) for name in used},
    }


def _open(tokens: Path, name: str) -> RowStore:
    if not (tokens / name).is_dir():
        raise UserError(
            f"the curriculum reads source {name!r}, but the corpus has no such text; change the world or the timing"
        )
    return RowStore.open(tokens / name)
