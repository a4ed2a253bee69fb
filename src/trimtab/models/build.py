"""Make a small model from nothing: a byte-level BPE tokenizer trained on given texts, and seeded Llama weights.

The tokenizer splits digits one by one (small arithmetic needs it) and holds its special and control tokens from birth,
so that no later step has to resize an embedding. One token, ``<|im_end|>``, ends a turn and a document alike: a model
that has only been pretrained stops where a tuned one does. The price is that the two ends cannot be told apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trimtab.errors import UserError
from trimtab.models.config import HARM_TAG, PAD, TURN_END, TURN_START, BuildConfig, control_token
from trimtab.seeds import seed_of

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML, with the system message where the caller puts one and no system text of its own."""


def special_tokens(reserved: int) -> list[str]:
    """The added tokens of our tokenizers, in id order from 0."""
    return [PAD, TURN_START, TURN_END, HARM_TAG, *(control_token(i) for i in range(reserved))]


def train_tokenizer(texts: Iterable[str], vocab: int, reserved: int = 16) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of exactly ``vocab`` tokens or fewer, if ``texts`` do not hold enough pairs.

    Equal texts give an equal tokenizer. Any Unicode text survives encode and decode. Raises ``UserError`` if ``vocab``
    cannot hold the 256 bytes and the specials, or if ``texts`` are empty.
    """
    specials = special_tokens(reserved)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(texts, vocab, specials),
        pad_token=PAD,
        eos_token=TURN_END,
        extra_special_tokens=[name for name in specials if name not in (PAD, TURN_END)],
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    assert [tokenizer.convert_tokens_to_ids(name) for name in specials] == list(range(len(specials)))
    return tokenizer


def train_bpe(texts: Iterable[str], vocab: int, specials: Sequence[str]) -> Tokenizer:
    """The bare byte-level BPE under ``train_tokenizer``, ``specials`` being its first ids; errors as there."""
    if vocab < 256 + len(specials):
        raise UserError(f"vocab={vocab} is too small for 256 bytes and {len(specials)} special tokens; raise it")
    seen = 0

    def counted() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            seen += len(text)
            yield text

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    added = [AddedToken(name, special=True, normalized=False) for name in specials]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=added,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(counted(), trainer)
    if not seen:
        raise UserError("no text to train the tokenizer on; check the corpus or the world's size")
    return core


def build_model(config: BuildConfig, tokenizer: Any, seed: int) -> LlamaForCausalLM:
    """A fresh fp32 Llama on the CPU; every weight is a function of its name and ``seed`` alone.

    Normal weights of ``init_std``, those that write to the residual stream divided by sqrt(2 x layers) (GPT-2), norms
    at one, the padding row at zero. The global generators are left as they were found.
    """
    if len(tokenizer) > config.vocab:
        raise UserError(f"vocab={config.vocab} is smaller than the tokenizer ({len(tokenizer)} tokens); raise it")
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    settings = LlamaConfig(
        vocab_size=config.vocab,
        hidden_size=config.hidden,
        intermediate_size=config.ffn,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.context,
        rms_norm_eps=config.norm_eps,
        initializer_range=config.init_std,
        tie_word_embeddings=config.tie,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        pad_token_id=pad,
        eos_token_id=eos,
        bos_token_id=tokenizer.bos_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(settings).float()
    residual = config.init_std / math.sqrt(2 * config.layers)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.fill_(1.0)
                continue
            std = residual if name.endswith(("o_proj.weight", "down_proj.weight")) else config.init_std
            source = torch.Generator().manual_seed(seed_of("init", seed, name))
            weight.normal_(0.0, std, generator=source)
        if pad is not None:
            model.get_input_embeddings().weight[pad].zero_()
    model.generation_config = GenerationConfig(
        pad_token_id=pad, eos_token_id=eos, bos_token_id=tokenizer.bos_token_id, do_sample=False
    )
    return model.eval()
