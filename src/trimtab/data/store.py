"""The token store: packed rows on disk, memory-mapped, and batches taken from them by row or by position.

A store is a directory of ``rows.npy`` and ``store.json``. A row is one record with the columns of the batch
contract in small dtypes (8 bytes a token up to 65,536 ids), so that taking a row is one copy. Opening checks
sizes and dtypes, not every byte (``verify=True`` does); content hashes of a study's stores are the artefact's
business.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from trimtab.artifact import fsync, is_no_space, no_space, sha256_file, write_atomic
from trimtab.data.mixture import Int64, Mixture
from trimtab.data.pack import Packed
from trimtab.errors import Fault, UserError
from trimtab.seeds import digest
from trimtab.types import IGNORE

STORE = "store.json"
ROWS = "rows.npy"
_CHUNK = 4096  # positions whose rows are worked out at once by ``Mixed``


@dataclass(frozen=True)
class Batch:
    """B packed rows of T tokens (DESIGN, decision 2); numpy, ready for ``torch.from_numpy``.

    input_ids     int32[B, T]
    labels        int32[B, T]  -100 where masked; not shifted
    position_ids  int32[B, T]  0 where a new piece begins; attention stays inside a piece, and what its branches see is
                               in ``data.tree``
    source_id     int16[B, T]  index into ``sources``
    span_id       uint8[B, T]  index into ``types.SPANS``
    sources       names of the sources, the same for every batch of one run
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    position_ids: NDArray[np.int32]
    source_id: NDArray[np.int16]
    span_id: NDArray[np.uint8]
    sources: tuple[str, ...]

    def rows(self, lo: int, hi: int) -> Batch:
        """The rows [lo, hi) of this batch (views)."""
        part = slice(lo, hi)
        return Batch(
            self.input_ids[part],
            self.labels[part],
            self.position_ids[part],
            self.source_id[part],
            self.span_id[part],
            self.sources,
        )


class RowStore:
    """Packed rows of one data set: ``len(store)``, ``store.take(rows)``. Made by ``write`` or
    ``write_stream``, reopened by ``open``."""

    def __init__(self, path: Path, meta: dict[str, Any], records: NDArray[Any]) -> None:
        self.path, self.meta, self.records = path, meta, records
        self.sources: tuple[str, ...] = tuple(meta["sources"])
        self.length: int = meta["length"]

    def __len__(self) -> int:
        return int(self.meta["rows"])

    @property
    def fingerprint(self) -> str:
        """Hash of the rows' content and of everything ``store.json`` says of them."""
        return digest(self.meta)

    @classmethod
    def write(
        cls,
        path: Path,
        packed: Packed,
        sources: Sequence[str],
        *,
        vocab: int,
        tokenizer: str,
        meta: Mapping[str, Any] | None = None,
    ) -> RowStore:
        """Write ``packed`` to the directory ``path``: ``write_stream`` of one chunk."""
        return cls.write_stream(path, [packed], sources, vocab=vocab, tokenizer=tokenizer, meta=meta)

    @classmethod
    def write_stream(
        cls,
        path: Path,
        chunks: Iterable[Packed],
        sources: Sequence[str],
        *,
        vocab: int,
        tokenizer: str,
        meta: Mapping[str, Any] | None = None,
    ) -> RowStore:
        """Write chunks of rows one after the other to the directory ``path`` (created) and open the store.

        chunks     such as ``pack_stream`` gives; one is held at a time, their counts are added up
        sources    names that ``source_id`` of the chunks indexes
        vocab      size of the vocabulary; ids must lie below it
        tokenizer  hash of the tokenizer, so that a model with another one can be refused
        meta       anything else worth keeping (JSON-ready), under "meta"

        Rows go to a file aside that takes its name when all are there, and ``store.json`` comes last: after a
        kill there is the store that was there before, or none that opens. The bytes are those that ``np.save``
        writes of all rows at once.
        """
        part = path / f"{ROWS}.part"
        try:
            path.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                body = _write_rows(file, chunks, len(sources), vocab)
            fsync(part)
            sha256 = sha256_file(part)
            (path / STORE).unlink(missing_ok=True)
            part.replace(path / ROWS)
        except OSError as error:
            if is_no_space(error):
                raise no_space(path) from error
            raise Fault(f"cannot write the token store {path}: {error.strerror or error}") from error
        finally:
            part.unlink(missing_ok=True)
        body |= {
            "sources": list(sources),
            "vocab": vocab,
            "tokenizer": tokenizer,
            "sha256": sha256,
            "meta": dict(meta or {}),
        }
        write_atomic(path / STORE, json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
        return cls.open(path)

    @classmethod
    def open(cls, path: Path, *, verify: bool = False) -> RowStore:
        """Map a store into memory. Fault names the file that is missing, truncated or of another shape.

        verify  also compare every file with its sha256 (reads everything)
        """
        try:
            meta = json.loads((path / STORE).read_text(encoding="utf-8"))
            count, dtype = int(meta["rows"]), _record(int(meta["vocab"]), int(meta["length"]))
            sha256, _ = meta["sha256"], (meta["sources"], meta["tokenizer"], meta["tokens"])
        except FileNotFoundError:
            raise Fault(f"{path / STORE} is missing: {path} is not a (whole) token store; build it again") from None
        except (ValueError, KeyError, TypeError) as error:
            raise Fault(f"{path / STORE} is damaged ({error}); build the store again") from None
        file = path / ROWS
        try:
            # As a plain array: it stays mapped, and numpy's memmap class makes every small operation slower.
            records = np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
        except FileNotFoundError:
            raise Fault(f"{file} is missing; build the store again") from None
        except (ValueError, OSError, EOFError) as error:
            raise Fault(f"{file} is damaged or truncated ({error}); build the store again") from None
        if records.shape != (count,) or records.dtype != dtype:
            raise Fault(
                f"{file} holds {len(records)} rows of {records.dtype.itemsize} bytes, but {STORE} says {count} of "
                f"{dtype.itemsize}; build the store again"
            )
        if verify and sha256_file(file) != sha256:
            raise Fault(f"{file} does not match its sha256 in {STORE}; build the store again")
        return cls(path, meta, records)

    def take(self, rows: Int64) -> Batch:
        """Rows by index int64[B], in the order given."""
        records = np.take(self.records, rows)
        return _widen(records, records["source"], self.sources)


def _write_rows(file: BinaryIO, chunks: Iterable[Packed], sources: int, vocab: int) -> dict[str, Any]:
    """Chunks as one ``.npy`` file of records, and what ``store.json`` says of them."""
    rows, length, tokens, trained_tokens = 0, 0, 0, 0
    counts: Counter[str] = Counter()
    header = b""
    for packed in chunks:
        if not header:
            length = packed.length
            header = _header(_record(vocab, length), 0)
            file.write(header)
        elif packed.length != length:
            raise ValueError(f"a chunk has rows of {packed.length} tokens after chunks of {length}")
        ids, trained = packed.input_ids, packed.labels != IGNORE
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
            raise UserError(f"token ids reach from {ids.min()} to {ids.max()}, outside the vocabulary of {vocab}")
        assert (packed.labels[trained] == ids[trained]).all(), "a label is its own token id or -100"
        if packed.source_id.size and not 0 <= packed.source_id.min() <= packed.source_id.max() < sources:
            raise ValueError(f"source ids reach up to {packed.source_id.max()}, but {sources} sources are named")
        records = np.empty(len(packed), _record(vocab, length))
        records["ids"], records["trained"], records["position"] = ids, trained, packed.position_ids
        records["source"], records["span"] = packed.source_id, packed.span_id
        file.write(records.data)
        rows += len(packed)
        tokens += int(ids.size)
        trained_tokens += int(trained.sum())
        counts.update(packed.counts)
    if not header:
        raise ValueError("a token store needs at least one chunk of rows")
    whole = _header(_record(vocab, length), rows)
    assert len(whole) == len(header), "numpy leaves room in the header for the number of rows"
    file.seek(0)
    file.write(whole)
    return {
        "rows": rows,
        "length": length,
        "tokens": tokens,
        "trained_tokens": trained_tokens,
        "counts": dict(counts),
    }


def _header(dtype: np.dtype[Any], rows: int) -> bytes:
    """The head of a ``.npy`` file of ``rows`` records."""
    head = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(head, {"descr": descr, "fortran_order": False, "shape": (rows,)})
    return head.getvalue()


def _record(vocab: int, length: int) -> np.dtype[Any]:
    """The dtype of one row of ``length`` tokens."""
    return np.dtype(
        [
            ("ids", "<u2" if vocab <= 2**16 else "<i4", (length,)),
            ("position", "<u2" if length <= 2**16 else "<i4", (length,)),
            ("source", "<i2", (length,)),
            ("span", "u1", (length,)),
            ("trained", "?", (length,)),
        ]
    )


def _widen(records: NDArray[Any], source: NDArray[Any], sources: tuple[str, ...]) -> Batch:
    """Records as the batch contract wants them."""
    ids = records["ids"].astype(np.int32)
    return Batch(
        input_ids=ids,
        labels=np.where(records["trained"], ids, np.int32(IGNORE)),
        position_ids=records["position"].astype(np.int32),
        source_id=source.astype(np.int16),
        span_id=records["span"].copy(),
        sources=sources,
    )


class Mixed:
    """Stores read through a mixture: ``batch(lo, hi)`` gives the rows at the positions [lo, hi), whoever
    asks, whenever.

    stores    one per source of the mixture, by its name, all of one length, vocabulary and tokenizer
    mixture   built with ``rows={name: len(store)}``

    ``sources`` are the stores' own source names, in the mixture's order (a store may hold several).
    """

    def __init__(self, stores: Mapping[str, RowStore], mixture: Mixture) -> None:
        missing = [name for name in mixture.sources if name not in stores]
        if missing:
            raise UserError(f"the mixture uses source {missing[0]!r}, but there is no store for it")
        self.mixture = mixture
        self._stores = [stores[name] for name in mixture.sources]
        # As bytes without fields: a row is then copied at once rather than column by column.
        self._rows = [store.records.view(np.dtype((np.void, store.records.itemsize))) for store in self._stores]
        first = self._stores[0]
        for name, store in zip(mixture.sources, self._stores, strict=True):
            if len(store) != mixture.rows[name]:
                raise UserError(f"store {store.path} has {len(store)} rows; the mixture counts on {mixture.rows[name]}")
            for key in ("length", "vocab", "tokenizer"):
                if store.meta[key] != first.meta[key]:
                    raise UserError(
                        f"stores {first.path} and {store.path} differ in {key} ({first.meta[key]!r} and "
                        f"{store.meta[key]!r}); build both with the same tokenizer and length"
                    )
        self.length = first.length
        self.sources = tuple(dict.fromkeys(name for store in self._stores for name in store.sources))
        # One table for all stores: source of the whole = names[offset of the store + source in the store].
        self._names = np.array([self.sources.index(n) for store in self._stores for n in store.sources], np.int16)
        self._offset = np.cumsum([0] + [len(store.sources) for store in self._stores[:-1]])
        self._cached: tuple[int, NDArray[np.int16], Int64] | None = None

    def fingerprint(self, upto: int | None = None) -> str:
        """Hash of all that decides the rows before position ``upto``: the mixture's and the stores' it uses
        so far."""
        used = set(self.mixture.used(upto))
        stores = {
            name: store.fingerprint
            for name, store in zip(self.mixture.sources, self._stores, strict=True)
            if name in used
        }
        return digest({"mixture": self.mixture.fingerprint(upto), "stores": stores})

    def batch(self, lo: int, hi: int) -> Batch:
        """The rows at positions [lo, hi): B = hi - lo."""
        source, row = self._at(lo, hi)
        rows = np.empty(hi - lo, self._rows[0].dtype)
        for index, mine in enumerate(self._rows):
            where = np.flatnonzero(source == index)
            if where.size:
                rows[where] = np.take(mine, row[where])
        records = rows.view(self._stores[0].records.dtype)
        offset = self._offset[source][:, None]
        if len(self._names) == len(self._stores):  # one source a store: its name goes for the whole row
            names = np.broadcast_to(np.take(self._names, offset), (hi - lo, self.length))
        else:
            names = np.take(self._names, records["source"] + offset)
        return _widen(records, names, self.sources)

    def _at(self, lo: int, hi: int) -> tuple[NDArray[np.int16], Int64]:
        """``mixture.at`` of [lo, hi), worked out for a whole chunk at once: batches are asked for in order,
        mostly."""
        chunk = lo // _CHUNK
        if hi > (chunk + 1) * _CHUNK:
            return self.mixture.at(np.arange(lo, hi))
        if self._cached is None or self._cached[0] != chunk:
            self._cached = (chunk, *self.mixture.at(np.arange(chunk * _CHUNK, (chunk + 1) * _CHUNK)))
        _, source, row = self._cached
        part = slice(lo - chunk * _CHUNK, hi - chunk * _CHUNK)
        return source[part], row[part]
