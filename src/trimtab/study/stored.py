"""A tokenised store that exists (``trimtab corpus export``), as a pretraining stage names it: found fit before training.

The directory holds ``tokenizer/``, ``manifest.json`` and one token store per source. Torch-free.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.artifact import sha256_file
from trimtab.data.store import STORE
from trimtab.errors import UserError
from trimtab.models.config import SMOLLM2
from trimtab.models.shape import SMOLLM2_SHAPE
from trimtab.seeds import digest

if TYPE_CHECKING:
    from trimtab.recipe.stages import PretrainStage

TOKENIZER = "tokenizer"


def stored_tokens(where: str, stage: PretrainStage) -> dict[str, str]:
    """``{"path", "identity"}`` of a stage's store. ``UserError`` naming a field if store, tokenizer, length and model do
    not fit each other."""
    assert stage.tokens is not None
    path = Path(stage.tokens).expanduser()
    try:
        stores = _stores(path)
    except UserError as error:
        raise UserError(f"{where}.tokens: {error}") from None
    if not stores:
        raise UserError(f"{where}.tokens: {path} holds no token store; `trimtab corpus export` makes one")
    own = path / TOKENIZER / "tokenizer.json"
    if not own.is_file():
        raise UserError(f"{where}.tokens: {own} is missing; export the store again")
    hash = sha256_file(own)
    for name, meta in stores.items():
        if meta["tokenizer"] != hash:
            raise UserError(
                f"{where}.tokens: source {name!r} was made with another tokenizer than {own}; export the store again"
            )
        if meta["length"] != stage.length:
            raise UserError(
                f"{where}.length: {stage.length}, but the rows of {path} have {meta['length']} tokens; change one of them"
            )
        if meta["vocab"] > stage.model.vocab:
            raise UserError(
                f"{where}.model.vocab: {stage.model.vocab}, but the store's tokenizer has {meta['vocab']} tokens; raise it"
            )
    if stage.tokenizer is not None:
        given = Path(stage.tokenizer.load).expanduser() / "tokenizer.json"
        if not given.is_file() or sha256_file(given) != hash:
            raise UserError(
                f"{where}.tokenizer: {stage.tokenizer.load!r} does not match the tokenizer of the store {path}; leave "
                "'tokenizer' out, or export the store with it"
            )
    return {"path": str(path), "identity": store_identity(path)}


def store_identity(path: Path) -> str:
    """Hash of a store's tokenizer and of what each token store says of its rows (their sha256 among it)."""
    own = path / TOKENIZER / "tokenizer.json"
    return digest([sha256_file(own) if own.is_file() else None, _stores(path)])


def stored_sizes(path: Path) -> dict[str, int]:
    """Tokens of each source of a store, padding included."""
    return {name: int(meta["rows"]) * int(meta["length"]) for name, meta in _stores(path.expanduser()).items()}


def _stores(path: Path) -> dict[str, Any]:
    """Source -> what its ``store.json`` says; ``UserError`` for one that cannot be read, or is none."""
    found = {}
    for file in sorted(path.glob(f"*/{STORE}")):
        try:
            meta = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read ({error}); export the store again") from None
        if not isinstance(meta, dict) or not {"tokenizer", "length", "vocab", "rows", "sha256"} <= meta.keys():
            raise UserError(f"{file} does not describe a token store; export the store again")
        found[file.parent.name] = meta
    return found


@dataclass(frozen=True)
class Vocabulary:
    """How many tokens a tokenizer has, and which of them were added to its model's."""

    size: int
    added: frozenset[str]


@cache
def vocabulary(load: str) -> Vocabulary | None:
    """The tokens of the packaged model or of a directory's ``tokenizer.json``, without a library; None where there is no such
    file to read, as of an id on the Hub."""
    if load == SMOLLM2:
        return Vocabulary(SMOLLM2_SHAPE.vocab, frozenset())  # the tag is not among those it has added
    try:
        data = json.loads((Path(load).expanduser() / "tokenizer.json").read_text(encoding="utf-8"))
        added = frozenset(token["content"] for token in data["added_tokens"])
        vocab = data["model"]["vocab"]
        names = vocab if isinstance(vocab, dict) else [name for name, _ in vocab]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # whoever opens it says best what is wrong
    return Vocabulary(len({*names, *added}), added)
