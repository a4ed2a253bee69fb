"""The mixture: close to its plan everywhere, each epoch a permutation, shared beginnings, closed forms that agree."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.data.mixture import Mixture, Phase, permute, quantise, spread

NAMES = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta")
counts_of = st.dictionaries(st.sampled_from(NAMES), st.integers(1, 40), min_size=1)


def plan_of(draw_phases: list[tuple[int, dict[str, int]]]) -> list[Phase]:
    start, phases = 0, []
    for gap, weights in draw_phases:
        phases.append(Phase(start, weights))
        start += gap
    return phases


phases_of = st.lists(st.tuples(st.integers(1, 90), counts_of), min_size=1, max_size=4).map(plan_of)
rows_of = st.fixed_dictionaries({name: st.integers(1, 50) for name in NAMES})


@settings(max_examples=60, deadline=None)
@given(counts_of)
def test_every_prefix_is_within_one_row_of_the_plan(counts: dict[str, int]) -> None:
    order, block = spread(counts), sum(counts.values())
    assert Counter(order) == counts
    seen = dict.fromkeys(counts, 0)
    for step, name in enumerate(order, 1):
        seen[name] += 1
        for other, count in counts.items():
            assert abs(seen[other] * block - step * count) < block


@settings(max_examples=60, deadline=None)
@given(rows_of, phases_of, st.integers(0, 5), st.integers(40, 60))
def test_closed_form_equals_counting_and_stays_within_one_row_of_each_phase(rows, phases, seed, block) -> None:
    try:
        mixture = Mixture(rows, phases, seed=seed, block=block)
    except ValueError as error:
        assert "less than one row" in str(error)
        return
    total = phases[-1].start + 130
    source, _ = mixture.at(np.arange(total))
    names = [mixture.sources[i] for i in source]
    for lo, hi in [(0, total), (7, 8), (total // 3, total // 2), (5, 5)]:
        counted = Counter(names[lo:hi])
        assert mixture.counts(lo, hi) == {name: counted[name] for name in mixture.sources}
    for phase, quota in zip(phases, mixture.quotas, strict=True):
        following = [p.start for p in phases if p.start > phase.start]
        for end in range(phase.start, following[0] if following else total):
            realised = mixture.counts(phase.start, end)
            for name in mixture.sources:
                assert abs(realised[name] - (end - phase.start) * quota.get(name, 0) / block) < 1


@settings(max_examples=40, deadline=None)
@given(rows_of, phases_of, st.integers(0, 9))
def test_no_row_is_lost_or_repeated_inside_an_epoch(rows, phases, seed) -> None:
    mixture = Mixture(rows, phases, seed=seed, block=300)
    source, row = mixture.at(np.arange(phases[-1].start + 400))
    for index, name in enumerate(mixture.sources):
        seen = row[source == index]
        for epoch in range(0, len(seen), rows[name]):
            part = seen[epoch : epoch + rows[name]]
            assert len(set(part.tolist())) == len(part)
            if len(part) == rows[name]:
                assert sorted(part) == list(range(rows[name]))


@given(st.integers(1, 3000), st.integers(0, 2**63))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation(size: int, key: int) -> None:
    full = np.full(size, size, np.int64)
    assert sorted(permute(np.arange(size), full, np.full(size, key, np.uint64))) == list(range(size))


def test_permutations_look_random_and_depend_on_seed_source_and_epoch() -> None:
    def rows(name: str, seed: int, epoch: int) -> np.ndarray:
        mixture = Mixture({name: 5000}, [Phase(0, {name: 1})], seed=seed)
        return mixture.at(np.arange(epoch * 5000, (epoch + 1) * 5000))[1]

    orders = [rows("a", 0, 0), rows("a", 0, 1), rows("a", 1, 0), rows("b", 0, 0), np.arange(5000)]
    for i, one in enumerate(orders):
        for other in orders[i + 1 :]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.06
            assert (one == other).sum() < 12  # a random permutation has one fixed point on average
    assert (rows("a", 0, 0) == orders[0]).all()
    # First places are spread evenly over seeds too, also for a source so small that the grid is tiny.
    first = Counter(
        int(Mixture({"a": 3}, [Phase(0, {"a": 1})], seed=seed).at(np.array([0]))[1][0]) for seed in range(300)
    )
    assert min(first.values()) > 70 and len(first) == 3


@settings(max_examples=40, deadline=None)
@given(rows_of, phases_of, counts_of)
def test_arms_that_share_their_first_phases_read_the_same_rows_there(rows, phases, later) -> None:
    branch = phases[-1].start + 35
    short = Mixture(rows, phases, seed=3, block=300)
    changed = [*phases, Phase(branch, {**later, "aaa": 5})]
    long = Mixture({**rows, "aaa": 9}, changed, seed=3, block=300)
    for positions in (np.arange(branch), np.arange(branch)[::-3]):
        (a, row_a), (b, row_b) = short.at(positions), long.at(positions)
        assert [short.sources[i] for i in a] == [long.sources[i] for i in b]
        assert (row_a == row_b).all()
    assert short.fingerprint(branch) == long.fingerprint(branch)
    assert short.fingerprint() != long.fingerprint()


def test_fingerprint_covers_rows_weights_seed_block_and_starts() -> None:
    def print_of(rows=10, weight=1.0, seed=0, block=100, start=50, upto=None) -> str:
        phases = [Phase(0, {"a": 1, "b": weight}), Phase(start, {"a": 1})]
        return Mixture({"a": rows, "b": 7}, phases, seed=seed, block=block).fingerprint(upto)

    base = print_of()
    assert base == print_of() == print_of(weight=1.0000001)  # the same counts
    changed = [print_of(rows=11), print_of(weight=2), print_of(seed=1), print_of(block=200), print_of(start=51)]
    assert len({base, *changed}) == 6
    assert print_of(upto=50) == print_of(start=60, upto=50) != print_of(upto=51)


def test_seek_costs_the_same_anywhere() -> None:
    mixture = Mixture({"a": 10**9, "b": 7}, [Phase(0, {"a": 0.9, "b": 0.1})], seed=0)
    far = np.arange(10**15, 10**15 + 50)
    whole, part = mixture.at(far), mixture.at(far[31:40])
    assert (whole[0][31:40] == part[0]).all() and (whole[1][31:40] == part[1]).all()
    assert mixture.counts(0, 10**15) == {"a": 9 * 10**14, "b": 10**14}


def test_largest_remainder() -> None:
    assert quantise({"a": 1, "b": 1, "c": 1}, 10) == {"a": 4, "b": 3, "c": 3}
    assert quantise({"a": 0.05, "b": 0.95, "none": 0}, 1000) == {"a": 50, "b": 950}


@pytest.mark.parametrize(
    ("rows", "phases", "block", "message"),
    [
        ({"a": 5}, [Phase(0, {"a": 1, "b": 0.0004})], 1000, "source 'b' is 0.0004 of its phase"),
        ({"a": 5}, [Phase(0, {"a": -1})], 10, "source 'a' is -1"),
        ({"a": 5}, [Phase(0, {"a": float("nan")})], 10, "source 'a' is nan"),
        ({"a": 5}, [Phase(0, {"a": 0})], 10, "weight above 0"),
        ({"a": 5}, [Phase(0, {"b": 1})], 10, "source 'b' has a weight but no rows"),
        ({"a": 5}, [Phase(1, {"a": 1})], 10, "start at row 0"),
        ({"a": 5}, [Phase(0, {"a": 1}), Phase(0, {"a": 1})], 10, "growing rows"),
        ({"a": 5}, [], 10, "start at row 0"),
        ({"a": 5}, [Phase(0, {"a": 1})], 0, "block is 0"),
    ],
)
def test_impossible_mixtures_are_refused(rows, phases, block, message) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture(rows, phases, seed=0, block=block)


def test_negative_positions_are_refused() -> None:
    mixture = Mixture({"a": 5}, [Phase(0, {"a": 1})], seed=0)
    with pytest.raises(ValueError, match="0 or more"):
        mixture.at(np.array([3, -1]))
    with pytest.raises(ValueError, match="lo <= hi"):
        mixture.counts(3, 2)
