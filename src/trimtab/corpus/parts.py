"""The files of a build's parts: rows with the number of their document, and their merge into the documents' order.

<place>/parts/00003/<source>.parquet         a part that is whole: renamed into place when all of it was written
<place>/parts/.00003.<token>.part/           one that is being written; the token is the run's, so that a worker of an
                                             earlier run that is still alive writes beside it and not into it
<place>/run/completions/00003                DataTrove's mark that the part is done
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from heapq import merge
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document

from trimtab.corpus.read import as_json
from trimtab.errors import Fault, UserError

ORDER = "order"
"""Key of the metadata that holds a document's number on its way through the pipeline."""
FAN = 128
"""Files merged at once: a thousand parts would be a thousand open files."""
_PART = pa.schema([(ORDER, pa.int64()), ("text", pa.string()), ("id", pa.string()), ("metadata", pa.string())])
_GROUP = 1024


class PartFile:
    """One file of a part: rows with the number of their document. Blocks use it as their exclusion writer too.

    token  the run's, the same in all its workers
    """

    def __init__(self, parts: Path, name: str, token: str) -> None:
        self.parts, self.name, self.token = parts, name, token
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
        self._path = draft_of(self.parts, rank, self.token) / f"{self.name}.parquet"
        if len(self._rows) >= _GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, _PART, compression="zstd")
        self._writer.write_table(_table(self._rows))
        self._rows = []


def draft_of(parts: Path, rank: int, token: str) -> Path:
    """Where a run writes a part."""
    return parts / f".{rank:05d}.{token}.part"


def finish(parts: Path, rank: int, token: str) -> None:
    """Move a part that is written to its place, unless another run of the same build was quicker."""
    draft, done = draft_of(parts, rank, token), parts / f"{rank:05d}"
    try:
        draft.rename(done)
    except OSError:
        if not done.is_dir():
            raise
        shutil.rmtree(draft, ignore_errors=True)


def remove_drafts(parts: Path) -> None:
    """Remove what killed runs left half written; only where no worker of theirs can be alive."""
    for draft in parts.glob(".*.part"):
        shutil.rmtree(draft, ignore_errors=True)


def reopen(place: Path, rank: int) -> None:
    """Take a part as not done, so that the next run does it again."""
    (place / "run" / "completions" / f"{rank:05d}").unlink(missing_ok=True)
    shutil.rmtree(place / "parts" / f"{rank:05d}", ignore_errors=True)


def check_there(place: Path, tasks: int) -> None:
    """``Fault`` for a part that is marked as done and has no files: without it the corpus would be short of its rows."""
    gone = [rank for rank in range(tasks) if not (place / "parts" / f"{rank:05d}").is_dir()]
    for rank in gone:
        reopen(place, rank)
    if gone:
        raise Fault(
            f"{place / 'parts'}: part {gone[0]} of {tasks} is gone ({len(gone)} are); run again to make it anew"
        )


def ordered(parts: Path, names: Sequence[str]) -> Iterator[tuple[int, str, str, str]]:
    """(number, text, id, metadata as JSON) of some files of all parts, by the number of their document; of one document,
    in the order of ``names``."""
    files = [file for name in names for file in sorted(parts.glob(f"[0-9]*/{name}.parquet"))]
    while len(files) > FAN:
        groups = [files[i : i + FAN] for i in range(0, len(files), FAN)]
        files = [
            _joined(group, parts / f"merge-{names[0]}-{len(files)}-{i:05d}.parquet") for i, group in enumerate(groups)
        ]
    return merge(*map(_rows_of, files), key=itemgetter(0))


def metadata_of(file: Path) -> Iterator[str]:
    """The metadata (JSON) of the rows of one file."""
    return (found[0] for found in _columns(file, ["metadata"]))


def rows_in(file: Path) -> int:
    """How many rows a file holds, by its footer."""
    try:
        return int(pq.read_metadata(file).num_rows)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, error) from None


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
    return _columns(file, _PART.names)


def _columns(file: Path, names: Sequence[str]) -> Iterator[Any]:
    try:
        with pq.ParquetFile(file) as opened:
            for batch in opened.iter_batches(batch_size=_GROUP, columns=list(names)):
                yield from zip(*(batch.column(name).to_pylist() for name in names), strict=True)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> Fault:
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return Fault(f"{file} cannot be read ({line}); remove {file.parent.parent.parent} and run again")
