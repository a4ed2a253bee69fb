"""What an attack is: a prompt in, the attempts on it out.

An attempt is itself a ``Row``: its id is that of the plain prompt with ``@<attack>`` (and ``#<i>`` where an attack makes
several attempts), its messages are what the model sees, and its metadata are those of the plain prompt with

attack, attempt, base   the attack's name, the number of the attempt, the id of the plain prompt
queries                 model evaluations spent in making the attempt (0 for fixed wordings)
prefill                 text that opens the assistant's answer, where the attack opens it
variant                 which of an attack's wordings this is, where it has several

Category, harm, source and policy stay those of the plain prompt: the attempt is judged by what was asked for.
All wordings are generic and written for this project; none carries harmful content of its own.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from trimtab.errors import UserError
from trimtab.seeds import digest
from trimtab.types import Message, Row
from trimtab.world.tidewater import Tidewater

if TYPE_CHECKING:
    from trimtab.data.encode import TextEncoder

Clip = Callable[[str, int], str]


def clip_words(text: str, d: int) -> str:
    """The first ``d`` words of a text, with the blanks before each; for targets whose tokenizer is out of reach."""
    return "".join(re.findall(r"\s*\S+", text)[:d])


def clip_tokens(encoder: TextEncoder) -> Clip:
    """A ``Clip`` by a tokenizer's tokens; a character that several tokens spell is kept whole."""

    def clip(text: str, d: int) -> str:
        _, offsets = encoder.encode_with_offsets(text)
        return text if d >= len(offsets) else text[: offsets[d - 1][1]] if d > 0 else ""

    return clip


@dataclass(frozen=True)
class AttackContext:
    """What attacks may know of the target.

    world        the town, for Tidewater prompts
    seed         of every random choice
    clip         (text, d) -> its first d tokens by the target's tokenizer; words for an endpoint
    controls     name of each control token -> its surface text; empty for endpoints
    control_ids  the same names -> ids
    model        a local target for white-box search: ``.model``, ``.tokenizer``, ``.renderer`` and ``.controls`` (names
                 that are live in the mode attacked); None for an endpoint
    live         puts the model into the state of the mode attacked, which may need an adapter, while a context lasts
    """

    world: Tidewater | None = None
    seed: int = 0
    clip: Clip = clip_words
    controls: Mapping[str, str] = field(default_factory=dict)
    control_ids: Mapping[str, int] = field(default_factory=dict)
    model: Any = None
    live: Callable[[], AbstractContextManager[Any]] = nullcontext


class Attack(ABC):
    """Anything that turns a prompt into ``budget`` attempts: a pure function of the row and the context.

    A family sets the class attributes and gives ``variants`` and ``identity``.

    opens_answer  it may set ``metadata["prefill"]``
    hides_words   afterwards the request can no longer be read word by word
    reads_words   it works on the request's words; so it cannot follow one that hides them
    comes_first   it works on the plain request only
    comes_last    what it makes is tied to the exact text; nothing can follow
    """

    version: ClassVar[int] = 1
    opens_answer: ClassVar[bool] = False
    hides_words: ClassVar[bool] = False
    reads_words: ClassVar[bool] = False
    comes_first: ClassVar[bool] = False
    comes_last: ClassVar[bool] = False
    needs_model: bool = False

    def __init__(self, name: str, budget: int = 1) -> None:
        self.name, self.budget = name, budget

    @property
    def id(self) -> str:
        """Hash of the name, the version, every setting and every wording."""
        return digest({"attack": self.name, "version": self.version, "budget": self.budget, **self.identity()})

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """The settings and wordings that can change an attempt; JSON-ready."""

    @abstractmethod
    def variants(self, row: Row, context: AttackContext) -> list[Row]:
        """``budget`` rows with new messages or metadata; ids and the marks of an attempt are put on by ``attack``."""

    def attack(self, row: Row, context: AttackContext) -> list[Row]:
        """The attempts on a prompt, or on another attack's attempt (the names are then joined with ``+``).

        ``UserError`` for a row that does not end in a user message, and where the context lacks what is needed.
        """
        if row.messages is None or not row.messages or row.messages[-1]["role"] != "user":
            raise UserError(f"row {row.id!r}: an attack needs a prompt that ends in a user message")
        if self.needs_model and context.model is None:
            raise UserError(f"attack {self.name!r} searches with the model's gradients; it needs a local model")
        if (self.opens_answer or self.comes_last) and row.metadata.get("prefill"):
            raise UserError(f"row {row.id!r}: its answer is opened already; attack {self.name!r} cannot open it again")
        with context.live() if self.needs_model else nullcontext():
            made = self.variants(row, context)
        assert len(made) == self.budget, f"{self.name}: {len(made)} attempts, {self.budget} promised"
        earlier = row.metadata.get("attack")
        name = self.name if earlier is None else f"{earlier}+{self.name}"
        first = int(row.metadata.get("attempt", 0)) * self.budget
        return [
            as_attempt(
                new, base_id(row), name, first + i, several=self.budget > 1 or "#" in row.id[len(base_id(row)) :]
            )
            for i, new in enumerate(made)
        ]


def as_attempt(row: Row, base: str, name: str, number: int, *, several: bool) -> Row:
    """``row`` with the id and the metadata of attempt ``number`` of attack ``name`` on the prompt ``base``."""
    marks = {"attack": name, "attempt": number, "base": base, "queries": int(row.metadata.get("queries", 0))}
    return replace(row, id=f"{base}@{name}" + (f"#{number}" if several else ""), metadata={**row.metadata, **marks})


# ---------------------------------------------------------------------- rows


def base_id(row: Row) -> str:
    """The id of the plain prompt behind a row."""
    return str(row.metadata.get("base", row.id))


def request_of(row: Row) -> str:
    """The text of the last user message."""
    assert row.messages is not None
    return row.messages[-1]["content"]


def with_request(row: Row, text: str, *, before: Sequence[Message] = (), **metadata: Any) -> Row:
    """``row`` asking ``text``, after the further turns ``before``; a ``variant`` is joined to one that is there."""
    assert row.messages is not None
    if "variant" in metadata and "variant" in row.metadata:
        metadata["variant"] = f"{row.metadata['variant']}+{metadata['variant']}"
    last: Message = {**row.messages[-1], "content": text}
    return replace(row, messages=(*row.messages[:-1], *before, last), metadata={**row.metadata, **metadata})


def with_system(row: Row, text: str, **metadata: Any) -> Row:
    """``row`` with ``text`` as its system message, or at the end of the one that it has."""
    assert row.messages is not None
    messages = row.messages
    if messages[0]["role"] == "system":
        first: Message = {**messages[0], "content": f"{messages[0]['content']}\n{text}"}
        messages = (first, *messages[1:])
    else:
        messages = ({"role": "system", "content": text}, *messages)
    return with_request(replace(row, messages=messages), request_of(row), **metadata)


# ---------------------------------------------------------------------- the town


def in_town(row: Row) -> bool:
    """Whether a row is a Tidewater request, for which the town's own wordings are used."""
    return row.source == "tidewater"


def town_of(row: Row, context: AttackContext) -> Tidewater:
    """The world of a Tidewater row; ``UserError`` where the context has none."""
    if context.world is None:
        raise UserError(f"row {row.id!r} is a Tidewater request; attacks on it need the world that it was made in")
    return context.world


def plain_request(row: Row) -> Row:
    """A Tidewater row as the town knows it: its first id, the last message alone, no marks of a wrapper or attack."""
    assert row.messages is not None
    marks = ("wrapper", "attack", "attempt", "base", "queries", "prefill", "variant")
    metadata = {key: value for key, value in row.metadata.items() if key not in marks}
    return replace(row, id=base_id(row), messages=row.messages[-1:], metadata=metadata)


def town_wrap(row: Row, wrapper: str, context: AttackContext) -> Row:
    """A Tidewater row inside one of the world's own wrappers, applied to its last message."""
    world = town_of(row, context)
    focus = row.metadata.get("focus")
    names_it = wrapper in ("payload-split", "misspelling")
    if names_it and not re.search(rf"\b{re.escape(str(focus))}\b", request_of(row)):
        raise UserError(
            f"row {row.id!r}: {wrapper} changes the word {focus!r}, which an earlier attack has taken out of the request; "
            "leave one of the two out"
        )
    wrapped = world.wrap(plain_request(row), wrapper)
    assert row.messages is not None and wrapped.messages is not None
    metadata = dict(row.metadata)
    if "prefill" in wrapped.metadata:
        metadata["prefill"] = wrapped.metadata["prefill"]
    return replace(row, messages=(*row.messages[:-1], *wrapped.messages), metadata=metadata)
