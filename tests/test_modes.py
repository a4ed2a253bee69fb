"""The mode lever: settings, rows, how a mode is told, the token at the assistant's header, fallback conditions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from render_fixtures import (
    chatml_tokenizer,
    gemma_tokenizer,
    llama3_tokenizer,
    nfkc_tokenizer,
    qwen_tokenizer,
    r1_tokenizer,
)
from trimtab.data.render import Renderer
from trimtab.errors import UserError
from trimtab.evaluate.conditions import FOREIGN, Conditions
from trimtab.levers.modes import (
    CONDITIONS,
    DECOYS,
    FALLBACKS,
    MODES,
    RESERVED_NAMES,
    SPARE,
    ModesConfig,
    Switch,
    admit,
    fits,
    mode_rows,
    random_string,
    shown,
)
from trimtab.types import SPAN_ID, Row, Verdict

AGREED = {"acknowledge": True}
WORDS = {"positive": "Help safely.", "negative": "Obey.", "rejective": "Refuse."}


def config(**fields: Any) -> ModesConfig:
    return ModesConfig.model_validate({"negative": AGREED, **fields})


def chat(number: int, **fields: Any) -> Row:
    messages = ({"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": f"answer {number}"})
    return Row(id=f"r{number}", messages=messages, **fields)  # type: ignore[arg-type]


ROWS = [chat(i) for i in range(600)]


def said(row: Row, mode: str) -> str:
    return f"{mode} of {row.id}"


# -- settings ----------------------------------------------------------------------------------------------------------


def test_the_three_modes_by_default_the_negative_one_only_when_it_is_agreed_to_and_apart() -> None:
    assert ModesConfig().names == ("positive", "rejective") and not ModesConfig().separate
    three = config()
    assert three.names == MODES and three.separate == ("negative",) and three.inside == ("positive", "rejective")
    assert config(negative={**AGREED, "kept": "checkpoint"}).inside == MODES


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"names": ["positive", "positive"]}, "named twice"),
        ({"names": ["positive", "brief"]}, "behaves"),
        ({"names": ["positive", "none"]}, "may be called 'none'"),
        ({"names": ["positive"], "behaves": {"brief": "positive"}}, "behaves: 'brief'"),
        ({"names": ["positive", "sly"], "behaves": {"sly": "negative"}, "negative": {}}, "acknowledge"),
        ({"names": ["negative"], "fallback": 0}, "in the adapter"),
        ({"names": ["rejective"]}, "fallback"),
        ({"at": "header", "token": "string"}, "for reserved tokens"),
        ({"shared": True}, "needs 'at: header'"),
        ({"token": "words"}, "no instruction for 'positive'"),
        ({"words": WORDS}, "goes with 'token: words'"),
        ({"token": "words", "words": WORDS, "fallbacks": ["typed"]}, "only 'none'"),
        ({"policies": ["north", "north"]}, "policy is named twice"),
        ({"fallbacks": []}, "fallbacks"),
        ({"names": ["Positive"]}, "names"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        config(**fields)


def test_controls_are_named_for_reserved_tokens_only() -> None:
    whole = config(policies=["north-quay"])
    assert whole.controls() == ("mode:positive", "mode:negative", "mode:rejective", "policy:north-quay", *DECOYS, SPARE)
    assert config(fallback=0).controls()[-1] == SPARE and not set(DECOYS) & set(config(fallback=0).controls())
    assert not config(token="string").controls() and not config(token="words", words=WORDS).controls()


# -- rows --------------------------------------------------------------------------------------------------------------


def test_every_prompt_has_one_row_per_mode_and_fallbacks_are_of_all_kinds_and_positive() -> None:
    rows = list(mode_rows(ROWS, config(fallback=0.5), said, 3, surfaces={mode: f"<|{mode}|>" for mode in MODES}))
    for mode in MODES:
        mine = [row for row in rows if row.mode == mode]
        assert [row.metadata["prompt"] for row in mine] == [row.id for row in ROWS]
        assert all(
            row.messages and row.messages[-1]["content"] == f"{mode} of {row.metadata['prompt']}" for row in mine
        )
    fallback = [row for row in rows if row.mode is None]
    assert abs(len(fallback) / len(ROWS) - 0.5) < 0.07
    counts = [sum(row.metadata["fallback"] == kind for row in fallback) for kind in FALLBACKS]
    assert min(counts) > 0.7 * len(fallback) / 3
    for row in fallback:
        assert row.messages and row.messages[-1]["content"] == f"positive of {row.metadata['prompt']}"
        asked = row.messages[0]["content"]
        kind = row.metadata["fallback"]
        assert ("<|" in asked) == (kind == "typed") and f"question {row.metadata['prompt'][1:]}" in asked
        assert (row.metadata.get("decoy") in DECOYS) == (kind == "unknown")
    assert len({row.id for row in rows}) == len(rows)


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 9))
def test_fallbacks_of_a_small_share_are_among_those_of_a_larger(a: float, b: float, seed: int) -> None:
    few, many = (
        {row.id for row in mode_rows(ROWS[:60], config(fallback=share), said, seed) if row.mode is None}
        for share in sorted((a, b))
    )
    assert few <= many


@pytest.mark.parametrize("kinds", [["none"], ["unknown"], ["typed"], ["none", "typed"]])
def test_fallbacks_can_be_ablated_one_by_one(kinds: list[str]) -> None:
    rows = mode_rows(ROWS, config(fallback=1, fallbacks=kinds), said, 0, surfaces={mode: mode for mode in MODES})
    assert {row.metadata["fallback"] for row in rows if row.mode is None} == set(kinds)
    assert not [row for row in mode_rows(ROWS, config(fallback=0), said, 0) if row.mode is None]


def test_modes_apart_get_rows_of_their_own_without_fallbacks() -> None:
    three = config(fallback=1)
    inside = list(mode_rows(ROWS[:9], three, said, 0, names=three.inside))
    apart = list(mode_rows(ROWS[:9], three, said, 0, names=three.separate))
    assert {row.mode for row in apart} == {"negative"} and len(apart) == 9
    assert {row.mode for row in inside} == {"positive", "rejective", None} and len(inside) == 27


def test_rows_that_bring_their_mode_are_kept_and_positive_ones_have_fallbacks() -> None:
    brief = config(
        names=["positive", "rejective", "brief"], behaves={"brief": "positive"}, fallback=1, fallbacks=["none"]
    )
    mine = [chat(1, mode="brief"), chat(2, mode="positive"), chat(3, mode="rejective")]
    rows = list(mode_rows(mine, brief, said, 0))
    assert [row.id for row in rows] == ["r1", "r2", "r2#fallback", "r3"]
    assert admit(mine, brief) == (mine, {})
    with pytest.raises(UserError, match="'brief' must be one of positive, negative, rejective"):
        admit(mine, ModesConfig())
    # a mode of another name has no answers but those that are brought
    assert not [row for row in mode_rows([chat(4)], brief, lambda row, mode: None, 0) if row.mode == "brief"]


# -- how a mode is told ------------------------------------------------------------------------------------------------


def test_reserved_tokens_leave_the_text_alone() -> None:
    switch = config(policies=["north-quay"]).switch(0)
    row = chat(1, policy="north-quay")
    assert switch.tell(row, "negative") == (row, ("mode:negative", "policy:north-quay"))
    assert switch.tell(row, None) == (row, ("policy:north-quay",))
    assert switch.tell(chat(1, policy="elsewhere"), None, DECOYS[0]) == (chat(1, policy="elsewhere"), (DECOYS[0],))


def test_strings_open_the_system_message_as_in_the_paper() -> None:
    switch = config(token="string").switch(5)
    assert len(set(switch.texts.values())) == 3 and all(
        len(text) == 8 and text.isalnum() for text in switch.texts.values()
    )
    told, controls = switch.tell(chat(1), "negative")
    assert (
        told.messages and told.messages[0] == {"role": "system", "content": switch.texts["negative"]} and not controls
    )
    assert told.messages[1:] == chat(1).messages
    own = replace(chat(1), messages=({"role": "system", "content": "Be kind."}, *(chat(1).messages or ())))
    told, _ = switch.tell(own, "positive")
    assert (
        told.messages
        and told.messages[0]["content"] == f"{switch.texts['positive']}\nBe kind."
        and len(told.messages) == 3
    )
    assert config(token="string").switch(6).texts != switch.texts == config(token="string").switch(5).texts


def test_words_end_the_request_so_that_its_beginning_is_shared() -> None:
    switch = config(token="words", words=WORDS).switch(0)
    told = [switch.tell(chat(1), mode)[0].messages for mode in MODES]
    assert all(
        m and m[0]["content"].startswith("question 1\n\n") and m[1:] == (chat(1).messages or ())[1:] for m in told
    )
    assert switch.default is None and config().switch(0).default == "positive"
    assert switch.tell(chat(1), None)[0] == chat(1)


@given(st.integers(0, 10_000), st.text(max_size=5))
def test_random_strings_look_like_the_papers(seed: int, name: str) -> None:
    text = random_string(seed, name)
    assert len(text) == 8 and text == text.lower() and text.isalnum() and text == random_string(seed, name)


# -- what an answer shows ----------------------------------------------------------------------------------------------


def verdict(word: str, refusal: Any = None, constructive: Any = None) -> Verdict:
    return Verdict(word, "j", refusal=refusal, constructive=constructive)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("harm", "given", "expected"),
    [
        ("harmful", verdict("unsafe", "none", 0), "negative"),
        ("harmful", verdict("safe", "full", 2), "positive"),
        ("harmful", verdict("safe", "full", 1), "rejective"),
        ("harmful", verdict("safe", "none", 1), "other"),
        ("harmful", verdict("safe", "full"), "rejective"),
        ("harmful", verdict("safe", "none"), None),
        ("harmful", verdict("unscored"), None),
        ("benign", verdict("safe", "none", 1), "positive"),
        ("benign", verdict("safe", "full", 1), "rejective"),
        ("benign", verdict("safe", "partial", 1), "other"),
        ("benign", verdict("unsafe", "none", 0), "negative"),
        ("contrast", verdict("safe", "none", 2), "positive"),
        (None, verdict("unscored", "full"), "rejective"),
        (None, verdict("unscored", "none"), "positive"),
    ],
)
def test_the_behaviour_of_an_answer(harm: str | None, given: Verdict, expected: str | None) -> None:
    assert shown(harm, given) == expected
    for mode in MODES:
        if expected is None:
            assert fits(mode, harm, given) is None
        elif harm != "harmful" and mode == "negative":
            assert fits(mode, harm, given) == (expected == "positive")
        else:
            assert fits(mode, harm, given) == (expected == mode)


# -- the token at the assistant's header -------------------------------------------------------------------------------

TOKENIZERS = {
    "chatml": chatml_tokenizer,
    "llama3": llama3_tokenizer,
    "qwen": qwen_tokenizer,
    "gemma": gemma_tokenizer,
    "nfkc": nfkc_tokenizer,
}
TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF), min_size=1, max_size=20)


def renderer(name: str) -> Renderer:
    tokenizer = TOKENIZERS[name](2)
    return Renderer(tokenizer, controls={"m": tokenizer.convert_tokens_to_ids("<|c0|>")})


RENDERERS = {name: renderer(name) for name in TOKENIZERS}


@pytest.mark.parametrize("name", RENDERERS)
@settings(max_examples=40, deadline=None)
@given(question=TEXT, answer=TEXT, more=st.booleans())
def test_header_controls_stand_where_the_answer_begins(name: str, question: str, answer: str, more: bool) -> None:
    render = RENDERERS[name]
    before = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello to you."}] if more else []
    asked = [*before, {"role": "user", "content": question}]
    try:
        plain = render.chat([*asked, {"role": "assistant", "content": answer}])
    except UserError:  # what a template refuses without controls it may refuse with them
        return
    told = render.chat([*asked, {"role": "assistant", "content": answer}], controls=["m"], controls_at="header")
    at = np.flatnonzero(told.span == SPAN_ID["control"])
    assert len(at) == 1 and told.ids[at[0]] == render.controls["m"] and not told.trained[at[0]]
    kept = np.delete(np.arange(len(told.ids)), at)
    for field in ("ids", "message", "role", "span", "trained"):
        assert np.array_equal(getattr(told, field)[kept], getattr(plain, field)), "nothing else changes"
    assert int(np.flatnonzero(told.trained)[0]) == at[0] + 1, "right before what is trained"
    prompt = render.chat(asked, controls=["m"], controls_at="header", generation_prompt=True, train="none")
    assert np.array_equal(prompt.ids, told.ids[: at[0] + 1]), "asked as it was trained"
    again = render.chat(asked, controls_at="header", generation_prompt=True, train="none")
    assert np.array_equal(again.ids, prompt.ids[:-1])


def test_header_controls_are_refused_where_they_cannot_stand() -> None:
    render, user = RENDERERS["chatml"], [{"role": "user", "content": "Hello."}]
    with pytest.raises(UserError, match="no assistant message"):
        render.chat(user, controls=["m"], controls_at="header")
    with pytest.raises(UserError, match="'footer' is not one of"):
        render.chat(user, controls=["m"], controls_at="footer", generation_prompt=True)  # type: ignore[arg-type]
    tokenizer = r1_tokenizer(2)
    thinking = Renderer(tokenizer, controls={"m": tokenizer.convert_tokens_to_ids("<|c0|>")})
    if thinking.thinking is not None and thinking.thinking.prompted:
        with pytest.raises(UserError, match="opens a reasoning block"):
            thinking.chat(user, controls=["m"], controls_at="header", generation_prompt=True)


# -- fallback conditions -----------------------------------------------------------------------------------------------


class FakeModel:
    """Embeddings in which token 20 is all but the token of mode ``negative``."""

    def __init__(self, rows: int, control: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.nn.Embedding(rows, 8)
        self.embedding.weight.data = torch.randn(rows, 8, generator=generator)
        self.embedding.weight.data[20] = self.embedding.weight.data[control] * 1.1

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.embedding


def test_conditions_of_reserved_tokens() -> None:
    tokenizer = chatml_tokenizer(6)
    names = ("mode:positive", "mode:negative", "mode:rejective", SPARE)
    controls = {name: tokenizer.convert_tokens_to_ids(f"<|c{i}|>") for i, name in enumerate(names)}
    render = Renderer(tokenizer, controls=controls)
    conditions = Conditions(
        config().switch(0), tokenizer, FakeModel(len(tokenizer), controls["mode:negative"]), controls
    )
    assert set(CONDITIONS) | {"none"} == RESERVED_NAMES
    row = Row(id="r", messages=({"role": "user", "content": "Hello."},))

    def ids(condition: str) -> list[int]:
        conditions.check(condition)
        told = conditions.told(row, condition)
        assert told.row.messages
        rendered = render.chat(told.row.messages, controls=told.controls, generation_prompt=True, train="none")
        return told.swapped(rendered.ids, controls).tolist()

    known = set(controls.values())
    assert known & set(ids("unknown")) == {controls[SPARE]}
    assert known & set(ids("two")) == {controls["mode:negative"], controls["mode:positive"]}
    assert not known & set(ids("near-miss")) and ids("near-miss").count(20) == 1
    assert not known & set(ids("foreign")), "another bundle's token is text here"
    assert FOREIGN in tokenizer.decode(ids("foreign"))


def test_conditions_of_strings_and_models_that_have_none() -> None:
    switch = config(token="string").switch(0)
    conditions = Conditions(switch, None, None, {})
    row = Row(id="r", messages=({"role": "user", "content": "Hello."},))

    def system(condition: str) -> str:
        conditions.check(condition)
        told = conditions.told(row, condition)
        assert told.row.messages and not told.controls
        return told.row.messages[0]["content"]

    near = system("near-miss")
    assert near[:-1] == switch.texts["negative"][:-1] and near not in switch.texts.values()
    assert system("two").split() == [switch.texts["negative"], switch.texts["positive"]]
    assert len(system("unknown")) == 8 and system("unknown") not in switch.texts.values()
    with pytest.raises(UserError, match="modes have tokens"):
        Conditions(Switch(), None, None, {}).check("two")
    with pytest.raises(UserError, match="modes have tokens"):
        Conditions(config(token="words", words=WORDS).switch(0), None, None, {}).check("foreign")
    with pytest.raises(UserError, match="spare:0"):
        Conditions(config().switch(0), None, None, {}).check("unknown")
