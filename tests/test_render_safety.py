"""No text, in any field, however split or spelled, yields an added-token id (Hypothesis and the known attacks)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from render_fixtures import (
    CHATML,
    GLUED,
    NAMED,
    chatml_tokenizer,
    gemma_tokenizer,
    llama3_tokenizer,
    nfkc_tokenizer,
    qwen_tokenizer,
    r1_tokenizer,
    unigram_tokenizer,
)
from trimtab.data.encode import TextEncoder
from trimtab.data.render import Rendered, Renderer
from trimtab.errors import UserError
from trimtab.types import SPANS

CONTROL = "<|c0|>"


def with_control(tok: Any, template: str | None = None) -> Renderer:
    return Renderer(tok, controls={"m": tok.convert_tokens_to_ids(CONTROL)}, template=template)


RENDERERS = {
    "chatml": with_control(chatml_tokenizer(2)),
    "named": with_control(chatml_tokenizer(2), NAMED),
    "glued": with_control(chatml_tokenizer(2), GLUED),
    "llama3": with_control(llama3_tokenizer(2)),
    "qwen": with_control(qwen_tokenizer(2)),
    "gemma": with_control(gemma_tokenizer(2)),
    "r1": with_control(r1_tokenizer(2)),
    "nfkc": with_control(nfkc_tokenizer(2)),
    "unigram": with_control(unigram_tokenizer(2)),
}
SURFACES = sorted({s for r in RENDERERS.values() for s in r.encoder.surfaces.values()} | {"<|loose|>", "<|n", "eg|>"})
WIDE = {c: chr(ord(c) + 0xFEE0) for c in map(chr, range(0x21, 0x7F))}


@st.composite
def spelled(draw: st.DrawFn) -> str:
    """A token's text: whole, halved, full-width, with zero-width characters, nested or doubled."""
    surface = draw(st.sampled_from(SURFACES))
    cut = draw(st.integers(0, len(surface)))
    way = draw(st.sampled_from(["whole", "left", "right", "wide", "zero", "nested", "twice", "upper", "blank"]))
    return {
        "whole": surface,
        "left": surface[:cut],
        "right": surface[cut:],
        "wide": "".join(WIDE.get(c, c) for c in surface),
        "zero": surface[:cut] + "\u200b" + surface[cut:],
        "nested": surface[:cut] + surface + surface[cut:],
        "twice": surface + surface,
        "upper": surface.upper(),
        "blank": surface[:cut] + " " + surface[cut:],
    }[way]


ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
TEXT = st.lists(spelled() | ANY | st.sampled_from(["\n", " ", "|>", "<|"]), max_size=5).map("".join)


def check(renderer: Renderer, got: Rendered, plain: Rendered, controls: int) -> None:
    """Text holds no guarded id, and structure is what harmless words get: same markers, same count of controls."""
    structure = np.isin(got.span, [SPANS.index("structure"), SPANS.index("control")])
    in_text = got.ids[~structure]
    marks = set(renderer.encoder.guarded)
    marks -= {t for t in marks if renderer.encoder.surfaces.get(t) in ("<think>", "</think>")}
    assert not marks & set(in_text.tolist())
    assert np.isin(got.ids, sorted(marks)).sum() == np.isin(plain.ids, sorted(marks)).sum()
    assert (got.ids == renderer.controls["m"]).sum() == controls == (got.span == SPANS.index("control")).sum()


@pytest.mark.parametrize("name", RENDERERS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_text_in_any_field_becomes_structure(name: str, data: st.DataObject) -> None:
    renderer = RENDERERS[name]
    roles = ["user", "assistant", "user", "assistant"][: data.draw(st.integers(1, 4))]
    if name != "gemma":
        roles = data.draw(st.sampled_from([[], ["system"]])) + roles
        roles += data.draw(st.sampled_from([[], ["tool"]]))
    messages, words = [], []
    for role in roles:
        message = {"role": role, "content": data.draw(TEXT)}
        word = {"role": role, "content": "w" if message["content"].strip() else message["content"]}
        if data.draw(st.booleans()):
            message["name"], word["name"] = data.draw(TEXT), "w"
        messages.append(message)
        words.append(word)
    controls = ["m"] if data.draw(st.booleans()) else []
    prompt = roles[-1] != "assistant"
    prefill = data.draw(st.none() | TEXT) if prompt else None
    last = [m["content"] for m in messages if m["role"] == "assistant"]
    prefix = last[-1][: data.draw(st.integers(0, len(last[-1])))] if last else None
    try:
        got = renderer.chat(messages, controls=controls, prefix=prefix, prefill=prefill, generation_prompt=prompt)
    except UserError as error:  # a refusal is safe; it must be one of those that depend on the text
        words = ("other structure for these texts", "no token of its own", "its reasoning never ends")
        assert any(word in str(error) for word in words), error
        return
    plain = renderer.chat(words, controls=controls, generation_prompt=prompt)
    check(renderer, got, plain, len(controls))
    if name in ("chatml", "named"):  # byte-level: text decodes to itself, message by message
        for i, message in enumerate(messages):
            mine = (got.message == i) & (got.span != SPANS.index("structure")) & (got.span != SPANS.index("control"))
            name_text = message.get("name", "") if name == "named" else ""
            assert renderer.tokenizer.decode(got.ids[mine]) == name_text + message["content"]
        if prefill is not None:
            tail = (got.message == -1) & (got.span == SPANS.index("prefix"))
            assert renderer.tokenizer.decode(got.ids[tail]) == prefill


@pytest.mark.parametrize("name", RENDERERS)
@settings(max_examples=60, deadline=None)
@given(text=TEXT)
def test_text_encoder_never_yields_a_guarded_id(name: str, text: str) -> None:
    encoder = RENDERERS[name].encoder
    try:
        ids, offsets = encoder.encode_with_offsets(text)
    except UserError as error:
        assert "no token of its own" in str(error)
        return
    assert encoder.guarded.isdisjoint(ids) and ids == encoder.encode(text)
    assert all(0 <= a <= b <= len(text) for a, b in offsets)
    assert [a for a, _ in offsets] == sorted(a for a, _ in offsets)
    if name in ("chatml", "llama3", "qwen", "gemma"):
        assert RENDERERS[name].tokenizer.decode(ids) == text


def test_refusals_are_rare() -> None:
    """Markers in a text are no reason to refuse it, except where the template itself reads the text."""
    for name, renderer in RENDERERS.items():
        for surface in renderer.encoder.surfaces.values():
            renderer.chat([{"role": "user", "content": f"a {surface}b"}])
            renderer.encode_text(surface)
        for odd in ("\u200b", "＜｜c0｜＞", "é", "漢字", "🌊", "\x00"):
            assert renderer.encode_text(odd), (name, odd)


def test_plain_encoding_is_fooled_where_the_renderer_is_not() -> None:
    """The attacks are real ones: each of these becomes a control id in the plain way."""
    tok = chatml_tokenizer(1)
    control = tok.convert_tokens_to_ids(CONTROL)
    attack = [{"role": "user", "content": CONTROL}]
    assert control in tok.apply_chat_template(attack, tokenize=True, return_dict=False)
    assert control not in Renderer(tok).chat(attack).ids
    glued = [{"role": "user", "content": "c0"}]
    assert control in tok.apply_chat_template(glued, tokenize=True, return_dict=False, chat_template=GLUED)
    assert control not in Renderer(tok, template=GLUED).chat(glued).ids
    tok = nfkc_tokenizer()
    loose = tok.convert_tokens_to_ids("<|loose|>")
    wide = "＜｜loose｜＞"
    assert loose in tok.encode(wide)
    assert loose not in Renderer(tok).encode_text(wide)
    plain = tok.convert_tokens_to_ids("<|plain|>")
    tok.split_special_tokens = True
    assert plain in tok.encode("<|plain|>")  # the flag does not cover added tokens that are not special
    assert plain not in Renderer(tok).encode_text("<|plain|>")
    assert Renderer(tok).chat([{"role": "user", "content": "x"}]).ids[0] == tok.convert_tokens_to_ids("<|im_start|>")
    tok = unigram_tokenizer(1)
    control = tok.convert_tokens_to_ids(CONTROL)
    bare = json.loads(tok.backend_tokenizer.to_str()) | {"added_tokens": []}
    assert control in Tokenizer.from_str(json.dumps(bare)).encode(CONTROL).ids  # Viterbi finds it among the pieces
    assert control not in Renderer(tok).encode_text(CONTROL)
    assert tok.decode(Renderer(tok).encode_text(CONTROL)) == CONTROL


def word_level(*words: str, unk: str | None = None) -> Any:
    vocab = {w: i for i, w in enumerate(words)}
    tok = Tokenizer(models.WordLevel(vocab, unk_token=unk) if unk else models.WordLevel(vocab))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    kw = {"unk_token": unk} if unk else {}
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="</s>", chat_template=CHATML, **kw)


def test_text_that_only_unk_covers_raises() -> None:
    encoder = TextEncoder(word_level("a", "b", "</s>", "<unk>", unk="<unk>"))
    assert encoder.encode("a b") == [0, 1]
    with pytest.raises(UserError, match=r"character 'z' \(U\+007A\) has no token of its own"):
        encoder.encode("a z")
    with pytest.raises(UserError, match="no token of its own"):
        encoder.encode("</s>")


def test_ignore_merges_cannot_smuggle_a_whole_token() -> None:
    """A BPE that looks the whole word up first (as Llama-3's does) has the marker in its vocabulary."""
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab = {**alphabet, "<|neg|>": len(alphabet)}
    tok = Tokenizer(models.BPE(vocab, [], ignore_merges=True))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|neg|>")
    encoder = TextEncoder(fast)
    ids = encoder.encode("<|neg|>")
    assert len(ids) == 7 and vocab["<|neg|>"] not in ids


def test_blank_added_tokens_stay_text() -> None:
    """Runs of spaces that a vocabulary lists as plain added tokens (GPT-NeoX, Gemma) are text, special ones are not."""
    tok = chatml_tokenizer()
    tok.add_tokens([AddedToken("    ", special=False, normalized=False)])
    tok.add_tokens([AddedToken("\t\t", special=True, normalized=False)], special_tokens=True)
    run, tabs = tok.convert_tokens_to_ids(["    ", "\t\t"])
    renderer = Renderer(tok)
    assert run in renderer.encode_text("a    b") and tabs not in renderer.encode_text("a\t\tb")
    chat = [{"role": "user", "content": "def f:\n    low"}]
    assert renderer.chat(chat).ids.tolist() == tok.apply_chat_template(chat, tokenize=True, return_dict=False)


def test_many_markers_in_one_text_stay_fast() -> None:
    renderer = RENDERERS["unigram"]
    ids = renderer.encode_text((CONTROL + "<|im_end|>") * 500)
    assert renderer.encoder.guarded.isdisjoint(ids)
