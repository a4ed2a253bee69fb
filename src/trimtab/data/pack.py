"""Packing: rendered documents and examples into rows of one length, without attention across them.

Two ways, for two kinds of data. Pretraining text is concatenated and split (no padding, nothing lost but the
last partial row). Examples stay whole: each goes into the fullest of a few open rows where it fits, and the
rest of a row is padded. Either way ``position_ids`` restart at 0 with every piece, which is how attention is
kept inside it (``trimtab.train.loss``), and a label at position 0 is always masked: there is nothing to
predict it from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING, Literal

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
    """Documents one after the other, cut into rows of ``length`` tokens.

    source_ids  one per document (default: all 0)
    last        what becomes of the last partial row: dropped (``counts["dropped_tokens"]``) or padded

    A document that is cut goes on in the next row as a piece of its own, since its beginning is out of reach
    there. Its first token is never trained. UserError if not one row is filled.
    """
    _check_length(length)
    counts: Counter[str] = Counter()
    ids, trained, span, source, starts = [], [], [], [], []
    total = 0
    for item, source_id in zip(rendered, source_ids if source_ids is not None else repeat(0), strict=False):
        size = len(item.ids)
        if not size:
            counts["dropped_empty"] += 1
            continue
        ids.append(np.asarray(item.ids, np.int32))
        trained.append(np.asarray(item.trained, bool))
        span.append(np.asarray(item.span, np.uint8))
        source.append(np.full(size, source_id, np.int16))
        starts.append(total)
        total += size
    rows, rest = divmod(total, length)
    if rest and last == "pad":
        pads = length - rest
        ids.append(np.full(pads, pad_id, np.int32))
        trained.append(np.zeros(pads, bool))
        span.append(np.full(pads, PAD, np.uint8))
        source.append(np.zeros(pads, np.int16))
        starts.append(total)
        counts["pads"] = pads
        rows += 1
    elif rest:
        counts["dropped_tokens"] = rest
    if not rows:
        raise UserError(f"{total} tokens of text do not fill one row of {length}; give more text or a shorter length")
    counts["documents"], counts["tokens"] = len(ids) - (last == "pad" and rest > 0), total

    kept = rows * length
    begins = np.zeros(kept, bool)
    begins[[s for s in starts if s < kept]] = True
    begins[::length] = True
    where = np.flatnonzero(begins)
    position = np.arange(kept) - np.repeat(where, np.diff(where, append=kept))
    flat_ids = np.concatenate(ids)[:kept]
    learn = np.concatenate(trained)[:kept] & (position > 0)
    return Packed(
        input_ids=flat_ids.reshape(rows, length),
        labels=np.where(learn, flat_ids, np.int32(IGNORE)).reshape(rows, length),
        position_ids=position.astype(np.int32).reshape(rows, length),
        source_id=np.concatenate(source)[:kept].reshape(rows, length),
        span_id=np.concatenate(span)[:kept].reshape(rows, length),
        counts=dict(counts),
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
