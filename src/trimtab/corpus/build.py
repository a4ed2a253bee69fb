"""From documents to a corpus: one DataTrove pipeline, then one merge that makes the order the same for any executor.

    documents -> Score -> Rephrase, Refuse -> (ready interventions) -> Moral -> Tag -> parts -> merge

    <work>/<identity>/parts, run     the parts and DataTrove's own files; ``identity`` stands for all that decides them, so
                                     neither another build nor a cluster's job of one can write among them
    <work>/answers/score, write      the answers of chat models, for any build: they are found by what was asked

Part ``k`` of ``n`` takes every ``n``-th document (of a source in many files: every ``n``-th file) and writes its rows with the
document's number; the merge puts them back in the documents' order. So the files are byte for byte the same for any number
of tasks and workers, and after a kill.

Trades off: of a source in one file every part reads (and skips) all documents, which is cheap beside scoring them; the
merge is one process.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.batching import batched

import trimtab
from trimtab.artifact import is_no_space, no_space, sha256_file, write_atomic
from trimtab.corpus.answered import WatchedScorer, WatchedWriter, check_answered, dropped_name, forget_junk
from trimtab.corpus.card import data_card
from trimtab.corpus.chat import Chat
from trimtab.corpus.config import (
    INTERVENTIONS,
    SOURCES,
    CorpusConfig,
    EndpointScorer,
    Intervention,
    ModelWriter,
    TidewaterWriter,
    TruthScorer,
)
from trimtab.corpus.documents import source_of
from trimtab.corpus.executors import reporting, run_pipeline, silence
from trimtab.corpus.lazy import Lazy
from trimtab.corpus.moral import Moral
from trimtab.corpus.parts import ORDER, PartFile, check_there, draft_of, finish, ordered, remove_drafts
from trimtab.corpus.read import DROPPED, FORMAT, MANIFEST, SourceWriter, words_in
from trimtab.corpus.refuse import Refuse
from trimtab.corpus.released import licence_of
from trimtab.corpus.rephrase import Rephrase
from trimtab.corpus.score import EMPTY, Score
from trimtab.corpus.scorers import Scorer, make_scorer, score_all
from trimtab.corpus.speakers import ASSISTANT, SPEAKERS, USER, read_dialogue
from trimtab.corpus.tag import Tag
from trimtab.corpus.writers import Writer, make_writer
from trimtab.data.sources import SourceConfig, share, source_identity
from trimtab.errors import UserError
from trimtab.seeds import digest
from trimtab.types import Message, Row
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import Tidewater

Progress = Callable[[Mapping[str, Any]], None]
_OURS = ("source", ORDER, "tags", "speakers", "style", "from", "from_score", "drop_reason", "scores", "score_reason")
"""Keys that mean something here; what a document brings under one of them is kept below ``metadata["given"]``."""
_TIDEWATER_LICENCE = "Apache-2.0"
_EMPTY: Mapping[str, Path] = {}


def build_corpus(
    config: CorpusConfig,
    out: Path,
    *,
    work: Path,
    world: TidewaterConfig | None = None,
    scorer_dirs: Mapping[str, Path] = _EMPTY,
    chat: Chat | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build the corpus of ``config`` at ``out`` (a new or empty directory) and return facts about it.

    work         where parts, answers of chat models and logs are kept until the end; a killed build goes on there. On a
                 cluster it must be on a file system that all machines share. One process at a time
    world        the town, where documents, scores or writer are Tidewater's (None: the default one)
    scorer_dirs  name of a scorer stage -> directory of its classifier
    chat         the chat model of a writer of kind ``model``; needs the local executor with one worker
    progress     told {"step", "total", "note"} now and then; only by the local executor with one worker

    ``UserError``: no document, a document without text, no text scored 0, or settings that do not fit each other.
    ``Fault``: more than ``config.max_unanswered`` got no answer from an endpoint; calling again asks for those once more.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; choose a new directory, or remove it")
    town = world or TidewaterConfig()
    alone = config.executor.kind == "local" and min(config.executor.workers, config.executor.tasks) == 1
    if isinstance(config.write, ModelWriter) and not alone:
        raise UserError("write: kind 'model' is loaded here, once; use executor.kind 'local' with one worker")
    kept = _Kept(chat) if chat is not None else None
    answers = work / "answers"
    forget_junk(answers / "score")
    scorers = [make_scorer(s, world=town, dirs=scorer_dirs, work=answers / "score") for s in config.score]
    writer = make_writer(config.write, world=town, seed=config.seed, work=answers / "write", chat=kept)
    makers = {"scorers": [s.identity for s in scorers], "writer": writer.identity if writer else None}
    if config.max_unanswered < 1:
        scorers = [WatchedScorer(scorer) for scorer in scorers]
        writer = WatchedWriter(writer) if writer is not None else None
    place = work / _identity(config, town, makers)[:16]
    if config.executor.kind == "local":
        remove_drafts(place / "parts")
    told = _Told(progress if alone else None, town.documents if not config.documents else None)
    run_pipeline(_blocks(config, town, place, scorers, writer, told), config.executor, place / "run")
    check_there(place, config.executor.tasks)
    check_answered(config, place)
    made = place / "corpus"
    shutil.rmtree(made, ignore_errors=True)
    manifest = _merge(config, town, makers, place / "parts", made)
    _move(made, out)
    shutil.rmtree(work, ignore_errors=True)
    return {
        "documents": {name: entry["rows"] for name, entry in manifest["sources"].items()},
        "words": {name: entry["words"] for name, entry in manifest["sources"].items()},
        "scores": manifest["scores"],
        "counts": manifest["counts"],
    }


def is_worth_keeping(work: Path) -> bool:
    """Whether an unfinished build left anything that the next one need not do again: a part, a queued job, an answer."""
    answers = any(file.stat().st_size for file in work.glob("answers/*/*.jsonl"))
    return answers or any(next(work.glob(f"*/run/{name}"), None) for name in ("completions/*", "slurm_job"))


def input_documents(config: CorpusConfig, world: TidewaterConfig) -> Iterator[Row]:
    """The documents of a corpus in their order; ``UserError`` names one that has no text."""
    return (row for _, row in _numbered(config, world, 0, 1))


def _numbered(config: CorpusConfig, world: TidewaterConfig, part: int, parts: int) -> Iterator[tuple[int, Row]]:
    """One part's documents, each with the number by which the merge finds its place."""
    if not config.documents:
        for number, row in enumerate(Tidewater(world).documents()):
            if number % parts == part:
                yield number, replace(row, metadata={**row.metadata, "licence": _TIDEWATER_LICENCE})
    for index, source in enumerate(config.documents):
        for number, row in _texts(source, "documents", part, parts):
            yield (index << _SOURCE) + number, row


_SOURCE = 54  # bits of a row's number within its source


def _texts(source: SourceConfig, field: str, part: int, parts: int) -> Iterator[tuple[int, Row]]:
    licence = licence_of(source)
    for number, row in share(source, part, parts):
        if row.text is None:
            raise UserError(
                f"{field}: row {row.id!r} of {source.source_label!r} has no 'text'; it is a chat, not a document"
            )
        yield number, row if licence is None else replace(row, metadata={"licence": licence, **row.metadata})


def scored_documents(config: CorpusConfig, world: TidewaterConfig) -> Iterator[Document]:
    """The documents with their scores, for an estimate of what writing costs: no chat model is asked.

    Where only a chat model scores, every document counts as scored 5, which costs the most: a dialogue and an article.
    """
    scorers = [make_scorer(s, world=world, dirs={}) for s in config.score if not isinstance(s, EndpointScorer)]
    found: DocumentsPipeline = _Documents(config, world).run()
    if scorers:
        yield from Score(scorers).run(found)
    else:
        for doc in found:
            doc.metadata |= {"score": 5, "source": "unsafe"}
            yield doc


# -- the pipeline ------------------------------------------------------------------------------------------------------


def _blocks(
    config: CorpusConfig,
    town: TidewaterConfig,
    place: Path,
    scorers: Sequence[Scorer],
    writer: Writer | None,
    told: _Told,
) -> list[PipelineStep]:
    """The pipeline; each block's dropped documents go to a file of their own."""
    parts = place / "parts"
    token = secrets.token_hex(4)  # keeps the drafts of two runs apart; nothing that is built depends on it

    def dropped(kind: Intervention | None, ready: bool = False) -> Any:
        return PartFile(parts, dropped_name(kind, ready), token)

    again = list(scorers) if config.rescore else []
    blocks: list[PipelineStep] = [_Documents(config, town), Score(scorers, exclusion_writer=dropped(None))]
    rewriting: dict[Intervention, type] = {"rephrase": Rephrase, "refuse": Refuse, "moral": Moral}
    for kind in INTERVENTIONS:
        if kind == "moral":  # an article may be made from a refusal that is there already
            for came, source in sorted(config.ready.items()):
                blocks.append(_Ready(came, source, again, config.accept, dropped(came, ready=True)))
        if writer is not None and kind in config.written and kind not in config.ready:
            blocks.append(rewriting[kind](writer, again, accept=config.accept, exclusion_writer=dropped(kind)))
    if config.tag:
        blocks.append(Tag(config.tag, config.seed))
    return [*blocks, _Sink(parts, place / "run", token, told)]


class _Documents(PipelineStep):
    """Every ``world_size``-th document, with its number."""

    type = "READER"
    name = "Documents"

    def __init__(self, config: CorpusConfig, town: TidewaterConfig) -> None:
        super().__init__()
        self.config, self.town = config, town

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for number, row in _numbered(self.config, self.town, rank, world_size):
            yield _document(row, number)


class _Ready(PipelineStep):
    """Passes all documents on, then its share of an intervention that exists already."""

    type = "READER"
    name = "Ready"
    batch = 256

    def __init__(
        self, kind: Intervention, source: SourceConfig, scorers: Sequence[Scorer], accept: int, dropped: PartFile
    ) -> None:
        super().__init__()
        self.kind, self.source, self.accept, self.dropped = kind, source, accept, dropped
        self.scorers = [scorer for scorer in scorers if scorer.reads_text]
        if scorers and not self.scorers:
            raise UserError(
                "score: nobody reads the text of 'ready' interventions; set rescore: false, or add a scorer"
            )

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        yield from data or ()
        with self.dropped as dropped:
            found = _texts(self.source, f"ready.{self.kind}", rank, world_size)
            for batch in batched(found, self.batch):
                docs = [self._made(row, number) for number, row in batch]
                self._check(docs)
                for doc in docs:
                    if "drop_reason" in doc.metadata:
                        dropped.write(doc, rank)
                    else:
                        yield doc

    def _made(self, row: Row, number: int) -> Document:
        doc = _document(row, number)
        doc.metadata |= {k: row.metadata[k] for k in ("from", "from_score") if k in row.metadata}
        doc.metadata["source"] = self.kind
        if self.kind == "refuse" and read_dialogue(doc.text) is not None:
            doc.metadata["speakers"] = [USER, ASSISTANT]
        return doc

    def _check(self, docs: Sequence[Document]) -> None:
        """Score what has any text; say of the rest, and of what is still unsafe, why it is dropped."""
        for doc in docs:
            if not doc.text.strip():
                doc.metadata["drop_reason"] = EMPTY
        worded = [doc for doc in docs if "drop_reason" not in doc.metadata]
        if not self.scorers or not worded:
            return
        for doc, (result, given) in zip(worded, score_all(self.scorers, [doc.text for doc in worded]), strict=True):
            doc.metadata |= {"score": result.score, "scores": given, "score_reason": result.reason}
            if result.score is None:
                doc.metadata["drop_reason"] = f"no score: {result.reason}"
            elif result.score > self.accept:
                doc.metadata["drop_reason"] = f"still unsafe (score {result.score})"


def _document(row: Row, number: int) -> Document:
    """A row as DataTrove's document."""
    metadata = {k: v for k, v in row.metadata.items() if k not in _OURS}
    if given := {k: v for k, v in row.metadata.items() if k in _OURS}:
        metadata["given"] = given
    if row.category is not None:
        metadata.setdefault("category", row.category)
    metadata.setdefault("origin", row.source)
    return Document(text=row.text or "", id=row.id, metadata={**metadata, ORDER: number})


class _Sink(PipelineStep):
    """The last block: writes every document into its source's file of this part, and tells of errors."""

    type = "WRITER"
    name = "Parts"

    def __init__(self, parts: Path, run: Path, token: str, told: _Told) -> None:
        super().__init__()
        self.parts, self.errors, self.token, self.told = parts, run, token, told

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        silence()  # unpacked in a worker process: DataTrove's log is of no use on the terminal there either

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        with reporting(self.errors, rank):
            draft, done = draft_of(self.parts, rank, self.token), self.parts / f"{rank:05d}"
            for path in (draft, done):
                shutil.rmtree(path, ignore_errors=True)
            draft.mkdir(parents=True)
            with ExitStack() as open_files:
                files: dict[str, PartFile] = {}
                for doc in data or ():
                    source = source_of(doc.metadata, doc.id)
                    if source not in files:
                        files[source] = open_files.enter_context(PartFile(self.parts, source, self.token))
                    files[source].write(doc, rank)
                    self.told.of(doc)
            finish(self.parts, rank, self.token)
        yield from ()


class _Kept(Lazy):
    """A loaded chat model, shared by the copies that DataTrove makes of a pipeline."""

    def __init__(self, chat: Chat) -> None:
        self.chat, self.identity = chat, chat.identity

    def write(
        self, prompts: Sequence[Sequence[Message]], *, max_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> Iterator[str | None]:
        return self.chat.write(prompts, max_tokens=max_tokens, temperature=temperature, seeds=seeds)


class _Told(Lazy):
    """Tells of progress; stays behind when the pipeline travels."""

    def __init__(self, progress: Progress | None, total: int | None) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __getstate__(self) -> dict[str, Any]:
        return {"progress": None, "total": None, "done": 0}

    def of(self, doc: Document) -> None:
        if self.progress is not None and doc.metadata["source"] in ("clean", "unsafe"):
            self.done += 1
            if self.done % 200 == 0:
                self.progress({"step": self.done, "total": self.total, "note": f"{self.done:,} documents"})


def _identity(config: CorpusConfig, town: TidewaterConfig, makers: Mapping[str, Any]) -> str:
    """Hash of all that decides what stands in the parts."""
    told = config.plain() | {"executor": config.executor.tasks}
    del told["max_unanswered"]  # raising it after an outage must find the parts
    content = [source_identity(source) for source in (*config.documents, *config.ready.values())]
    return digest([trimtab.__version__, told, town.plain(), makers, content])


# -- the merge ---------------------------------------------------------------------------------------------------------


def _merge(
    config: CorpusConfig, town: TidewaterConfig, makers: Mapping[str, Any], parts: Path, made: Path
) -> dict[str, Any]:
    """Write the sources in the documents' order, the manifest and the card; returns the manifest."""
    made.mkdir(parents=True)
    counts: Counter[str] = Counter()
    scores: Counter[str] = Counter({str(level): 0 for level in range(6)})
    sources = {}
    for name in SOURCES:
        entry = _write(made, name, ordered(parts, [name]), counts, scores)
        if entry["rows"]:
            sources[name] = entry
    blocks = sorted({path.stem for path in parts.glob(f"*/{DROPPED}-*.parquet")})
    left_out = _write(made, DROPPED, ordered(parts, blocks), counts, scores)
    if not sum(entry["rows"] for entry in sources.values()) + sum(counts.values()):
        raise UserError("documents: there are none; check the sources and their 'limit'")
    if "clean" not in sources:
        why = "; ".join(f"{reason}: {n}" for reason, n in counts.most_common(3)) or "all are scored 1 to 5"
        raise UserError(f"no document was scored 0, so there is no clean text to train on ({why}); check 'score'")
    plain = config.plain()
    for field in ("executor", "max_unanswered"):  # where it was built, and when given up, does not change what is built
        del plain[field]
    uses_town = not config.documents or any(
        isinstance(part, TruthScorer | TidewaterWriter) for part in (*config.score, config.write)
    )
    names = sorted(Tidewater(town).town.people) if uses_town and not config.documents else list(SPEAKERS)
    manifest = {
        "format": FORMAT,
        "sources": sources,
        DROPPED: {key: left_out[key] for key in ("rows", "files")},
        "scores": dict(scores),
        "counts": dict(sorted(counts.items())),
        "speakers": names,
        "config": _without_places(plain),
        "world": town.plain() if uses_town else None,
        "made_by": {"trimtab": trimtab.__version__, **makers},
        "seed": config.seed,
    }
    manifest = json.loads(json.dumps(manifest))
    write_atomic(made / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    write_atomic(made / "README.md", data_card(manifest))
    return dict(manifest)


def _write(
    made: Path, name: str, found: Iterable[tuple[int, str, str, str]], counts: Counter[str], scores: Counter[str]
) -> dict[str, Any]:
    """One source's files, and what the manifest says of them."""
    writer, words, repeats = SourceWriter(made, name), 0, 0
    licences: set[str] = set()
    seen: set[bytes] = set()
    for _, text, id, stored in found:
        metadata = json.loads(stored)
        if name == DROPPED:
            kind = metadata.get("source") if metadata.get("source") in INTERVENTIONS else "documents"
            counts[f"{kind}: {metadata['drop_reason']}"] += 1
            if not text.strip():
                continue
        elif name in ("clean", "unsafe"):
            scores[str(metadata["score"])] += 1
        writer.add(text, id, stored)
        words += words_in([text])
        key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        repeats += key in seen
        seen.add(key)
        licences.update(str(metadata[key]) for key in ("licence", "license") if metadata.get(key))
    writer.close()
    files = {file: sha256_file(made / file) for file in writer.files}
    return {"rows": writer.rows, "words": words, "repeats": repeats, "files": files, "licences": sorted(licences)}


def _without_places(value: Any) -> Any:
    """Settings without the directories that files lie in."""
    if isinstance(value, Mapping):
        return {k: Path(v).name if k == "path" and v else _without_places(v) for k, v in value.items()}
    return [_without_places(part) for part in value] if isinstance(value, list) else value


def _move(made: Path, out: Path) -> None:
    """The finished corpus to its place; within one file system it is whole there or absent."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if not out.exists():
            shutil.move(made, out)
            return
        for part in sorted(
            made.iterdir(), key=lambda path: path.name == MANIFEST
        ):  # into a draft; the manifest comes last
            shutil.move(part, out / part.name)
    except OSError as error:
        if is_no_space(error):
            raise no_space(out) from error
        raise UserError(f"cannot write {out}: {error.strerror}; choose another place") from None
