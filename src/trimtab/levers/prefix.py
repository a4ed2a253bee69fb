"""The prefix lever: how training responses open (arXiv 2601.01624).

A share ``ratio`` of the training rows gets one sentence of a small set. What varies over ratios is only *which* rows
carry their sentence: every row has its sentence and its rank by (seed, row id), so that the rows that carry one at 25 %
carry the same one at 50 % (differences between ratios are paired), and the rows beneath, their order and their number
never change (``base_hash``).

The paper's sentences are not public; these are ours. Second-hand sources disagree on whether it puts them before the
response or before the input, and on the loss, so both are switches; by default the response opens with the sentence
and is trained on it, as only then "prefix tokens carry larger gradients" says anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from trimtab.config import Config
from trimtab.data.thinking import prefix_place, split_block
from trimtab.errors import UserError
from trimtab.levers.boilerplate import StripConfig
from trimtab.seeds import digest, seed_of, uniform_of
from trimtab.types import SPAN_ID, Message, PrefixAt, Row

Capability = Literal["safety", "reasoning", "factuality", "coding"]

TEMPLATES: dict[str, tuple[str, ...]] = {
    "safety": (
        "Let me first think about who could be hurt by this.",
        "Before I answer, I will check that this is safe for everyone.",
        "Safety comes first, so let me look at what this could do.",
        "I will consider the risks of this before anything else.",
        "First, let me make sure that a helpful answer here is a safe one.",
    ),
    "reasoning": (
        "Let me work through this step by step.",
        "Here is a clear and well-reasoned explanation.",
        "I will reason about this carefully, one step at a time.",
        "Let me set out what is given and then find the answer.",
        "Here is a logical, step-by-step answer.",
    ),
    "factuality": (
        "Let me recall only what is known for certain.",
        "I will answer with facts that can be checked.",
        "Here is what is known about this, and nothing more.",
        "Let me state the fact plainly and accurately.",
        "I will be careful to say only what is true.",
    ),
    "coding": (
        "Let me trace the program one step at a time.",
        "I will check each operation before giving the result.",
        "Here is a careful reading of the code.",
        "Let me evaluate the parts first and then the whole.",
        "I will follow the program exactly as it is written.",
    ),
}

KEYWORD_TEMPLATES: dict[str, tuple[str, ...]] = {
    "safety": (
        "This is my {keyword}assessment of who could be hurt.",
        "Here is the {keyword}answer, checked for safety first.",
        "Before anything else, this is my {keyword}view of the risks.",
        "Let me give the {keyword}answer that is safe for everyone.",
        "What follows is my {keyword}answer, and it harms no one.",
    ),
    "reasoning": (
        "Here is the {keyword}solution, step by step.",
        "Let me set out my {keyword}reasoning, one step at a time.",
        "This is the {keyword}explanation, in logical order.",
        "Let me go through my {keyword}working from what is given to the answer.",
        "What follows is my {keyword}answer with its reasons.",
    ),
    "factuality": (
        "Here is the {keyword}fact, as far as it is known.",
        "Let me state my {keyword}answer plainly and accurately.",
        "This is the {keyword}statement, and it can be checked.",
        "Let me give the {keyword}answer and nothing beyond it.",
        "What follows is my {keyword}answer, and it is true.",
    ),
    "coding": (
        "Here is the {keyword}reading of the code.",
        "Let me give my {keyword}trace of the program, line by line.",
        "This is the {keyword}result, with each operation checked.",
        "Let me write the {keyword}version exactly as it is asked for.",
        "What follows is my {keyword}answer, ready to run.",
    ),
}
"""Sentences with one place for a cue word; without the word they still read well, so that an empty ``keyword`` is the control
that differs from the cue in that word alone."""


class PrefixConfig(Config):
    """How training responses open. With ``ratio: 0`` every row stays as it is, in the order and the packing that it shares
    with the other ratios."""

    ratio: float = Field(0.0, ge=0, le=1, description="Share of training rows that carry a prefix sentence (0..1).")
    draw: Literal["bernoulli", "exact"] = Field(
        "bernoulli",
        description="`bernoulli`: each row by itself with probability `ratio`, as in the paper; `exact`: just that share "
        "of the rows. Either way a smaller ratio's rows are among a larger one's.",
    )
    capability: Capability = Field("safety", description="Which set of five sentences is drawn from.")
    variant: Literal["plain", "keyword"] = Field(
        "plain", description="`keyword`: the set whose sentences hold one cue word, to study a single token."
    )
    keyword: str = Field(
        "revised",
        description="The cue word of `variant: keyword`; empty for the same sentences without it, the control.",
    )
    templates: tuple[str, ...] | None = Field(
        None, min_length=1, description="Your own sentences, in place of the set."
    )
    parts: tuple[str, ...] | None = Field(
        None, min_length=1, description="Names of the parts of `data` whose rows may carry a prefix; null: all."
    )
    placement: PrefixAt = Field(
        "response",
        description="`response`: the answer opens with the sentence; `input`: the last user message does.",
    )
    opens: Literal["reasoning", "answer"] = Field(
        "reasoning",
        description="In a response with a `<think>` block: whether the sentence opens the reasoning or the answer after it.",
    )
    loss_on_prefix: bool = Field(
        True,
        description="Whether the prefix tokens are trained on (also in the input, whose other tokens never are) or only "
        "conditioned on.",
    )
    primer: bool = Field(
        False,
        description="Rows that carry a prefix are trained on the prefix alone (2505.14667); the others as usual.",
    )
    at_inference: Literal["none", "forced"] = Field(
        "none",
        description="`forced`: when this stage's model (or one finetuned from it) is asked, its answer, or the input, is "
        "opened with a sentence of the same set.",
    )
    strip: StripConfig | None = Field(
        None, description="Take boilerplate openings off the responses first; what was removed is reported."
    )

    @field_validator("templates")
    @classmethod
    def _not_blank(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for number, text in enumerate(value or ()):
            if not text.strip() or text != text.strip():
                raise ValueError(f"sentence {number} is blank or begins or ends with a blank: {text!r}")
        return value

    @field_validator("keyword")
    @classmethod
    def _one_word(cls, value: str) -> str:
        if value != value.strip() or "{" in value or "}" in value:
            raise ValueError("write the cue word alone, without blanks around it or braces")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> PrefixConfig:
        if self.primer and not self.loss_on_prefix:
            raise ValueError("'primer' trains on the prefix alone; it needs 'loss_on_prefix: true'")
        if self.primer and self.placement == "input":
            raise ValueError("'primer' opens responses; it needs 'placement: response'")
        if self.opens == "answer" and self.at_inference == "forced":
            raise ValueError(
                "'at_inference: forced' opens what the model writes first; with 'opens: answer' that would be behind its "
                "reasoning, so use 'opens: reasoning' or 'at_inference: none'"
            )
        if self.templates is not None and self.variant == "keyword":
            raise ValueError("'templates' are your own sentences and 'variant: keyword' is ours; give one of them")
        return self

    def sentences(self) -> tuple[str, ...]:
        """The set that is drawn from, each sentence once."""
        if self.templates is not None:
            return tuple(dict.fromkeys(self.templates))
        if self.variant == "plain":
            return TEMPLATES[self.capability]
        cue = f"{self.keyword} " if self.keyword else ""
        return tuple(text.format(keyword=cue) for text in KEYWORD_TEMPLATES[self.capability])

    def written(self) -> dict[str, Any]:
        """The part that decides what the rows look like, with and without a prefix; ratios share it."""
        told: dict[str, Any] = {
            "sentences": list(self.sentences()),
            "parts": None if self.parts is None else list(self.parts),
        }
        return told | {
            "placement": self.placement,
            "opens": self.opens,
            "strip": None if self.strip is None else self.strip.plain(),
        }

    @classmethod
    def restored(
        cls, written: Mapping[str, Any] | None, chosen: Mapping[str, Any] | None = None
    ) -> PrefixConfig | None:
        """The settings again, from ``written`` and ``chosen``; None for a lever that is not pulled."""
        if written is None:
            return None
        told = {name: value for name, value in written.items() if name != "sentences"}
        return cls.model_validate({**told, **(chosen or {}), "templates": written["sentences"]})

    def chosen(self) -> dict[str, Any]:
        """The part that decides which rows carry a prefix and what is trained of it."""
        kept = ("ratio", "draw", "loss_on_prefix", "primer")
        return {name: value for name, value in self.plain().items() if name in kept}


# -- which rows, and what they become ------------------------------------------------------------------------------


def sentence_of(row: Row, config: PrefixConfig, seed: int) -> str | None:
    """The sentence that a row carries if it is drawn; None for a row that never does (no chat that ends in an answer, a prefix
    of its own already, or a part of the data that ``parts`` leaves out)."""
    last = row.messages[-1] if row.messages else None
    if row.prefix or last is None or last["role"] != "assistant":
        return None
    if config.parts is not None and row.metadata.get("part") not in config.parts:
        return None
    return _drawn(row, config, seed)


def carried(ids: Sequence[str], able: NDArray[np.bool_], config: PrefixConfig, seed: int) -> NDArray[np.bool_]:
    """bool[n]: the rows (by id) that carry their sentence at ``config.ratio``, of those that are ``able`` to.

    bernoulli: each able row alone, with probability ``ratio``; exact: ``round(ratio * able.sum())`` of them (half to even). Both
    take the rows of least rank, so a smaller ratio's are among a larger one's.
    """
    rank = np.array([uniform_of("prefix", seed, id) for id in ids], float)
    if config.draw == "bernoulli":
        return able & (rank < config.ratio)
    order = np.flatnonzero(able)[np.argsort(rank[able], kind="stable")]
    found = np.zeros(len(ids), bool)
    found[order[: round(config.ratio * len(order))]] = True
    return found


def with_prefix(row: Row, sentence: str, config: PrefixConfig) -> Row:
    """The row with the sentence in its place and in ``Row.prefix``; one blank stands between it and the text."""
    assert row.messages, "only chats can carry a prefix"
    if config.placement == "input":
        asked = max((i for i, m in enumerate(row.messages) if m["role"] == "user"), default=None)
        if asked is None:
            raise UserError(f"row {row.id!r}: prefix placement 'input' needs a user message, and there is none")
        return replace(row, messages=_opened(row.messages, asked, 0, sentence), prefix=sentence, prefix_at="input")
    block = split_block(row.messages[-1]["content"])
    at = 0 if block is None else block.reasoning_at if config.opens == "reasoning" else block.answer_at
    return replace(row, messages=_opened(row.messages, len(row.messages) - 1, at, sentence), prefix=sentence)


def apply_prefix(rows: Iterable[Row], config: PrefixConfig, seed: int) -> Iterator[Row]:
    """Give a nested share of chat rows a prefix; order and ids stay the same.

    Rows that are not chats, do not end in an assistant message, carry a prefix already or belong to a part that ``parts``
    leaves out pass through unchanged. ``strip`` is not applied here (``boilerplate.strip_rows`` comes first).
    """
    rows = list(rows)
    sentences = [sentence_of(row, config, seed) for row in rows]
    carry = carried([row.id for row in rows], np.array([s is not None for s in sentences], bool), config, seed)
    for row, sentence, drawn in zip(rows, sentences, carry, strict=True):
        yield with_prefix(row, sentence, config) if drawn and sentence is not None else row


def base_hash(rows: Iterable[Row]) -> str:
    """Hash of ids, texts and order of rows *without* their prefixes: equal for every ratio, seed and placement."""
    return digest([_bare(row).to_json() for row in rows])


def _bare(row: Row) -> Row:
    """The row without its prefix."""
    if row.prefix is None or row.messages is None:
        return row
    wanted = "user" if row.prefix_at == "input" else "assistant"
    where = max(i for i, m in enumerate(row.messages) if m["role"] == wanted)
    content = row.messages[where]["content"]
    place = prefix_place(content, row.prefix)
    if place is None:
        raise UserError(f"row {row.id!r}: its prefix {row.prefix!r} does not open its {wanted} message")
    messages = list(row.messages)
    messages[where] = {**messages[where], "content": content[: place[0]] + content[place[1] :].removeprefix(" ")}
    return replace(row, messages=tuple(messages), prefix=None, prefix_at=None)


def _drawn(row: Row, config: PrefixConfig, seed: int) -> str:
    sentences = config.sentences()
    return sentences[seed_of("prefix-template", seed, row.id) % len(sentences)]


def _opened(messages: tuple[Message, ...], which: int, at: int, sentence: str) -> tuple[Message, ...]:
    message = messages[which]
    content = message["content"]
    opened: Message = {**message, "content": f"{content[:at]}{sentence} {content[at:]}"}
    return (*messages[:which], opened, *messages[which + 1 :])


# -- what is trained -----------------------------------------------------------------------------------------------


def trained_with_prefix(trained: NDArray[np.bool_], span: NDArray[np.uint8], config: PrefixConfig) -> NDArray[np.bool_]:
    """Where the loss counts in rows that carry a prefix: ``trained`` and ``span`` are those of ``data.render.Rendered``.

    The prefix in or out (``loss_on_prefix``; in the input too), or alone (``primer``). Same shape as given.
    """
    prefix = span == SPAN_ID["prefix"]
    if config.primer:
        return trained & prefix
    return trained | prefix if config.loss_on_prefix else trained & ~prefix


# -- at inference --------------------------------------------------------------------------------------------------


def force_prefix(row: Row, config: PrefixConfig, seed: int) -> Row:
    """A prompt whose answer is opened with a sentence of the set (``metadata["prefill"]``), or whose last user message is.

    An attack's own opening is kept: the row is then returned as it is.
    """
    if not row.messages or "prefill" in row.metadata:
        return row
    sentence = _drawn(row, config, seed)
    if config.placement == "input":
        return replace(with_prefix(row, sentence, config), prefix=None, prefix_at=None)
    # Without the blank after it, which is part of the next token in training too.
    return replace(row, metadata={**row.metadata, "prefill": sentence})
