"""What every named prompt set is: a card, a pin, and rows.

Three kinds are made of it: files of pinned wheels (``promptsets``), data sets of the Hub at a pinned commit (``hubsets``)
and sets of our own (``ownsets``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.seeds import rng_of
from trimtab.types import Harm, Row

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ASK_NUMBER = 'Work it out step by step. End with a line that says "Answer:" and then the number alone.'
ASK_LETTER = 'End with a line that says "Answer:" and then the letter of the right choice.'


@dataclass(frozen=True, kw_only=True)
class PromptSet(ABC):
    """What a report says of a prompt set.

    rows      how many the set has; checked at every full read, so that a reader cannot lose rows unnoticed; 0 where it is
              not known, because no commit of the set is
    harm      the label of every row, or None where rows differ (``Row.harm`` has it)
    category  what ``Row.category`` holds
    """

    name: str
    about: str
    licence: str
    rows: int
    harm: Harm | None
    category: str

    @abstractmethod
    def found(self) -> Iterator[Row]:
        """The rows, in the source's order."""

    @property
    @abstractmethod
    def pins(self) -> dict[str, Any]:
        """What fixes the rows (JSON-ready); part of the identity of every step that reads them."""

    @property
    @abstractmethod
    def origin(self) -> str:
        """Where the rows come from, in a few words."""

    @property
    @abstractmethod
    def revision(self) -> str:
        """The version, commit or hash that is read."""

    @property
    def offline(self) -> bool:
        """Whether the set can be read without the Hub (from a package, or from Trimtab itself)."""
        return True


def prompt_row(
    source: str, key: str, prompt: str, harm: Harm, category: str, metadata: Mapping[str, Any] | None = None
) -> Row:
    """One prompt without an answer, ``<source>/<key>`` being its id."""
    return Row(
        id=f"{source}/{key}",
        messages=({"role": "user", "content": prompt.strip()},),
        source=source,
        harm=harm,
        category=category,
        metadata=dict(metadata or {}),
    )


def choice_row(source: str, key: str, question: str, choices: Sequence[str], right: int, category: str) -> Row:
    """A question with lettered choices, in an order drawn for this row, so that no letter is right more often.

    ``metadata["choices"]`` has the choices as they are shown, ``metadata["answer"]`` the letter of the right one.
    """
    order = rng_of("choices", source, key).permutation(len(choices)).tolist()
    shown = [choices[index] for index in order]
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, shown))
    return prompt_row(
        source, key, f"{question.strip()}\n\n{listed}\n\n{ASK_LETTER}", "benign", category,
        {"choices": shown, "answer": LETTERS[order.index(right)]},
    )  # fmt: skip
