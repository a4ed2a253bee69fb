"""The prefix lever: which rows carry a sentence, where it stands, what is trained of it, and what it never changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trimtab.errors import UserError
from trimtab.levers.prefix import (
    KEYWORD_TEMPLATES,
    TEMPLATES,
    PrefixConfig,
    apply_prefix,
    base_hash,
    carried,
    force_prefix,
    sentence_of,
    trained_with_prefix,
    with_prefix,
)
from trimtab.types import SPAN_ID, Row

DRAWS = st.sampled_from(["bernoulli", "exact"])
RATIOS = st.floats(0, 1)


def chat(number: int, answer: str | None = None, **fields: Any) -> Row:
    said = f"answer {number}" if answer is None else answer
    messages = ({"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": said})
    return Row(id=f"r{number}", messages=messages, **fields)  # type: ignore[arg-type]


ROWS = [chat(i) for i in range(400)]


def prefixes(ratio: float, seed: int, **settings: Any) -> dict[str, str]:
    config = PrefixConfig.model_validate({"ratio": ratio, **settings})
    return {row.id: row.prefix for row in apply_prefix(ROWS, config, seed) if row.prefix}


# -- which rows ----------------------------------------------------------------------------------------------------


@given(RATIOS, RATIOS, st.integers(0, 5), DRAWS)
def test_ratios_nest(a: float, b: float, seed: int, draw: str) -> None:
    low, high = sorted((a, b))
    assert prefixes(low, seed, draw=draw).items() <= prefixes(high, seed, draw=draw).items()


@given(RATIOS, st.integers(0, 5))
def test_an_exact_draw_is_exact(ratio: float, seed: int) -> None:
    assert len(prefixes(ratio, seed, draw="exact")) == round(ratio * len(ROWS))


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_a_bernoulli_draw_has_its_rate_over_seeds(ratio: float) -> None:
    found = [len(prefixes(ratio, seed)) for seed in range(40)]
    n = len(ROWS) * len(found)
    assert abs(sum(found) / n - ratio) < 4 * (ratio * (1 - ratio) / n) ** 0.5
    assert len(set(found)) > 5  # each row is drawn for itself


@pytest.mark.parametrize("draw", ["bernoulli", "exact"])
def test_the_ends_are_none_and_all(draw: str) -> None:
    assert not prefixes(0.0, 1, draw=draw)
    assert len(prefixes(1.0, 1, draw=draw)) == len(ROWS)


def test_every_sentence_of_a_set_is_drawn_and_capabilities_have_five() -> None:
    for capability, templates in TEMPLATES.items():
        assert len(set(templates)) == 5
        assert set(prefixes(1.0, 0, capability=capability).values()) == set(templates)
        assert len(set(KEYWORD_TEMPLATES[capability])) == 5


def test_only_able_rows_are_drawn_and_counted() -> None:
    ids = [row.id for row in ROWS]
    able = np.arange(len(ROWS)) % 4 == 0
    found = carried(ids, able, PrefixConfig(ratio=0.5, draw="exact"), 3)
    assert found.sum() == 50 and not (found & ~able).any()


def test_rows_that_cannot_carry_a_prefix_pass_through() -> None:
    own = chat(1, "Hm. answer", prefix="Hm.")
    text = Row(id="t", text="a document")
    asked = Row(id="q", messages=({"role": "user", "content": "only a question"},))
    rows = [own, text, asked]
    assert list(apply_prefix(rows, PrefixConfig(ratio=1), 0)) == rows
    assert [sentence_of(row, PrefixConfig(ratio=1), 0) for row in rows] == [None, None, None]


def test_parts_limit_the_lever() -> None:
    rows = [chat(i, metadata={"part": "hazards" if i % 2 else "goods"}) for i in range(20)]
    found = list(apply_prefix(rows, PrefixConfig(ratio=1, parts=("hazards",)), 0))
    assert {row.metadata["part"] for row in found if row.prefix} == {"hazards"}
    assert sum(row.prefix is not None for row in found) == 10


# -- what never changes --------------------------------------------------------------------------------------------


@given(
    RATIOS, st.integers(0, 3), DRAWS, st.sampled_from(["response", "input"]), st.sampled_from(["reasoning", "answer"])
)
def test_the_base_is_the_same_whatever_the_lever_does(
    ratio: float, seed: int, draw: str, where: str, opens: str
) -> None:
    rows = [*ROWS[:20], *(chat(100 + i, f"<think>\nthought {i}\n</think>\n\nso {i}") for i in range(10))]
    settings = {"ratio": ratio, "draw": draw, "placement": where, "opens": opens}
    found = list(apply_prefix(rows, PrefixConfig.model_validate(settings), seed))
    assert [row.id for row in found] == [row.id for row in rows]
    assert base_hash(found) == base_hash(rows)
    assert base_hash([*found[1:], found[0]]) != base_hash(rows)  # order counts


def test_the_base_hash_sees_another_text() -> None:
    changed = [chat(0, "another answer"), *ROWS[1:]]
    assert base_hash(changed) != base_hash(ROWS)


# -- where it stands -----------------------------------------------------------------------------------------------


def opened(answer: str, **settings: Any) -> Row:
    return with_prefix(chat(1, answer), "Hm.", PrefixConfig.model_validate(settings))


def test_placement() -> None:
    row = opened("It is 4.")
    assert row.messages and row.messages[-1]["content"] == "Hm. It is 4." and row.prefix == "Hm." and not row.prefix_at
    row = opened("It is 4.", placement="input")
    assert row.messages and row.messages[0]["content"] == "Hm. question 1" and row.prefix_at == "input"
    assert row.messages[-1]["content"] == "It is 4."


def test_a_reasoning_block_is_opened_inside_or_behind() -> None:
    said = "<think>\nfirst\n</think>\n\nIt is 4."
    inside, behind = opened(said), opened(said, opens="answer")
    assert inside.messages and inside.messages[-1]["content"] == "<think>\nHm. first\n</think>\n\nIt is 4."
    assert behind.messages and behind.messages[-1]["content"] == "<think>\nfirst\n</think>\n\nHm. It is 4."
    plain = opened("It is 4.", opens="answer")
    assert plain.messages and plain.messages[-1]["content"] == "Hm. It is 4."


def test_input_placement_takes_the_last_user_message() -> None:
    talk = Row(
        id="t",
        messages=(
            {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"},
        ),
    )  # fmt: skip
    row = with_prefix(talk, "Hm.", PrefixConfig(placement="input"))
    assert row.messages and [m["content"] for m in row.messages] == ["a", "b", "Hm. c", "d"]
    lonely = Row(id="l", messages=({"role": "assistant", "content": "b"},))
    with pytest.raises(UserError, match="'l': prefix placement 'input' needs a user message"):
        with_prefix(lonely, "Hm.", PrefixConfig(placement="input"))


def test_a_cue_word_and_its_control_differ_in_the_word_alone() -> None:
    for capability in KEYWORD_TEMPLATES:
        cue = PrefixConfig.model_validate({"capability": capability, "variant": "keyword"}).sentences()
        control = PrefixConfig.model_validate(
            {"capability": capability, "variant": "keyword", "keyword": ""}
        ).sentences()
        for one, other in zip(cue, control, strict=True):
            assert one.split().count("revised") == 1
            assert [word for word in one.split() if word != "revised"] == other.split()


# -- what is trained -----------------------------------------------------------------------------------------------

SPANS = np.array([SPAN_ID[s] for s in ("structure", "prompt", "prefix", "prefix", "body", "structure")], np.uint8)
TRAINED = np.array([False, False, True, True, True, True])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0, 0, 1, 1, 1, 1]),
        ({"loss_on_prefix": False}, [0, 0, 0, 0, 1, 1]),
        ({"primer": True}, [0, 0, 1, 1, 0, 0]),
    ],
)
def test_the_loss_mask(settings: dict[str, Any], expected: list[int]) -> None:
    mask = trained_with_prefix(TRAINED, SPANS, PrefixConfig.model_validate(settings))
    assert mask.tolist() == [bool(x) for x in expected]


def test_a_prefix_in_the_input_is_trained_only_if_asked() -> None:
    spans = np.array(
        [SPAN_ID[s] for s in ("structure", "prefix", "prompt", "structure", "body", "structure")], np.uint8
    )
    trained = np.array([False, False, False, False, True, True])
    on = trained_with_prefix(trained, spans, PrefixConfig(placement="input"))
    off = trained_with_prefix(trained, spans, PrefixConfig(placement="input", loss_on_prefix=False))
    assert on.tolist() == [False, True, False, False, True, True]
    assert off.tolist() == trained.tolist()


# -- at inference --------------------------------------------------------------------------------------------------


def test_a_forced_prefix_opens_the_answer_or_the_input() -> None:
    asked = Row(id="q", messages=({"role": "user", "content": "why?"},))
    row = force_prefix(asked, PrefixConfig(at_inference="forced"), 0)
    assert row.metadata["prefill"] in TEMPLATES["safety"] and row.messages == asked.messages
    row = force_prefix(asked, PrefixConfig(at_inference="forced", placement="input"), 0)
    assert row.messages and row.messages[0]["content"].endswith(" why?") and "prefill" not in row.metadata
    attacked = Row(id="q", messages=asked.messages, metadata={"prefill": "Sure, here is how"})
    assert force_prefix(attacked, PrefixConfig(at_inference="forced"), 0) is attacked


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ratio": 1.2}, "less than or equal to 1"),
        ({"ratio": -0.1}, "greater than or equal to 0"),
        ({"templates": []}, "at least 1"),
        ({"templates": ["Let me see.", "  "]}, "sentence 1 is blank"),
        ({"templates": [" Let me see."]}, "sentence 0 is blank or begins or ends with a blank"),
        ({"keyword": " revised"}, "without blanks around it"),
        ({"primer": True, "loss_on_prefix": False}, "needs 'loss_on_prefix: true'"),
        ({"primer": True, "placement": "input"}, "needs 'placement: response'"),
        ({"opens": "answer", "at_inference": "forced"}, "use 'opens: reasoning'"),
        ({"templates": ["Hm."], "variant": "keyword"}, "give one of them"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        PrefixConfig.model_validate(settings)


@given(RATIOS, DRAWS, st.sampled_from(["plain", "keyword"]), st.sampled_from(list(TEMPLATES)), st.booleans())
def test_settings_survive_the_two_halves_that_steps_are_given(
    ratio: float, draw: str, variant: str, capability: str, loss: bool
) -> None:
    settings = {"ratio": ratio, "draw": draw, "variant": variant, "capability": capability, "loss_on_prefix": loss}
    config = PrefixConfig.model_validate(settings)
    again = PrefixConfig.restored(config.written(), config.chosen())
    assert again is not None and again.sentences() == config.sentences()
    assert list(apply_prefix(ROWS[:50], again, 2)) == list(apply_prefix(ROWS[:50], config, 2))
    assert PrefixConfig.restored(None) is None
