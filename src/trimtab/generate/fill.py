"""Letting prompts in: their keys and values, and the logits of their last token, each shared start computed once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from trimtab.generate.schedule import SHARE, Prefixes, Prompt, common
from trimtab.generate.slots import Chunk, Layout, Slots

if TYPE_CHECKING:
    from trimtab.generate.engine import Engine

_PREFIX_BYTES = 512 * 2**20
_PREFILL = {"cpu": 1024}
_PREFILL_ELSEWHERE = 8192
"""Tokens computed in one go when prompts are let in; more only takes memory."""


@dataclass
class Filled:
    """A prompt whose keys and values are computed: those, and the logits of its last token."""

    chunk: Chunk
    logits: torch.Tensor


class Filling:
    """Prompts computed for one wave of answers; ``filled`` holds those that are waited for, by their index."""

    def __init__(self, engine: Engine, layout: Layout) -> None:
        self.engine, self.layout = engine, layout
        self.prefixes = Prefixes(max(1, _PREFIX_BYTES // max(1, layout.token_bytes)))
        self.filled: dict[int, Filled] = {}

    def _fill(self, prompts: dict[int, Prompt]) -> None:
        """Compute keys, values and last logits of prompts. One that shares more with another of them than with any
        met before waits until that one is done."""
        waiting = list(prompts.items())
        while waiting:
            now: list[tuple[int, Prompt, int, Chunk]] = []
            later: list[tuple[int, Prompt]] = []
            for index, prompt in waiting:
                known, name = self.prefixes.longest(prompt.ids)
                here = max((common(p.ids, prompt.ids) for _, p, _, _ in now), default=0)
                if min(here, len(prompt.ids) - 1) >= known + SHARE:
                    later.append((index, prompt))
                else:
                    now.append((index, prompt, known, [] if name is None else self.prefixes.take(name, known)))
            now.sort(key=lambda item: len(item[1].ids) - item[2])
            for group in self._groups(now):
                self._prefill(group)
            waiting = later

    def _groups(self, items: list[tuple[int, Prompt, int, Chunk]]) -> Iterator[list[tuple[int, Prompt, int, Chunk]]]:
        """Cut a list that is sorted by the tokens to compute into what is computed together."""
        limit = _PREFILL.get(self.engine.device.type, _PREFILL_ELSEWHERE)
        group: list[tuple[int, Prompt, int, Chunk]] = []
        for item in items:
            new = len(item[1].ids) - item[2]
            if group:
                least = len(group[0][1].ids) - group[0][2]
                if (len(group) + 1) * new > limit or (
                    new != least if self.engine._windowed else 2 * new > 3 * least + 16
                ):
                    yield group
                    group = []
            group.append(item)
        if group:
            yield group

    def _prefill(self, group: list[tuple[int, Prompt, int, Chunk]]) -> None:
        known = max(item[2] for item in group)
        new = max(len(item[1].ids) - item[2] for item in group)
        slots = Slots(self.layout, len(group), known, new)
        ids = np.full((len(group), new), self.engine.pad_id, dtype=np.int64)
        mask = np.zeros((len(group), known + new), dtype=np.int64)
        positions = np.zeros((len(group), new), dtype=np.int64)
        for row, (_, prompt, shared, chunk) in enumerate(group):
            size = len(prompt.ids) - shared
            if shared:
                slots.put(row, chunk, known)
            ids[row, new - size :] = prompt.ids[shared:]
            mask[row, known - shared : known] = mask[row, known + new - size :] = 1
            positions[row, new - size :] = np.arange(shared, len(prompt.ids))
        device = self.engine.device
        tokens, seen, places = (torch.from_numpy(array).to(device) for array in (ids, mask, positions))
        logits = self.engine._forward(tokens, seen, places, slots)
        for row, (index, prompt, shared, chunk) in enumerate(group):
            fresh = slots.take(row, known + new - (len(prompt.ids) - shared), known + new)
            whole = [torch.cat([old, part], dim=2) for old, part in zip(chunk, fresh)] if shared else fresh
            self.prefixes.add(index, prompt.ids, whole)
            self.filled[index] = Filled(whole, logits[row])
