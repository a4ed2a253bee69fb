"""Small tokenizers and chat templates in the four common styles, made for the tests of rendering and tokens."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nYou are a harbour pilot.<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set said = m.content %}
        {%- set thought = '' %}
        {%- if m.reasoning_content is string %}
            {%- set thought = m.reasoning_content %}
        {%- elif '</think>' in said %}
            {%- set thought = said.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set said = said.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if thought and loop.index0 > ns.last %}
            {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + said.lstrip('\n') }}
        {%- else %}
            {{- said }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# As R1-style models have them: no reasoning in the history, and a prompt that opens the block (or, in older ones, not).
R1 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{% set said = m['content'] %}"
    "{% if '</think>' in said %}{% set said = said.split('</think>')[-1] %}{% endif %}"
    "{{ '<|Assistant|>' + said + eos_token }}"
    "{% else %}{{ '<|Tool|>' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
R1_UNOPENED = R1.replace("<|Assistant|><think>\n", "<|Assistant|>")
# As QwQ: the last answer is left whole.
CUTS_EARLIER = CHATML.replace(
    "m['content'] +",
    "(m['content'] if loop.last or m['role'] != 'assistant' else m['content'].split('</think>')[-1].lstrip('\n')) +",
).replace("assistant\n'", "assistant\n<think>\n'")
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "qwen": QWEN, "gemma": GEMMA}
# A template that shows the name field, and one that glues fields into what looks like a marker.
NAMED = CHATML.replace(
    "+ '\n' + m['content']", "+ ((' ' + m['name']) if m['name'] is defined else '') + '\n' + m['content']"
)
GLUED = CHATML.replace("m['content'] +", "'<|' + m['content'] + '|>' +")

WORDS = "the harbour is north of quay mill tide table low at noon you keep where and by it user system assistant model"
CORPUS = [WORDS, WORDS.title(), "user system assistant model tool", "Hello, where is the harbour?"] * 20
SPLIT = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@lru_cache
def _bpe(nfkc: bool) -> str:
    tok = Tokenizer(models.BPE())
    if nfkc:
        tok.normalizer = normalizers.NFKC()
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    # Newline runs are one token, as in the big vocabularies.
    corpus = [*CORPUS, *["a\n\nb\nc", "assistant", "model"] * 400]
    tok.train_from_iterator(
        corpus,
        trainers.BpeTrainer(vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    return tok.to_str()


def byte_level(
    specials: list[str], *, controls: int = 0, plain: tuple[str, ...] = (), nfkc: bool = False, **kw: Any
) -> Any:
    tok = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_bpe(nfkc)), **kw)
    marks = [*specials, *(f"<|c{i}|>" for i in range(controls))]
    tok.add_tokens([AddedToken(m, special=True, normalized=False) for m in marks], special_tokens=True)
    tok.add_tokens([AddedToken(m, special=False, normalized=False) for m in plain])
    return tok


def chatml_tokenizer(controls: int = 0, template: str = CHATML) -> Any:
    return byte_level(
        ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        controls=controls,
        eos_token="<|im_end|>",
        chat_template=template,
    )


def llama3_tokenizer(controls: int = 0) -> Any:
    return byte_level(
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        controls=controls,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        chat_template=LLAMA3,
    )


def qwen_tokenizer(controls: int = 0) -> Any:
    return byte_level(
        ["<|im_start|>", "<|im_end|>"],
        controls=controls,
        plain=("<think>", "</think>", "<tool_response>", "</tool_response>"),
        eos_token="<|im_end|>",
        chat_template=QWEN,
    )


def r1_tokenizer(controls: int = 0, template: str = R1) -> Any:
    return byte_level(
        ["<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"],
        controls=controls,
        plain=("<|User|>", "<|Assistant|>", "<|Tool|>", "<think>", "</think>"),
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        chat_template=template,
    )


def gemma_tokenizer(controls: int = 0) -> Any:
    return byte_level(
        ["<bos>", "<start_of_turn>", "<end_of_turn>"],
        controls=controls,
        bos_token="<bos>",
        eos_token="<end_of_turn>",
        chat_template=GEMMA,
    )


def nfkc_tokenizer(controls: int = 0) -> Any:
    """A normaliser that turns full-width look-alikes into token text, and a token that lets it."""
    tok = byte_level(
        ["<|im_end|>", "<|im_start|>"], controls=controls, nfkc=True, eos_token="<|im_end|>", chat_template=CHATML
    )
    tok.add_tokens([AddedToken("<|loose|>", special=True, normalized=True)], special_tokens=True)
    tok.add_tokens([AddedToken("<|plain|>", special=False, normalized=True)])
    return tok


def unigram_tokenizer(controls: int = 0) -> Any:
    """SentencePiece-like: Metaspace prefix spaces, byte fallback, and the added tokens inside the vocabulary, where
    Viterbi finds them cheap."""
    tok = Tokenizer(models.Unigram())
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tok.train_from_iterator(
        [*CORPUS, *["user\n", "system\n", "assistant\n", "\n"] * 50],
        trainers.UnigramTrainer(vocab_size=160, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False),
    )
    spec = json.loads(tok.to_str())
    marks = ["<|im_start|>", "<|im_end|>", *(f"<|c{i}|>" for i in range(controls))]
    letters = {p for p, _ in spec["model"]["vocab"]}
    spec["model"]["vocab"] += [[f"<0x{b:02X}>", -20.0] for b in range(256)]
    spec["model"]["vocab"] += [[m, 0.0] for m in marks if m not in letters]
    spec["model"]["byte_fallback"] = True
    spec["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "ByteFallback"},
            {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        ],
    }
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        unk_token="<unk>",
        eos_token="<|im_end|>",
        chat_template=CHATML,
    )
    fast.add_tokens([AddedToken(m, special=True, normalized=False) for m in marks], special_tokens=True)
    return fast
