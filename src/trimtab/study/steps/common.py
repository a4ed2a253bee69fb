"""What several steps share: the model that a step starts from, and the check that nothing moved since the plan.

A step's name holds a hash of every file it reads. The hash is taken when the study is planned, the files are read when
the step runs, perhaps hours later; a step that did not look again could do its work under a name that lies.
"""

from __future__ import annotations

from pathlib import Path

from trimtab.data.sources import SourceConfig, source_identity
from trimtab.errors import UserError
from trimtab.models.bundle import MANIFEST, verify_bundle
from trimtab.models.config import SMOLLM2, LoadConfig
from trimtab.models.load import identity
from trimtab.study.execute import Context


def check_unchanged(context: Context) -> None:
    """Compare the sources and the loaded model of a step with what its plan hashed.

    ``UserError`` names the first file or directory that differs, or is gone.
    """
    config = context.step.config
    moved = None
    for part in (*config.get("data", ()), *config.get("tasks", ())):
        if "content" in part:
            source = SourceConfig.model_validate(part["source"])
            if source_identity(source) != part["content"]:
                moved = source.path or source.source_label
                break
    else:
        if "load" in config and identity(LoadConfig.model_validate(config["load"])) != config["identity"]:
            moved = config["load"]["load"]
    if moved is not None:
        raise UserError(f"stage {context.step.name!r}: {moved} has changed since the study was planned; run again")


def start_model(context: Context) -> Path | LoadConfig:
    """The model that a step starts from. One that is loaded is verified here if it is a bundle (``Fault`` names the file
    that differs); one that an earlier step made was verified with its artefact, and SmolLM2 is when it is opened."""
    source = context.inputs.get("model")
    if source is not None:
        return source.path / "model"
    where = LoadConfig.model_validate(context.step.config["load"])
    directory = Path(where.load).expanduser()
    if where.load != SMOLLM2 and (directory / MANIFEST).is_file():
        verify_bundle(directory)
    return where
