"""From documents to a corpus: one DataTrove pipeline, then one merge that makes the order the same for any executor.

    documents -> Score -> Rephrase, Refuse -> (ready interventions) -> Moral -> Tag -> parts -> merge

Part ``k`` of ``n`` takes every ``n``-th document (of a source in many files: every ``n``-th file) and writes its rows with the
document's number; the merge puts them back in the documents' order. So the files are byte for byte the same for any number
of tasks and workers, and after a kill.

Trades off: of a source in one file every part reads (and skips) all documents, which is cheap beside scoring them; the
merge is one process.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from heapq import merge
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

import trimtab
from trimtab.artifact import is_no_space, no_space, sha256_file, write_atomic
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
from trimtab.corpus.read import DROPPED, FORMAT, MANIFEST, SourceWriter, as_json, words_in
from trimtab.corpus.refuse import Refuse
from trimtab.corpus.released import licence_of
from trimtab.corpus.rephrase import Rephrase
from trimtab.corpus.score import Score
from trimtab.corpus.scorers import Scorer, make_scorer, score_all
from trimtab.corpus.speakers import ASSISTANT, SPEAKERS, USER, read_dialogue
from trimtab.corpus.tag import Tag
from trimtab.corpus.writers import Writer, make_writer
from trimtab.data.sources import SourceConfig, share, source_identity
from trimtab.errors import Fault, UserError
from trimtab.seeds import digest
from trimtab.types import Message, Row
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import Tidewater

Progress = Callable[[Mapping[str, Any]], None]
ORDER = "order"
"""Key of the metadata that holds a document's number on its way through the pipeline."""
_OURS = ("source", ORDER, "tags", "speakers", "style", "from", "from_score", "drop_reason", "scores", "score_reason")
"""Keys that mean something here; what a document brings under one of them is kept below ``metadata["given"]``."""
_PART = pa.schema([(ORDER, pa.int64()), ("text", pa.string()), ("id", pa.string()), ("metadata", pa.string())])
_GROUP = 1024
_FAN = 128  # files merged at once: a thousand parts would be a thousand open files
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
                 cluster it must be on a file system that all machines share
    world        the town, where documents, scores or writer are Tidewater's (None: the default one)
    scorer_dirs  name of a scorer stage -> directory of its classifier
    chat         the chat model of a writer of kind ``model``; needs the local executor with one worker
    progress     told {"step", "total", "note"} now and then; only by the local executor with one worker

    ``UserError``: no document, a document without text, no text scored 0, or settings that do not fit each other.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; choose a new directory, or remove it")
    town = world or TidewaterConfig()
    alone = config.executor.kind == "local" and min(config.executor.workers, config.executor.tasks) == 1
    if isinstance(config.write, ModelWriter) and not alone:
        raise UserError("write: kind 'model' is loaded here, once; use executor.kind 'local' with one worker")
    kept = _Kept(chat) if chat is not None else None
    answers = work / "answers"
    scorers = [make_scorer(s, world=town, dirs=scorer_dirs, work=answers) for s in config.score]
    writer = make_writer(config.write, world=town, seed=config.seed, work=answers, chat=kept)
    makers = {"scorers": [s.identity for s in scorers], "writer": writer.identity if writer else None}
    _claim(work, config, town, makers)
    told = _Told(progress if alone else None, town.documents if not config.documents else None)
    run_pipeline(_blocks(config, town, work, scorers, writer, told), config.executor, work / "run")
    made = work / "corpus"
    shutil.rmtree(made, ignore_errors=True)
    manifest = _merge(config, town, makers, work / "parts", made)
    _move(made, out)
    shutil.rmtree(work, ignore_errors=True)
    return {
        "documents": {name: entry["rows"] for name, entry in manifest["sources"].items()},
        "words": {name: entry["words"] for name, entry in manifest["sources"].items()},
        "scores": manifest["scores"],
        "counts": manifest["counts"],
    }


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
    work: Path,
    scorers: Sequence[Scorer],
    writer: Writer | None,
    told: _Told,
) -> list[PipelineStep]:
    """The pipeline; each block's dropped documents go to a file of their own."""
    parts = work / "parts"

    def dropped(block: str) -> Any:
        return _PartFile(parts, f"{DROPPED}-{block}")

    again = list(scorers) if config.rescore else []
    blocks: list[PipelineStep] = [_Documents(config, town), Score(scorers, exclusion_writer=dropped("1"))]
    rewriting: dict[Intervention, type] = {"rephrase": Rephrase, "refuse": Refuse, "moral": Moral}
    for number, kind in enumerate(INTERVENTIONS, 2):
        if kind == "moral":  # an article may be made from a refusal that is there already
            blocks += [_Ready(k, s, again, config.accept, dropped(f"r-{k}")) for k, s in sorted(config.ready.items())]
        if writer is not None and kind in config.written and kind not in config.ready:
            blocks.append(rewriting[kind](writer, again, accept=config.accept, exclusion_writer=dropped(str(number))))
    if config.tag:
        blocks.append(Tag(config.tag, config.seed))
    return [*blocks, _Sink(parts, work / "run", told)]


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

    def __init__(
        self, kind: Intervention, source: SourceConfig, scorers: Sequence[Scorer], accept: int, dropped: _PartFile
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
            for number, row in _texts(self.source, f"ready.{self.kind}", rank, world_size):
                doc = self._made(row, number)
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
        if self.scorers:
            result, given = score_all(self.scorers, [doc.text])[0]
            doc.metadata |= {"score": result.score, "scores": given, "score_reason": result.reason}
            if result.score is None:
                doc.metadata["drop_reason"] = f"no score: {result.reason}"
            elif result.score > self.accept:
                doc.metadata["drop_reason"] = f"still unsafe (score {result.score})"
        return doc


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

    def __init__(self, parts: Path, run: Path, told: _Told) -> None:
        super().__init__()
        self.parts, self.errors, self.told = parts, run, told

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        silence()  # unpacked in a worker process: DataTrove's log is of no use on the terminal there either

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        with reporting(self.errors, rank):
            draft, done = _draft(self.parts, rank), self.parts / f"{rank:05d}"
            for path in (draft, done):
                shutil.rmtree(path, ignore_errors=True)
            draft.mkdir(parents=True)
            with ExitStack() as open_files:
                files: dict[str, _PartFile] = {}
                for doc in data or ():
                    source = source_of(doc.metadata, doc.id)
                    if source not in files:
                        files[source] = open_files.enter_context(_PartFile(self.parts, source))
                    files[source].write(doc, rank)
                    self.told.of(doc)
            draft.rename(done)
        yield from ()


class _PartFile:
    """One file of a part: rows with the number of their document. Blocks use it as their exclusion writer too."""

    def __init__(self, parts: Path, name: str) -> None:
        self.parts, self.name = parts, name
        self._rows: list[tuple[int, str, str, str]] = []
        self._writer: Any = None

    def __enter__(self) -> Self:
        self._rows, self._writer = [], None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None and self._rows:
            self._flush()
        if self._writer is not None:
            self._writer.close()
        self._rows, self._writer = [], None

    def write(self, doc: Document, rank: int = 0) -> None:
        metadata = {k: v for k, v in doc.metadata.items() if k not in (ORDER, "filter_reason")}
        try:
            self._rows.append((doc.metadata[ORDER], doc.text, doc.id, as_json(metadata)))
        except ValueError:
            raise UserError(f"document {doc.id!r}: its metadata holds a number that is none (NaN); mend it") from None
        self._path = _draft(self.parts, rank) / f"{self.name}.parquet"
        if len(self._rows) >= _GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, _PART, compression="zstd")
        self._writer.write_table(_table(self._rows))
        self._rows = []


def _draft(parts: Path, rank: int) -> Path:
    return parts / f".{rank:05d}.part"


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


def _claim(work: Path, config: CorpusConfig, town: TidewaterConfig, makers: Mapping[str, Any]) -> None:
    """Drop parts that another build left in ``work``; the answers of chat models are kept, as they say what was asked."""
    told = config.plain() | {"executor": config.executor.tasks}
    content = [source_identity(source) for source in (*config.documents, *config.ready.values())]
    identity = digest([trimtab.__version__, told, town.plain(), makers, content])
    mark = work / "identity"
    if not mark.is_file() or mark.read_text() != identity:
        for name in ("run", "parts"):
            shutil.rmtree(work / name, ignore_errors=True)
        write_atomic(mark, identity)


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
        entry = _write(made, name, _ordered(parts, [name]), counts, scores)
        if entry["rows"]:
            sources[name] = entry
    blocks = sorted({path.stem for path in parts.glob(f"*/{DROPPED}-*.parquet")})
    left_out = _write(made, DROPPED, _ordered(parts, blocks), counts, scores)
    if not sum(entry["rows"] for entry in sources.values()) + sum(counts.values()):
        raise UserError("documents: there are none; check the sources and their 'limit'")
    if "clean" not in sources:
        why = "; ".join(f"{reason}: {n}" for reason, n in counts.most_common(3)) or "all are scored 1 to 5"
        raise UserError(f"no document was scored 0, so there is no clean text to train on ({why}); check 'score'")
    plain = config.plain()
    del plain["executor"]  # where it was built does not change what is built
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


def _ordered(parts: Path, names: Sequence[str]) -> Iterator[tuple[int, str, str, str]]:
    """The rows of some files of all parts, by the number of their document; of one document, in the order of ``names``."""
    files = [file for name in names for file in sorted(parts.glob(f"[0-9]*/{name}.parquet"))]
    while len(files) > _FAN:
        groups = [files[i : i + _FAN] for i in range(0, len(files), _FAN)]
        files = [
            _joined(group, parts / f"merge-{names[0]}-{len(files)}-{i:05d}.parquet") for i, group in enumerate(groups)
        ]
    return merge(*map(_rows_of, files), key=itemgetter(0))


def _joined(files: Sequence[Path], target: Path) -> Path:
    with pq.ParquetWriter(target, _PART, compression="zstd") as writer:
        group: list[tuple[int, str, str, str]] = []
        for row in merge(*map(_rows_of, files), key=itemgetter(0)):
            group.append(row)
            if len(group) == _GROUP:
                writer.write_table(_table(group))
                group = []
        if group:
            writer.write_table(_table(group))
    return target


def _table(group: Sequence[tuple[int, str, str, str]]) -> pa.Table:
    return pa.table([pa.array(c, f.type) for c, f in zip(zip(*group, strict=True), _PART)], schema=_PART)


def _rows_of(file: Path) -> Iterator[tuple[int, str, str, str]]:
    try:
        with pq.ParquetFile(file) as opened:
            for batch in opened.iter_batches(batch_size=_GROUP):
                yield from zip(*(batch.column(name).to_pylist() for name in _PART.names), strict=True)
    except (pa.ArrowException, OSError) as error:
        raise Fault(
            f"{file} cannot be read ({str(error).splitlines()[0]}); remove {file.parent.parent} and run again"
        ) from None


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
