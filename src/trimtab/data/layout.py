"""What stands where in a rendered chat: structure pieces as ids, each attributed to its message, with slots between.

Facts about the template (BOS, the marker that ends an answer, the generation prompt, whether there is a system slot)
are learned once from small conversations of sentinels. A ``Plan`` is the part of a rendering that does not depend on
the texts; it is cached by shape, generation prompt and where the controls go, which is what makes rendering fast.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.data.encode import TextEncoder
from trimtab.data.skeleton import Probe, Render, Shape, Skeleton, Slot
from trimtab.errors import UserError
from trimtab.types import ROLES, SPAN_ID

ROLE_ID: dict[str, int] = {role: i for i, role in enumerate(ROLES)}
_SAID = ("content", "reasoning_content")


@dataclass(frozen=True)
class Piece:
    """Ids and what each belongs to, arrays [n]; ``owner``: the answer whose training covers the id, or -1."""

    ids: np.ndarray
    message: np.ndarray
    role: np.ndarray
    span: np.ndarray
    owner: np.ndarray


def make_piece(ids: Sequence[int], message: int, role: int, span: int, owner: int = -1) -> Piece:
    """A piece that belongs to one message as a whole."""
    n = len(ids)
    return Piece(
        np.array(ids, np.int32),
        np.full(n, message, np.int32),
        np.full(n, role, np.int8),
        np.full(n, span, np.uint8),
        np.full(n, owner, np.int32),
    )


@dataclass(frozen=True)
class Place:
    """A slot for text, and whether the tokenizer's prefix space belongs before it."""

    slot: Slot
    head: bool


@dataclass(frozen=True)
class Plan:
    """``parts`` in order: structure, places for text, and None where the control ids go."""

    skeleton: Skeleton
    parts: tuple[Piece | Place | None, ...]
    control_message: int


class Layout:
    """Plans for one template and tokenizer.

    bos             the BOS text the template opens with ("" if none)
    document_bos    ids that open a pretraining document: bos, unless the template uses it to open every turn
    stop_ids        ids that end an answer: the template's marker first, then eos and the generation config's
    system_slot     the template gives the system message a turn of its own
    system_header   what the template writes between BOS and the system text
    header          what the template writes before an answer
    prompt          the generation prompt
    answer          how the template trims an answer, and whether a prefix space belongs before it
    """

    def __init__(self, encoder: TextEncoder, render: Render, template: str, tokenizer: Any) -> None:
        self.encoder = encoder
        self.probe = Probe(render, template)
        self._plans: dict[tuple[Shape, bool, str], Plan] = {}
        self._learn(tokenizer)

    def clear(self) -> None:
        """Forget the cached plans (a template may write the date)."""
        self._plans.clear()
        self.probe.clear()

    def plan(self, shape: Shape, generation_prompt: bool, mode: str) -> Plan:
        """mode: "" no controls, "system" before the first message's text, "default-system" inside the
        system block that the template writes itself, "after-bos"."""
        key = (shape, generation_prompt, mode)
        if key not in self._plans:
            if len(self._plans) > 4096:
                self._plans.clear()
            self._plans[key] = self._build(shape, generation_prompt, mode)
        return self._plans[key]

    def default_system(self, shape: Shape, generation_prompt: bool) -> bool:
        """Does the template write a system block of its own for this shape?"""
        first = self.probe.raw(shape, generation_prompt)[0][0]
        return bool(self.system_header) and first.startswith(self.bos + self.system_header)

    # ------------------------------------------------------------------ facts

    def _pieces(self, shape: Shape, generation_prompt: bool = False) -> tuple[str, ...] | None:
        """Structure of a canonical conversation, or None if the template refuses it or drops a text."""
        try:
            pieces, keys = self.probe.raw(shape, generation_prompt)
        except UserError:
            return None
        return pieces if [i for i, _ in keys] == list(range(len(shape))) else None

    def _learn(self, tokenizer: Any) -> None:
        self._headers: dict[str, str] = {}
        turn, prompted = self._pieces(_plain("user")), self._pieces(_plain("user"), True)
        talk = self._pieces(_plain("user", "assistant"))
        if turn is None or talk is None:
            self.probe.raw(_plain("user", "assistant"), False)  # a refusal speaks for itself
            raise UserError("chat template: it drops the text of a user or assistant message; use another template")
        bos = tokenizer.bos_token
        self.bos: str = bos if bos and turn[0].startswith(bos) else ""
        opens_turns = bool(bos) and sum(piece.count(bos) for piece in talk) > 1
        self.document_bos: list[int] = [] if not bos or opens_turns else [tokenizer.bos_token_id]
        if opens_turns:
            self.bos = ""
        self.prompt: str = prompted[-1][len(turn[-1]) :] if prompted and prompted[-1].startswith(turn[-1]) else ""

        if talk[1].startswith(turn[-1]):
            self._headers["assistant"] = talk[1][len(turn[-1]) :]
        self.header: str = self._headers.get("assistant", "")
        again = self._pieces(_plain("user", "assistant", "user"))
        if again and again[2].startswith(talk[-1]):
            self._headers["user"] = again[2][len(talk[-1]) :]

        self.system_slot, self.system_header = False, ""
        briefed = self._pieces(_plain("system", "user"))
        if briefed:
            ids = self.encoder.structure(briefed[1], head=False)[0]
            self.system_slot = not self.encoder.guarded.isdisjoint(ids)
            self.system_header = briefed[0][len(self.bos) :]

        ended = self.encoder.structure(talk[-1], head=False)[0]
        stops = [token for token in ended if token in self.encoder.guarded][:1]
        if tokenizer.eos_token_id is not None:
            stops.append(tokenizer.eos_token_id)
        stops += _configured_stops(tokenizer)
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(stops))
        if not self.stop_ids:
            raise UserError("tokenizer: no token ends an answer; set tokenizer.eos_token or end turns in the template")
        answer = self.probe.skeleton(_plain("user", "assistant"), False).slots[-1]
        opening = self.encoder.structure(self.prompt, head=False)[0] if self.prompt else ended
        self.answer = (answer, self.head_after(opening))

    def head_after(self, ids: Sequence[int], start: bool = False) -> bool:
        """Does a prefix space belong after these ids? ``start``: nothing at all stands before."""
        if not len(ids):
            return start
        return int(ids[-1]) in self.encoder.added and not self.encoder.first_only

    # ------------------------------------------------------------------ plans

    def _build(self, shape: Shape, generation_prompt: bool, mode: str) -> Plan:
        skeleton = self.probe.skeleton(shape, generation_prompt)
        parts: list[Piece | Place | None] = []
        control_message, head = -1, True
        for k, text in enumerate(skeleton.pieces):
            before = skeleton.slots[k - 1] if k > 0 else None
            after = skeleton.slots[k] if k < len(skeleton.slots) else None
            cuts: int | None = None  # where the controls go in this piece
            if k == 0 and mode == "after-bos":
                cuts = len(self.bos)
            elif k == 0 and mode == "default-system":
                cuts = len(self.bos + self.system_header)
            elif mode == "system" and after and after.key == (0, "content") and None not in parts:
                cuts, control_message = len(text), 0
            attributes = _Attribution(self, shape, generation_prompt, text, before, after)
            start = 0
            # Cut where the generation prompt ends, so that no token joins what is asked with and what is answered.
            for stop in sorted({attributes.opened, len(text)} | (set() if cuts is None else {cuts})):
                if start < stop:
                    ids, offsets = self.encoder.structure(text[start:stop], head=head)
                    parts.append(attributes.piece(ids, [start + a for a, _ in offsets]))
                    head = self.head_after(ids, head)
                if stop == cuts:
                    parts.append(None)
                    head = not self.encoder.first_only
                start = stop
            if after:
                parts.append(Place(after, head))
                head = False
        assert not mode or None in parts, "the controls found no place"
        return Plan(skeleton, tuple(parts), control_message)


class _Attribution:
    """Which message each character of one structure piece belongs to, and whether an answer's training covers it.

    What the model itself writes in a turn is trained: from the end of the generation prompt (a template may open a
    reasoning block there) through the marker that ends the turn.

    opened  the character where the generation prompt of the answer after the piece ends; the piece's end, if it has none
    """

    def __init__(
        self, layout: Layout, shape: Shape, generation_prompt: bool, text: str, before: Slot | None, after: Slot | None
    ) -> None:
        self._layout, self._shape, self._before, self._after = layout, shape, before, after
        self._left = before.key[0] if before else -1
        self._right = after.key[0] if after else -1
        self._right_role = shape[self._right][0] if after else ("assistant" if generation_prompt else None)
        self._cut = self._border(text, generation_prompt)
        prompt = layout.prompt
        opened = text.rfind(prompt) if prompt and after and self._says(after) and self._left != self._right else -1
        self.opened = opened + len(prompt) if opened >= 0 else len(text)

    def _says(self, slot: Slot) -> bool:
        return self._shape[slot.key[0]][0] == "assistant" and slot.key[1] in _SAID

    def _border(self, text: str, generation_prompt: bool) -> int:
        """The character where the message after the piece begins."""
        layout, before, after = self._layout, self._before, self._after
        if before and after and self._left == self._right:
            return len(text)
        if before is None:
            header = layout._headers.get(self._right_role or "")
            return len(text) - len(header) if header and text.endswith(header) else len(layout.bos)
        if after is None and not generation_prompt:
            return len(text)
        try:
            pieces, keys = layout.probe.raw(self._shape[: self._left + 1], False)
        except UserError:  # the conversation up to here is none that the template accepts
            pieces, keys = ("",), ()
        if keys and keys[-1][0] == self._left and text.startswith(pieces[-1]):
            return len(pieces[-1])
        header = layout.prompt if after is None else layout._headers.get(self._right_role or "")
        return len(text) - len(header) if header and text.endswith(header) else 0

    def piece(self, ids: Sequence[int], starts: Sequence[int]) -> Piece:
        """``starts``: the character of the piece at which each id begins."""
        where = np.array(starts, np.int64).reshape(-1)
        left = where < self._cut
        left_role = ROLE_ID[self._shape[self._left][0]] if self._before else -1
        right_role = ROLE_ID[self._right_role] if self._right_role else -1
        owner = np.full(len(ids), -1, np.int32)
        span = np.full(len(ids), SPAN_ID["structure"], np.uint8)
        before, after = self._before, self._after
        if before and self._says(before):
            if after and self._left == self._right and self._says(after):  # between reasoning and answer
                owner[:], span[:] = self._left, SPAN_ID["think"]
            elif self._left != self._right or not after:
                end = next((k for k, token in enumerate(ids) if token in self._layout.encoder.guarded), None)
                if end is not None and ids[end] in self._layout.stop_ids:
                    owner[: end + 1] = self._left
        if after and self._says(after):
            opened = where >= self.opened
            owner[opened], span[opened] = self._right, SPAN_ID["think"]
        return Piece(
            np.array(ids, np.int32),
            np.where(left, self._left, self._right).astype(np.int32),
            np.where(left, left_role, right_role).astype(np.int8),
            span,
            owner,
        )


def _plain(*roles: str) -> Shape:
    return tuple((role, (("content", None),)) for role in roles)


def _configured_stops(tokenizer: Any) -> list[int]:
    """eos ids of ``generation_config.json`` beside a local tokenizer; some models end turns with several ids."""
    path = Path(str(getattr(tokenizer, "name_or_path", "") or "")) / "generation_config.json"
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); mend or remove it") from error
    stops = found if isinstance(found, list) else [found]
    return [stop for stop in stops if isinstance(stop, int)]
