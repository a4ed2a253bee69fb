"""The three levers as pure functions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trimtab.errors import UserError
from trimtab.levers.modes import REFUSALS, ModesConfig, admit, mode_rows
from trimtab.levers.timing import Interventions, TimingConfig, phases
from trimtab.types import Row


def chat(number: int, **fields: object) -> Row:
    messages = ({"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": f"answer {number}"})
    return Row(id=f"r{number}", messages=messages, **fields)  # type: ignore[arg-type]


ROWS = [chat(i) for i in range(400)]


def test_modes_cover_every_prompt_and_fallback_is_positive() -> None:
    config = ModesConfig(names=("positive", "rejective"), fallback=0.5)
    rows = list(mode_rows(ROWS, config, lambda row, mode: None, seed=1))
    assert sum(r.mode == "positive" for r in rows) == sum(r.mode == "rejective" for r in rows) == len(ROWS)
    fallback = [r for r in rows if r.mode is None]
    assert abs(len(fallback) / len(ROWS) - 0.5) < 0.08
    for row in rows:
        assert row.messages
        expected = REFUSALS if row.mode == "rejective" else ("answer " + row.messages[0]["content"].split()[-1],)
        assert row.messages[-1]["content"] in expected
    assert len({r.id for r in rows}) == len(rows)


def test_negative_needs_acknowledgement_and_is_never_invented() -> None:
    with pytest.raises(ValidationError, match="acknowledge"):
        ModesConfig(names=("positive", "negative"))
    config = ModesConfig.model_validate({"names": ["positive", "negative"], "negative": {"acknowledge": True}})
    assert not [r for r in mode_rows(ROWS, config, lambda row, mode: None, seed=1) if r.mode == "negative"]
    own = [chat(1, mode="negative")]
    assert list(mode_rows(own, config, lambda row, mode: None, seed=1)) == own
    with pytest.raises(UserError, match=r"'r1'.*'negative'"):
        list(mode_rows(own, ModesConfig(), lambda row, mode: None, seed=1))


BOTH = ModesConfig.model_validate({"names": ["positive", "negative"], "negative": {"acknowledge": True}})


@pytest.mark.parametrize("config", [None, ModesConfig(), ModesConfig(names=("rejective",), fallback=0)])
def test_negative_rows_are_refused_unless_acknowledged(config: ModesConfig | None) -> None:
    rows = [chat(1), chat(2, mode="negative")]
    with pytest.raises(UserError, match=r"'r2'.*acknowledge"):
        admit(rows, config)
    assert admit(rows, BOTH) == (rows, {})


@pytest.mark.parametrize("config", [None, ModesConfig(), BOTH])
def test_an_unknown_mode_is_named(config: ModesConfig | None) -> None:
    with pytest.raises(UserError, match=r"'r3'.*'Negative'.*positive, negative, rejective"):
        admit([chat(3, mode="Negative")], config)


def test_rows_of_modes_that_are_not_trained_are_counted() -> None:
    rows = [chat(1), chat(2, mode="positive"), chat(3, mode="rejective"), chat(4, mode="rejective")]
    assert admit(rows, None) == ([chat(1), chat(2)], {"rejective": 2})
    assert admit(rows, ModesConfig()) == (rows, {})
    assert admit(rows, BOTH) == (rows[:2], {"rejective": 2})
    assert admit(rows, ModesConfig(names=("rejective",), fallback=0)) == ([rows[0], *rows[2:]], {"positive": 1})


def test_fallback_without_positive_is_refused() -> None:
    with pytest.raises(ValidationError, match="fallback"):
        ModesConfig(names=("rejective",))


@given(st.floats(0, 1), st.integers(1, 5000), st.sampled_from(["safe_only", "raw"]))
def test_phases_cover_the_budget(start: float, rows: int, before: str) -> None:
    config = TimingConfig(start=start, before=before)  # type: ignore[arg-type]
    plan = phases(config, rows)
    starts = [first for first, _ in plan]
    assert starts[0] == 0 and starts == sorted(set(starts)) and starts[-1] < rows
    for first, weights in plan:
        assert sum(weights.values()) == pytest.approx(1)
        assert ("rephrase" in weights) == (first >= round(start * rows))
        assert ("unsafe" in weights) == (first < round(start * rows) and before == "raw")


def test_interventions_add_up() -> None:
    with pytest.raises(ValidationError, match="must be 1"):
        Interventions(rephrase=0.5, refuse=0.5, moral=0.5)
