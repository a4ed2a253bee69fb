"""``trimtab corpus``: build a pretraining corpus, look at it, and make a token store of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.options import Overrides
from trimtab.errors import UserError

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A corpus (.yaml): the fields of a corpus stage.")]
CorpusDir = Annotated[Path, typer.Argument(metavar="DIR", help="A corpus that was built.")]


def register(app: typer.Typer) -> None:
    corpus = typer.Typer(no_args_is_help=True, help="Build a pretraining corpus with safety interventions; export it.")
    app.add_typer(corpus, name="corpus")

    @corpus.command()
    def build(
        config: ConfigPath,
        out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the corpus goes: a new directory.")],
        set_: Overrides = None,
        yes: Annotated[bool, typer.Option("--yes", help="Go on, although what is written has a price.")] = False,
    ) -> None:
        """Score documents, write the interventions, tag, and write the sources out. A killed build goes on where it was."""
        from trimtab.study.corpora import build_from, cost_of, load_corpus, price_of, print_card

        settings = load_corpus(config, set_ or [])
        cost = cost_of(settings)
        if cost is not None:
            print(f"writing: {cost}")
        if price_of(settings) and not yes:
            raise UserError("the writer has a price: look at the estimate above, and say --yes to go on")
        build_from(settings, out)
        print_card(out)
        print(out)

    @corpus.command()
    def estimate(config: ConfigPath, set_: Overrides = None) -> None:
        """Say what writing the interventions would cost; the documents are scored, no writer is asked."""
        from trimtab.study.corpora import cost_of, load_corpus

        cost = cost_of(load_corpus(config, set_ or []))
        print("nothing to pay: no chat model writes" if cost is None else f"writing: {cost}")

    @corpus.command()
    def card(
        directory: CorpusDir,
        check: Annotated[bool, typer.Option("--check", help="Compare every file with its sha256 first.")] = False,
    ) -> None:
        """Print a corpus's figures: scores, sources, origins, and what was left out. Never its text."""
        from trimtab.corpus.read import verify
        from trimtab.study.corpora import print_card

        if check:
            verify(directory)
        print_card(directory)

    @corpus.command(name="score-card")
    def score_card(
        config: ConfigPath,
        labelled: Annotated[
            Path, typer.Argument(metavar="LABELLED", help="Texts (.jsonl) with `text` and a true `score` from 0 to 5.")
        ],
        set_: Overrides = None,
    ) -> None:
        """Measure the scorers of a corpus on labelled texts: confusion, recall and precision at 1 and 3, with intervals."""
        from trimtab.study.corpora import load_corpus, score_cards

        print("\n\n".join(score_cards(load_corpus(config, set_ or []), labelled)))

    @corpus.command()
    def export(
        directory: CorpusDir,
        tokenizer: Annotated[str, typer.Option(metavar="ID", help="Hub id or directory of the tokenizer.")],
        length: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens per packed row.")],
        out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the store goes: a new directory.")],
        revision: Annotated[str | None, typer.Option(metavar="COMMIT", help="Hub commit of the tokenizer.")] = None,
        seed: Annotated[int, typer.Option(help="Seed of the order of documents and of speakers' names.")] = 0,
        add_tag: Annotated[
            bool, typer.Option("--add-tag", help="Give the tokenizer the harmfulness tag, if it has none.")
        ] = False,
    ) -> None:
        """Make a token store of a corpus: what `tokens` of a pretrain stage names."""
        from trimtab.study.corpora import export_corpus, print_tokens

        print_tokens(export_corpus(directory, out, tokenizer, revision, length, seed, add_tag))
        print(out)
