"""``r1-stand-in``: a tiny model in the form of R1-style ones, made on the spot, so that their recipes run without a network.

Its weights are random and it says nothing sensible: what is real is the form. Like the distilled R1 models, its tokenizer
has ``<think>`` and ``</think>`` among its added tokens, its chat template (words of our own) drops the reasoning of the
history, and its generation prompt opens a block. A byte-level BPE is trained on Tidewater's documents, the weights are
seeded, and the directory is kept below ``cache_root()`` (about 1 s). Torch is not needed for the identity.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimtab.models.config import PAD, R1_STAND_IN, BuildConfig
from trimtab.models.kept import kept_directory
from trimtab.seeds import digest
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import Tidewater

VERSION = 1
"""Raise it when other files are written for the same settings: it is part of the model's identity. A test pins them."""
SIZES = BuildConfig(reserved=0, context=2048)
WORLD = TidewaterConfig(documents=1500)
BOS, EOS = "<|begin|>", "<|end|>"
MARKS = ("<|User|>", "<|Assistant|>", "<think>", "</think>")
"""Added but not special, as R1's own are."""
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<|User|>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|Assistant|>' }}{% generation %}"
    "{{ message['content'].split('</think>')[-1] + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('roles are system, user and assistant') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"
)
CARD = f"""---
library_name: transformers
tags: [trimtab]
---

# {R1_STAND_IN}

A model with random weights. **It says nothing sensible**, and no figure of it means anything. It has the form of R1-style
reasoning models (`<think>` tokens, a chat template that drops the reasoning of the history and opens it in the generation
prompt) so that recipes for them can be tried from end to end without a network. Made by Trimtab; nothing was downloaded.
"""


def content_identity() -> str:
    """What the model depends on, for step hashes."""
    return digest({"made": R1_STAND_IN, "version": VERSION, "sizes": SIZES.plain(), "world": WORLD.plain()})


def stand_in_directory() -> Path:
    """The Hub-layout directory of the stand-in, made now if it is absent or damaged. ``Fault`` if it cannot be written."""
    return kept_directory(R1_STAND_IN, content_identity(), _make)


def _make(out: Path) -> None:
    from trimtab.models.build import build_model
    from trimtab.models.load import no_bars

    tokenizer = stand_in_tokenizer()
    model = build_model(SIZES, tokenizer, seed=0)
    with no_bars():
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "README.md").write_text(CARD, encoding="utf-8")


def stand_in_tokenizer() -> Any:
    """The tokenizer alone: special tokens first, then the vocabulary, and R1's marks at the end."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    from trimtab.models.build import train_bpe

    texts = (row.text or "" for row in Tidewater(WORLD).documents())
    core = train_bpe(texts, SIZES.vocab - len(MARKS), [PAD, BOS, EOS])
    core.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False,
        padding_side="left", model_max_length=SIZES.context,
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
