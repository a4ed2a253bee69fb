"""Keys and values of the answers that are being decoded, in buffers that all layers share.

A row of the buffers is a slot. All slots end at the same column, so a step writes one column and copies nothing; a slot
that falls free takes the next prompt in place, right-aligned, and what lies left of it is masked. Moving rows about
(packing, growing) is one operation per buffer, not one per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

Chunk = list[torch.Tensor]
"""Keys and values of one prompt: per buffer ``[members, heads, tokens, dim]``."""
GROW = 64
"""Columns of room that a buffer is given for answers to grow into."""


@dataclass(frozen=True)
class Layout:
    """Which buffer holds what. Tensors of one shape (all keys and values of most models) are members of one buffer.

    shapes  (heads, dim) per buffer; counts  members per buffer; places  per layer (buffer, member) of keys and of values
    """

    shapes: Sequence[tuple[int, int]]
    counts: Sequence[int]
    places: Sequence[tuple[tuple[int, int], tuple[int, int]]]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, model: Any) -> Layout:
        """The layout of a model, found by asking it for one token."""
        cache = Cache(layer_class_to_replicate=DynamicLayer)
        device = next(model.parameters()).device
        one = torch.zeros(1, 1, dtype=torch.long, device=device)
        model(input_ids=one, past_key_values=cache, use_cache=True)
        counts: dict[tuple[int, int], int] = {}
        places: list[tuple[tuple[int, int], tuple[int, int]]] = []
        first: torch.Tensor | None = None
        for layer in cache.layers:
            pair = []
            assert isinstance(layer, DynamicLayer)
            for tensor in (layer.keys, layer.values):
                assert tensor is not None
                first = tensor if first is None else first
                shape = (int(tensor.shape[1]), int(tensor.shape[3]))
                counts[shape] = counts.get(shape, 0) + 1
                pair.append((list(counts).index(shape), counts[shape] - 1))
            places.append((pair[0], pair[1]))
        assert first is not None, "a decoder has layers"
        return cls(list(counts), list(counts.values()), places, first.dtype, first.device)

    def zeros(self, rows: int, width: int) -> list[torch.Tensor]:
        # Zeros, not empty memory: a masked column still takes part in the product, where a stray NaN would spread.
        return [
            torch.zeros(count, rows, heads, width, dim, dtype=self.dtype, device=self.device)
            for (heads, dim), count in zip(self.shapes, self.counts)
        ]

    @property
    def token_bytes(self) -> int:
        """Bytes that one token's keys and values take."""
        size = torch.empty(0, dtype=self.dtype).element_size()
        return size * sum(count * heads * dim for (heads, dim), count in zip(self.shapes, self.counts))


class Slots:
    """``rows`` slots, the first ``filled`` columns in use. ``cache`` is what the model is given; it writes at ``filled``,
    which the caller moves on once all layers have written."""

    def __init__(self, layout: Layout, rows: int, filled: int, room: int) -> None:
        self.layout = layout
        self.rows = rows
        self.filled = filled
        self.buffers = layout.zeros(rows, filled + room)
        self.cache = Cache(layers=[_Layer(self, keys, values) for keys, values in layout.places])

    def put(self, row: int, chunk: Chunk, end: int) -> None:
        """Write a chunk into a slot so that it ends before column ``end``."""
        for buffer, part in zip(self.buffers, chunk):
            buffer[:, row, :, end - part.shape[2] : end] = part

    def take(self, row: int, start: int, end: int) -> Chunk:
        """A copy of some columns of a slot."""
        return [buffer[:, row, :, start:end].clone() for buffer in self.buffers]

    def pick(self, row: int, columns: torch.Tensor) -> Chunk:
        """A copy of the columns of a slot that ``columns`` lists."""
        return [buffer[:, row].index_select(2, columns) for buffer in self.buffers]

    def keep(self, columns: torch.Tensor) -> None:
        """Of the columns that were written from ``filled`` on, keep those at ``columns`` (``[rows, kept]``, counted from
        ``filled``), slot by slot and in that order. The caller moves ``filled`` on."""
        rows = torch.arange(self.rows, device=columns.device)[:, None]
        for buffer in self.buffers:
            # Indexed so, the result is [rows, kept, members, heads, dim].
            kept = buffer[:, rows, :, self.filled + columns]
            buffer[:, :, :, self.filled : self.filled + columns.shape[1]] = kept.permute(2, 0, 3, 1, 4)

    def repack(self, rows: torch.Tensor, cut: int, room: int = GROW) -> None:
        """Keep ``rows``, drop the first ``cut`` columns (a negative ``cut`` adds some), and leave ``room`` at the end."""
        kept = self.filled - max(cut, 0)
        fresh = self.layout.zeros(len(rows), self.filled - cut + room)
        for new, old in zip(fresh, self.buffers):
            new[:, :, :, -cut if cut < 0 else 0 :][..., :kept, :] = old.index_select(1, rows)[
                :, :, :, self.filled - kept : self.filled
            ]
        self.buffers, self.rows, self.filled = fresh, len(rows), self.filled - cut

    @property
    def full(self) -> bool:
        return self.filled == self.buffers[0].shape[3]


class _Layer(DynamicLayer):
    """One layer's window on the slots. Sliding-window layers keep their full length; the model's mask hides the rest."""

    def __init__(self, slots: Slots, keys: tuple[int, int], values: tuple[int, int]) -> None:
        super().__init__()
        self.slots, self.key_place, self.value_place = slots, keys, values
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start = self.slots.filled
        end = start + key_states.shape[-2]
        found = []
        for (buffer, member), states in ((self.key_place, key_states), (self.value_place, value_states)):
            held = self.slots.buffers[buffer][member]
            held[:, :, start:end] = states
            found.append(held[:, :, :end])
        return found[0], found[1]

    def get_seq_length(self) -> int:
        return self.slots.filled
