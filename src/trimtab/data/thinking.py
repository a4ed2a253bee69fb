"""Reasoning blocks: ``<think>...</think>`` at the start of an answer, as R1-style models write them.

One grammar for rendering and judging: a block opens the answer (white space before it is allowed) and ends at the first
closing mark; marks anywhere else are text. Where the tokenizer has both marks as added tokens and the template does not
place the reasoning itself (``reasoning_content``), the renderer does (``Thinking``), in the form that such models write:
``<think>``, newline, reasoning, newline, ``</think>``, blank line, answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trimtab.data.encode import TextEncoder
from trimtab.errors import UserError

OPEN, CLOSE = "<think>", "</think>"
OPENING, CLOSING = f"{OPEN}\n", f"{CLOSE}\n\n"
THINK = re.compile(r"^\s*<think>.*?(?:</think>|\Z)", re.DOTALL)
"""The reasoning at the start of an answer, with its marks; up to the end of the text where it never ends."""
_BLOCK = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)
_START = re.compile(r"\s*<think>")


@dataclass(frozen=True)
class Block:
    """A content that opens with a reasoning block: both texts without the newlines around them, and where each starts.

    end  the character after the closing mark
    """

    reasoning: str
    reasoning_at: int
    answer: str
    answer_at: int
    end: int


def split_block(content: str) -> Block | None:
    """The block that a content opens with and ends, or None."""
    found = _BLOCK.match(content)
    if found is None:
        return None
    inner = found[1].lstrip("\n")
    answer = content[found.end() :].lstrip("\n")
    return Block(inner.rstrip("\n"), found.end(1) - len(inner), answer, len(content) - len(answer), found.end())


def opens(content: str) -> bool:
    """Does the content open with a reasoning block, ended or not?"""
    return _START.match(content) is not None


def unopened(content: str) -> str:
    """The content without an opening mark and the newlines that follow it."""
    found = _START.match(content)
    return content[found.end() if found else 0 :].lstrip("\n")


def never_ends(content: str) -> bool:
    """Does a reasoning block open here and not end?"""
    return opens(content) and CLOSE not in content


def without_reasoning(text: str) -> str | None:
    """An answer without its reasoning block; None where the reasoning never ends, so that there is no answer."""
    if never_ends(text):
        return None
    found = THINK.match(text)
    return text[found.end() :] if found else text


def begun(prefill: str, text: str) -> str:
    """A whole answer: ``prefill``, which opened it, and ``text``, what was generated then (``Generation.text``).

    The text repeats the opening mark where it goes on with reasoning; then the opening belongs into the block.
    """
    if not prefill or not opens(text):
        return prefill + text
    return f"{OPENING}{unopened(prefill)}{unopened(text)}"


def left_out(prefill: str, text: str) -> tuple[str, str] | None:
    """``prefill`` and ``text`` without the reasoning, wherever in them it begins and ends; None where it never ends."""
    if not opens(text) and not opens(prefill):
        return prefill, text
    if (kept := without_reasoning(prefill)) is not None and not opens(text):
        return kept, text  # the opening held the whole block
    answer = without_reasoning(begun(prefill, text))
    return None if answer is None else ("", answer)


def prefix_place(content: str, prefix: str) -> tuple[int, int] | None:
    """[start, end) of an answer's prefix: at the start of the content, of its reasoning, or of the answer after it,
    white space before the latter two left out; the first that fits, or None."""
    if content.startswith(prefix):
        return 0, len(prefix)
    ends = [_START.match(content), _BLOCK.match(content)]
    for at in (found.end() for found in ends if found):
        start = len(content) - len(content[at:].lstrip())
        if content.startswith(prefix, start):
            return start, start + len(prefix)
    return None


@dataclass(frozen=True)
class Thinking:
    """How blocks are rendered for one tokenizer and template.

    open_id, close_id  the added tokens of the marks
    opening   ids between the assistant's header and the reasoning
    closing   ids from the closing mark to the answer
    prompted  the generation prompt opens the block, so every answer has one, be it empty, and its opening is not trained
    cuts      the template drops the reasoning of earlier turns
    """

    open_id: int
    close_id: int
    opening: tuple[int, ...]
    closing: tuple[int, ...]
    prompted: bool
    cuts: bool

    @classmethod
    def of(
        cls,
        encoder: TextEncoder,
        template: str,
        header: str,
        prompt: str,
        render: Callable[[list[dict[str, str]]], str],
    ) -> Thinking | None:
        """None where the tokenizer has no marks of its own or the template places the reasoning.

        header  what the template writes before an answer; prompt  its generation prompt
        """
        ids = {surface: token for token, surface in encoder.surfaces.items()}
        if OPEN not in ids or CLOSE not in ids or "reasoning_content" in template:
            return None
        opening, prompted = OPENING, False
        if OPEN in prompt and CLOSE not in prompt and prompt.startswith(header):
            opening, prompted = prompt[len(header) :], True
        elif OPEN in prompt:
            raise UserError(
                f"chat template: its generation prompt {prompt!r} opens the reasoning in a way that answers cannot be "
                f"trained on; let it end in {OPENING!r} after the header of an answer, {header!r}"
            )
        words = ("reasoning of an earlier turn", "answer to it")
        said = f"{OPENING}{words[0]}\n{CLOSING}{words[1]}"
        asked = {"role": "user", "content": "-"}
        return cls(
            ids[OPEN],
            ids[CLOSE],
            tuple(encoder.structure(opening, head=False)[0]),
            tuple(encoder.structure(CLOSING, head=False)[0]),
            prompted,
            words[0] not in render([asked, {"role": "assistant", "content": said}, asked]),
        )

    @property
    def marks(self) -> Sequence[int]:
        """The ids of both marks; a model must be free to write them."""
        return self.open_id, self.close_id
