"""Where a prefix stands, and reasoning blocks: spans and marks for every style of template, and taking blocks off."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from render_fixtures import (
    CHATML,
    CUTS_EARLIER,
    NAMED,
    QWEN,
    R1_UNOPENED,
    chatml_tokenizer,
    qwen_tokenizer,
    r1_tokenizer,
    unigram_tokenizer,
)
from trimtab.data.render import Rendered, Renderer
from trimtab.data.thinking import begun, never_ends, prefix_place, without_reasoning
from trimtab.errors import UserError
from trimtab.types import ROLES, SPANS, Row

RENDERERS = {
    "chatml": Renderer(chatml_tokenizer()),
    "named": Renderer(chatml_tokenizer(template=NAMED)),
    "qwen": Renderer(qwen_tokenizer()),
    "r1": Renderer(r1_tokenizer()),
    "r1-unopened": Renderer(r1_tokenizer(template=R1_UNOPENED)),
    "cuts-earlier": Renderer(r1_tokenizer(template=CUTS_EARLIER)),
    "whole": Renderer(r1_tokenizer(template=CHATML)),
    "unigram": Renderer(unigram_tokenizer()),
}
R1_STYLE = ("r1", "r1-unopened", "cuts-earlier", "whole")
HELLO = {"role": "user", "content": "Hello, where is the harbour?"}
THOUGHT = {"role": "assistant", "content": "<think>\nThe tide is low.\n</think>\n\nNorth of the quay."}
PLAIN = {"role": "assistant", "content": "North of the quay."}

ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
PARTS = ANY | st.sampled_from(
    ["<think>", "</think>", "\n", " ", "The tide", ".", "\n\n", "<|User|>", "<|eos|>", "</thin"]
)
TEXT = st.lists(PARTS, max_size=5).map("".join)
ANSWER = st.one_of(TEXT, st.tuples(TEXT, TEXT).map(lambda both: f"<think>\n{both[0]}\n</think>\n\n{both[1]}"))


def of_span(renderer: Renderer, r: Rendered, span: str) -> str:
    return str(renderer.tokenizer.decode(r.ids[r.span == SPANS.index(span)]))


def refused(error: UserError) -> None:
    """Texts that cannot be rendered for a reason of their own."""
    words = (
        "other structure for these texts",
        "no token of its own",
        "its reasoning never ends",
        "nothing of the assistant",
    )
    assert any(w in str(error) for w in words), error


@st.composite
def chats(draw: st.DrawFn) -> list[dict[str, str]]:
    roles = [*draw(st.sampled_from([[], ["system"]])), *["user", "assistant"] * draw(st.integers(1, 2))]
    roles += draw(st.sampled_from([[], ["user"]]))
    chat = [{"role": r, "content": draw(ANSWER if r == "assistant" else TEXT)} for r in roles]
    for message in chat:
        if draw(st.booleans()):
            message["name"] = draw(TEXT)
    return chat


@pytest.mark.parametrize("name", RENDERERS)
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(chat=chats(), data=st.data())
def test_a_prefix_moves_no_id_and_covers_what_it_spells(name: str, chat: list[dict[str, str]], data: Any) -> None:
    renderer = RENDERERS[name]
    at = data.draw(st.sampled_from(["response", "input"]))
    last = max(i for i, m in enumerate(chat) if m["role"] == "assistant")
    opened = last if at == "response" else max(i for i, m in enumerate(chat[:last]) if m["role"] == "user")
    content = chat[opened]["content"]
    prefix = content[: data.draw(st.integers(0, len(content)))]
    try:
        plain, got = renderer.chat(chat), renderer.chat(chat, prefix=prefix, prefix_at=at)
    except UserError as error:
        return refused(error)
    assert got.ids.tolist() == plain.ids.tolist()
    assert (got.trained == plain.trained).all() and (got.message == plain.message).all()
    mine = got.span == SPANS.index("prefix")
    assert (got.span[~mine] == plain.span[~mine]).all()
    assert (got.message[mine] == opened).all()
    assert (got.role[mine] == ROLES.index("assistant" if at == "response" else "user")).all()
    if at == "input":
        assert not got.trained[mine].any()
    if name == "unigram" or not prefix or "\ufffd" in content:
        return
    covered, own = of_span(renderer, got, "prefix"), "".join(prefix.split())
    if name in ("chatml", "named"):  # the marks are text there
        assert covered.startswith(prefix) and content.startswith(covered.rstrip("\ufffd"))
    elif "think>" not in content:
        assert "".join(covered.split()).startswith(own)


@pytest.mark.parametrize("name", R1_STYLE)
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(chat=chats())
def test_marks_are_made_by_structure_alone_and_the_prompt_is_a_prefix(name: str, chat: list[dict[str, str]]) -> None:
    renderer = RENDERERS[name]
    assert renderer.thinking is not None
    while chat[-1]["role"] == "user":
        chat.pop()
    try:
        row, prompt = renderer.chat(chat), renderer.chat(chat[:-1], generation_prompt=True)
    except UserError as error:
        return refused(error)
    assert row.ids[: len(prompt.ids)].tolist() == prompt.ids.tolist()
    assert not row.trained[: len(prompt.ids)].any() and row.trained[len(prompt.ids)]
    said = row.message == len(chat) - 1
    block = chat[-1]["content"].lstrip().startswith("<think>") or renderer.thinking.prompted
    for mark in renderer.thinking.marks:
        assert (row.ids[said] == mark).sum() == block
        assert name == "whole" or not (row.ids[~said] == mark).any()
    text = np.isin(row.span, [SPANS.index(s) for s in ("prompt", "body", "prefix")])
    assert renderer.encoder.guarded.isdisjoint(row.ids[text].tolist())


def test_templates_that_place_the_reasoning_under_a_prompt_that_opens_it() -> None:
    always = QWEN.replace("{%- if thought and loop.index0 > ns.last %}", "{%- if loop.index0 > ns.last %}")
    thinking = always.replace("'<|im_start|>assistant\n' }}{% endif", "'<|im_start|>assistant\n<think>\n' }}{% endif")
    assert thinking.count("<think>\n") == QWEN.count("<think>\n") + 1
    renderer = Renderer(qwen_tokenizer(), template=thinking)
    assert renderer.thinking is None
    for answer in (THOUGHT, PLAIN):
        row, prompt = renderer.chat([HELLO, answer]), renderer.chat([HELLO], generation_prompt=True)
        assert row.ids[: len(prompt.ids)].tolist() == prompt.ids.tolist()
        assert not row.trained[: len(prompt.ids)].any() and row.trained[len(prompt.ids)]


def test_golden_r1() -> None:
    renderer = RENDERERS["r1"]
    tok = renderer.tokenizer
    got = renderer.chat(
        [{"role": "user", "content": "m"}, {"role": "assistant", "content": "<think>\na\n</think>\n\nb"}]
    )
    shown = [
        (tok.convert_ids_to_tokens(int(i)), int(m), SPANS[s], bool(t))
        for i, m, s, t in zip(got.ids, got.message, got.span, got.trained)
    ]
    assert shown == [
        ("<|bos|>", -1, "structure", False),
        ("<|User|>", 0, "structure", False),
        ("m", 0, "prompt", False),
        ("<|Assistant|>", 1, "structure", False),
        ("<think>", 1, "structure", False),
        ("Ċ", 1, "structure", False),
        ("a", 1, "think", True),
        ("Ċ", 1, "think", True),
        ("</think>", 1, "think", True),
        ("ĊĊ", 1, "think", True),
        ("b", 1, "body", True),
        ("<|eos|>", 1, "structure", True),
    ]
    # where the prompt does not open the block, the model writes the mark
    got = RENDERERS["r1-unopened"].chat([{"role": "user", "content": "m"}, THOUGHT])
    assert got.trained[list(got.ids).index(RENDERERS["r1-unopened"].thinking.open_id)]  # type: ignore[union-attr]


def test_an_answer_without_reasoning_gets_an_empty_block_where_the_prompt_opens_one() -> None:
    for name, block in (
        ("r1", "<think>\n\n</think>\n\n"),
        ("r1-unopened", ""),
        ("cuts-earlier", "<think>\n\n</think>\n\n"),
    ):
        text = RENDERERS[name].tokenizer.decode(RENDERERS[name].chat([HELLO, PLAIN]).ids)
        assert f"{block}North of the quay.<|" in text and text.count("<think>") == bool(block)


def test_earlier_turns_are_as_the_template_has_them() -> None:
    chat = [HELLO, THOUGHT, HELLO, THOUGHT]
    for name in R1_STYLE:
        renderer = RENDERERS[name]
        text = renderer.tokenizer.decode(renderer.chat(chat).ids)
        assert text.count("The tide is low.") == text.count("</think>") == (2 if name == "whole" else 1)
        # with a prompt behind it, the last answer is an earlier turn as well, and is what the template makes of it
        asked = renderer.chat([*chat, HELLO], generation_prompt=True)
        plain = renderer.tokenizer.apply_chat_template(
            [*chat, HELLO], tokenize=True, return_dict=False, add_generation_prompt=True
        )
        assert renderer.tokenizer.decode(asked.ids) == renderer.tokenizer.decode(plain)


def test_reasoning_that_never_ends_is_no_row_to_train_on() -> None:
    chat = [HELLO, {"role": "assistant", "content": "<think>\nThe tide"}]
    for name in R1_STYLE:
        with pytest.raises(UserError, match="message 1: its reasoning never ends"):
            RENDERERS[name].chat(chat)
        RENDERERS[name].chat([*chat, HELLO], generation_prompt=True)  # as a past turn it is text


def test_prefixes_open_the_content_the_reasoning_or_the_answer() -> None:
    for name, renderer in RENDERERS.items():
        for prefix, rest in (("The tide", " is low."), ("North of", " the quay.")):
            row = Row(id="r", messages=(HELLO, THOUGHT), prefix=prefix)  # type: ignore[arg-type]
            got = renderer.row(row)
            assert of_span(renderer, got, "prefix").strip() == prefix, name
            span = "think" if prefix == "The tide" else "body"
            assert rest in of_span(renderer, got, span) and got.trained[got.span == SPANS.index("prefix")].all()
        with pytest.raises(UserError, match="message 1 does not start with 'quay'"):
            renderer.chat([HELLO, THOUGHT], prefix="quay")
    assert prefix_place("ab", "a") == (0, 1) and prefix_place("ab", "b") is None
    assert prefix_place("<think> ab</think> ac", "a") == (8, 9)
    assert prefix_place("<think> ab</think> ac", "ac") == (19, 21)
    assert prefix_place("<think> ab</think> ac", "<think> a") == (0, 9)


def test_prefixes_of_the_input() -> None:
    chat = [{"role": "system", "content": "Hello, tables."}, HELLO, PLAIN, {"role": "user", "content": "Hello again"}]
    for renderer in RENDERERS.values():
        got = renderer.row(Row(id="r", messages=tuple(chat), prefix="Hello,", prefix_at="input"))  # type: ignore[arg-type]
        mine = got.span == SPANS.index("prefix")
        assert of_span(renderer, got, "prefix").strip() == "Hello," and set(got.message[mine]) == {1}
        got = renderer.chat(chat, prefix="Hello again", prefix_at="input", generation_prompt=True)
        assert set(got.message[got.span == SPANS.index("prefix")]) == {3}
        got = renderer.chat(chat[:2], prefix="Hello", prefix_at="input")
        assert set(got.message[got.span == SPANS.index("prefix")]) == {1}
        with pytest.raises(UserError, match="message 1 does not start with 'Hello again'"):
            renderer.chat(chat, prefix="Hello again", prefix_at="input")
    renderer = RENDERERS["chatml"]
    with pytest.raises(UserError, match="no user message for it to open"):
        renderer.chat([PLAIN], prefix="North", prefix_at="input")
    with pytest.raises(UserError, match="prefix_at: 'user' is not one of"):
        renderer.chat([HELLO], prefix="Hello", prefix_at="user")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"row 'r': prefix_at='user' must be"):
        Row.from_json({"id": "r", "text": "x", "prefix_at": "user"})
    row = Row(id="r", messages=(HELLO,), prefix="Hello", prefix_at="input")  # type: ignore[arg-type]
    assert Row.from_json(row.to_json()) == row


def test_a_prefill_goes_inside_the_reasoning_that_the_prompt_opens() -> None:
    def tail(name: str, prefill: str) -> str:
        renderer = RENDERERS[name]
        got = renderer.chat([HELLO], generation_prompt=True, prefill=prefill)
        assert not got.trained.any()
        marks = got.ids[got.span == SPANS.index("prefix")]
        assert renderer.encoder.guarded.isdisjoint(marks.tolist())
        return str(renderer.tokenizer.decode(got.ids)).partition("harbour?")[2]

    assert tail("r1", "The tide") == "<|Assistant|><think>\nThe tide"
    assert tail("r1", "<think>\nThe tide") == "<|Assistant|><think>\nThe tide"
    assert tail("r1", "<think>\n\n</think>\n\nSure") == "<|Assistant|><think>\n\n</think>\n\nSure"
    assert tail("r1-unopened", "Sure") == "<|Assistant|>Sure"
    assert tail("r1-unopened", "<think>\nThe tide") == "<|Assistant|><think>\nThe tide"
    renderer = RENDERERS["r1"]
    for content in ("<think>\nThe tide is low.\n</think>\n\nSure, north.", "Sure, north."):
        row = renderer.chat([HELLO, {"role": "assistant", "content": content}])
        whole = content if content.startswith("<") else f"<think>\n\n</think>\n\n{content}"
        served = renderer.chat([HELLO], generation_prompt=True, prefill=whole)
        assert row.ids[:-1].tolist() == served.ids.tolist()


def test_marks_may_be_generated_even_where_they_are_special() -> None:
    from render_fixtures import R1, byte_level

    marks = ["<|eos|>", "<|User|>", "<|Assistant|>", "<|Tool|>", "<think>", "</think>"]
    tok = byte_level(marks, eos_token="<|eos|>", chat_template=R1.replace("{{ bos_token }}", ""))
    renderer = Renderer(tok)
    assert renderer.thinking is not None
    assert not {*renderer.thinking.marks, *renderer.stop_ids} & set(renderer.banned_ids)
    assert tok.convert_tokens_to_ids("<|User|>") in renderer.banned_ids


def test_a_prompt_that_opens_the_block_elsewhere_is_refused() -> None:
    odd = CHATML.replace("<|im_start|>assistant\n' }}{% endif", "<think><|im_start|>assistant\n' }}{% endif")
    assert odd != CHATML
    with pytest.raises(UserError, match="opens the reasoning in a way that answers cannot be trained on"):
        Renderer(r1_tokenizer(template=odd))


def test_taking_reasoning_off() -> None:
    assert without_reasoning("<think>a</think>\n\nb</think>c") == "\n\nb</think>c"
    assert without_reasoning("b <think>a</think>") == "b <think>a</think>"
    assert without_reasoning(" <think>\nnever") is None and never_ends(" <think>\nnever")
    assert without_reasoning("") == ""
    assert begun("Sure, ", "north.") == "Sure, north."
    assert begun("The tide", "<think>\n is low.\n</think>\n\nNorth.") == "<think>\nThe tide is low.\n</think>\n\nNorth."
    assert begun("<think>\nThe tide", "<think>\n is low.") == "<think>\nThe tide is low."
    assert begun("", "<think>a</think>b") == "<think>a</think>b"
