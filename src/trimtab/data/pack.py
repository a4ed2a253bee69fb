"""Packing: rendered documents and examples into rows of one length, without attention across them.

Two ways, for two kinds of data. Pretraining text is concatenated and split (no padding, nothing lost but the
last partial row). Examples stay whole: each goes into the fullest of a few open rows where it fits, and the
rest of a row is padded. Either way ``position_ids`` restart at 0 with every piece, which is how attention is
kept inside it (``trimtab.train.loss``), and a label at position 0 is always masked: there is nothing to
predict it from. Answers may share the prompt before them in a row (``trimtab.data.tree``).
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
    position_ids  int32[R, T]  0 at the start of every document, example and padding; a branch goes on from its prompt's
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


@dataclass(frozen=True)
class Examples:
    """Rendered examples laid one after the other: ids int32[N], trained bool[N], span uint8[N], ends int64[E]."""

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    span: NDArray[np.uint8]
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ends)

    @classmethod
    def of(cls, rendered: Sequence[Rendered]) -> Examples:
        none: list[Any] = [np.empty(0)]  # concatenating needs one array at least
        return cls(
            ids=np.concatenate([r.ids for r in rendered] or none).astype(np.int32),
            trained=np.concatenate([r.trained for r in rendered] or none).astype(bool),
            span=np.concatenate([r.span for r in rendered] or none).astype(np.uint8),
            ends=np.cumsum([len(r.ids) for r in rendered], dtype=np.int64),
        )

    @property
    def starts(self) -> NDArray[np.int64]:
        return np.concatenate([np.zeros(min(1, len(self)), np.int64), self.ends[:-1]])

    @property
    def sizes(self) -> NDArray[np.int64]:
        return self.ends - self.starts

    def learns(self) -> NDArray[np.bool_]:
        """bool[E]: the examples in which something is trained that has a token before it."""
        trained = self.trained.copy()
        trained[self.starts[self.sizes > 0]] = False
        before = np.concatenate([[0], np.cumsum(trained)])
        return before[self.ends] > before[self.starts]

    def take(self, which: NDArray[np.int64]) -> Examples:
        """The examples by index, in the order given."""
        sizes = self.sizes[which]
        at = spread(self.starts[which], sizes)
        return Examples(self.ids[at], self.trained[at], self.span[at], np.cumsum(sizes, dtype=np.int64))


@dataclass(frozen=True)
class Bins:
    """Which examples share a row, by best fit: ``row`` int64[E], -1 where an example is left out; ``rows`` how many there are."""

    row: NDArray[np.int64]
    rows: int
    counts: Mapping[str, int]


def bin_examples(
    sizes: NDArray[np.int64],
    length: int,
    *,
    learns: NDArray[np.bool_] | None = None,
    too_long: Literal["drop", "error"] = "drop",
    open_rows: int = 32,
) -> Bins:
    """Examples into rows of ``length`` tokens, best fit; rows come in the order they were begun.

    sizes      int64[E], tokens to reserve for each: the longest of its forms, where one plan is to serve several
    learns     bool[E], False for an example in which nothing is trained: left out (``dropped_untrained``)
    too_long   an example longer than ``length`` is dropped (and counted) or is a UserError; it is never cut
    open_rows  how many rows are kept open for a fit; few keep the given order, many waste less padding

    UserError if nothing is left.
    """
    _check_length(length)
    counts: Counter[str] = Counter()
    row_of = np.full(len(sizes), -1, np.int64)
    rows = 0
    free: dict[int, int] = {}  # open row -> tokens left; in the order the rows were begun
    for index, size in enumerate(sizes.tolist()):
        if size > length:
            if too_long == "error":
                raise UserError(
                    f"example {index} has {size} tokens, more than the row length of {length}; "
                    "raise the length or drop long examples"
                )
            counts["dropped_too_long"] += 1
            continue
        if learns is not None and not learns[index]:
            counts["dropped_untrained"] += 1
            continue
        fitting = [row for row, left in free.items() if left >= size]
        if fitting:
            row = min(fitting, key=free.__getitem__)
            free[row] -= size
        else:
            row = rows
            rows += 1
            free[row] = length - size
        row_of[index] = row
        if not free[row]:
            del free[row]
        elif len(free) > open_rows:
            del free[min(free, key=free.__getitem__)]
        counts["examples"] += 1
    if not rows:
        raise UserError(f"no example is left to train on, of {len(sizes)}: {dict(counts) or 'none were given'}")
    return Bins(row_of, rows, dict(counts))


def offsets(examples: Examples, bins: Bins) -> NDArray[np.int64]:
    """int64[E]: where each example begins in its row; 0 for one that is left out."""
    kept = in_rows(bins.row)
    sizes, row = examples.sizes[kept], bins.row[kept]
    before = np.cumsum(sizes) - sizes
    first = np.concatenate([[True], row[1:] != row[:-1]])
    found = np.zeros(len(examples), np.int64)
    found[kept] = before - np.maximum.accumulate(np.where(first, before, 0))  # tokens of the same row before it
    return found


def in_rows(row: NDArray[np.int64]) -> NDArray[np.int64]:
    """The examples that have a row (``Bins.row``), row by row, in the order given."""
    kept = np.flatnonzero(row >= 0)
    return kept[np.argsort(row[kept], kind="stable")]


def fill_rows(
    examples: Examples,
    bins: Bins,
    length: int,
    source_ids: NDArray[np.int16] | None = None,
    *,
    pad_id: int = 0,
    begin: NDArray[np.int64] | None = None,
) -> Packed:
    """Examples in the rows that ``bins`` gives them, in order, each row padded behind them.

    source_ids  int16[E], one per example (default: all 0)
    begin       int64[E], the position of each one's first token, more than 0 for a branch of ``data.tree`` (default: all 0)
    """
    kept = in_rows(bins.row)
    chosen = examples.take(kept)
    sizes, row, offset = chosen.sizes, bins.row[kept], offsets(examples, bins)[kept]
    before = np.cumsum(sizes) - sizes
    assert len(sizes) and int((offset + sizes).max()) <= length, "an example is longer than what was reserved for it"
    at = spread(row * length + offset, sizes)
    total = bins.rows * length
    position = np.arange(len(at)) - np.repeat(before if begin is None else before - begin[kept], sizes)
    used = np.zeros(bins.rows, np.int64)
    np.maximum.at(used, row, offset + sizes)

    def flat(fill: int, dtype: Any, values: NDArray[Any]) -> NDArray[Any]:
        out = np.full(total, fill, dtype)
        out[at] = values
        return out.reshape(bins.rows, length)

    positions = (np.arange(length)[None, :] - used[:, None]).reshape(-1)  # padding is a piece of its own
    positions[at] = position
    learn = chosen.trained & (position > 0)
    source = np.zeros(len(kept), np.int16) if source_ids is None else np.asarray(source_ids, np.int16)[kept]
    return Packed(
        input_ids=flat(pad_id, np.int32, chosen.ids),
        labels=flat(IGNORE, np.int32, np.where(learn, chosen.ids, np.int32(IGNORE))),
        position_ids=positions.astype(np.int32).reshape(bins.rows, length),
        source_id=flat(0, np.int16, np.repeat(source, sizes)),
        span_id=flat(PAD, np.uint8, chosen.span),
        counts={**bins.counts, "tokens": int(sizes.sum()), "pads": total - int(sizes.sum())},
    )


def spread(starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64: starts[0], starts[0] + 1, ... (sizes[0] of them), starts[1], ..."""
    before = np.cumsum(sizes) - sizes
    return np.arange(int(sizes.sum()), dtype=np.int64) + np.repeat(starts - before, sizes)


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
    too_long, open_rows  as for ``bin_examples``

    An example in which nothing is trained is dropped too (``dropped_untrained``). UserError if nothing is
    left.
    """
    if source_ids is not None and len(source_ids) != len(rendered):
        raise ValueError(f"{len(source_ids)} source ids for {len(rendered)} examples")
    examples = Examples.of(rendered)
    bins = bin_examples(examples.sizes, length, learns=examples.learns(), too_long=too_long, open_rows=open_rows)
    sources = None if source_ids is None else np.array(source_ids, np.int16)
    return fill_rows(examples, bins, length, sources, pad_id=pad_id)


def _check_length(length: int) -> None:
    if length < 2:
        raise UserError(f"a row length of {length} leaves nothing to predict; it must be at least 2")
