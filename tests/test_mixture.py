"""The mixture: close to its plan everywhere, each epoch a permutation, shared beginnings, closed forms that agree."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.data.mixture import HEAD, PARTS, Mixture, Phase, permute, quantise

NAMES = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta")
counts_of = st.dictionaries(st.sampled_from(NAMES), st.integers(1, 40), min_size=1)


def plan_of(draw_phases: list[tuple[int, dict[str, int]]]) -> list[Phase]:
    start, phases = 0, []
    for gap, weights in draw_phases:
        phases.append(Phase(start, weights))
        start += gap
    return phases


phases_of = st.lists(st.tuples(st.integers(1, 90), counts_of), min_size=1, max_size=12).map(plan_of)
long_of = st.lists(st.tuples(st.sampled_from([1, 7, 40, 1500, 2600]), counts_of), min_size=1, max_size=4).map(plan_of)
rows_of = st.fixed_dictionaries({name: st.integers(1, 50) for name in NAMES})


def planned(phases: list[Phase], total: int) -> dict[str, np.ndarray]:
    """The plan of each source after 0, 1, ..., ``total`` rows, from the weights as given."""
    ends = [phase.start for phase in phases[1:]] + [total]
    out = {}
    for name in {name for phase in phases for name in phase.weights}:
        steps = np.zeros(total)
        for phase, end in zip(phases, ends, strict=True):
            steps[phase.start : end] = phase.weights.get(name, 0) / sum(phase.weights.values())
        out[name] = np.concatenate([[0], np.cumsum(steps)])
    return out


def debts(mixture: Mixture, phases: list[Phase], total: int) -> dict[str, np.ndarray]:
    """Planned less realised rows of each source after 0, 1, ..., ``total`` rows."""
    source, _ = mixture.at(np.arange(total))
    index = {name: i for i, name in enumerate(mixture.sources)}
    plan = planned(phases, total)
    return {n: plan[n] - np.concatenate([[0], np.cumsum(source == index[n])]) for n in mixture.sources}


def reach(sources: int) -> float:
    """How far a debt can be driven by phases chosen against the mixture; one row for three sources or fewer."""
    return max(1.0, sum(1 / k for k in range(2, sources + 1)))


@settings(max_examples=150, deadline=None)
@given(rows_of, phases_of, st.integers(0, 5))
def test_any_number_of_phases_is_read_within_one_row_of_the_plan(rows, phases, seed) -> None:
    mixture = Mixture(rows, phases, seed=seed)
    for debt in debts(mixture, phases, phases[-1].start + 130).values():
        assert np.abs(debt).max() <= reach(len(mixture.sources)) + 1e-6


@settings(max_examples=40, deadline=None)
@given(rows_of, long_of)
def test_long_phases_too(rows, phases) -> None:
    mixture = Mixture(rows, phases, seed=0)
    total = phases[-1].start + HEAD + 2500
    for debt in debts(mixture, phases, total).values():
        assert np.abs(debt).max() <= max(1.25, reach(len(mixture.sources)))


def test_random_curricula_are_within_one_row_at_every_boundary() -> None:
    rng = np.random.default_rng(0)
    over = 0
    for _ in range(300):
        names = NAMES[: rng.integers(2, 6)]
        gaps = rng.integers(1, 60, 8)
        phases = [
            Phase(int(start), {name: float(weight) for name, weight in zip(names, rng.random(len(names)))})
            for start in np.cumsum(gaps) - gaps[0]
        ]
        mixture = Mixture(dict.fromkeys(names, 9), phases, seed=0)
        found = debts(mixture, phases, phases[-1].start + 50)
        over += any(abs(debt[phase.start]) > 1 for debt in found.values() for phase in phases)
    assert over == 0


@pytest.mark.parametrize("start", [0.0, 0.2, 0.6])
@pytest.mark.parametrize("before", [{"clean": 1.0}, {"clean": 0.7, "unsafe": 0.3}])
@pytest.mark.parametrize("steps", [1, 50])
def test_curricula_with_ramps_are_within_one_row_everywhere(start: float, before: dict, steps: int) -> None:
    total = 30_000
    first, ramp = round(start * total), 6000
    phases = [Phase(0, before)] if first else []
    for step in range(steps):
        share = 0.3 * (step + 1) / steps
        inside = {"rephrase": 0.4 * share, "refuse": 0.37 * share, "moral": 0.23 * share}
        phases.append(Phase(first + ramp * step // steps, {"clean": 1 - share, **inside}))
    mixture = Mixture(dict.fromkeys(["clean", "unsafe", "rephrase", "refuse", "moral"], 50), phases, seed=0)
    for debt in debts(mixture, phases, total).values():
        assert np.abs(debt).max() < 1


def test_the_corner_where_one_row_cannot_be_kept() -> None:
    """Drop whoever was served, again and again: no order made without looking ahead keeps all within one row."""
    names = list(NAMES[:4])
    phases: list[Phase] = []
    for start in range(3):
        phases.append(Phase(start, dict.fromkeys(names, 1.0)))
        mixture = Mixture(dict.fromkeys(NAMES, 9), phases, seed=0)
        names.remove(mixture.sources[int(mixture.at(np.array([start]))[0][0])])
    debt = debts(mixture, phases, 3)[names[0]][3]
    assert debt == pytest.approx(1 / 4 + 1 / 3 + 1 / 2) and debt == pytest.approx(reach(4))


@settings(max_examples=60, deadline=None)
@given(rows_of, st.one_of(phases_of, long_of), st.integers(0, 5))
def test_closed_form_equals_counting_and_positions_are_pure(rows, phases, seed) -> None:
    mixture = Mixture(rows, phases, seed=seed)
    total = phases[-1].start + 1300
    source, row = mixture.at(np.arange(total))
    names = [mixture.sources[i] for i in source]
    for lo, hi in [(0, total), (7, 8), (total // 3, total // 2), (5, 5), (total - 1, total)]:
        counted = Counter(names[lo:hi])
        assert mixture.counts(lo, hi) == {name: counted[name] for name in mixture.sources}
    some = np.random.default_rng(seed).integers(0, total, 200)
    again = Mixture(rows, phases, seed=seed).at(some)
    assert (again[0] == source[some]).all() and (again[1] == row[some]).all()


@pytest.mark.parametrize("sources", [2, 3, 5, 8])
def test_shares_are_exact_over_any_length(sources: int) -> None:
    rng = np.random.default_rng(sources)
    weights = {f"s{i}": float(w) for i, w in enumerate(rng.random(sources) + 0.01)}
    phases = [Phase(0, {"s0": 1}), Phase(1001, weights)]
    mixture = Mixture(dict.fromkeys(weights, 9), phases, seed=0)
    whole = sum(map(Fraction, weights.values()))
    for length in (10**4, 10**6, 10**8):
        counts = mixture.counts(1001, 1001 + length)
        for name, weight in weights.items():
            assert abs(counts[name] - Fraction(weight) / whole * length) < 2
    exact = {name: Fraction(n, PARTS) for name, n in mixture.quotas[1].items()}
    for length in (10**12, 10**15 + 7):  # no drift at all from the weights as they are held
        counts = mixture.counts(1001, 1001 + length)
        assert sum(counts.values()) == length
        assert all(abs(counts[name] - share * length) < 2 for name, share in exact.items())


@settings(max_examples=40, deadline=None)
@given(rows_of, phases_of, st.integers(0, 9))
def test_no_row_is_lost_or_repeated_inside_an_epoch(rows, phases, seed) -> None:
    mixture = Mixture(rows, phases, seed=seed)
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
    short = Mixture(rows, phases, seed=3)
    changed = [*phases, Phase(branch, {**later, "aaa": 5})]
    long = Mixture({**rows, "aaa": 9}, changed, seed=3)
    for positions in (np.arange(branch), np.arange(branch)[::-3]):
        (a, row_a), (b, row_b) = short.at(positions), long.at(positions)
        assert [short.sources[i] for i in a] == [long.sources[i] for i in b]
        assert (row_a == row_b).all()
    assert short.fingerprint(branch) == long.fingerprint(branch)
    assert short.fingerprint() != long.fingerprint()


def test_fingerprint_covers_rows_weights_seed_and_starts() -> None:
    def print_of(rows=10, weight=1.0, seed=0, start=50, upto=None) -> str:
        phases = [Phase(0, {"a": 1, "b": weight}), Phase(start, {"a": 1})]
        return Mixture({"a": rows, "b": 7}, phases, seed=seed).fingerprint(upto)

    base = print_of()
    assert base == print_of() == print_of(weight=1 + 1e-10)  # the same parts
    changed = [print_of(rows=11), print_of(weight=2), print_of(seed=1), print_of(start=51)]
    assert len({base, *changed}) == 5
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
    ("rows", "phases", "message"),
    [
        ({"a": 5}, [Phase(0, {"a": 1, "b": 4e-10})], "source 'b' is 4e-10 of its phase"),
        ({"a": 5}, [Phase(0, {"a": -1})], "source 'a' is -1"),
        ({"a": 5}, [Phase(0, {"a": float("nan")})], "source 'a' is nan"),
        ({"a": 5}, [Phase(0, {"a": 0})], "weight above 0"),
        ({"a": 5}, [Phase(0, {"b": 1})], "source 'b' has a weight but no rows"),
        ({"a": 5}, [Phase(1, {"a": 1})], "start at row 0"),
        ({"a": 5}, [Phase(0, {"a": 1}), Phase(0, {"a": 1})], "growing rows"),
        ({"a": 5}, [], "start at row 0"),
    ],
)
def test_impossible_mixtures_are_refused(rows, phases, message) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture(rows, phases, seed=0)


def test_negative_positions_are_refused() -> None:
    mixture = Mixture({"a": 5}, [Phase(0, {"a": 1})], seed=0)
    with pytest.raises(ValueError, match="0 or more"):
        mixture.at(np.array([3, -1]))
    with pytest.raises(ValueError, match="lo <= hi"):
        mixture.counts(3, 2)
