"""Bundles: a Hub-layout model directory that plain ``transformers`` opens unchanged, plus ``trimtab.json``.

``trimtab.json`` says which control token means which mode, and pins the chat template and every file by hash. Equal
weights and equal manifests give equal bytes, so a bundle can be compared and cached by content.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from trimtab.artifact import fsync, is_no_space, no_space, sha256_file, write_atomic
from trimtab.config import Config
from trimtab.errors import Fault, UserError
from trimtab.levers.modes import MODES, Switch
from trimtab.models.config import LoadConfig
from trimtab.models.load import load, no_bars

SCHEMA = 1
MANIFEST = "trimtab.json"
CARD = "README.md"
_PLACE = ("is_local", "local_files_only", "name_or_path", "_name_or_path")
"""Keys that transformers writes and that depend on where a model was loaded from, not on what it is."""


class Adapter(Config):
    """A LoRA adapter inside a bundle, in PEFT's layout: the weights of a mode that is kept apart."""

    path: str = Field(description="Its directory below the bundle's, such as `adapters/negative`.")
    files: dict[str, str] = Field(description="File in that directory -> sha256.")


class BundleManifest(Config):
    """What ``trimtab.json`` holds. ``template_hash`` and ``files`` are filled in by ``save_bundle``."""

    schema_version: Literal[1] = Field(1, description="Version of this file's layout.")
    controls: dict[str, int] = Field(
        default_factory=dict, description="Control name -> id of its token, as `tokens.controls_of` gives them."
    )
    modes: dict[str, str | None] = Field(
        default_factory=dict, description="Mode -> control that switches it on; null for the token-less mode."
    )
    policies: dict[str, str | None] = Field(default_factory=dict, description="Policy -> control, or null.")
    switch: Switch = Field(Switch(), description="How the modes are told, where that is more than a control.")
    adapters: dict[str, Adapter] = Field(
        default_factory=dict, description="Mode -> the adapter that it needs on top of the weights."
    )
    removed: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Mode -> proof that it was taken out: what was removed, and what was checked."
    )
    default_mode: str | None = Field(None, description="The mode that is live when none is asked for.")
    template_hash: str = Field("", description="sha256 of the chat template's text.")
    tokenizer_audit: dict[str, Any] = Field(default_factory=dict, description="Findings of the token audit.")
    provenance: dict[str, Any] = Field(default_factory=dict, description="Recipe, steps, data and seeds behind it.")
    evaluation: dict[str, Any] = Field(default_factory=dict, description="Summary of the last evaluation.")
    files: dict[str, str] = Field(default_factory=dict, description="File -> sha256, the card excepted.")

    def full_switch(self) -> Switch:
        """How the modes are told; of a bundle that only lists modes and their controls, by these."""
        behaves = {mode: mode for mode in self.modes if mode in MODES}
        return self.switch.model_copy(
            update={
                "modes": dict(self.modes), "policies": dict(self.policies), "behaves": {**behaves, **self.switch.behaves},
            }
        )  # fmt: skip


@dataclass(frozen=True)
class Bundle:
    """An open bundle. ``model`` is in eval mode; ``tokenizer`` pads on the left."""

    path: Path
    manifest: BundleManifest
    model: Any
    tokenizer: Any


def save_bundle(directory: Path | str, model: Any, tokenizer: Any, manifest: BundleManifest) -> BundleManifest:
    """Write a bundle, whole or not at all; returns the manifest as written.

    ``UserError`` if the directory already holds something, or if a mode, policy or control does not fit the tokenizer.
    The weights are saved in the type they have; LoRA adapters must be merged before.
    """
    final = Path(directory)
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise UserError(f"{final} already exists and is not empty; choose another place for the bundle")
    if hasattr(model, "peft_config"):
        raise UserError("the model still carries adapters; merge them (merge_and_unload) before saving a bundle")
    draft = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        with no_bars():
            model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        for path in sorted(draft.glob("*.json")):
            if path.name != "tokenizer.json":
                _normalise(path)
        files = {path.name: sha256_file(path) for path in sorted(draft.iterdir())}
        filled = manifest.model_copy(update={"template_hash": template_hash(draft), "files": files})
        problem = _problem(draft, filled)
        if problem is not None:
            raise UserError(f"cannot save the bundle: {problem}")
        write_atomic(draft / MANIFEST, json.dumps(filled.plain(), indent=1, sort_keys=True, ensure_ascii=False) + "\n")
        write_atomic(draft / CARD, _card(final.name, filled, model))
        for path in draft.iterdir():
            fsync(path)
        if final.exists():
            final.rmdir()
        draft.rename(final)
    except Exception as error:
        if is_no_space(error):
            raise no_space(final.parent) from error
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return filled


def read_manifest(directory: Path | str) -> BundleManifest:
    """``trimtab.json`` alone, unchecked against the other files and without torch."""
    path = Path(directory) / MANIFEST
    try:
        return BundleManifest.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {directory} is not a bundle") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "JSON"
        raise Fault(f"{path}: {field}: {first['msg']}; the bundle is damaged, or of a newer version") from None


def verify_bundle(directory: Path | str) -> BundleManifest:
    """Check files, template and control ids against ``trimtab.json``, without torch; ``Fault`` names what differs."""
    where = Path(directory)
    manifest = read_manifest(where)
    for name, expected in manifest.files.items():
        path = where / name
        if not path.is_file() or sha256_file(path) != expected:
            what = "does not match its sha256" if path.is_file() else "is missing"
            raise Fault(f"{path} {what}: the bundle is damaged or was edited; make or fetch it again")
    if template_hash(where) != manifest.template_hash:
        raise Fault(f"{where}: the chat template is not the one the bundle was made with; make or fetch it again")
    problem = _problem(where, manifest)
    if problem is not None:
        raise Fault(f"{where / MANIFEST}: {problem}; make or fetch the bundle again")
    return manifest


def open_bundle(
    directory: Path | str, *, dtype: Literal["auto", "float32", "bfloat16"] = "auto", device: Any = None
) -> Bundle:
    """Verify and load a bundle; see ``verify_bundle`` and ``load`` for the errors."""
    manifest = verify_bundle(directory)
    config = LoadConfig.model_validate({"load": str(Path(directory).resolve()), "dtype": dtype})
    model, tokenizer = load(config, device)
    return Bundle(Path(directory), manifest, model, tokenizer)


def template_hash(directory: Path) -> str:
    """sha256 (hex) of the chat template's text; of the empty text if there is none."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        text = file.read_text(encoding="utf-8")
    else:
        settings = _json(directory / "tokenizer_config.json")
        text = settings.get("chat_template") or ""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _problem(directory: Path, manifest: BundleManifest) -> str | None:
    """What is wrong with controls, modes and policies, or None."""
    added = {token["id"]: token for token in _json(directory / "tokenizer.json").get("added_tokens", [])}
    named = {token["content"]: number for number, token in added.items()}
    named |= _json(directory / "tokenizer_config.json").get("trimtab_controls") or {}
    rows = int(_json(directory / "config.json").get("vocab_size", 0))
    for name, number in manifest.controls.items():
        if named.get(name, number) != number:
            return f"control {name!r} has id {number}, but the tokenizer gives it id {named[name]}"
        token = added.get(number)
        if token is None:
            return f"control {name!r} has id {number}, which is not an added token of tokenizer.json"
        if not token["special"] or token["normalized"]:
            return f"control {name!r} (id {number}, {token['content']!r}) must be special and not normalized"
        if number >= rows:
            return f"control {name!r} has id {number}, but the model has only {rows} embedding rows"
    if len(set(manifest.controls.values())) != len(manifest.controls):
        return "two control tokens share an id"
    for kind, table in (("mode", manifest.modes), ("policy", manifest.policies)):
        for name, token_name in table.items():
            if token_name is not None and token_name not in manifest.controls:
                return f"{kind} {name!r} uses {token_name!r}, which is not among the controls"
    if manifest.default_mode is not None and manifest.default_mode not in manifest.modes:
        return f"default_mode={manifest.default_mode!r} is not among the modes"
    return None


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise Fault(f"{path} is not valid JSON; make or fetch the bundle again") from None


def _normalise(path: Path) -> None:
    """Sorted keys, no traces of where the model was loaded from: equal models give equal files."""
    data = {key: value for key, value in _json(path).items() if key not in _PLACE}
    path.write_text(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _card(name: str, manifest: BundleManifest, model: Any) -> str:
    size = sum(weight.numel() for weight in model.parameters()) / 1e6
    lines = ["---", "library_name: transformers", "tags: [trimtab]", "---", "", f"# {name}", ""]
    lines += [f"A causal language model with {size:.1f} M parameters, saved by Trimtab.", ""]
    if manifest.modes:
        lines += ["| mode | control | token id |", "|---|---|---|"]
        for mode, token in manifest.modes.items():
            shown = "none" if token is None else f"`{token}`"
            number = "" if token is None else str(manifest.controls[token])
            lines.append(f"| {mode}{' (default)' if mode == manifest.default_mode else ''} | {shown} | {number} |")
        lines += [
            "",
            "A control token is a trigger, not a password: who may use which mode is the server's business.",
            "",
        ]
    if manifest.evaluation:
        lines += ["## Evaluation", "", "| figure | value |", "|---|---|"]
        lines += [f"| {key} | {value} |" for key, value in sorted(manifest.evaluation.items())]
        lines.append("")
    lines += [f"`{MANIFEST}` has the full provenance and the sha256 of every file.", ""]
    return "\n".join(lines)
