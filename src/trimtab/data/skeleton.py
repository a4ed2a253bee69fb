"""The skeleton of a chat: what a template writes around the texts, found by rendering it with sentinels.

A chat template is a program. It is run with a unique sentinel in place of every text field, and the result is cut at
the sentinels: what is left is structure, which only the template's author can have written. How a field is trimmed is
found by running it again with blanks around the sentinels. Skeletons depend on roles, fields and flags alone, so they
are cached; ``Skeleton.fill`` gives the string that the renderer compares with the template's own output for the real
texts, so that a template whose structure depends on the text is found out on the very row where it does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.errors import UserError
from trimtab.seeds import rng_of

FieldKey = tuple[int, str]
"""(index of the message, "content" | "name" | "reasoning_content")."""
FieldShape = tuple[str, str | None]
"""(field, None for a sentinel, or a literal blank text that is left in place)."""
MessageShape = tuple[str, tuple[FieldShape, ...]]
Shape = tuple[MessageShape, ...]
Render = Callable[[list[dict[str, str]], bool], str]

# How a template may trim one side of a field: nothing, all white space, newlines only.
_SIDES: tuple[str | None, ...] = ("", None, "\n")
_PROBES = ("\n \n", " \n ")


@dataclass(frozen=True)
class Slot:
    """A place for one text field; ``left`` / ``right``: characters trimmed there ("" none, None all white space)."""

    key: FieldKey
    left: str | None = ""
    right: str | None = ""

    def trim(self, text: str) -> tuple[str, int]:
        """The text as the template writes it, and how many characters went on the left."""
        kept = text if self.left == "" else text.lstrip(self.left)
        shift = len(text) - len(kept)
        return (kept if self.right == "" else kept.rstrip(self.right)), shift


@dataclass(frozen=True)
class Skeleton:
    """``pieces[0] slots[0] pieces[1] slots[1] ... pieces[-1]``."""

    pieces: tuple[str, ...]
    slots: tuple[Slot, ...]

    def fill(self, texts: Mapping[FieldKey, str]) -> str:
        """The whole chat as one string, for comparison with the template's own output."""
        out = [self.pieces[0]]
        for slot, piece in zip(self.slots, self.pieces[1:]):
            out += (slot.trim(texts[slot.key])[0], piece)
        return "".join(out)


class Probe:
    """Runs one template on shapes; ``render(messages, generation_prompt)`` is the template."""

    def __init__(self, render: Render, template: str) -> None:
        self._render = render
        self._names = [_names(template, draw) for draw in (0, 1)]
        self._raw: dict[tuple[Shape, bool], tuple[tuple[str, ...], tuple[FieldKey, ...]]] = {}

    def clear(self) -> None:
        """Forget what was found (a template may write the date)."""
        self._raw.clear()

    def raw(self, shape: Shape, generation_prompt: bool) -> tuple[tuple[str, ...], tuple[FieldKey, ...]]:
        """Structure pieces and the fields between them, equal under two unlike draws of sentinels."""
        key = (shape, generation_prompt)
        if key not in self._raw:
            found = [self._split(shape, generation_prompt, draw, "") for draw in (0, 1)]
            if found[0] != found[1]:
                raise UserError(
                    "chat template: its structure depends on the texts of the messages, so they cannot be told apart "
                    "safely; use a template that only places them"
                )
            if len(self._raw) > 4096:
                self._raw.clear()
            self._raw[key] = found[0]
        return self._raw[key]

    def skeleton(self, shape: Shape, generation_prompt: bool) -> Skeleton:
        """``raw`` with the trimming of every field."""
        pieces, keys = self.raw(shape, generation_prompt)
        probes = []
        for blank in _PROBES:
            found, probe_keys = self._split(shape, generation_prompt, 0, blank)
            if probe_keys == keys:  # else blanks change the structure: the check of the filled chat will tell
                probes.append((blank, found))
        lefts: list[str | None] = [""] * len(keys)
        rights: list[str | None] = [""] * len(keys)
        for k, piece in enumerate(pieces):
            sides = (
                (right, left) for right in (_SIDES if k > 0 else ("",)) for left in (_SIDES if k < len(keys) else ("",))
            )
            for right, left in sides:
                if all(
                    found[k]
                    == (_kept(blank, right, False) if k > 0 else "")
                    + piece
                    + (_kept(blank, left, True) if k < len(keys) else "")
                    for blank, found in probes
                ):
                    if k > 0:
                        rights[k - 1] = right
                    if k < len(keys):
                        lefts[k] = left
                    break
        return Skeleton(pieces, tuple(Slot(*parts) for parts in zip(keys, lefts, rights)))

    def _split(
        self, shape: Shape, generation_prompt: bool, draw: int, blank: str
    ) -> tuple[tuple[str, ...], tuple[FieldKey, ...]]:
        start, end, fields = self._names[draw]
        text_of = {
            (i, name): f"{blank}{start}{i}{fields[name]}{end}{blank}"
            for i, (_, parts) in enumerate(shape)
            for name, literal in parts
            if literal is None
        }
        rendered = self._render(as_messages(shape, text_of), generation_prompt)
        name_of = {letter: name for name, letter in fields.items()}
        parts = re.split(rf"{start}(\d+)([{''.join(name_of)}]){end}", rendered)
        keys = tuple((int(i), name_of[letter]) for i, letter in zip(parts[1::3], parts[2::3]))
        return tuple(parts[0::3]), keys


def as_messages(shape: Shape, text_of: Mapping[FieldKey, str]) -> list[dict[str, str]]:
    """The messages a template is given: texts from ``text_of``, literal blanks from the shape."""
    return [
        {"role": role, **{n: (text_of[i, n] if literal is None else literal) for n, literal in parts}}
        for i, (role, parts) in enumerate(shape)
    ]


def _kept(blank: str, side: str | None, left: bool) -> str:
    if side == "":
        return blank
    return blank.lstrip(side) if left else blank.rstrip(side)


def _names(template: str, draw: int) -> tuple[str, str, dict[str, str]]:
    """Sentinel delimiters and field letters of one draw, none of them in the template's text.

    The two draws differ in length, case and letters, so that a template that looks at its texts gives itself away.
    No message text is ever rendered beside a sentinel, so a user cannot write one.
    """
    for attempt in range(100):
        rng = rng_of("sentinel", draw, attempt)
        letters = "abcdefghijklmnopqrstuvwxyz" if draw == 0 else "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        word = "".join(letters[i] for i in rng.integers(0, 26, 16 + 7 * draw))
        start, end = word[:-6], word[-6:]
        if start not in template and end not in template:
            names: Sequence[str] = ("content", "name", "reasoning_content")
            return start, end, dict(zip(names, "xyz" if draw == 0 else "PQR"))
    raise AssertionError("no free sentinel in 100 draws")


def shape_of(role: str, fields: Mapping[str, Any], literal_blanks: bool) -> MessageShape:
    """The shape of one message; with ``literal_blanks`` empty texts stay in place for templates that look at them."""
    return role, tuple((n, t if literal_blanks and not t.strip() else None) for n, t in fields.items())
