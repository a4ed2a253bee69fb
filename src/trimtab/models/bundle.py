"""Bundles: a Hub-layout model directory that plain ``transformers`` opens unchanged, plus ``trimtab.json``.

``trimtab.json`` says which control token means which mode, and pins the chat template and every file by hash. Equal
weights and equal manifests give equal bytes, so a bundle can be compared and cached by content. A mode that is kept
apart has an adapter in ``adapters/MODE/`` (``models.adapters``); who opens the directory as a plain model never loads it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from trimtab.artifact import fsync, is_no_space, no_space, sha256_file, write_atomic
from trimtab.config import Config
from trimtab.errors import Fault, UserError
from trimtab.levers.modes import MODES, Switch
from trimtab.models.card import card
from trimtab.models.config import LoadConfig
from trimtab.models.load import load, no_bars

SCHEMA = 1
MANIFEST = "trimtab.json"
CARD = "README.md"
ADAPTERS = "adapters"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""What a PEFT adapter is made of; nothing else belongs into its directory."""
TRAINED = "trained_modes"
"""In ``provenance``: the modes whose rows the weights were trained on."""
CONTROLS = "trimtab_controls"
"""Where the controls' names live in ``tokenizer_config.json`` (``models.tokens.KEY``)."""
WEIGHTS = ".safetensors"
_PLACE = ("is_local", "local_files_only", "name_or_path", "_name_or_path")
"""Keys that transformers writes and that depend on where a model was loaded from, not on what it is."""


class Adapter(Config):
    """A LoRA adapter inside a bundle, in PEFT's layout: the weights of a mode that is kept apart."""

    path: str = Field(description="Its directory below the bundle's, such as `adapters/negative`.")
    files: dict[str, str] = Field(description="File in that directory -> sha256.")


class Removed(Config):
    """Proof that a mode was taken out of a bundle; ``verify_bundle`` compares it with what is there."""

    control: str | None = Field(None, description="The control that switched it on; null where it had none.")
    id: int | None = Field(None, description="The id of that control, which is a token without meaning now.")
    surface: str | None = Field(None, description="How that token is written.")
    files: dict[str, str] = Field(description="Each file of its adapter -> sha256; none of them is left.")
    weights: dict[str, str] = Field(description="Each file of weights -> sha256, the same before and after.")
    trained_modes: tuple[str, ...] = Field(description="The modes that the weights were trained on.")
    audit: tuple[str, ...] = Field(description="What the audit of the remaining controls found; nothing.")


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
    removed: dict[str, Removed] = Field(
        default_factory=dict, description="Mode -> proof that it was taken out: what was removed, and what was checked."
    )
    default_mode: str | None = Field(None, description="The mode that is live when none is asked for.")
    template_hash: str = Field("", description="sha256 of the chat template's text.")
    tokenizer_audit: dict[str, Any] = Field(default_factory=dict, description="Findings of the token audit.")
    provenance: dict[str, Any] = Field(default_factory=dict, description="Recipe, steps, data and seeds behind it.")
    evaluation: dict[str, Any] = Field(default_factory=dict, description="Summary of the last evaluation.")
    files: dict[str, str] = Field(default_factory=dict, description="File -> sha256, the card excepted.")

    @model_validator(mode="after")
    def _inside(self) -> BundleManifest:
        """A manifest names files of its own directory and no others: they are copied by these names."""
        for name in self.files:
            if Path(name).name != name:
                raise ValueError(f"file {name!r} is not in the bundle's directory itself")
        for mode, adapter in self.adapters.items():
            if (
                Path(mode).name != mode
                or adapter.path != f"{ADAPTERS}/{mode}"
                or sorted(adapter.files) != [*ADAPTER_FILES]
            ):
                raise ValueError(f"adapter {mode!r} must be {ADAPTERS}/MODE with {' and '.join(ADAPTER_FILES)}")
        return self

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


def save_bundle(
    directory: Path | str,
    model: Any,
    tokenizer: Any,
    manifest: BundleManifest,
    adapters: Mapping[str, Path] | None = None,
) -> BundleManifest:
    """Write a bundle, whole or not at all; returns the manifest as written.

    adapters  mode -> a directory in PEFT's layout with the adapter that it needs, which is copied

    ``UserError`` if the directory already holds something, or if a mode, policy or control does not fit the tokenizer.
    The weights are saved in the type they have; LoRA adapters must be merged before.
    """
    if hasattr(model, "peft_config"):
        raise UserError("the model still carries adapters; merge them (merge_and_unload) before saving a bundle")
    with drafted(directory) as draft:
        with no_bars():
            model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        for path in sorted(draft.glob("*.json")):
            if path.name != "tokenizer.json":
                normalise(path)
        for mode, source in (adapters or {}).items():
            copy_adapter(source, draft / ADAPTERS / mode)
        return seal(draft, Path(directory).name, manifest)


@contextmanager
def drafted(directory: Path | str) -> Iterator[Path]:
    """A draft directory that becomes ``directory`` when the block ends without an error, else disappears. ``UserError`` if
    there is something already."""
    final = Path(directory)
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise UserError(f"{final} already exists and is not empty; choose another place for the bundle")
    draft = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        yield draft
        for path in (*draft.rglob("*"), draft):
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


def seal(draft: Path, name: str, manifest: BundleManifest) -> BundleManifest:
    """Hash what lies in a draft, check it, and write ``trimtab.json`` and the card of a bundle that is called ``name``;
    returns the manifest as written. ``UserError`` if something does not fit."""
    files = {p.name: sha256_file(p) for p in sorted(draft.iterdir()) if p.is_file() and p.name not in (MANIFEST, CARD)}
    adapters = {
        where.name: Adapter(
            path=f"{ADAPTERS}/{where.name}", files={p.name: sha256_file(p) for p in sorted(where.iterdir())}
        )
        for where in sorted((draft / ADAPTERS).glob("*"))
    }
    found = {"template_hash": template_hash(draft), "files": files, "adapters": adapters}
    filled = manifest.model_copy(update=found)
    problem = _problem(draft, filled)
    if problem is not None:
        raise UserError(f"cannot save the bundle: {problem}")
    write_atomic(draft / MANIFEST, json.dumps(filled.plain(), indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    write_atomic(draft / CARD, card(name, filled, draft))
    return filled


def copy_bundle(source: Path, manifest: BundleManifest, draft: Path, *, link: bool = False) -> None:
    """The files that a manifest lists, into a draft; with ``link`` as hard links where the file system has them. (Files that
    are linked are one file: never edit one in place.)"""
    for name in _listed(manifest):
        (draft / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            if not link:
                raise OSError
            os.link(source / name, draft / name)
        except OSError:
            shutil.copyfile(source / name, draft / name)


def copy_adapter(source: Path, into: Path) -> None:
    """The two files of an adapter, its settings without traces of where it was made. ``UserError`` if one is missing."""
    into.mkdir(parents=True)
    for name in ADAPTER_FILES:
        if not (source / name).is_file():
            raise UserError(f"{source / name} is missing: {source} is not an adapter in PEFT's layout")
        shutil.copyfile(source / name, into / name)
    settings = into / ADAPTER_FILES[0]
    plain = {
        key: sorted(v) if key == "target_modules" and isinstance(v, list) else v for key, v in _json(settings).items()
    }
    plain["base_model_name_or_path"] = None  # it lies in the directory of its base
    settings.write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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
    """Check files, adapters, template, control ids and the proofs of what was taken out against ``trimtab.json``, without
    torch; ``Fault`` names what differs."""
    where = Path(directory)
    manifest = read_manifest(where)
    for mode, adapter in manifest.adapters.items():
        if not (where / adapter.path).is_dir():
            raise Fault(f"{where / adapter.path} is missing, which mode {mode!r} needs; make or fetch the bundle again")
    listed = _listed(manifest)
    for name, expected in listed.items():
        path = where / name
        if not path.is_file() or sha256_file(path) != expected:
            what = "does not match its sha256" if path.is_file() else "is missing"
            raise Fault(f"{path} {what}: the bundle is damaged or was edited; make or fetch it again")
    for path in sorted((where / ADAPTERS).rglob("*")):
        if path.is_file() and path.relative_to(where).as_posix() not in listed:
            raise Fault(f"{path} is not listed in {MANIFEST}: the bundle was edited; make or fetch it again")
    if template_hash(where) != manifest.template_hash:
        raise Fault(f"{where}: the chat template is not the one the bundle was made with; make or fetch it again")
    problem = _problem(where, manifest)
    if problem is not None:
        raise Fault(f"{where / MANIFEST}: {problem}; make or fetch the bundle again")
    for mode in manifest.removed:
        problem = removal_problem(where, manifest, mode)
        if problem is not None:
            raise Fault(
                f"{where}: mode {mode!r} is said to be taken out, but {problem}; make or fetch the bundle again"
            )
    return manifest


def adapters_of(directory: Path | str) -> dict[str, Path]:
    """Mode -> the directory of its adapter, as a bundle's manifest lists them; none for a model that is no bundle."""
    where = Path(directory)
    if not (where / MANIFEST).is_file():
        return {}
    return {mode: where / adapter.path for mode, adapter in read_manifest(where).adapters.items()}


def open_bundle(
    directory: Path | str, *, dtype: Literal["auto", "float32", "bfloat16"] = "auto", device: Any = None
) -> Bundle:
    """Verify and load a bundle; see ``verify_bundle`` and ``load`` for the errors."""
    manifest = verify_bundle(directory)
    config = LoadConfig.model_validate({"load": str(Path(directory).resolve()), "dtype": dtype})
    model, tokenizer = load(config, device)
    return Bundle(Path(directory), manifest, model, tokenizer)


def template_text(directory: Path) -> str:
    """The chat template; empty if there is none."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    return _json(directory / "tokenizer_config.json").get("chat_template") or ""


def template_hash(directory: Path) -> str:
    """sha256 (hex) of the chat template's text; of the empty text if there is none."""
    return hashlib.sha256(template_text(directory).encode("utf-8")).hexdigest()


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
    for mode in manifest.adapters:
        if mode not in manifest.modes:
            return f"adapter {mode!r} belongs to no mode"
    for mode in manifest.modes if TRAINED in manifest.provenance else ():
        if mode not in manifest.provenance[TRAINED] and mode not in manifest.adapters:
            return f"mode {mode!r} is neither in the weights ({TRAINED}) nor in an adapter"
    return None


def removal_problem(directory: Path, manifest: BundleManifest, mode: str) -> str | None:
    """What contradicts the proof that a mode was taken out, or None. The files of ``manifest`` are those on the disk."""
    proof, switch = manifest.removed[mode], manifest.switch
    if {name: digest for name, digest in manifest.files.items() if name.endswith(WEIGHTS)} != proof.weights:
        return "the weights are not those that the proof names"
    if mode in {*manifest.modes, *manifest.adapters, *switch.modes, *switch.texts}:
        return f"{MANIFEST} still has it"
    names = {**(_json(directory / "tokenizer_config.json").get(CONTROLS) or {}), **manifest.controls}
    if proof.control in names or proof.id in names.values():
        return f"its control {proof.control!r} (id {proof.id}) is still known"
    template = template_text(directory)
    if any(word is not None and word in template for word in (proof.control, proof.surface)):
        return "the chat template mentions its token"
    if proof.audit:
        return f"the audit of what is left found: {proof.audit[0]}"
    if mode in proof.trained_modes or list(proof.trained_modes) != list(manifest.provenance.get(TRAINED, ())):
        return "the weights were trained on it, or it is not known on what"
    gone, listed = {digest for name, digest in proof.files.items() if name.endswith(WEIGHTS)}, _listed(manifest)
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and (
            (path.name in ADAPTER_FILES and name not in listed) or _digest(path, name, listed) in gone
        ):
            return f"{name} is of an adapter that is not listed"
    return None


def _listed(manifest: BundleManifest) -> dict[str, str]:
    """Every file that a manifest lists, by its path below the bundle's directory -> sha256."""
    apart = ((adapter.path, adapter.files) for adapter in manifest.adapters.values())
    return manifest.files | {f"{where}/{name}": digest for where, files in apart for name, digest in files.items()}


def _digest(path: Path, name: str, listed: Mapping[str, str]) -> str:
    return listed[name] if name in listed else sha256_file(path)


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise Fault(f"{path} is not valid JSON; make or fetch the bundle again") from None


def normalise(path: Path) -> None:
    """Sorted keys, no traces of where the model was loaded from: equal models give equal files."""
    data = {key: value for key, value in _json(path).items() if key not in _PLACE}
    path.write_text(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
