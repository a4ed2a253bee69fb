"""From a corpus to packed tokens: one ``data.store.RowStore`` per source, and the tokenizer beside them.

    <dir>/<source>/rows.npy, store.json    packed rows, read by position while training
    <dir>/tokenizer/                       Hub layout (where the store stands alone)
    <dir>/tokens.json                      length, vocabulary, tokenizer's sha256, rows and tokens per source

Here the harmfulness tag becomes an id, and the speakers of refusal dialogues get their names. Documents are read in a keyed
order, file by file of the corpus, so memory is that of one file and one chunk of packed rows, whatever the corpus holds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.artifact import sha256_file, write_atomic
from trimtab.corpus.config import SOURCES
from trimtab.corpus.read import read_file, read_manifest, source_files
from trimtab.corpus.speakers import with_speakers
from trimtab.data.pack import pack_stream
from trimtab.data.store import RowStore
from trimtab.errors import Fault, UserError
from trimtab.seeds import rng_of
from trimtab.types import SPAN_ID

if TYPE_CHECKING:
    from trimtab.data.render import Rendered, Renderer

TOKENS = "tokens.json"
TOKENIZER = "tokenizer"
FORMAT = 1
_PLAIN = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"
"""Stands in for the chat template of a tokenizer that has none: documents are no chats."""
Progress = Callable[[Mapping[str, Any]], None]


def check_tag(tokenizer: Any, tag: str) -> int:
    """The id of the harmfulness tag: a special token of its own. Needs neither torch nor transformers.

    tokenizer  a fast tokenizer, or a directory that holds ``tokenizer.json``

    ``UserError`` if the tag is missing, is cut into several tokens, or is a token that a text could yield.
    """
    from tokenizers import Tokenizer

    if isinstance(tokenizer, Path):
        core, where = Tokenizer.from_file(str(_tokenizer_file(tokenizer))), str(tokenizer)
    else:
        core, where = tokenizer.backend_tokenizer, str(getattr(tokenizer, "name_or_path", "") or "the tokenizer")
    ids = core.encode(tag, add_special_tokens=False).ids
    added = {t["id"]: t for t in json.loads(core.to_str())["added_tokens"] if t["content"] == tag}
    if len(ids) != 1 or ids[0] not in added:
        raise UserError(
            f"tag: {tag} is not one token of {where} but {len(ids)}; take a tokenizer that has it as a special token, or set "
            "'tag: 0' in the corpus"
        )
    if not added[ids[0]]["special"]:
        raise UserError(f"tag: {tag} is no special token of {where}, so a text could hold it; make it special")
    return int(ids[0])


def add_tag(tokenizer: Any, tag: str) -> int:
    """``check_tag``, after making the tag a special token of a tokenizer that has no such token at all (in place).

    For a tokenizer whose model is yet to be made: an embedding that exists would lack the new row.
    """
    from tokenizers import AddedToken

    if tag not in tokenizer.get_vocab():
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [AddedToken(tag, special=True, normalized=False)]},
            replace_extra_special_tokens=False,
        )
    return check_tag(tokenizer, tag)


def documents(corpus: Path, source: str, seed: int) -> Iterator[tuple[str, list[int]]]:
    """(text, offsets of tags) of every row of a source, in a keyed order, with the speakers' names drawn.

    The files in one order, the rows of each in another; a document's names depend on ``seed`` and its id alone.
    """
    names = read_manifest(corpus)["speakers"]
    files = source_files(corpus, source)
    for number in rng_of("pack files", seed, source, len(files)).permutation(len(files)):
        rows = list(read_file(files[number], source))
        for i in rng_of("pack", seed, source, int(number), len(rows)).permutation(len(rows)):
            text, metadata = rows[i].text or "", rows[i].metadata
            if metadata.get("speakers"):
                assert not metadata.get("tags"), "a dialogue that refuses is never tagged"
                text = with_speakers(text, names, rng_of("speakers", seed, rows[i].id))
            yield text, metadata.get("tags") or []


def tokenise(
    corpus: Path, out: Path, tokenizer: Any, digest: str, length: int, *, tag: str, seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Pack every source of a corpus into rows of ``length`` tokens below ``out``; returns rows, tokens and tags.

    digest  sha256 of the tokenizer's ``tokenizer.json``, by which a store and a model's tokenizer are matched
    tag     what the harmfulness tag is called in the tokenizer; needed where the corpus has tags

    Tokens are counted without padding. ``UserError`` for a text that the tokenizer cannot spell, or a tag that is no token.
    """
    from trimtab.data.render import Renderer

    manifest = read_manifest(corpus)
    renderer = Renderer(tokenizer, template=None if tokenizer.chat_template else _PLAIN)
    sources = {name: manifest["sources"][name] for name in SOURCES if name in manifest["sources"]}
    tag_id = check_tag(tokenizer, tag) if "tagged" in sources else None
    told = _Told(progress, sum(entry["rows"] for entry in sources.values()))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    facts: dict[str, Any] = {"rows": {}, "tokens": {}, "tags": 0}
    for name in sources:
        rendered = told.counted(_rendered(renderer, corpus, name, seed, tag_id), name)
        try:
            store = RowStore.write_stream(
                out / name,
                pack_stream(rendered, length, last="pad", pad_id=pad),
                [name],
                vocab=len(tokenizer),
                tokenizer=digest,
                meta={"seed": seed},
            )
        except UserError as error:
            raise UserError(f"source {name!r}: {error}") from None
        facts["rows"][name] = len(store)
        facts["tokens"][name] = store.meta["counts"]["tokens"]
    facts["tags"] = told.tags
    body = {
        "format": FORMAT,
        "length": length,
        "vocab": len(tokenizer),
        "tokenizer": digest,
        "tag": tag_id,
        "seed": seed,
        "tags": told.tags,
        "corpus": sha256_file(corpus / "manifest.json"),
        "sources": {name: {"rows": facts["rows"][name], "tokens": facts["tokens"][name]} for name in sources},
    }
    write_atomic(out / TOKENS, json.dumps(body, indent=1, sort_keys=True) + "\n")
    return facts


def export(
    corpus: Path, out: Path, tokenizer: Any, length: int, *, tag: str, seed: int = 0, progress: Progress | None = None
) -> dict[str, Any]:
    """A store that stands alone, tokenizer included, at ``out`` (a new directory): what a pretrain stage's ``tokens`` names.

    Returns ``tokens.json``. It is whole or absent: made aside, then moved.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: is there already; choose a new directory, or remove it")
    draft = out.with_name(f".{out.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        tokenizer.save_pretrained(draft / TOKENIZER)
        tokenise(
            corpus, draft, tokenizer, sha256_file(_tokenizer_file(draft / TOKENIZER)), length, tag=tag, seed=seed,
            progress=progress,
        )  # fmt: skip
        if out.exists():
            out.rmdir()
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return read_tokens(out)


def read_tokens(directory: Path) -> dict[str, Any]:
    """``tokens.json`` of a store, checked against its tokenizer and the heads of its rows; torch-free.

    ``UserError`` where there is no store, or its tokenizer is another one; ``Fault`` for a damaged one.
    """
    try:
        found = json.loads((directory / TOKENS).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{directory} is no token store: it has no {TOKENS}; make one with `trimtab corpus export`"
        ) from None
    except (OSError, ValueError) as error:
        raise Fault(f"{directory / TOKENS} cannot be read ({error}); export the corpus again") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{directory / TOKENS} is not of format {FORMAT}; export the corpus again")
    if (directory / TOKENIZER).is_dir() and sha256_file(_tokenizer_file(directory / TOKENIZER)) != found["tokenizer"]:
        raise UserError(f"{directory / TOKENIZER} is not the tokenizer that the store was made with; export it again")
    for name, entry in found["sources"].items():
        store = RowStore.open(directory / name)
        told = (entry["rows"], found["length"], found["tokenizer"])
        if (len(store), store.length, store.meta["tokenizer"]) != told:
            raise Fault(f"{store.path} is not the store that {TOKENS} tells of; export the corpus again")
    return found


class _Told:
    """Counts documents and tags on their way, and tells of them."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done, self.tags = progress, total, 0, 0

    def counted(self, rendered: Iterator[Rendered], name: str) -> Iterator[Rendered]:
        for item in rendered:
            self.done += 1
            if name == "tagged":
                self.tags += int((item.span == SPAN_ID["tag"]).sum())
            if self.progress is not None and self.done % 500 == 0:
                self.progress({"step": self.done, "total": self.total, "note": name})
            yield item


def _rendered(renderer: Renderer, corpus: Path, source: str, seed: int, tag_id: int | None) -> Iterator[Rendered]:
    return (renderer.text(text, tags, tag_id) for text, tags in documents(corpus, source, seed))


def _tokenizer_file(directory: Path) -> Path:
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{directory}: no tokenizer.json there; only fast tokenizers can be used")
    return file
