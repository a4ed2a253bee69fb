"""Who speaks in a refusal dialogue: placeholders on disk, names drawn when the text is tokenised (2504.16980, sec. 3.3).

A model that always read "User" and "Assistant" would tie the refusal to two words. The corpus keeps the placeholders, so
that one dialogue can stand in it under other names at every repeat.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from trimtab.errors import UserError

USER, ASSISTANT = "User", "Assistant"
"""The placeholders, also ``metadata["speakers"]`` of a refusal dialogue."""

SPEAKERS: tuple[str, ...] = (
    "Alex", "Ari", "Ashley", "Avery", "Bailey", "Blake", "Cameron", "Casey", "Charlie", "Chris", "Dana", "Devon",
    "Drew", "Eden", "Ellis", "Emery", "Finley", "Frankie", "Harper", "Hayden", "Indigo", "Jamie", "Jessie", "Jordan",
    "Jules", "Kai", "Kelly", "Kim", "Lane", "Lee", "Logan", "Marley", "Max", "Micah", "Morgan", "Nico", "Noor",
    "Parker", "Pat", "Quinn", "Reese", "Remy", "Riley", "Robin", "Rowan", "Sam", "Sasha", "Shannon", "Sidney",
    "Skyler", "Taylor", "Toni", "Val", "Wren", "Yuri",
    "Adviser", "Caller", "Clerk", "Coach", "Colleague", "Editor", "Friend", "Gardener", "Guest", "Guide", "Helper",
    "Host", "Learner", "Librarian", "Mentor", "Neighbour", "Reader", "Student", "Teacher", "Traveller", "Visitor",
)  # fmt: skip
"""Neutral first names and roles, for corpora without a cast of their own."""

_TURN = re.compile(rf"^[ \t]*(?:\*\*)?({USER}|{ASSISTANT})(?:\*\*:|:\*\*|:)", re.MULTILINE)
_LABEL = re.compile(rf"{_TURN.pattern}[ \t]*", re.MULTILINE)


def with_speakers(text: str, names: Sequence[str], rng: np.random.Generator) -> str:
    """``text`` with the placeholders at the start of lines, also those in bold (a dialogue that came ready may have them so),
    replaced by two different ones of ``names``.

    ``rng`` is the caller's (key it by document and repeat). ``UserError`` where ``names`` has not two different ones.
    """
    different = list(dict.fromkeys(names))
    if len(different) < 2:
        raise UserError(f"speakers: a dialogue needs two different names, not {different}")
    first, second = (different[i] for i in rng.choice(len(different), size=2, replace=False))
    return _TURN.sub(lambda found: f"{first if found[1] == USER else second}:", text)


def read_dialogue(text: str) -> list[tuple[str, str]] | None:
    """The turns (speaker, words) of a dialogue, or None for a text that is none.

    It begins with the user, the speakers take turns, nobody is silent, and the assistant has the last word. A label may
    be set in bold, as chat models like to do.
    """
    parts = _LABEL.split(text.strip())
    if parts[0].strip():
        return None
    turns = [(speaker, words.strip()) for speaker, words in zip(parts[1::2], parts[2::2])]
    fair = all(words and speaker == (USER, ASSISTANT)[i % 2] for i, (speaker, words) in enumerate(turns))
    return turns if turns and fair and len(turns) % 2 == 0 else None
