"""Mixing as a pure function of position: position -> (source, row), staged by phases (DESIGN, decision 3).

The plan of a source is a real number that grows by its weight with every row, over all phases. What has been read
differs from it by the source's *debt*, which goes from each phase into the next. Two rules keep debts small:

- The first ``HEAD`` rows of a phase each go to the source with the largest debt. Without knowing the phases to come
  nothing does better: with n sources a debt stays within 1/2 + 1/3 + ... + 1/n, and whoever chooses the phases after
  seeing the rows can force that much (n equal sources, then those that were not served, and so on). That is 0.83
  rows for three sources, 1.08 for four, 1.28 for five; a source that rests while others go on can raise it. Looking
  ahead would give less than 1, but then arms that differ later could not share what comes before.
- Later rows are divided by a binary tree of sources, each node rounding its own count: a closed form of any position,
  exact for any weights. The tree is the one whose worst debt is smallest; it is below 1 for four sources or fewer, 1.03
  for five, 1.08 for six, plus the weight's part of what resting sources are owed.

So a curriculum of any number of phases is read within one row of its plan, but for what an adversary would choose;
seeking costs nothing; weights are held to one in 1.8 billion. Which row comes next in a source is a keyed
permutation of its rows, one per epoch (a Feistel network with cycle walking): nothing is stored, no row is lost, none
comes twice before the whole source has been seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

from trimtab.seeds import digest, seed_of

Int64 = NDArray[np.int64]
PARTS = 1_800_000_000
"""Weights are whole numbers of so many parts (so decimals of up to eight digits and ninths are exact), and debts are
counted in such parts of a row. Its square, but not more, fits 64 bits."""
HEAD = 1024
"""Rows at the beginning of a phase that are given out one by one, by the largest debt."""
_SEARCHED = 6  # sources up to which every tree is looked at (945 of them)
_M1, _M2, _GOLD = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(0x9E3779B97F4A7C15)
_ROUND = [np.uint64((int(_GOLD) * r) % 2**64) for r in range(1, 7)]  # one constant per Feistel round


@dataclass(frozen=True)
class Phase:
    """From row position ``start`` on, rows come from the sources in proportion to ``weights`` (any positive
    scale)."""

    start: int
    weights: Mapping[str, float]


def quantise(weights: Mapping[str, float], parts: int = PARTS) -> dict[str, int]:
    """Whole numbers out of ``parts`` by largest remainder; sources of weight 0 are left out.

    Raises ValueError for a negative or non-finite weight, for no positive weight, and for a share below
    1/``parts``.
    """
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight of source {name!r} is {weight}; it must be 0 or more")
    # Fractions of the floats as given: the same counts on every machine.
    total = sum((Fraction(w) for w in weights.values()), Fraction(0))
    if total == 0:
        raise ValueError("a phase needs at least one source with a weight above 0")
    exact = {name: Fraction(weights[name]) / total * parts for name in sorted(weights) if weights[name] > 0}
    for name, share in exact.items():
        if share < 1:
            raise ValueError(
                f"weight of source {name!r} is {float(share) / parts:.2g} of its phase, less than one part "
                f"in {parts}; raise the weight or set it to 0"
            )
    counts = {name: math.floor(share) for name, share in exact.items()}
    missing = parts - sum(counts.values())
    for name in sorted(exact, key=lambda n: (counts[n] - exact[n], n))[:missing]:
        counts[name] += 1
    return counts


def serve(weights: Sequence[int], debts: Sequence[int], rows: int) -> list[int]:
    """``rows`` times the index of the largest debt, each row adding ``weights`` to the debts and paying one row.

    weights  parts, adding up to PARTS; who has none is never served
    debts    in parts of a row, before the first row. Ties go to the first
    """
    active = [i for i, weight in enumerate(weights) if weight]
    now = list(debts)
    order = []
    for _ in range(rows):
        best = active[0]
        for i in active:
            now[i] += weights[i]
            if now[i] > now[best]:
                best = i
        now[best] -= PARTS
        order.append(best)
    return order


@dataclass(frozen=True)
class _Split:
    """A node of a tree: of its rows, those at which ``(share * m + lead) // whole`` grows go left.

    ``lead`` is half of ``whole`` (rounding to the nearest), plus what the left side is owed at the beginning; a side
    that is owed more than half a row has the first rows alone.
    """

    left: _Split | int
    right: _Split | int
    share: int
    whole: int
    lead: int

    def counts(self, rows: int, into: list[int]) -> None:
        """Add to ``into`` the rows of each source among the first ``rows`` of this node."""
        left = min(max((self.share * rows + self.lead) // self.whole, 0), rows)
        for side, count in ((self.left, left), (self.right, rows - left)):
            if isinstance(side, _Split):
                side.counts(count, into)
            else:
                into[side] += count

    def place(self, at: Int64, which: NDArray[np.intp], source: NDArray[np.int16], used: Int64) -> None:
        """Write the source of the node's rows ``at``, and its rows before each, to the places ``which``."""
        # share * at may not fit 64 bits; share * (at mod whole) does.
        turns, rest = np.divmod(at, self.whole)
        left, over = np.divmod(self.share * rest + self.lead, self.whole)
        left += self.share * turns
        goes = ((over + self.share >= self.whole) & (left >= 0)) | (left > at)
        left = np.clip(left, 0, at)
        for side, here, ordinal in ((self.left, goes, left), (self.right, ~goes, at - left)):
            if isinstance(side, _Split):
                side.place(ordinal[here], which[here], source, used)
            else:
                source[which[here]] = side
                used[which[here]] = ordinal[here]


_Shape = int | tuple["_Shape", "_Shape"]


def _shapes(leaves: tuple[int, ...]) -> Iterator[_Shape]:
    """Every binary tree of the leaves."""
    if len(leaves) == 1:
        yield leaves[0]
        return
    first, rest = leaves[0], leaves[1:]
    for size in range(len(rest)):
        for chosen in combinations(rest, size):
            others = tuple(leaf for leaf in rest if leaf not in chosen)
            for left in _shapes((first, *chosen)):
                for right in _shapes(others):
                    yield left, right


def _tree(weights: Sequence[int], debts: Sequence[int]) -> _Split | int:
    """The tree for the sources that have a weight, from their debts on."""
    active = tuple(i for i, weight in enumerate(weights) if weight)
    owed = abs(sum(debts[i] for i in active)) / PARTS

    def weight(shape: _Shape) -> int:
        return weights[shape] if isinstance(shape, int) else weight(shape[0]) + weight(shape[1])

    def debt(shape: _Shape) -> int:
        return debts[shape] if isinstance(shape, int) else debt(shape[0]) + debt(shape[1])

    def worst(shape: _Shape, above: float) -> float:
        """A node errs by half a row, and hands its own error down by weight."""
        if isinstance(shape, int):
            return weights[shape] * above
        return max(worst(side, above + 0.5 / weight(side)) for side in shape)

    def choose(leaves: tuple[int, ...]) -> _Shape:
        if len(leaves) <= _SEARCHED:
            return min(_shapes(leaves), key=lambda shape: worst(shape, owed / PARTS))
        sides: tuple[list[int], list[int]] = ([], [])
        for leaf in sorted(leaves, key=lambda i: (-weights[i], i)):
            min(sides, key=lambda side: sum(weights[i] for i in side)).append(leaf)
        return choose(tuple(sorted(sides[0]))), choose(tuple(sorted(sides[1])))

    def build(shape: _Shape) -> _Split | int:
        if isinstance(shape, int):
            return shape
        share, whole = weight(shape[0]), weight(shape)
        lead = (whole * PARTS // 2 + debt(shape[0]) * whole - share * debt(shape)) // PARTS
        return _Split(build(shape[0]), build(shape[1]), share, whole, lead)

    return build(choose(active))


class _Leg:
    """One phase, ready for lookup; S sources of the mixture, the last ``rows`` of it unknown (None: endless).

    before  int64[S]     rows of each source used by the phases before
    head    int16[H]     sources of the first H rows, H <= HEAD
    rank    int64[H]     rows of that source in the phase before each
    base    int64[S]     rows of each source used before the rows that follow the head
    tree    sources of those; None if the phase ends within its head
    """

    def __init__(self, weights: Sequence[int], debts: Sequence[int], before: Int64, rows: int | None) -> None:
        self.weights, self.debts, self.before = weights, list(debts), before
        alone = max(weights) == PARTS
        size = 0 if alone else HEAD if rows is None else min(HEAD, rows)
        self.head = np.array(serve(weights, debts, size), np.int16)
        taken = self.head[:, None] == np.arange(len(weights), dtype=np.int16)
        self.rank = (np.cumsum(taken, axis=0)[np.arange(size), self.head] - 1).astype(np.int64)
        self.base = before + taken.sum(axis=0)
        ends = rows is not None and rows <= size
        self.tree = None if ends else _tree(weights, self.debts_after(size))

    def counts(self, rows: int) -> Int64:
        """Rows of each source among the first ``rows`` rows of the phase, [S]."""
        size = len(self.head)
        if rows <= size:
            return np.bincount(self.head[:rows], minlength=len(self.weights)).astype(np.int64)
        counts = (self.base - self.before).tolist()
        if isinstance(self.tree, _Split):
            self.tree.counts(rows - size, counts)
        else:
            assert self.tree is not None
            counts[self.tree] += rows - size
        return np.array(counts, np.int64)

    def debts_after(self, rows: int) -> list[int]:
        """The debt of each source after ``rows`` rows of the phase."""
        counts = self.counts(rows).tolist()
        return [d + w * rows - PARTS * n for d, w, n in zip(self.debts, self.weights, counts, strict=True)]


class Mixture:
    """Position -> (source, row) over phases; see the module's docstring.

    rows      rows of each source; a source that no phase uses is ignored
    phases    sorted by ``start``, the first at 0; the last one never ends (sources repeat, epoch by epoch)
    seed      with the source's name and the epoch it keys the order of rows

    ``sources`` are the sorted names of the sources used; ``at`` gives indices into it; ``quotas`` are the weights of
    each phase in parts. Two mixtures that agree on their first phases give the same rows there (by name), whatever
    comes later. ValueError names what is impossible.
    """

    def __init__(self, rows: Mapping[str, int], phases: Sequence[Phase], *, seed: int) -> None:
        if not phases or phases[0].start != 0:
            raise ValueError("the first phase must start at row 0")
        starts = [int(phase.start) for phase in phases]
        if any(b <= a for a, b in pairwise(starts)):
            raise ValueError(f"phases must start at growing rows, not {starts}")
        self.seed, self.starts = seed, tuple(starts)
        self.quotas: list[dict[str, int]] = []
        for index, phase in enumerate(phases):
            try:
                self.quotas.append(quantise(phase.weights))
            except ValueError as error:
                raise ValueError(f"phase {index} (from row {phase.start}): {error}") from None
        self.sources: tuple[str, ...] = tuple(sorted({name for quota in self.quotas for name in quota}))
        for name in self.sources:
            if rows.get(name, 0) < 1:
                raise ValueError(f"source {name!r} has a weight but no rows")
        self.rows = {name: int(rows[name]) for name in self.sources}
        self._starts = np.array(starts, np.int64)
        self._legs: list[_Leg] = []
        debts, before = [0] * len(self.sources), np.zeros(len(self.sources), np.int64)
        for index, quota in enumerate(self.quotas):
            size = starts[index + 1] - starts[index] if index + 1 < len(starts) else None
            leg = _Leg([quota.get(name, 0) for name in self.sources], debts, before, size)
            self._legs.append(leg)
            if size is not None:
                debts, before = leg.debts_after(size), before + leg.counts(size)
        # Heads side by side, so that positions in any of them are one lookup.
        self._heads = np.array([len(leg.head) for leg in self._legs], np.int64)
        self._offset = np.cumsum(self._heads) - self._heads
        self._source = np.concatenate([leg.head for leg in self._legs])
        self._used_before = np.concatenate([leg.before[leg.head] + leg.rank for leg in self._legs])
        self._size = np.array([self.rows[name] for name in self.sources], np.int64)
        self._key = np.array([seed_of("mixture", seed, name) for name in self.sources], np.uint64)

    def at(self, positions: Int64) -> tuple[NDArray[np.int16], Int64]:
        """Source index (into ``sources``) int16[N] and row int64[N] of each position int64[N]."""
        positions = np.asarray(positions, np.int64)
        if positions.size and positions.min() < 0:
            raise ValueError("positions must be 0 or more")
        phase = np.searchsorted(self._starts, positions, side="right") - 1
        offset = positions - self._starts[phase]
        source, used = np.empty(positions.shape, np.int16), np.empty(positions.shape, np.int64)
        first = offset < self._heads[phase]
        cell = (self._offset[phase] + offset)[first]
        source[first], used[first] = self._source[cell], self._used_before[cell]
        later = np.flatnonzero(~first)
        for number in np.unique(phase[later]).tolist():
            leg, where = self._legs[number], later[phase[later] == number]
            rest = offset[where] - len(leg.head)
            if isinstance(leg.tree, _Split):
                leg.tree.place(rest, where, source, used)
            else:
                assert leg.tree is not None
                source[where], used[where] = leg.tree, rest
            used[where] += leg.base[source[where]]
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
        leg = self._legs[phase]
        return leg.before + leg.counts(position - self.starts[phase])

    def fingerprint(self, upto: int | None = None) -> str:
        """Hash of all that decides the rows before position ``upto`` (default: of all rows): equal -> same
        rows."""
        phases = [
            {"start": start, "quota": quota}
            for start, quota in zip(self.starts, self.quotas, strict=True)
            if upto is None or start < upto
        ]
        rows = {name: self.rows[name] for name in self.used(upto)}
        return digest({"seed": self.seed, "phases": phases, "rows": rows})

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
