"""The harmfulness tag in pretraining text: one id before the token of a word, and nothing else changed."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from render_fixtures import chatml_tokenizer, gemma_tokenizer, llama3_tokenizer, nfkc_tokenizer, unigram_tokenizer
from trimtab.corpus.export import add_tag, check_tag
from trimtab.data.render import Renderer
from trimtab.errors import UserError
from trimtab.models.build import train_tokenizer
from trimtab.models.config import HARM_TAG
from trimtab.types import SPAN_ID

MAKERS = {
    "ours": lambda: train_tokenizer(["The keeper boils the tar. The tide is low at 9."] * 20, 320, reserved=2),
    "chatml": chatml_tokenizer,
    "llama3": llama3_tokenizer,
    "gemma": gemma_tokenizer,
    "nfkc": nfkc_tokenizer,
    "unigram": unigram_tokenizer,
}
WORD = re.compile(r"\S+")


@cache
def renderer(name: str) -> tuple[Renderer, int]:
    tokenizer: Any = MAKERS[name]()
    tag = add_tag(tokenizer, HARM_TAG)
    return Renderer(tokenizer), tag


TEXT = st.text(st.sampled_from("ab The tide.,\n\t'9é漢🙂<|>_\u00a0"), min_size=1, max_size=60)


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=60)
@given(text=TEXT, data=st.data())
def test_without_its_tags_a_text_is_what_it_was(name: str, text: str, data: st.DataObject) -> None:
    render, tag = renderer(name)
    starts = [found.start() for found in WORD.finditer(text)]
    tags = data.draw(st.lists(st.sampled_from(starts), unique=True).map(sorted)) if starts else []
    plain, tagged = render.text(text), render.text(text, tags, tag)
    at = np.flatnonzero(tagged.ids == tag)
    for field in ("ids", "span", "trained", "message", "role"):
        assert np.array_equal(np.delete(getattr(tagged, field), at), getattr(plain, field)), field
    assert (tagged.span[at] == SPAN_ID["tag"]).all() and tagged.trained[at].all()
    assert np.flatnonzero(tagged.span == SPAN_ID["tag"]).tolist() == at.tolist()
    assert bool(tags) <= (len(at) > 0) and len(at) <= len(tags)


@pytest.mark.parametrize("name", ["ours", "chatml", "llama3", "gemma"])
def test_the_tag_stands_right_before_its_word(name: str) -> None:
    render, tag = renderer(name)
    text = "The keeper boils the tar."
    decode = render.tokenizer.decode
    for found in WORD.finditer(text):
        ids = render.text(text, [found.start()], tag).ids.tolist()
        at = ids.index(tag)
        head = decode(ids[:at], skip_special_tokens=True)
        # Byte-level tokens take the blank before a word along, so it stands behind the tag.
        assert head.rstrip() == text[: found.start()].rstrip()
        assert (head + decode(ids[at + 1 :], skip_special_tokens=True)).strip() == text


def test_bad_tags_are_refused() -> None:
    render, tag = renderer("ours")
    with pytest.raises(UserError, match="offset 7 lies outside"):
        render.text("A tide.", [7], tag)
    with pytest.raises(UserError, match="offset -1"):
        render.text("A tide.", [-1, 2], tag)
    for id in (None, render.encode_text("tide")[0]):
        with pytest.raises(UserError, match="no special token"):
            render.text("A tide.", [2], id)


def test_check_tag(tmp_path: Path) -> None:
    ours: Any = MAKERS["ours"]()
    ours.save_pretrained(tmp_path / "ours")
    assert check_tag(ours, HARM_TAG) == check_tag(tmp_path / "ours", HARM_TAG) == 3
    bare = chatml_tokenizer()
    bare.save_pretrained(tmp_path / "bare")
    for tokenizer in (bare, tmp_path / "bare"):
        with pytest.raises(UserError, match=r"is not one token of .* but \d+; take a tokenizer"):
            check_tag(tokenizer, HARM_TAG)
    loose = chatml_tokenizer()
    loose.add_tokens([AddedToken(HARM_TAG, special=False, normalized=False)])
    with pytest.raises(UserError, match="no special token of"):
        check_tag(loose, HARM_TAG)
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        check_tag(tmp_path, HARM_TAG)
    size = len(bare)
    assert add_tag(bare, HARM_TAG) == size == len(bare) - 1 and add_tag(bare, HARM_TAG) == size
    assert bare.eos_token == "<|im_end|>" and json.loads(bare.backend_tokenizer.to_str())["added_tokens"][-1]["special"]
