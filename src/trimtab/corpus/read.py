"""A corpus on disk: Parquet files of ``text, id, metadata`` per source, and the manifest beside them.

    <dir>/<source>/00000.parquet ...   clean, unsafe, rephrase, refuse, moral (an empty source has no folder)
    <dir>/dropped/00000.parquet        what was left out, with metadata.drop_reason
    <dir>/manifest.json                rows, words, sha256 and licences per source; scores; counts; speakers; config
    <dir>/README.md                    the data card (``corpus.card``)

``metadata`` is a JSON object in a string: its keys differ from row to row, and a Parquet struct would fill up with nulls.
Needs pyarrow and no DataTrove, so that training can read what was built elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.artifact import is_no_space, no_space, sha256_file
from trimtab.corpus.config import SOURCES
from trimtab.errors import Fault, UserError
from trimtab.types import Row

if TYPE_CHECKING:
    import pyarrow as pa

DROPPED = "dropped"
MANIFEST = "manifest.json"
FORMAT = 1
FILE_ROWS = 100_000
FILE_CHARS = 128 * 2**20
"""A file is closed at so many rows or characters of text: what shuffling and reading by file have to hold at once."""
_BATCH = 1024


def read_manifest(directory: Path) -> dict[str, Any]:
    """``manifest.json`` of a corpus; ``UserError`` where there is none, ``Fault`` for one that cannot be read."""
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{directory} is no corpus: it has no {MANIFEST}; build one with `trimtab corpus build`"
        ) from None
    except (OSError, ValueError) as error:
        raise Fault(f"{path} cannot be read ({error}); build the corpus again") from None
    known = isinstance(manifest, dict) and isinstance(manifest.get("sources"), dict) and "speakers" in manifest
    if not known or manifest.get("format") != FORMAT:
        raise UserError(f"{path} is not the manifest of a corpus of format {FORMAT}; build the corpus again")
    return manifest


def source_files(directory: Path, source: str) -> list[Path]:
    """The files of a source in their order; none for an empty source. ``Fault`` for one that is missing."""
    manifest = read_manifest(directory)
    entry = manifest.get(DROPPED) if source == DROPPED else manifest["sources"].get(source)
    files = [directory / name for name in sorted(entry["files"])] if entry else []
    for file in files:
        if not file.is_file():
            raise Fault(f"{file} is missing; build the corpus again")
    return files


def read_source(directory: Path, source: str) -> Iterator[Row]:
    """The rows of one of ``SOURCES``, or of ``dropped``, in their order; ``Row.source`` is the source's name."""
    assert source in (*SOURCES, DROPPED), source
    for file in source_files(directory, source):
        yield from read_file(file, source)


def read_file(path: Path, source: str) -> Iterator[Row]:
    """The rows of one file; ``Fault`` if it is damaged."""
    for text, id, metadata in read_columns(path):
        try:
            yield Row(id=id, text=text, source=source, metadata=json.loads(metadata))
        except ValueError:
            raise Fault(f"{path}, row {id!r}: the metadata is no JSON; build the corpus again") from None


def read_columns(path: Path, columns: tuple[str, ...] = ("text", "id", "metadata")) -> Iterator[tuple[str, ...]]:
    """The rows of one file as tuples of the columns' strings."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH, columns=list(columns)):
                yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)
    except (pa.ArrowException, OSError, KeyError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise Fault(f"{path}: not a readable file of a corpus ({line}); build the corpus again") from None


def verify(directory: Path) -> dict[str, Any]:
    """Compare every file with its sha256; returns the manifest. ``Fault`` names the first that differs."""
    manifest = read_manifest(directory)
    for entry in (*manifest["sources"].values(), manifest.get(DROPPED) or {"files": {}}):
        for name, sha256 in entry["files"].items():
            if not (directory / name).is_file():
                raise Fault(f"{directory / name} is missing; build the corpus again")
            if sha256_file(directory / name) != sha256:
                raise Fault(f"{directory / name} does not match its sha256; build the corpus again")
    return manifest


class SourceWriter:
    """Writes the rows of one source in order, into as many files as they need; ``close`` it.

    Equal rows give equal bytes: one schema, fixed row groups, no statistics of the writer's own.
    """

    def __init__(self, root: Path, source: str) -> None:
        self.root, self.source = root, source
        self.files: list[str] = []
        self.rows = 0
        self._writer: Any = None
        self._group: list[tuple[str, str, str]] = []
        self._in_file, self._chars = 0, 0

    def add(self, text: str, id: str, metadata: str) -> None:
        self._group.append((text, id, metadata))
        self.rows += 1
        self._in_file += 1
        self._chars += len(text)
        if self._in_file >= FILE_ROWS or self._chars >= FILE_CHARS:
            self._end_file()
        elif len(self._group) >= _BATCH:
            self._end_group()

    def close(self) -> None:
        self._end_file()

    def _end_group(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            if self._writer is None:
                name = f"{self.source}/{len(self.files):05d}.parquet"
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                self._writer = pq.ParquetWriter(self.root / name, schema(), compression="zstd")
                self.files.append(name)
            columns = list(zip(*self._group, strict=True))
            self._writer.write_table(pa.table([pa.array(c, pa.string()) for c in columns], schema=schema()))
        except OSError as error:
            if is_no_space(error):
                raise no_space(self.root) from error
            raise Fault(f"cannot write {self.root / self.source}: {error.strerror or error}") from error
        self._group = []

    def _end_file(self) -> None:
        if self._group:
            self._end_group()
        if self._writer is not None:
            self._writer.close()
        self._writer, self._in_file, self._chars = None, 0, 0


def schema() -> pa.Schema:
    """Columns of every file of a corpus."""
    import pyarrow as pa

    return pa.schema([("text", pa.string()), ("id", pa.string()), ("metadata", pa.string())])


def as_json(metadata: Mapping[str, Any]) -> str:
    """Metadata as it is stored: keys sorted, so that equal metadata are equal bytes."""
    return json.dumps(metadata, ensure_ascii=False, sort_keys=True, allow_nan=False, default=str)


def words_in(texts: Iterable[str]) -> int:
    """Words, as blanks cut them."""
    return sum(len(text.split()) for text in texts)
