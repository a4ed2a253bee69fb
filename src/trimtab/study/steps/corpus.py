"""Steps ``corpus``, ``tokenizer`` and ``tokens``: from the world to packed rows per source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trimtab.artifact import read_jsonl, sha256_file, write_jsonl
from trimtab.corpus.interventions import SOURCES, split_sources
from trimtab.seeds import rng_of
from trimtab.study.execute import Context
from trimtab.types import Row
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import Tidewater


def run_corpus(context: Context) -> None:
    """Write ``docs/<source>.jsonl``: Tidewater's documents by safety score, and the interventions made from them."""
    town = Tidewater(TidewaterConfig.model_validate(context.step.config["world"]))
    sources, counts = split_sources(town.documents(), rephrase=town.rephrase, refuse=town.refuse, moral=town.moral)
    directory = context.draft.path / "docs"
    directory.mkdir()
    for name, rows in sources.items():
        write_jsonl(directory / f"{name}.jsonl", [row.to_json() for row in rows])
    context.draft.facts = {"documents": {name: len(rows) for name, rows in sources.items()}, "counts": dict(counts)}


def run_tokenizer(context: Context) -> None:
    """Train a BPE tokenizer on all sources and save it in Hub layout."""
    from trimtab.models.build import train_tokenizer

    corpus = context.inputs["corpus"].path
    texts = (row.text or "" for name in SOURCES for row in _documents(corpus, name))
    train_tokenizer(texts, context.step.config["vocab"]).save_pretrained(context.draft.path)


def run_tokens(context: Context) -> None:
    """Pack each source into rows of ``length`` tokens: one ``RowStore`` per source that has any text."""
    from transformers import AutoTokenizer

    from trimtab.data.pack import pack_documents
    from trimtab.data.render import Renderer
    from trimtab.data.store import RowStore

    directory = context.inputs["tokenizer"].path
    tokenizer = AutoTokenizer.from_pretrained(directory)
    renderer = Renderer(tokenizer)
    rows_of = {}
    for name in SOURCES:
        documents = list(_documents(context.inputs["corpus"].path, name))
        if not documents:
            continue
        order = rng_of("pack", name, len(documents)).permutation(len(documents))
        rendered = (renderer.text(documents[i].text or "") for i in order)
        packed = pack_documents(rendered, context.step.config["length"], last="pad", pad_id=tokenizer.pad_token_id)
        store = RowStore.write(
            context.draft.path / name,
            packed,
            [name],
            vocab=len(tokenizer),
            tokenizer=sha256_file(directory / "tokenizer.json"),
        )
        rows_of[name] = len(store)
    context.draft.facts = {"rows": rows_of}


def _documents(corpus: Path, source: str) -> Iterator[Row]:
    return (Row.from_json(data) for data in read_jsonl(corpus / "docs" / f"{source}.jsonl"))
