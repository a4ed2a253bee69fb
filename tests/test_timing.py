"""Curricula: what a start, a ramp, matched exposure and spelt-out phases read, to the row; and what is refused."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from trimtab.data.mixture import Mixture, Phase
from trimtab.levers.timing import RAMP_STEPS, TimingConfig, TimingPhase, phases

INTERVENTIONS = ("rephrase", "refuse", "moral")
Plan = list[tuple[int, dict[str, float]]]


def config(**fields: Any) -> TimingConfig:
    return TimingConfig.model_validate(fields)


def planned(plan: Plan, rows: int) -> dict[str, float]:
    """Rows of each source in the whole plan."""
    total: Counter[str] = Counter()
    for (first, weights), end in zip(plan, [row for row, _ in plan[1:]] + [rows], strict=True):
        for name, weight in weights.items():
            total[name] += weight * (end - first)  # type: ignore[assignment]
    return dict(total)


def realised(plan: Plan, rows: int) -> dict[str, int]:
    sources = {name for _, weights in plan for name in weights}
    mixture = Mixture(dict.fromkeys(sources, 17), [Phase(row, weights) for row, weights in plan], seed=0)
    return mixture.counts(0, rows)


def until(plan: Plan, row: int) -> Plan:
    return [phase for phase in plan if phase[0] < row]


def test_the_papers_four_arms() -> None:
    after = {"clean": 0.7, "rephrase": 0.12, "refuse": 0.12, "moral": 0.06}
    assert phases(config(), 1000) == [(0, after)]
    assert phases(config(start=0.2), 1000) == [(0, {"clean": 1}), (200, after)]
    assert phases(config(start=0.6, before="raw"), 1000) == [(0, {"clean": 0.7, "unsafe": 0.3}), (600, after)]
    assert phases(config(start=1), 1000) == [(0, {"clean": 1})]


curricula = st.builds(
    dict,
    start=st.floats(0, 1),
    before=st.sampled_from(["safe_only", "raw"]),
    ramp=st.floats(0, 1),
    exposure=st.sampled_from(["natural", "matched"]),
    unsafe_share=st.floats(0.01, 0.9),
    dose=st.none() | st.floats(0.001, 1),
)


@settings(max_examples=300, deadline=None)
@given(curricula, st.integers(1, 3000))
def test_a_curriculum_covers_the_budget_or_is_refused(fields: dict[str, Any], rows: int) -> None:
    try:
        timing = config(**fields)
        plan = phases(timing, rows)
    except ValueError as error:
        assert re.search("ramp: |dose: |dose is for", str(error))
        return
    starts = [row for row, _ in plan]
    assert starts[0] == 0 and starts == sorted(set(starts)) and starts[-1] < rows
    assert len(plan) <= RAMP_STEPS + 2
    begin = round(timing.start * rows)
    for row, weights in plan:
        assert sum(weights.values()) == pytest.approx(1) and min(weights.values()) > 0
        assert ("rephrase" in weights) == (row >= begin) and ("unsafe" in weights) <= (timing.before == "raw")
    assert all(a[1] != b[1] for a, b in pairwise(plan))
    if timing.exposure == "matched" and timing.start < 1:
        dose = timing.unsafe_share if timing.dose is None else timing.dose
        found = planned(plan, rows)
        for name, share in timing.interventions.plain().items():
            assert found.get(name, 0) == pytest.approx(dose * share * rows, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 0.6), st.floats(0, 0.1)), min_size=2, max_size=4),
    st.integers(300, 5000),
    st.floats(0.05, 0.3),
)
def test_matched_arms_read_the_same_of_every_source_to_one_row(arms, rows, dose) -> None:
    """Safe-only text before: only the order differs, clean text included."""
    found = [
        realised(phases(config(start=start, ramp=ramp, exposure="matched", dose=dose), rows), rows)
        for start, ramp in arms
    ]
    for counts in found:
        for name, share in {
            "clean": 1 - dose,
            "rephrase": 0.4 * dose,
            "refuse": 0.4 * dose,
            "moral": 0.2 * dose,
        }.items():
            assert abs(counts[name] - share * rows) <= 1
    assert all(sum(counts.values()) == rows for counts in found)


def test_matched_exposure_and_natural_exposure_are_one_arm_from_the_start_on() -> None:
    for rows in (999, 4687, 6250):
        assert phases(config(exposure="matched"), rows) == phases(config(), rows)
        assert phases(config(start=1, exposure="matched"), rows) == phases(config(start=1), rows)
        natural, matched = phases(config(start=0.6), rows), phases(config(start=0.6, exposure="matched"), rows)
        assert until(natural, matched[1][0]) == until(matched, matched[1][0]) and natural != matched
        assert matched[1][1]["rephrase"] == pytest.approx(0.3 * 0.4 / 0.4, rel=1e-3)


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 0.5), st.floats(0, 0.5), st.sampled_from(["safe_only", "raw"]), st.integers(10, 2000), st.data())
def test_arms_are_equal_up_to_the_first_start(a: float, b: float, before: str, rows: int, data) -> None:
    def arm(start: float) -> Plan:
        fields = {
            "start": start,
            "before": before,
            "ramp": data.draw(st.floats(0, 0.2)),
            "exposure": data.draw(st.sampled_from(["natural", "matched"])),
        }
        return phases(config(**fields), rows)

    first = round(min(a, b) * rows)
    assert until(arm(a), first) == until(arm(b), first)


def test_a_ramp_grows_from_nothing_and_reads_what_the_line_reads() -> None:
    plan = phases(config(start=0.2, ramp=0.3), 1000)
    assert plan[0] == (0, {"clean": 1.0}) and plan[1][0] == 200 and plan[-1][0] == 500
    inside = plan[1:-1]
    assert len(inside) == RAMP_STEPS and [row for row, _ in inside] == list(range(200, 500, 6))
    for row, weights in inside:
        line = (row + 3 - 200) / 300  # the middle of the step
        assert 1 - weights["clean"] == pytest.approx(0.3 * line)
        assert weights["refuse"] == pytest.approx(0.12 * line)
    assert planned(plan, 1000)["rephrase"] == pytest.approx(0.12 * (150 + 500))
    counts = realised(plan, 1000)
    assert all(abs(counts[name] - n) < 1 for name, n in planned(plan, 1000).items())


def test_a_ramp_out_of_raw_text_takes_the_unsafe_text_down() -> None:
    for _, weights in phases(config(start=0.5, ramp=0.1, before="raw"), 1000)[1:-1]:
        assert weights["clean"] == pytest.approx(0.7)
        assert weights["unsafe"] + sum(weights[name] for name in INTERVENTIONS) == pytest.approx(0.3)


@pytest.mark.parametrize("rows", [1, 2, 7, 60])
def test_a_ramp_of_few_rows_has_a_phase_per_row(rows: int) -> None:
    plan = phases(config(ramp=1.0), rows)
    assert len(plan) == min(rows, RAMP_STEPS)
    found = planned(plan, rows)
    assert sum(found[name] for name in INTERVENTIONS) == pytest.approx(0.15 * rows)


def test_any_number_of_phases_spelt_out() -> None:
    timing = config(
        phases=[
            {"at": 0, "weights": {"clean": 2}},
            {"at": 0.25, "weights": {"clean": 3, "unsafe": 1, "moral": 0}},
            {"at": 0.5, "weights": {"rephrase": 1}, "ramp": 0.1},
            {"at": 0.9, "weights": {"rephrase": 4}},
        ]
    )
    plan = phases(timing, 400)
    assert plan[:2] == [(0, {"clean": 1.0}), (100, {"clean": 0.75, "unsafe": 0.25})]
    assert plan[2][0] == 200 and plan[-1] == (240, {"rephrase": 1.0})  # the last phase changes nothing
    assert planned(plan, 400)["rephrase"] == pytest.approx(20 + 160)


def test_a_curriculum_spelt_out_equals_the_same_one_described() -> None:
    for start in (0.2, 0.6):
        share = 0.3 / (1 - start)
        spelt = config(
            phases=[
                {"at": 0, "weights": {"clean": 5}},
                {
                    "at": start,
                    "weights": {
                        "clean": 1 - share,
                        "rephrase": 4 * share / 10,
                        "refuse": 0.4 * share,
                        "moral": share / 5,
                    },
                },
            ]
        )
        assert phases(spelt, 1000) == phases(config(start=start, exposure="matched"), 1000)


def test_settings_survive_being_saved() -> None:
    for timing in (
        config(start=0.2, ramp=0.1),
        config(phases=[{"at": 0, "weights": {"clean": 1}}], repeats={"clean": 2}),
    ):
        assert TimingConfig.model_validate(timing.plain()) == timing


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"start": 1.2}, "start"),
        ({"start": -0.1}, "start"),
        ({"ramp": 1.5}, "ramp"),
        ({"dose": 1.5, "exposure": "matched"}, "dose"),
        (
            {"start": 0.8, "ramp": 0.3},
            r"ramp: 0.3 of the budget after a start at 0.8 ends at 1.1, past its end; use at most 0.2",
        ),
        ({"dose": 0.2}, "dose is for 'exposure: matched'"),
        (
            {"start": 0.8, "exposure": "matched"},
            r"need 0.3 of the budget, but after a start at 80 % only 0.2 of it is left; start at 70 % or earlier, or set a "
            "dose of 0.2 or less",
        ),
        (
            {"start": 0.5, "ramp": 0.4, "exposure": "matched", "dose": 0.4},
            "a ramp over 40 %, which counts half, only 0.3 of it is left; start at 40 % or earlier",
        ),
        ({"repeats": {"refuse": 0}}, "repeats.refuse is 0"),
        ({"phases": [{"at": 0.1, "weights": {"clean": 1}}]}, "must begin at 0"),
        (
            {
                "phases": [
                    {"at": 0, "weights": {"a": 1}},
                    {"at": 0.5, "weights": {"b": 1}},
                    {"at": 0.4, "weights": {"a": 1}},
                ]
            },
            "growing",
        ),
        ({"phases": [{"at": 0, "weights": {"a": 1}}, {"at": 1.0, "weights": {"b": 1}}]}, "at"),
        ({"phases": [{"at": 0, "weights": {"a": 1}, "ramp": 0.1}]}, r"phases.0.ramp is 0.1"),
        (
            {
                "phases": [
                    {"at": 0, "weights": {"a": 1}},
                    {"at": 0.5, "weights": {"b": 1}, "ramp": 0.3},
                    {"at": 0.7, "weights": {"a": 1}},
                ]
            },
            r"phases.1.ramp: 0.3 of the budget from 0.5 on ends at 0.8, past the phase's end at 0.7; use at most 0.2",
        ),
        ({"phases": [{"at": 0, "weights": {"a": -1, "b": 2}}]}, "weights.a is -1"),
        ({"phases": [{"at": 0, "weights": {"a": 0}}]}, "weights are all 0"),
        ({"phases": [{"at": 0, "weights": {}}]}, "weights"),
        ({"phases": [{"at": 0, "weights": {"a": 1}}], "start": 0.2}, "start has no meaning beside 'phases'"),
        ({"phases": [{"at": 0, "weights": {"a": 1}}], "exposure": "matched"}, "exposure has no meaning"),
        (
            {"phases": [{"at": 0, "weights": {"a": 1}}], "interventions": {"refuse": 1, "rephrase": 0, "moral": 0}},
            "interventions has no",
        ),
        ({"begin": 0.2}, "begin"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_read(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**fields)


def test_never_is_allowed_with_every_setting() -> None:
    timing = config(start=1.0, exposure="matched", ramp=0.2, dose=0.5)
    assert phases(timing, 100) == [(0, {"clean": 1.0})]


def test_matched_exposure_that_a_short_budget_cannot_hold_is_refused_in_rows() -> None:
    timing = config(start=0.7, exposure="matched")
    assert phases(timing, 1000)[1] == (700, {"rephrase": 0.4, "refuse": 0.4, "moral": 0.2})
    with pytest.raises(ValueError, match=r"need 0.3 of 5 rows = 1.5 rows, but after a start at 80 % only 1 are left"):
        phases(timing, 5)  # 3.5 rows are rounded to 4


def test_a_share_that_no_row_could_hold_is_refused() -> None:
    tiny = config(phases=[{"at": 0, "weights": {"a": 1, "b": 1e-14}}])
    with pytest.raises(ValueError, match="share of 'b' is 1e-14"):
        phases(tiny, 100)


def test_phases_take_their_defaults() -> None:
    assert TimingPhase(at=0, weights={"a": 1}).ramp == 0
    assert np.isclose(sum(config().interventions.plain().values()), 1)
