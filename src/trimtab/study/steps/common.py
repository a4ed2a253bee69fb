"""What several steps share: the model that a step starts from, the check that nothing moved since the plan, the bundle that
a tuning leaves, and what a training cost.

A step's name holds a hash of every file it reads. The hash is taken when the study is planned, the files are read when
the step runs, perhaps hours later; a step that did not look again could do its work under a name that lies.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trimtab.data.sources import SourceConfig, source_identity
from trimtab.errors import Fault, UserError
from trimtab.evaluate.panel import TaskConfig
from trimtab.levers.modes import Switch
from trimtab.machine import Peak
from trimtab.models.bundle import (
    MANIFEST,
    TRAINED,
    BundleManifest,
    adapters_of,
    read_manifest,
    save_bundle,
    verify_bundle,
)
from trimtab.models.config import NAMED, LoadConfig
from trimtab.models.load import identity
from trimtab.models.minilm import encoder_identity
from trimtab.models.tokens import audit
from trimtab.seeds import digest
from trimtab.study.execute import Context
from trimtab.study.stored import store_identity


def check_unchanged(context: Context) -> None:
    """Compare the sources and the loaded models of a step with what its plan hashed.

    ``UserError`` names the first file or directory that differs, or is gone.
    """
    config = context.step.config
    moved = next(
        (source.path or source.source_label for source, content in _read(config) if source_identity(source) != content),
        None,
    )
    if moved is None and "load" in config and identity(LoadConfig.model_validate(config["load"])) != config["identity"]:
        moved = config["load"]["load"]
    if moved is None:
        named = config.get("models", ())
        moved = next((m["load"] for m in named if encoder_identity(m["load"], m["revision"]) != m["identity"]), None)
    store = config.get("store")
    if moved is None and store is not None and store_identity(Path(store["path"])) != store["identity"]:
        moved = store["path"]
    if moved is not None:
        raise UserError(f"stage {context.step.name!r}: {moved} has changed since the study was planned; run again")


def _read(config: Mapping[str, Any]) -> Iterator[tuple[SourceConfig, str]]:
    """Every source that a step reads, with the hash that its plan took."""
    pairs = [
        (part["source"], part["content"])
        for key in ("data", "prompts", "tasks")
        for part in config.get(key, ())
        if "content" in part
    ]
    own = config.get("config", {})
    if "documents" in own:  # a corpus
        pairs += zip((*own["documents"], *own["ready"].values()), own["content"], strict=True)
    elif "data" in own:  # a scorer
        pairs += zip((part["source"] for part in own["data"]), config["content"], strict=True)
    for source, content in pairs:
        yield SourceConfig.model_validate(source), content


def tasks_of(config: Mapping[str, Any]) -> list[TaskConfig]:
    """The tasks of a step's config, which has the hash of what they hold beside each."""
    return [TaskConfig.model_validate({k: v for k, v in task.items() if k != "content"}) for task in config["tasks"]]


def start_model(context: Context) -> Path | LoadConfig:
    """The model that a step starts from. One that is loaded is verified here if it is a bundle (``Fault`` names the file
    that differs); one that an earlier step made was verified with its artefact, and SmolLM2 is when it is opened."""
    source = context.inputs.get("model")
    if source is not None:
        return source.path / "model"
    directory = _bundle(context)
    if directory is not None:
        verify_bundle(directory)
    return LoadConfig.model_validate(context.step.config["load"])


def start_manifest(context: Context) -> BundleManifest | None:
    """The manifest of the model that a step starts from; None for one that is no bundle."""
    directory = _bundle(context)
    return None if directory is None else read_manifest(directory)


def start_switch(context: Context) -> Switch:
    """How the model that a step starts from is told its modes; one without a manifest has none."""
    manifest = start_manifest(context)
    return Switch() if manifest is None else manifest.full_switch()


def start_adapters(context: Context) -> dict[str, Path]:
    """Mode -> the adapter of the model that a step starts from, for the modes that are kept apart."""
    directory = _bundle(context)
    return {} if directory is None else adapters_of(directory)


def _bundle(context: Context) -> Path | None:
    """The directory of the model that a step starts from, if it is a bundle."""
    source = context.inputs.get("model")
    where = context.step.config["load"]["load"] if source is None else ""
    directory = Path(where).expanduser() if source is None else source.path / "model"
    return None if where in NAMED or not (directory / MANIFEST).is_file() else directory


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of what a tokenizer does: vocabulary, merges, added tokens."""
    return digest(tokenizer.backend_tokenizer.to_str())


def check_length(context: Context, model: Any, length: int) -> None:
    """``UserError`` where rows are longer than the model's context."""
    limit = getattr(model.config, "max_position_embeddings", length)
    if length > limit:
        raise UserError(f"stage {context.step.name!r}: length ({length}) is more than the model's context ({limit})")


def save_tuned(
    context: Context, model: Any, tokenizer: Any, controls: Mapping[str, int], switch: Switch | None = None
) -> None:
    """Leave a tuned model as the bundle ``model/``, and the training's log; ``Fault`` for a control token that does not work.

    switch  how its modes are told, the modes being those that the weights were trained on; None: those of the model before
            hold on, and its adapters, if it has some, go with it (they were trained on the weights of before)
    """
    problems = audit(tokenizer, model, controls)
    if problems:
        raise Fault(f"stage {context.step.name!r}: control token {problems[0]}; the bundle is not saved")
    provenance: dict[str, Any] = {
        "step": context.step.id,
        "inputs": dict(context.step.inputs),
        "seed": context.step.config["seed"],
    }
    adapters: dict[str, Path] = {}
    if switch is None:
        before = start_manifest(context)
        switch, adapters = Switch() if before is None else before.full_switch(), start_adapters(context)
        told = {} if before is None else before.provenance
        provenance[TRAINED] = list(told.get(TRAINED, [name for name in switch.modes if name not in adapters]))
        if adapters and "adapters" in told:
            provenance["adapters"] = told["adapters"]
    else:
        provenance[TRAINED] = list(switch.modes)
    manifest = BundleManifest(
        controls=dict(controls),
        modes=switch.modes,
        policies=switch.policies,
        switch=switch,
        default_mode=switch.default,
        tokenizer_audit={"problems": problems},
        provenance=provenance,
    )
    save_bundle(context.draft.path / "model", model, tokenizer, manifest, adapters)
    shutil.copyfile(context.work / "log.jsonl", context.draft.path / "log.jsonl")


def cost_of(
    context: Context, *, tokens: int, trained_tokens: int, steps: int, seconds: float, peak: Peak, read: int = 0
) -> dict[str, Any]:
    """``facts["cost"]`` of a training step, alike for every kind, so that arms can be compared.

    tokens   that went through the model in training, padding included; ``read``: that were only read, by a reference
    seconds  of the training alone: nothing is loaded, rendered or saved in them

    ``flops`` are the plan's, for the tokens really seen (0 where the model's shape is not known); ``peak_bytes`` is null where
    the system does not tell; ``models`` are those held in memory while training.
    """
    step = context.step
    return {
        "tokens": tokens + read,
        "trained_tokens": trained_tokens,
        "steps": steps,
        "flops": step.flops * tokens / step.tokens if step.tokens else 0.0,
        "seconds": round(seconds, 3),
        "peak_bytes": peak.bytes,
        "models": 1,
    }
