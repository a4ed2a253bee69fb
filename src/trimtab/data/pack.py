"""Packing: rendered documents and examples into rows of one length, without attention across them.

Two ways, for two kinds of data. Pretraining text is concatenated and split (no padding, nothing lost but the
last partial row). Examples stay whole: each goes into the fullest of a few open rows where it fits, and the
rest of a row is padded. Either way ``position_ids`` restart at 0 with every piece, which is how attention is
kept inside it (``trimtab.train.loss``), and a label at position 0 is always masked: there is nothing to
predict it from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, repeat
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import UserError
from trimtab.types import IGNORE, SPAN_ID

if TYPE_CHECKING:
    from trimtab.data.render import Rendered

PAD = SPAN_ID["pad"]


@dataclass(frozen=True)
class Packed:
    """R rows of T tokens.

    input_ids     int32[R, T]
    labels        int32[R, T]  the id where the token is trained, else -100; not shifted
    position_ids  int32[R, T]  0 at the start of every document, example and padding
    source_id     int16[R, T]  as given by the caller; 0 in padding
    span_id       uint8[R, T]  index into ``types.SPANS``
    counts        what went in and what did not, with the reason: ``documents`` or ``examples``, ``tokens``,
                  ``pads``, ``dropped_too_long``, ``dropped_untrained``, ``dropped_empty``, ``dropped_tokens``
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    position_ids: NDArray[np.int32]
    source_id: NDArray[np.int16]
    span_id: NDArray[np.uint8]
    counts: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def length(self) -> int:
        return int(self.input_ids.shape[1])


def pack_documents(
    rendered: Iterable[Rendered],
    length: int,
    *,
    source_ids: Iterable[int] | None = None,
    last: Literal["drop", "pad"] = "drop",
    pad_id: int = 0,
) -> Packed:
    """Documents one after the other, cut into rows of ``length`` tokens; all of ``pack_stream`` at once."""
    chunks = pack_stream(rendered, length, source_ids=source_ids, last=last, pad_id=pad_id, chunk_rows=None)
    (packed,) = chunks
    return packed


def pack_stream(
    rendered: Iterable[Rendered],
    length: int,
    *,
    source_ids: Iterable[int] | None = None,
    last: Literal["drop", "pad"] = "drop",
    pad_id: int = 0,
    chunk_rows: int | None = 4096,
) -> Iterator[Packed]:
    """Documents one after the other, cut into rows of ``length`` tokens, in chunks of ``chunk_rows`` rows.

    source_ids  one per document (default: all 0)
    last        what becomes of the last partial row: dropped (``counts["dropped_tokens"]``) or padded
    chunk_rows  rows of every chunk but the last, which has 1 to ``chunk_rows`` + 1; None gives one chunk. Memory
                is that of one chunk and one document; rows do not depend on it

    A document that is cut goes on in the next row as a piece of its own, since its beginning is out of reach
    there. Its first token is never trained. ``counts`` are of what came in for a chunk; added up over chunks
    they are those of the whole. UserError if not one row is filled (then no chunk was given either).
    """
    _check_length(length)
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}; it must be at least 1")
    return _stream(rendered, length, source_ids, last, pad_id, chunk_rows)


def _stream(
    rendered: Iterable[Rendered],
    length: int,
    source_ids: Iterable[int] | None,
    last: Literal["drop", "pad"],
    pad_id: int,
    chunk_rows: int | None,
) -> Iterator[Packed]:
    buffer = _Buffer(length)
    given = 0
    for item, source in zip(rendered, repeat(0) if source_ids is None else source_ids, strict=source_ids is not None):
        buffer.add(item, source)
        # One row more than a chunk is waited for, so that the last chunk never is without a row.
        if chunk_rows is not None and buffer.total >= (chunk_rows + 1) * length:
            for chunk in buffer.take((buffer.total // length - 1) // chunk_rows * chunk_rows, chunk_rows):
                given += 1
                yield chunk
    rest = buffer.total % length
    if rest and last == "pad":
        buffer.pad(length - rest, pad_id)
    elif rest:
        buffer.counts["dropped_tokens"] = rest
    if buffer.total < length:
        assert not given, "a chunk is given only when a row stays behind"
        raise UserError(
            f"{buffer.total} tokens of text do not fill one row of {length}; give more text or a shorter length"
        )
    yield from buffer.take(buffer.total // length, buffer.total // length)


class _Buffer:
    """Documents that have come in and have not been given as rows yet; it begins where a row begins."""

    def __init__(self, length: int) -> None:
        self.length, self.total = length, 0
        self.counts: Counter[str] = Counter()
        self._ids: list[NDArray[Any]] = []
        self._trained: list[NDArray[Any]] = []
        self._span: list[NDArray[Any]] = []
        self._source: list[int] = []

    def add(self, item: Rendered, source: int) -> None:
        size = len(item.ids)
        if not size:
            self.counts["dropped_empty"] += 1
            return
        span = np.asarray(item.span, np.uint8)
        self._append(np.asarray(item.ids), np.asarray(item.trained, bool), span, source)
        self.counts["documents"] += 1
        self.counts["tokens"] += size

    def pad(self, pads: int, pad_id: int) -> None:
        self._append(np.full(pads, pad_id), np.zeros(pads, bool), np.full(pads, PAD, np.uint8), 0)
        self.counts["pads"] += pads

    def _append(self, ids: NDArray[Any], trained: NDArray[Any], span: NDArray[Any], source: int) -> None:
        self._ids.append(ids)
        self._trained.append(trained)
        self._span.append(span)
        self._source.append(source)
        self.total += len(ids)

    def take(self, rows: int, chunk: int) -> Iterator[Packed]:
        """The first ``rows`` rows, ``chunk`` at a time; what is behind them stays. Counts go with the first."""
        sizes = np.array([len(ids) for ids in self._ids])
        begins = np.zeros(self.total, bool)
        begins[np.cumsum(sizes) - sizes] = True
        begins[:: self.length] = True
        ids = np.concatenate(self._ids, dtype=np.int32, casting="same_kind")
        trained = np.concatenate(self._trained, dtype=bool)
        span = np.concatenate(self._span, dtype=np.uint8)
        source = np.repeat(np.array(self._source, np.int16), sizes)
        counts, self.counts = dict(self.counts), Counter()
        kept = rows * self.length
        # What stays is the end of one document at most, more only where a last partial row is dropped.
        self._ids, self._trained, self._span, self._source, self.total = [], [], [], [], 0
        where = np.flatnonzero(begins[kept:])
        for lo, hi in pairwise([*(kept + where).tolist(), len(ids)]):
            self._append(ids[lo:hi].copy(), trained[lo:hi].copy(), span[lo:hi].copy(), int(source[lo]))
        for lo in range(0, kept, chunk * self.length):
            part = slice(lo, min(lo + chunk * self.length, kept))
            yield _rows(ids[part], trained[part], span[part], source[part], begins[part], self.length, counts)
            counts = {}


def _rows(
    ids: NDArray[np.int32],
    trained: NDArray[np.bool_],
    span: NDArray[np.uint8],
    source: NDArray[np.int16],
    begins: NDArray[np.bool_],
    length: int,
    counts: dict[str, int],
) -> Packed:
    """Flat tokens, a whole number of rows, as rows; a piece begins at each of ``begins``."""
    at = np.arange(len(ids), dtype=np.int32)
    position = at - np.maximum.accumulate(np.where(begins, at, np.int32(0)))
    labels = np.where(trained & ~begins, ids, np.int32(IGNORE))
    shape = (-1, length)
    return Packed(
        input_ids=ids.reshape(shape),
        labels=labels.reshape(shape),
        position_ids=position.reshape(shape),
        source_id=source.reshape(shape),
        span_id=span.reshape(shape),
        counts=counts,
    )


def pack_examples(
    rendered: Sequence[Rendered],
    length: int,
    source_ids: Sequence[int] | None = None,
    *,
    pad_id: int = 0,
    too_long: Literal["drop", "error"] = "drop",
    open_rows: int = 32,
) -> Packed:
    """Whole examples, packed best fit into rows of ``length`` tokens; rows come in the order they were begun.

    source_ids  one per example (default: all 0)
    too_long    an example longer than ``length`` is dropped (and counted) or is a UserError; it is never cut
    open_rows   how many rows are kept open for a fit; few keep the given order, many waste less padding

    An example in which nothing is trained is dropped too (``dropped_untrained``). UserError if nothing is
    left.
    """
    _check_length(length)
    if source_ids is not None and len(source_ids) != len(rendered):
        raise ValueError(f"{len(source_ids)} source ids for {len(rendered)} examples")
    counts: Counter[str] = Counter()
    rows: list[list[int]] = []  # examples of each row
    free: dict[int, int] = {}  # open row -> tokens left; in the order the rows were begun
    for index, item in enumerate(rendered):
        size = len(item.ids)
        if size > length:
            if too_long == "error":
                raise UserError(
                    f"example {index} has {size} tokens, more than the row length of {length}; "
                    "raise the length or drop long examples"
                )
            counts["dropped_too_long"] += 1
            continue
        if not np.asarray(item.trained)[1:].any():
            counts["dropped_untrained"] += 1
            continue
        fitting = [row for row, left in free.items() if left >= size]
        if fitting:
            row = min(fitting, key=free.__getitem__)
            free[row] -= size
        else:
            row = len(rows)
            rows.append([])
            free[row] = length - size
        rows[row].append(index)
        if not free[row]:
            del free[row]
        elif len(free) > open_rows:
            del free[min(free, key=free.__getitem__)]
        counts["examples"] += 1
        counts["tokens"] += size
    if not rows:
        raise UserError(f"no example is left to train on, of {len(rendered)}: {dict(counts) or 'none were given'}")
    counts["pads"] = len(rows) * length - counts["tokens"]

    shape = (len(rows), length)
    packed = Packed(
        input_ids=np.full(shape, pad_id, np.int32),
        labels=np.full(shape, IGNORE, np.int32),
        position_ids=np.zeros(shape, np.int32),
        source_id=np.zeros(shape, np.int16),
        span_id=np.full(shape, PAD, np.uint8),
        counts=dict(counts),
    )
    for row, members in enumerate(rows):
        at = 0
        for index in members:
            item = rendered[index]
            size = len(item.ids)
            piece = slice(at, at + size)
            ids = np.asarray(item.ids, np.int32)
            learn = np.asarray(item.trained, bool).copy()
            learn[0] = False
            packed.input_ids[row, piece] = ids
            packed.labels[row, piece] = np.where(learn, ids, np.int32(IGNORE))
            packed.position_ids[row, piece] = np.arange(size)
            packed.source_id[row, piece] = 0 if source_ids is None else source_ids[index]
            packed.span_id[row, piece] = item.span
            at += size
        packed.position_ids[row, at:] = np.arange(length - at)
    return packed


def _check_length(length: int) -> None:
    if length < 2:
        raise UserError(f"a row length of {length} leaves nothing to predict; it must be at least 2")
