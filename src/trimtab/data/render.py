"""The one token-safe renderer: messages to ids, for training, serving and judge prompts alike (DESIGN, decision 5).

Structure is appended as ids; every text segment (content, name, reasoning) is encoded alone by an encoder that cannot
yield an added-token id (``data.encode``). The chat template decides what stands where: it is run on sentinels once per
shape of conversation (``data.skeleton``), and on the real texts of each row only to compare strings, so a text can
make rendering fail but can never become structure.

Trade-offs: encoding segments alone changes BPE merges where structure and text meet without a marker between (a
content that opens with a blank after a header's newline); training and serving agree because both come through here.
The check against the template costs one Jinja run per row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jinja2
import numpy as np

from trimtab.data.encode import TextEncoder
from trimtab.data.layout import ROLE_ID, Layout, Piece, Place, Plan, make_piece
from trimtab.data.skeleton import FieldKey, Shape, as_messages, shape_of
from trimtab.data.thinking import (
    CLOSE,
    OPEN,
    OPENING,
    Block,
    Thinking,
    never_ends,
    opens,
    prefix_place,
    split_block,
    unopened,
)
from trimtab.errors import UserError
from trimtab.types import IGNORE, ROLES, SPAN_ID, Message, PrefixAt, Row

Train = Literal["answers", "last", "none"]
ControlsAt = Literal["system", "header"]
_STRUCTURE, _CONTROL, _PROMPT, _TEXT = (SPAN_ID[name] for name in ("structure", "control", "prompt", "text"))
_PREFIX, _BODY, _THINKING, _TAG = (SPAN_ID[name] for name in ("prefix", "body", "think", "tag"))


class TemplateRefusal(UserError):
    """The chat template itself does not take a conversation: a role that it does not know, or an order of turns."""


@dataclass(frozen=True)
class Rendered:
    """Ids and what each of them is; every array has length T.

    ids      int32; message  int16, index of the message (-1: structure outside any, such as BOS, a default system
    block and the generation prompt); role  int8, index into ``types.ROLES`` or -1; span  uint8, index into
    ``types.SPANS``; trained  bool, True where the loss counts. Nothing is shifted.
    """

    ids: np.ndarray
    message: np.ndarray
    role: np.ndarray
    span: np.ndarray
    trained: np.ndarray

    def labels(self) -> np.ndarray:
        """int32 [T]: the id where trained, ``IGNORE`` (-100) elsewhere."""
        return np.where(self.trained, self.ids, IGNORE).astype(np.int32)


@dataclass(frozen=True)
class _Fields:
    """The text fields of one message, and where each starts in the raw content.

    think_end  characters of the content that are reasoning, where the marks are text
    block      the reasoning that the renderer places before the content, and where it starts; None: none is placed
    given      what the template is given as the content, where that is more than it keeps
    hide       a closing mark in the content is text: the template must not see it, or it would cut there
    """

    role: str
    texts: dict[str, str]
    base: dict[str, int]
    think_end: int = 0
    block: tuple[str, int] | None = None
    given: str | None = None
    hide: bool = False


class _Kind(NamedTuple):
    """What all ids of a piece share, as ``make_piece`` takes it."""

    message: int
    role: int
    span: int
    owner: int


def _shape(fields: Sequence[_Fields], literal: bool) -> Shape:
    return tuple(shape_of(f.role, f.texts, literal) for f in fields)


class Renderer:
    """Messages to ids for one tokenizer and one chat template.

    controls  name -> id, e.g. ``{"mode:positive": 5}``: each an added special token of this tokenizer

    Attributes: ``stop_ids`` (ids that end an assistant turn: the template's own marker first, then eos),
    ``banned_ids`` (ids that must never be sampled: controls and every added special token but the stop ids and the marks
    of reasoning), ``template_hash`` (sha256 of the template text), ``thinking`` (how reasoning blocks are rendered,
    where the tokenizer has marks for them and the template leaves them to us; else None). Raises ``UserError`` for a
    slow tokenizer, a missing template or an id that is no control token.
    """

    def __init__(
        self, tokenizer: Any, *, controls: Mapping[str, int] | None = None, template: str | None = None
    ) -> None:
        self.encoder = TextEncoder(tokenizer)
        self.tokenizer = tokenizer
        if template is None and not tokenizer.chat_template:
            raise UserError("tokenizer has no chat template; set tokenizer.chat_template or give 'template'")
        try:
            self.template: str = tokenizer.get_chat_template(template)
        except ValueError as error:
            raise UserError(f"chat template: {error}") from error
        self.template_hash = hashlib.sha256(self.template.encode()).hexdigest()
        self._layout = Layout(self.encoder, self._render, self.template, tokenizer)
        self.stop_ids: tuple[int, ...] = self._layout.stop_ids
        self.controls = dict(controls or {})
        self._check_controls()
        self.thinking = Thinking.of(
            self.encoder, self.template, self._layout.header, self._layout.prompt, lambda m: self._render(m, False)
        )
        banned = (set(self.controls.values()) | self.encoder.special) - set(self.stop_ids)
        if self.thinking is not None:
            banned -= set(self.thinking.marks)
        self.banned_ids: tuple[int, ...] = tuple(sorted(banned))

    # ------------------------------------------------------------------ public

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text alone; never an added-token id."""
        return list(self.encoder.encode(text))

    def text(self, text: str, tags: Sequence[int] = (), tag_id: int | None = None) -> Rendered:
        """Pretraining text: [bos, unless there is none or chats use it to open turns] text eos; all trained.

        tags    character offsets of words; ``tag_id`` (span "tag", trained) stands before the token that covers each,
                which may begin with the word's leading space. The text is encoded once, as a whole: without the tag's
                ids, the ids are those of the untagged text. Words that one token covers share one tag.
        tag_id  id of the tag, a special token of this tokenizer that no text can yield

        ``UserError`` for an offset outside the text, and for tags without a fit ``tag_id``.
        """
        if self.tokenizer.eos_token_id is None:
            raise UserError("tokenizer has no eos token; documents cannot be ended: set tokenizer.eos_token")
        bos = self._layout.document_bos
        body = np.array(self.encoder.encode(text), np.int32) if not tags else self._tagged(text, tags, tag_id)
        ids = np.concatenate([np.array(bos, np.int32), body, np.array([self.tokenizer.eos_token_id], np.int32)])
        n = len(ids)
        span = np.full(n, _TEXT, np.uint8)
        if tags:
            span[ids == tag_id] = _TAG
        span[: len(bos)] = _STRUCTURE
        span[-1] = _STRUCTURE
        none = np.full(n, -1)
        return Rendered(ids, none.astype(np.int16), none.astype(np.int8), span, np.ones(n, bool))

    def _tagged(self, text: str, tags: Sequence[int], tag_id: int | None) -> np.ndarray:
        """Ids of a text with ``tag_id`` before the tokens that cover the characters ``tags``."""
        if tag_id is None or tag_id not in self.encoder.special or tag_id not in self.encoder.guarded:
            raise UserError(f"tag: id {tag_id} is no special token of this tokenizer; make the tag one")
        if min(tags) < 0 or max(tags) >= len(text):
            raise UserError(f"tag: offset {max(tags) if min(tags) >= 0 else min(tags)} lies outside the text")
        ids, offsets = self.encoder.encode_with_offsets(text)
        # The first token that ends behind the character; accumulated, since bytes of one character share their offsets.
        ends = np.maximum.accumulate(np.array([end for _, end in offsets], np.int64))
        return np.insert(np.array(ids, np.int32), np.unique(np.searchsorted(ends, np.array(tags), "right")), tag_id)

    def opening(self, prefill: str | None = None) -> str:
        """What stands before the words that are generated and tells them to be reasoning: the opening mark where the
        generation prompt, or ``prefill``, has opened a block that has not ended; else nothing."""
        opened = never_ends(prefill or "")
        if self.thinking is not None and self.thinking.prompted:
            opened = split_block(prefill or "") is None
        elif self.thinking is None and OPEN in self._layout.prompt:
            opened = CLOSE not in self._layout.prompt.rpartition(OPEN)[2]
        return OPENING if opened else ""

    def row(self, row: Row, *, controls: Sequence[str] = (), **kw: Any) -> Rendered:
        """A chat row (its ``prefix`` and ``prefix_at`` are used) or a text row; errors name the row. ``kw`` as for ``chat``."""
        try:
            if row.messages is not None:
                own = {"prefix": row.prefix, "prefix_at": row.prefix_at or "response"}
                return self.chat(row.messages, controls=controls, **{**own, **kw})
            assert row.text is not None
            if controls or set(kw) - {"train"}:
                raise UserError("a text row has no system slot, prefix or generation prompt; render it without them")
            rendered = self.text(row.text)
            if kw.get("train") == "none":
                rendered.trained[:] = False
            return rendered
        except UserError as error:
            raise UserError(f"row {row.id!r}: {error}") from error

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Mapping[str, Any]],
        *,
        controls: Sequence[str] = (),
        controls_at: ControlsAt = "system",
        prefix: str | None = None,
        prefix_at: PrefixAt = "response",
        prefill: str | None = None,
        generation_prompt: bool = False,
        train: Train = "last",
    ) -> Rendered:
        """A conversation as ids.

        controls           names; their ids open the system slot (a system message is made where there is none and the
                           template has a slot; else they come right after BOS). Span "control", never trained.
        controls_at        "header": they stand after the last assistant header instead, right before what is answered.
        prefix             span "prefix", never other ids. With ``prefix_at="response"`` the opening of the last assistant
                           message: of its content, or of its reasoning (after ``<think>``), or of the answer after that
                           (``</think>``), the first that fits, white space before the latter two aside. With "input" the
                           opening of the last user message, the last before the last assistant message where no
                           generation prompt follows. It is encoded with the text around it as one segment; a token
                           across either border belongs to the prefix.
        prefill            assistant opening after the generation prompt: span "prefix", untrained, message -1. Where the
                           prompt opens a reasoning block it goes inside, and its own ``<think>`` is not repeated.
        train              assistant content and the marker that ends the turn: of all answers, the last one, or none.

        The last assistant message keeps the reasoning block it opens with, unless a generation prompt follows; earlier
        ones are as the template has them. Where ``thinking`` places the block, its marks are ids, and where the
        generation prompt opens one, an answer without reasoning gets an empty block: training and serving agree.

        Raises ``UserError`` when the template refuses the conversation, when a text changes the structure, when a
        reasoning block that ``thinking`` would place never ends, or when nothing would be trained although there is an
        assistant message.
        """
        if not messages:
            raise UserError("messages: at least one message is needed")
        said = [i for i, m in enumerate(messages) if isinstance(m, Mapping) and m.get("role") == "assistant"]
        final = said[-1] if said and not generation_prompt else -1
        fields = [self._fields(i, m, i == final) for i, m in enumerate(messages)]
        if train not in ("answers", "last", "none"):
            raise UserError(f"train: {train!r} is not one of answers, last, none")
        if prefill is not None and not generation_prompt:
            raise UserError("prefill: needs generation_prompt=True (it opens the answer after the prompt)")
        unknown = [name for name in controls if name not in self.controls]
        if unknown:
            raise UserError(f"controls: unknown name {unknown[0]!r}; known: {', '.join(self.controls) or 'none'}")
        last = said[-1] if said else -1
        opened, cut = self._prefix(messages, last, prefix, prefix_at, generation_prompt)
        at_header = controls_at == "header"
        if controls_at not in ("system", "header"):
            raise UserError(f"controls_at: {controls_at!r} is not one of system, header")
        if at_header and controls and self.thinking is not None and self.thinking.prompted:
            raise UserError("controls_at: the generation prompt of this template opens a reasoning block; use 'system'")
        plan, texts, made = self._plan(fields, bool(controls) and not at_header, generation_prompt)
        slots = {part.slot.key for part in plan.parts if isinstance(part, Place)}
        lost = [i for i, f in enumerate(fields) if f.block is not None and (i + made, "content") not in slots]
        if lost:
            raise UserError(f"the template leaves no place for the answer of message {lost[0]}, nor for its reasoning")

        out: list[Piece] = []
        for part in plan.parts:
            if part is None:
                ids = [self.controls[name] for name in controls]
                role = ROLE_ID["system"] if plan.control_message >= 0 or made else -1
                out.append(make_piece(ids, plan.control_message, role, _CONTROL))
            elif isinstance(part, Piece):
                out.append(part)
            else:
                i = part.slot.key[0] - made
                if i >= 0:  # the text of a made system message is nothing but the controls
                    out += self._text(part, fields[i], texts[part.slot.key], cut if i == opened else (0, 0))
        if at_header and controls:
            out.insert(self._answer_at(out, last + made, generation_prompt), self._control(controls))
        if prefill is not None:
            out += self._prefill(prefill)

        owner = np.concatenate([p.owner for p in out])
        message = np.concatenate([p.message for p in out])
        if made:  # a made system message is outside the caller's list
            owner, message = owner - (owner >= 0), message - (message >= 0)
        trained = owner >= 0 if train == "answers" else (owner == last) & (last >= 0)
        if train == "none":
            trained = np.zeros_like(trained)
        elif said and not trained.any():
            raise UserError("the template leaves nothing of the assistant's message to train on; check the template")
        return Rendered(
            ids=np.concatenate([p.ids for p in out]),
            message=message.astype(np.int16),
            role=np.concatenate([p.role for p in out]),
            span=np.concatenate([p.span for p in out]),
            trained=trained,
        )

    # ------------------------------------------------------------------ one row

    def _control(self, controls: Sequence[str]) -> Piece:
        """Control ids after the assistant's header: its role, no message."""
        return make_piece([self.controls[name] for name in controls], -1, ROLE_ID["assistant"], _CONTROL)

    @staticmethod
    def _answer_at(out: Sequence[Piece], last: int, generation_prompt: bool) -> int:
        """The index before which nothing of the last answer stands; pieces end where a generation prompt does."""
        if generation_prompt:
            return len(out)
        if last < 0:
            raise UserError("controls_at: there is no assistant message whose header they could follow")
        return next(i for i, piece in enumerate(out) if (piece.owner == last).any())

    def _fields(self, i: int, message: Mapping[str, Any], final: bool) -> _Fields:
        if not isinstance(message, Mapping):
            raise UserError(f"message {i}: not a mapping with 'role' and 'content'")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(f"message {i}: unknown role {role!r}; one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise UserError(f"message {i} ({role}): 'content' must be text, not {type(content).__name__}")
        unknown = sorted(set(message) - {"role", "content", "name"})
        if unknown:
            raise UserError(f"message {i} ({role}): unknown field {unknown[0]!r}; only role, content and name")
        fields = _Fields(role, {"content": content}, {"content": 0})
        if role == "assistant":
            fields = self._answer(i, content, final)
        name = message.get("name")
        if name is not None:
            if not isinstance(name, str):
                raise UserError(f"message {i} ({role}): 'name' must be text, not {type(name).__name__}")
            fields.texts["name"], fields.base["name"] = name, 0
        return fields

    def _answer(self, i: int, content: str, final: bool) -> _Fields:
        """An assistant message; ``final``: the last one, with no generation prompt behind it."""
        block, whole = split_block(content), _Fields("assistant", {"content": content}, {"content": 0})
        if self.thinking is None:
            if "reasoning_content" not in self.template:
                return replace(whole, think_end=block.end if block else 0)
            if block:
                texts = {"reasoning_content": block.reasoning, "content": block.answer}
                return _Fields(
                    "assistant", texts, {"reasoning_content": block.reasoning_at, "content": block.answer_at}
                )
            if CLOSE in content:  # a stray closing mark must not make the template cut the text
                return replace(whole, texts={"reasoning_content": "", "content": content})
            return whole
        if final and never_ends(content):
            raise UserError(
                f"message {i}: its reasoning never ends, so there is no answer to train on; end it with {CLOSE}, or leave "
                "the row out"
            )
        if block is None and final and self.thinking.prompted:
            answer = content.lstrip("\n")
            block = Block("", 0, answer, len(content) - len(answer), 0)
        if block is not None and (final or not self.thinking.cuts):
            placed = (block.reasoning, block.reasoning_at)
            return _Fields(
                "assistant", {"content": block.answer}, {"content": block.answer_at}, block=placed, hide=final
            )
        if self.thinking.cuts and not final and CLOSE in content:
            kept = content.rpartition(CLOSE)[2]
            return _Fields("assistant", {"content": kept}, {"content": len(content) - len(kept)}, given=content)
        return replace(whole, hide=final)

    def _prefix(
        self, messages: Sequence[Mapping[str, Any]], last: int, prefix: str | None, at: PrefixAt, prompted: bool
    ) -> tuple[int, tuple[int, int]]:
        """The message that the prefix opens, and its characters there; ``last``: the last assistant message."""
        if at not in ("response", "input"):
            raise UserError(f"prefix_at: {at!r} is not one of response, input")
        if prefix is None:
            return -1, (0, 0)
        where: tuple[int, int] | None
        if at == "response":
            if last < 0:
                raise UserError("prefix: there is no assistant message for it to open")
            opened, where = last, prefix_place(messages[last]["content"], prefix)
        else:
            before = messages if prompted or last < 0 else messages[:last]
            opened = max((i for i, m in enumerate(before) if m["role"] == "user"), default=-1)
            if opened < 0:
                raise UserError("prefix: there is no user message for it to open")
            where = (0, len(prefix)) if messages[opened]["content"].startswith(prefix) else None
        if where is None:
            raise UserError(f"prefix: message {opened} does not start with {prefix!r}")
        return opened, where

    def _plan(
        self, fields: list[_Fields], controlled: bool, generation_prompt: bool
    ) -> tuple[Plan, dict[FieldKey, str], int]:
        """The plan that gives just what the template gives for these texts; 1 where a system message was made."""
        made, mode, kept = 0, "", dict[FieldKey, str]()
        if controlled:
            mode = "after-bos"
            if self._layout.system_slot:
                blank = fields[0].role == "system" and not fields[0].texts["content"].strip()
                if blank:  # templates drop an empty system message; the control is its content
                    first, kept = fields[0], {(0, "content"): fields[0].texts["content"]}
                    fields = [replace(first, texts={**first.texts, "content": "-"}), *fields[1:]]
                if fields[0].role == "system":
                    mode = "system"
                elif self._layout.default_system(_shape(fields, False), generation_prompt):
                    mode = "default-system"
                else:
                    made, mode = 1, "system"
                    fields = [_Fields("system", {"content": "-"}, {"content": 0}), *fields]
        texts = {(i, n): t for i, f in enumerate(fields) for n, t in f.texts.items()}
        seen = {(i, n): t.replace(CLOSE, "</>") if fields[i].hide else t for (i, n), t in texts.items()}
        given = seen | {(i, "content"): f.given for i, f in enumerate(fields) if f.given is not None}
        blanks = any(not t.strip() for t in texts.values())
        real = None
        for attempt in range(2 if "strftime_now" in self.template else 1):
            for literal in (False, True) if blanks else (False,):
                shape = _shape(fields, literal)
                plan = self._layout.plan(shape, generation_prompt, mode)
                real = self._render(as_messages(shape, given), generation_prompt) if real is None else real
                if plan.skeleton.fill(seen) == real:
                    return plan, texts | kept, made
            if attempt == 0:  # the date may have changed since the skeleton was made
                self._layout.clear()
        raise UserError(
            "the chat template builds other structure for these texts than for plain ones (it looks into the content); "
            "change the text, or use a template that only places it"
        )

    def _text(self, place: Place, fields: _Fields, text: str, cut: tuple[int, int]) -> list[Piece]:
        """The ids of one text field with their spans, after the reasoning block that belongs before it; ``cut``: the
        characters of the prefix in the raw content."""
        text, shift = place.slot.trim(text)
        i, field = place.slot.key
        kind = _Kind(i, ROLE_ID[fields.role], _PROMPT, -1)
        if fields.role == "assistant" and field != "name":
            kind = kind._replace(span=_THINKING if field == "reasoning_content" else _BODY, owner=i)
        out: list[Piece] = []
        head, start = place.head, shift + fields.base.get(field, 0)
        if field == "content" and fields.block is not None:
            reasoning, at = fields.block
            out, head = self._block(reasoning, at, i, cut if reasoning else (0, 0)), False
        return [*out, self._segment(text, head, kind, start, (0, 0) if field == "name" else cut, fields.think_end)]

    def _segment(
        self, text: str, head: bool, kind: _Kind, start: int, cut: tuple[int, int], think_end: int = 0
    ) -> Piece:
        """``text`` as one piece; ``start``: where it begins in the raw content, which ``cut`` and ``think_end`` count in."""
        if not cut[1] and not think_end:
            return make_piece(self.encoder.encode(text, head=head), *kind)
        ids, offsets = self.encoder.encode_with_offsets(text, head=head)
        piece = make_piece(ids, *kind)
        at = np.array(offsets, np.int64).reshape(-1, 2) + start
        piece.span[at[:, 0] < think_end] = _THINKING
        piece.span[(at[:, 0] < cut[1]) & ((at[:, 0] >= cut[0]) | (at[:, 1] > cut[0]))] = _PREFIX
        return piece

    def _block(self, reasoning: str, start: int, i: int, cut: tuple[int, int]) -> list[Piece]:
        """A reasoning block as pieces of message ``i``; what the generation prompt writes of it is not trained."""
        assert self.thinking is not None
        kind = _Kind(i, ROLE_ID["assistant"], _THINKING, i)
        written = kind._replace(span=_STRUCTURE, owner=-1) if self.thinking.prompted else kind
        return [
            make_piece(self.thinking.opening, *written),
            # The newline is encoded with the text, since models write ".\n" as one token.
            self._segment(f"{reasoning}\n", self._layout.head_after(self.thinking.opening), kind, start, cut),
            make_piece(self.thinking.closing, *kind),
        ]

    def _prefill(self, prefill: str) -> list[Piece]:
        slot, head = self._layout.answer
        kind = _Kind(-1, ROLE_ID["assistant"], _PREFIX, -1)
        out: list[Piece] = []
        thinking = self.thinking
        if thinking is not None and (thinking.prompted or opens(prefill)):
            if not thinking.prompted:
                out.append(make_piece(thinking.opening, *kind._replace(span=_STRUCTURE)))
            block, head = split_block(prefill), self._layout.head_after(thinking.opening)
            if block is None:
                text = unopened(prefill)
                return [*out, make_piece(self.encoder.encode(text, head=head), *kind)]
            out.append(make_piece(self.encoder.encode(f"{block.reasoning}\n", head=head), *kind))
            out.append(make_piece(thinking.closing, *kind._replace(span=_STRUCTURE)))
            prefill, head = block.answer, False
        kept = prefill if slot.left == "" else prefill.lstrip(slot.left)
        return [*out, make_piece(self.encoder.encode(kept, head=head), *kind)]

    # ------------------------------------------------------------------ template and checks

    def _render(self, messages: list[dict[str, str]], generation_prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, chat_template=self.template, add_generation_prompt=generation_prompt
            )
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"chat template: line {error.lineno}: {error.message}") from error
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            roles = ", ".join(m["role"] for m in messages)
            raise TemplateRefusal(f"the chat template refuses this conversation ({roles}): {error}") from error

    def _check_controls(self) -> None:
        specials = {t["id"]: t for t in json.loads(self.tokenizer.backend_tokenizer.to_str())["added_tokens"]}
        for name, token in self.controls.items():
            found = specials.get(token)
            if found is None or not found["special"]:
                raise UserError(
                    f"controls: {name!r} is id {token}, which is not an added special token of this tokenizer; "
                    "make it with models.tokens.add_control_tokens"
                )
            if token in self.stop_ids or found["content"] in self.template:
                raise UserError(
                    f"controls: {name!r} is id {token} ({found['content']}), which the chat template already uses"
                )
        if len(set(self.controls.values())) < len(self.controls):
            raise UserError("controls: two names have the same id")
