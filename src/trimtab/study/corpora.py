"""What ``trimtab corpus`` does and prints, outside a study."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trimtab.artifact import is_no_space, no_space
from trimtab.corpus.card import drops, histogram, makers, origins, table
from trimtab.corpus.config import ClassifierScorer, CorpusConfig, EndpointWriter, ModelWriter
from trimtab.corpus.read import DROPPED, read_manifest
from trimtab.errors import Fault, TrimtabError, UserError
from trimtab.models.config import HARM_TAG, LoadConfig
from trimtab.progress import make_reporter
from trimtab.settings import load_settings
from trimtab.world.config import TidewaterConfig

if TYPE_CHECKING:
    from trimtab.corpus.writers import Cost


class CorpusFile(CorpusConfig):
    """A corpus that is built outside a study."""

    world: TidewaterConfig = Field(
        TidewaterConfig(), description="The sandbox world, where Tidewater has a part in it."
    )


def load_corpus(path: Path, overrides: Sequence[str]) -> CorpusFile:
    """The settings of a corpus; ``UserError`` names the field that is wrong, or the scorer that only a study can train."""
    settings = load_settings(path, overrides, CorpusFile, "corpus")
    for scorer in settings.score:
        if isinstance(scorer, ClassifierScorer) and scorer.stage is not None:
            raise UserError(
                f"{path}: score: stage {scorer.stage!r} belongs to a study; give 'model', a directory or Hub id"
            )
    return settings


def work_of(out: Path) -> Path:
    """Where a build that is not finished lies; beside its target, so that the end is one rename."""
    return out.with_name(f".{out.name}.work")


@contextmanager
def lock_of(work: Path) -> Iterator[None]:
    """Hold a work directory, which is made if need be; the lock dies with the process. ``UserError`` for a second one."""
    while True:
        try:
            work.mkdir(parents=True, exist_ok=True)
            handle = (work / ".lock").open("a")
        except OSError as error:
            if is_no_space(error):
                raise no_space(work) from error
            raise UserError(f"cannot write to {work}: {error.strerror}; choose another --out") from None
        held = False
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another build is at work in {work}; wait for it, or choose another --out") from None
            except OSError as error:
                raise UserError(
                    f"{work} cannot be locked ({error.strerror}); choose an --out on another disk"
                ) from None
            # The one that held it may have ended and removed the directory between opening and locking.
            with suppress(FileNotFoundError):
                held = os.path.samestat((work / ".lock").stat(), os.fstat(handle.fileno()))
            if held:
                yield
                return


def build_from(settings: CorpusFile, out: Path) -> dict[str, Any]:
    """Build a corpus, telling of it as a study tells of its steps; returns its facts.

    Of a build that failed, the work directory stays if the next one can go on there, and the error says so.
    """
    from trimtab.corpus.build import is_worth_keeping

    work = work_of(out)
    with lock_of(work):
        try:
            return _build(settings, out, work)
        except BaseException as error:
            kept = is_worth_keeping(work)
            if not kept and str(work) not in str(error):  # a message may name a file in it
                shutil.rmtree(work, ignore_errors=True)
            if kept and isinstance(error, TrimtabError):
                said = f"{error}; what is done is kept in {work}, where the next build of {out} goes on"
                raise (UserError if isinstance(error, UserError) else Fault)(said) from error
            raise


def _build(settings: CorpusFile, out: Path, work: Path) -> dict[str, Any]:
    from trimtab.corpus.build import build_corpus

    chat = None
    if isinstance(settings.write, ModelWriter):
        from trimtab.study.steps.writer import load_chat

        chat = load_chat(settings.write)
    config = _plain(settings)
    reporter, started = make_reporter(), time.monotonic()
    try:
        reporter.start("corpus", out.name, 1, 1)
        facts = build_corpus(
            config, out, work=work, world=settings.world, chat=chat,
            progress=lambda event: reporter.update("corpus", event),
        )  # fmt: skip
        reporter.done("corpus", out.name, time.monotonic() - started)
    finally:
        reporter.close()
        if chat is not None:
            chat.close()
    return facts


def _plain(settings: CorpusFile) -> CorpusConfig:
    return CorpusConfig.model_validate({k: v for k, v in settings.plain().items() if k != "world"})


def price_of(settings: CorpusFile) -> bool:
    """Whether the writer has a price."""
    writer = settings.write
    return isinstance(writer, EndpointWriter) and (writer.price_in > 0 or writer.price_out > 0)


def cost_of(settings: CorpusFile) -> Cost | None:
    """What writing would cost, from documents scored here and now; None where no chat model writes."""
    if not isinstance(settings.write, EndpointWriter | ModelWriter):
        return None
    from trimtab.corpus.build import scored_documents
    from trimtab.corpus.config import INTERVENTIONS
    from trimtab.corpus.writers import estimate_cost

    kinds = [kind for kind in INTERVENTIONS if kind in settings.written and kind not in settings.ready]
    return estimate_cost(
        settings.write, scored_documents(_plain(settings), settings.world), kinds=kinds, seed=settings.seed
    )


def score_cards(settings: CorpusFile, labelled: Path) -> list[str]:
    """The card of every scorer on labelled texts, as tables."""
    from trimtab.corpus.scorecard import card_table, score_card
    from trimtab.corpus.scorers import make_scorer
    from trimtab.data.sources import SourceConfig, rows

    found = list(rows(SourceConfig(path=str(labelled))))
    scorers = [make_scorer(scorer, world=settings.world, dirs={}) for scorer in settings.score]
    return [card_table(score_card(scorer, found)) for scorer in scorers]


def print_card(directory: Path) -> None:
    """A corpus's card on the terminal."""
    manifest = read_manifest(directory)
    console = _console()
    console.print("[bold]scores of the documents[/bold]")
    console.print("\n".join(f"  {line}" for line in histogram(manifest["scores"])), highlight=False)
    shown = Table(box=box.SIMPLE_HEAD)
    for heading, justify in (("source", "left"), ("rows", "right"), ("words", "right"), ("repeats", "right")):
        shown.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for heading in ("licence", "what it is"):
        shown.add_column(heading)
    for row in table(manifest):
        shown.add_row(*map(escape, row))
    console.print(shown)
    _lines(console, "documents", origins(manifest))
    _lines(console, "made by", makers(manifest))
    left = [f"{n:,} {reason}" for reason, n in drops(manifest)]
    if manifest[DROPPED]["rows"]:
        left.append(f"({manifest[DROPPED]['rows']:,} of them are kept in {DROPPED}/)")
    _lines(console, "left out", left or ["nothing"])


def export_corpus(
    corpus: Path, out: Path, tokenizer: str, revision: str | None, length: int, seed: int, add: bool
) -> dict[str, Any]:
    """``corpus.export.export`` with a tokenizer by name, told as a study's step is; returns ``tokens.json``."""
    from trimtab.corpus.export import add_tag, export
    from trimtab.machine import quieten
    from trimtab.study.steps.corpus import load_tokenizer

    read_manifest(corpus)
    quieten()
    loaded = load_tokenizer(LoadConfig(load=tokenizer, revision=revision))
    if add:
        add_tag(loaded, HARM_TAG)
    reporter, started = make_reporter(), time.monotonic()
    try:
        reporter.start("tokens", out.name, 1, 1)
        made = export(
            corpus,
            out,
            loaded,
            length,
            tag=HARM_TAG,
            seed=seed,
            progress=lambda event: reporter.update("tokens", event),
        )
        reporter.done("tokens", out.name, time.monotonic() - started)
    finally:
        reporter.close()
    return made


def print_tokens(tokens: Mapping[str, Any]) -> None:
    """Rows and tokens of a store, by source."""
    shown = Table(box=box.SIMPLE_HEAD)
    shown.add_column("source")
    shown.add_column(f"rows of {tokens['length']}", justify="right")
    shown.add_column("tokens", justify="right")
    for name, entry in tokens["sources"].items():
        shown.add_row(name, f"{entry['rows']:,}", f"{entry['tokens']:,}")
    console = _console()
    console.print(shown)
    if tokens["tags"]:
        console.print(f"{tokens['tags']:,} harmfulness tags (id {tokens['tag']})", highlight=False)


def _lines(console: Console, head: str, lines: Iterable[str]) -> None:
    for number, line in enumerate(lines):
        console.print(f"{head if not number else '':<11}{escape(line)}", highlight=False)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=120)
