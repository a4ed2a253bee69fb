"""Mixing as a pure function of position: position -> (source, row), staged by phases (DESIGN, decision 3).

Inside a phase the weights are quantised to integer counts out of ``block`` rows, and every block of the phase
has the same order: Tijdeman's chairman assignment, under which every prefix holds each source within one row
of its share. So the source of a position is one table lookup, the number of its rows used before has a closed
form, and seeking costs nothing. Which row comes next in a source is a keyed permutation of its rows, one per
epoch (a Feistel network with cycle walking): nothing is stored, no row is lost, none comes twice before the
whole source has been seen.

The price: weights are exact to 1/``block`` only (a smaller weight is refused), and a phase starts its own
balance, so the plan is kept within one row *per phase*, not over many short phases together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from trimtab.seeds import digest, seed_of

Int64 = NDArray[np.int64]
BLOCK = 1000
"""Rows over which weights are balanced: they are exact to one in so many."""
_M1, _M2, _GOLD = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(0x9E3779B97F4A7C15)
_ROUND = [np.uint64((int(_GOLD) * r) % 2**64) for r in range(1, 7)]  # one constant per Feistel round


@dataclass(frozen=True)
class Phase:
    """From row position ``start`` on, rows come from the sources in proportion to ``weights`` (any positive
    scale)."""

    start: int
    weights: Mapping[str, float]


@dataclass(frozen=True)
class _Table:
    """One phase, ready for lookup. S sources of the mixture, ``block`` rows."""

    source: NDArray[np.int16]  # [block] source at each offset
    rank: Int64  # [block] rows of that source earlier in the block
    cumulative: Int64  # [block + 1, S] rows of each source before each offset
    before: Int64  # [S] rows of each source used by the phases before

    def rows(self, count: int) -> Int64:
        """Rows of each source among the first ``count`` rows of the phase, [S]."""
        blocks, rest = divmod(count, len(self.source))
        return blocks * self.cumulative[-1] + self.cumulative[rest]


def quantise(weights: Mapping[str, float], block: int) -> dict[str, int]:
    """Integer counts out of ``block`` by largest remainder; sources of weight 0 are left out.

    Raises ValueError for a negative or non-finite weight, for no positive weight, and for a share below
    1/``block``.
    """
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight of source {name!r} is {weight}; it must be 0 or more")
    # Fractions of the floats as given: the same counts on every machine.
    total = sum((Fraction(w) for w in weights.values()), Fraction(0))
    if total == 0:
        raise ValueError("a phase needs at least one source with a weight above 0")
    exact = {name: Fraction(weights[name]) / total * block for name in sorted(weights) if weights[name] > 0}
    for name, share in exact.items():
        if share < 1:
            raise ValueError(
                f"weight of source {name!r} is {float(share) / block:.2g} of its phase, less than one row "
                f"in a block of {block}; raise the weight, set it to 0, or use a larger block"
            )
    counts = {name: math.floor(share) for name, share in exact.items()}
    missing = block - sum(counts.values())
    for name in sorted(exact, key=lambda n: (counts[n] - exact[n], n))[:missing]:
        counts[name] += 1
    return counts


def spread(counts: Mapping[str, int]) -> list[str]:
    """The names in an order whose every prefix of j rows holds each name within one row of j * count / total.

    Tijdeman (1980), "The chairman assignment problem": among the names that are behind enough, take the one
    whose deadline comes first. Integers only, ties go to the first name, so the order is the same everywhere.
    """
    names = sorted(name for name, count in counts.items() if count > 0)
    block = sum(counts.values())
    if len(names) == 1:
        return names * block
    scale = 2 * len(names) - 2
    used = dict.fromkeys(names, 0)
    order = []
    for step in range(1, block + 1):
        best: str | None = None
        best_slack = 0
        for name in names:
            deficit = counts[name] * step - block * used[name]  # rows behind, times block
            if deficit * scale < block:
                continue
            slack = block * (scale - 1) - scale * deficit  # rows until the deadline, times scale * count
            if best is None or slack * counts[best] < best_slack * counts[name]:
                best, best_slack = name, slack
        assert best is not None, "some name is always at least the mean behind"
        used[best] += 1
        order.append(best)
    return order


class Mixture:
    """Position -> (source, row) over phases; see the module's docstring.

    rows      rows of each source; a source that no phase uses is ignored
    phases    sorted by ``start``, the first at 0; the last one never ends (sources repeat, epoch by epoch)
    seed      with the source's name and the epoch it keys the order of rows
    block     rows over which the weights are exact

    ``sources`` are the sorted names of the sources used; ``at`` gives indices into it. Two mixtures that
    agree on their first phases give the same rows there (by name), whatever comes later. ValueError names
    what is impossible.
    """

    def __init__(self, rows: Mapping[str, int], phases: Sequence[Phase], *, seed: int, block: int = BLOCK) -> None:
        if block < 1:
            raise ValueError(f"block is {block}; it must be at least 1")
        if not phases or phases[0].start != 0:
            raise ValueError("the first phase must start at row 0")
        starts = [int(phase.start) for phase in phases]
        if any(b <= a for a, b in pairwise(starts)):
            raise ValueError(f"phases must start at growing rows, not {starts}")
        self.seed, self.block, self.starts = seed, block, tuple(starts)
        self.quotas: list[dict[str, int]] = []
        for index, phase in enumerate(phases):
            try:
                self.quotas.append(quantise(phase.weights, block))
            except ValueError as error:
                raise ValueError(f"phase {index} (from row {phase.start}): {error}") from None
        self.sources: tuple[str, ...] = tuple(sorted({name for quota in self.quotas for name in quota}))
        for name in self.sources:
            if rows.get(name, 0) < 1:
                raise ValueError(f"source {name!r} has a weight but no rows")
        self.rows = {name: int(rows[name]) for name in self.sources}
        self._starts = np.array(starts, np.int64)
        self._tables: list[_Table] = []
        before = np.zeros(len(self.sources), np.int64)
        for index, quota in enumerate(self.quotas):
            table = self._table(quota, before)
            self._tables.append(table)
            if index + 1 < len(starts):
                before = before + table.rows(starts[index + 1] - starts[index])
        self._source = np.stack([t.source for t in self._tables])  # [P, block]
        self._rank = np.stack([t.rank for t in self._tables])
        self._quota = np.stack([t.cumulative[-1] for t in self._tables])  # [P, S]
        self._before = np.stack([t.before for t in self._tables])
        self._size = np.array([self.rows[name] for name in self.sources], np.int64)
        self._key = np.array([seed_of("mixture", seed, name) for name in self.sources], np.uint64)

    def _table(self, quota: Mapping[str, int], before: Int64) -> _Table:
        index = {name: i for i, name in enumerate(self.sources)}
        source = np.array([index[name] for name in spread(quota)], np.int16)
        taken = source[:, None] == np.arange(len(self.sources))
        cumulative = np.zeros((self.block + 1, len(self.sources)), np.int64)
        np.cumsum(taken, axis=0, out=cumulative[1:])
        return _Table(source, cumulative[np.arange(self.block), source], cumulative, before)

    def at(self, positions: Int64) -> tuple[NDArray[np.int16], Int64]:
        """Source index (into ``sources``) int16[N] and row int64[N] of each position int64[N]."""
        positions = np.asarray(positions, np.int64)
        if positions.size and positions.min() < 0:
            raise ValueError("positions must be 0 or more")
        phase = np.searchsorted(self._starts, positions, side="right") - 1
        blocks, offset = np.divmod(positions - self._starts[phase], self.block)
        source = self._source[phase, offset]
        used = self._before[phase, source] + blocks * self._quota[phase, source] + self._rank[phase, offset]
        size = self._size[source]
        epoch, index = np.divmod(used, size)
        return source, permute(index, size, _mix(self._key[source] + _GOLD * epoch.astype(np.uint64)))

    def counts(self, lo: int, hi: int) -> dict[str, int]:
        """Rows of each source among the positions [lo, hi); exact, in closed form."""
        if not 0 <= lo <= hi:
            raise ValueError(f"counts need 0 <= lo <= hi, not {lo} and {hi}")
        rows = self._used(hi) - self._used(lo)
        return {name: int(n) for name, n in zip(self.sources, rows, strict=True)}

    def _used(self, position: int) -> Int64:
        phase = int(np.searchsorted(self._starts, position, side="right")) - 1
        table = self._tables[phase]
        return table.before + table.rows(position - self.starts[phase])

    def fingerprint(self, upto: int | None = None) -> str:
        """Hash of all that decides the rows before position ``upto`` (default: of all rows): equal -> same
        rows."""
        phases = [
            {"start": start, "quota": quota}
            for start, quota in zip(self.starts, self.quotas, strict=True)
            if upto is None or start < upto
        ]
        rows = {name: self.rows[name] for name in self.used(upto)}
        return digest({"seed": self.seed, "block": self.block, "phases": phases, "rows": rows})

    def used(self, upto: int | None = None) -> tuple[str, ...]:
        """The sources of the phases that start before position ``upto`` (default: of all), sorted."""
        quotas = (q for start, q in zip(self.starts, self.quotas, strict=True) if upto is None or start < upto)
        return tuple(sorted({name for quota in quotas for name in quota}))


def permute(index: Int64, size: Int64, key: NDArray[np.uint64]) -> Int64:
    """A keyed permutation of range(size), element by element: int64[N] in, int64[N] out, no memory of its
    own.

    A Feistel network on pairs (left, right) of a grid of at least ``size`` cells, a little over it at most; a
    value that falls outside walks on along its cycle, which stays a permutation of range(size).
    """
    out = index.copy()
    if not out.size:
        return out
    width = np.ceil(np.sqrt(size)).astype(np.int64)  # the grid is width x height
    height = -(-size // width)
    keys = [_mix(key ^ constant) for constant in _ROUND]
    current, w, h, limit = out, width, height, size
    active = np.arange(out.size)
    while True:
        left, right = np.divmod(current, h)
        for even, odd in zip(keys[::2], keys[1::2], strict=True):
            left = _shift(left, right, even, w)
            right = _shift(right, left, odd, h)
        current = left * h + right
        inside = current < limit
        out[active[inside]] = current[inside]
        todo = ~inside
        if not todo.any():
            return out
        current, w, h, limit, active = current[todo], w[todo], h[todo], limit[todo], active[todo]
        keys = [k[todo] for k in keys]


def _shift(moved: Int64, by: Int64, key: NDArray[np.uint64], modulus: Int64) -> Int64:
    """(moved + f(by, key)) mod modulus: one round; undone by subtracting, hence a permutation."""
    step = _mix(by.astype(np.uint64) ^ key) % modulus.astype(np.uint64)
    moved = moved + step.astype(np.int64)
    return np.where(moved >= modulus, moved - modulus, moved)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A 64-bit finaliser (xor-shift-multiply): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * _M1
    x = (x ^ (x >> np.uint64(27))) * _M2
    return x ^ (x >> np.uint64(31))
