"""What several steps share: the model that a step starts from, and the check that nothing moved since the plan.

A step's name holds a hash of every file it reads. The hash is taken when the study is planned, the files are read when
the step runs, perhaps hours later; a step that did not look again could do its work under a name that lies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trimtab.data.sources import SourceConfig, source_identity
from trimtab.errors import UserError
from trimtab.levers.modes import Switch
from trimtab.models.bundle import MANIFEST, read_manifest, verify_bundle
from trimtab.models.config import NAMED, LoadConfig
from trimtab.models.load import identity
from trimtab.models.minilm import encoder_identity
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
    if (isinstance(where, LoadConfig) and where.load in NAMED) or not (directory / MANIFEST).is_file():
        return Switch()
    return read_manifest(directory).full_switch()


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of what a tokenizer does: vocabulary, merges, added tokens."""
    return digest(tokenizer.backend_tokenizer.to_str())
