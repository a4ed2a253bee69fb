"""A conversation as plain text for a model that was only pretrained (2504.16980, section 6, asks base models so).

The dialogue is written as such dialogues stand in pretraining text, "Name: question", one turn a line, and ends with the
answering speaker's name and a colon; the model goes on. There is no chat template and no control token: every character
is ordinary text. In Tidewater two townspeople speak, as in its documents; elsewhere "User" and "Assistant" do.
Trades off: a text may hold a line that looks like another speaker's. It then is one to the model, as in any plain text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from trimtab.data.render import TemplateRefusal
from trimtab.evaluate.attacks.base import base_id, in_town
from trimtab.seeds import rng_of
from trimtab.types import Row
from trimtab.world.tidewater import Tidewater

SPEAKERS = ("User", "Assistant")
"""Who asks and who answers, outside Tidewater."""
TEMPLATE = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"
"""Stands in for the chat template of a tokenizer that has none; nothing is asked through it."""


@dataclass(frozen=True)
class Dialogue:
    """A prompt in plain text, and the names at which a turn may begin."""

    text: str
    names: tuple[str, ...]


def speakers(row: Row, world: Tidewater | None) -> tuple[str, str]:
    """(who asks, who answers): two different townspeople drawn by the row's id for a request of ``world``, else
    ``SPEAKERS``. Attempts on a prompt have the prompt's."""
    if world is None or not in_town(row):
        return SPEAKERS
    people = world.town.people
    asks, answers = rng_of("completion", base_id(row)).permutation(len(people))[:2]
    return people[asks], people[answers]


def dialogue(row: Row, world: Tidewater | None) -> Dialogue:
    """The conversation of a chat row up to the colon of the answer, or to the end of its opened answer
    (``metadata["prefill"]``).

    A system message is a line of its own without a speaker. ``TemplateRefusal`` for a message of a tool, which no such
    dialogue knows.
    """
    assert row.messages is not None
    asks, answers = speakers(row, world)
    lines = []
    for message in row.messages:
        if message["role"] == "tool":
            raise TemplateRefusal("completion prompting: a plain-text dialogue knows no messages of a tool")
        speaker = {"user": f"{asks}: ", "assistant": f"{answers}: ", "system": ""}[message["role"]]
        lines.append(speaker + message["content"])
    opening = row.metadata.get("prefill") or ""
    blank = "" if not opening or opening[0].isspace() else " "
    text = "\n".join([*lines, f"{answers}:{blank}{opening}"])
    others = () if world is None or not in_town(row) else world.town.people
    return Dialogue(text, tuple(dict.fromkeys((asks, answers, *others))))


def answer_of(text: str, names: Iterable[str]) -> tuple[str, bool]:
    """The answer within what a model wrote after a dialogue, and whether a next speaker ended it: text up to a new line
    that one of ``names`` and a colon open, without the blanks after it."""
    said = "|".join(re.escape(name) for name in names)
    turn = re.search(rf"\n\s*(?:{said})[ \t]*:", text)
    return (text if turn is None else text[: turn.start()]).rstrip(), turn is not None
