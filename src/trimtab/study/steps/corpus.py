"""Steps ``corpus``, ``tokenizer`` and ``tokens``: from documents to packed rows per source."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.artifact import sha256_file
from trimtab.corpus.config import SOURCES, CorpusConfig, ModelWriter
from trimtab.corpus.export import TOKENIZER, add_tag, documents, tokenise
from trimtab.corpus.read import read_manifest
from trimtab.models.config import HARM_TAG, LoadConfig
from trimtab.study.execute import Context
from trimtab.study.steps.common import check_unchanged
from trimtab.world.config import TidewaterConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_TEXT = 50 * 2**20
"""Characters of text that a tokenizer is trained on at most; of a larger corpus every source gives the same share."""


def run_corpus(context: Context) -> None:
    """Leave the corpus (``corpus.read`` tells its layout) in ``corpus/``."""
    from trimtab.corpus.build import build_corpus

    check_unchanged(context)
    step = context.step.config
    plain = {name: value for name, value in step["config"].items() if name != "content"}
    config = CorpusConfig.model_validate(plain | {"executor": step.get("executor", {})})
    world = TidewaterConfig.model_validate(step["world"]) if "world" in step else None
    dirs = {role.split(":", 1)[1]: made.path / "model" for role, made in context.inputs.items() if ":" in role}
    chat = None
    if isinstance(config.write, ModelWriter):
        from trimtab.study.steps.writer import load_chat

        chat = load_chat(config.write)
    with closing(chat) if chat is not None else nullcontext():
        context.draft.facts = build_corpus(
            config,
            context.draft.path / "corpus",
            work=context.work / "corpus",
            world=world,
            scorer_dirs=dirs,
            chat=chat,
            progress=context.progress,
        )


def run_tokenizer(context: Context) -> None:
    """Leave a tokenizer in Hub layout: trained on the corpus, or that of a store or of a model that exists."""
    check_unchanged(context)
    config = context.step.config
    if "store" in config:
        shutil.copytree(Path(config["store"]["path"]) / TOKENIZER, context.draft.path, dirs_exist_ok=True)
    elif "load" in config:
        tokenizer = load_tokenizer(LoadConfig.model_validate(config["load"]))
        add_tag(tokenizer, HARM_TAG)  # as those that are trained here have it from birth
        tokenizer.save_pretrained(context.draft.path)
    else:
        from trimtab.models.build import train_tokenizer

        corpus = context.inputs["corpus"].path / "corpus"
        train_tokenizer(tokenizer_texts(corpus), config["vocab"]).save_pretrained(context.draft.path)


def load_tokenizer(config: LoadConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hub id, a directory or the packaged model, without its weights."""
    from transformers import AutoTokenizer

    from trimtab.models.load import explained, resolve

    where, options = resolve(config)
    try:
        return AutoTokenizer.from_pretrained(where, **options)  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise explained(error, config, where) from None


def tokenizer_texts(corpus: Path, limit: int = TOKENIZER_TEXT) -> Iterator[str]:
    """What a tokenizer is trained on: the texts of all sources, or evenly spaced ones of a corpus of over ``limit``
    characters. Tagged texts are left out, since they stand among the unsafe ones already."""
    sources = [name for name in SOURCES if name in read_manifest(corpus)["sources"] and name != "tagged"]
    # Six characters a word: a little more than English has, so that the limit is kept.
    size = sum(6 * read_manifest(corpus)["sources"][name]["words"] for name in sources)
    every = max(1.0, size / limit)
    for name in sources:
        due = 0.0
        for number, (text, _) in enumerate(documents(corpus, name, 0)):
            if number >= due:
                due += every
                yield text


def run_tokens(context: Context) -> None:
    """Pack each source into rows of ``length`` tokens: one ``RowStore`` per source that has any text."""
    from transformers import AutoTokenizer

    directory = context.inputs["tokenizer"].path
    tokenizer = AutoTokenizer.from_pretrained(directory)
    context.draft.facts = tokenise(
        context.inputs["corpus"].path / "corpus",
        context.draft.path,
        tokenizer,
        sha256_file(directory / "tokenizer.json"),
        context.step.config["length"],
        tag=HARM_TAG,
        seed=context.step.config["seed"],
        progress=context.progress,
    )
