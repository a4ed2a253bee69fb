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
from trimtab.levers.modes import Switch
from trimtab.machine import Peak
from trimtab.models.bundle import MANIFEST, BundleManifest, read_manifest, save_bundle, verify_bundle
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


def start_model(context: Context) -> Path | LoadConfig:
    """The model that a step starts from. One that is loaded is verified here if it is a bundle (``Fault`` names the file
    that differs); one that an earlier step made was verified with its artefact, and SmolLM2 is when it is opened."""
    source = context.inputs.get("model")
    if source is not None:
        return source.path / "model"
    where = LoadConfig.model_validate(context.step.config["load"])
    directory = Path(where.load).expanduser()
    if where.load not in NAMED and (directory / MANIFEST).is_file():
        verify_bundle(directory)
    return where


def start_switch(context: Context) -> Switch:
    """How the model that a step starts from is told its modes; one without a manifest has none."""
    where = start_model(context)
    directory = where if isinstance(where, Path) else Path(where.load).expanduser()
    if isinstance(where, LoadConfig) and (where.load in NAMED or not (directory / MANIFEST).is_file()):
        return Switch()
    return read_manifest(directory).full_switch()


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of what a tokenizer does: vocabulary, merges, added tokens."""
    return digest(tokenizer.backend_tokenizer.to_str())


def check_length(context: Context, model: Any, length: int) -> None:
    """``UserError`` where rows are longer than the model's context."""
    limit = getattr(model.config, "max_position_embeddings", length)
    if length > limit:
        raise UserError(f"stage {context.step.name!r}: length ({length}) is more than the model's context ({limit})")


def carried_switch(context: Context) -> Switch:
    """How a model that is tuned further is told its modes: as the one that it started from, without the modes of which only
    an adapter knew."""
    switch, where = start_switch(context), start_model(context)
    directory = where if isinstance(where, Path) else Path(where.load).expanduser()
    if not switch.modes:
        return switch
    apart = read_manifest(directory).adapters
    return switch.model_copy(
        update={name: {mode: told for mode, told in getattr(switch, name).items() if mode not in apart}
                for name in ("modes", "behaves", "texts")}
    )  # fmt: skip


def save_tuned(context: Context, model: Any, tokenizer: Any, controls: Mapping[str, int], switch: Switch) -> None:
    """Leave a tuned model as the bundle ``model/``, and the training's log; ``Fault`` for a control token that does not work."""
    problems = audit(tokenizer, model, controls)
    if problems:
        raise Fault(f"stage {context.step.name!r}: control token {problems[0]}; the bundle is not saved")
    manifest = BundleManifest(
        controls=dict(controls),
        modes=switch.modes,
        policies=switch.policies,
        switch=switch,
        default_mode=switch.default,
        tokenizer_audit={"problems": problems},
        provenance={
            "step": context.step.id,
            "inputs": dict(context.step.inputs),
            "seed": context.step.config["seed"],
        },
    )
    save_bundle(context.draft.path / "model", model, tokenizer, manifest)
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
