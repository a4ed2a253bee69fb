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
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jinja2
import numpy as np

from trimtab.data.encode import TextEncoder
from trimtab.data.layout import ROLE_ID, Layout, Piece, Place, Plan, make_piece
from trimtab.data.skeleton import FieldKey, Shape, as_messages, shape_of
from trimtab.errors import UserError
from trimtab.types import IGNORE, ROLES, SPAN_ID, Message, Row

Train = Literal["answers", "last", "none"]
_THINK = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)
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
    """The text fields of one message, and where each starts in the raw content."""

    role: str
    texts: dict[str, str]
    base: dict[str, int]
    think_end: int = 0


def _shape(fields: Sequence[_Fields], literal: bool) -> Shape:
    return tuple(shape_of(f.role, f.texts, literal) for f in fields)


class Renderer:
    """Messages to ids for one tokenizer and one chat template.

    controls  name -> id, e.g. ``{"mode:positive": 5}``: each an added special token of this tokenizer

    Attributes: ``stop_ids`` (ids that end an assistant turn: the template's own marker first, then eos),
    ``banned_ids`` (ids that must never be sampled: controls and every added special token but the stop ids),
    ``template_hash`` (sha256 of the template text). Raises ``UserError`` for a slow tokenizer, a missing template or
    an id that is no control token.
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
        banned = (set(self.controls.values()) | self.encoder.special) - set(self.stop_ids)
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

    def row(self, row: Row, *, controls: Sequence[str] = (), **kw: Any) -> Rendered:
        """A chat row (its ``prefix`` is used) or a text row; errors name the row. ``kw`` as for ``chat``."""
        try:
            if row.messages is not None:
                return self.chat(row.messages, controls=controls, **{"prefix": row.prefix, **kw})
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
        prefix: str | None = None,
        prefill: str | None = None,
        generation_prompt: bool = False,
        train: Train = "last",
    ) -> Rendered:
        """A conversation as ids.

        controls           names; their ids open the system slot (a system message is made where there is none and the
                           template has a slot; else they come right after BOS). Span "control", never trained.
        prefix             opening of the last assistant message (its content starts with it): span "prefix". It is
                           encoded with the body as one segment; a token across the border belongs to the prefix.
        prefill            assistant opening after the generation prompt: span "prefix", untrained, message -1.
        train              assistant content and the marker that ends the turn: of all answers, the last one, or none.

        Raises ``UserError`` when the template refuses the conversation, when a text changes the structure, or when
        nothing would be trained although there is an assistant message.
        """
        fields = [self._fields(i, m) for i, m in enumerate(messages)]
        if not fields:
            raise UserError("messages: at least one message is needed")
        if train not in ("answers", "last", "none"):
            raise UserError(f"train: {train!r} is not one of answers, last, none")
        if prefill is not None and not generation_prompt:
            raise UserError("prefill: needs generation_prompt=True (it opens the answer after the prompt)")
        unknown = [name for name in controls if name not in self.controls]
        if unknown:
            raise UserError(f"controls: unknown name {unknown[0]!r}; known: {', '.join(self.controls) or 'none'}")
        answers = [i for i, f in enumerate(fields) if f.role == "assistant"]
        last = answers[-1] if answers else -1
        cut = self._prefix_end(messages, last, prefix)
        plan, texts, made = self._plan(fields, bool(controls), generation_prompt)

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
                    out.append(self._text(part, fields[i], texts[part.slot.key], cut if i == last else 0))
        if prefill is not None:
            out.append(self._prefill(prefill))

        owner = np.concatenate([p.owner for p in out])
        message = np.concatenate([p.message for p in out])
        if made:  # a made system message is outside the caller's list
            owner, message = owner - (owner >= 0), message - (message >= 0)
        trained = owner >= 0 if train == "answers" else (owner == last) & (last >= 0)
        if train == "none":
            trained = np.zeros_like(trained)
        elif answers and not trained.any():
            raise UserError("the template leaves nothing of the assistant's message to train on; check the template")
        return Rendered(
            ids=np.concatenate([p.ids for p in out]),
            message=message.astype(np.int16),
            role=np.concatenate([p.role for p in out]),
            span=np.concatenate([p.span for p in out]),
            trained=trained,
        )

    # ------------------------------------------------------------------ one row

    def _fields(self, i: int, message: Mapping[str, Any]) -> _Fields:
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
        texts, base, think_end = {"content": content}, {"content": 0}, 0
        if role == "assistant":
            opening = _THINK.match(content)
            if "reasoning_content" in self.template:
                if opening:
                    answer = content[opening.end() :].lstrip("\n")
                    texts = {"reasoning_content": opening[1].strip("\n"), "content": answer}
                    skipped = len(opening[1]) - len(opening[1].lstrip("\n"))
                    base = {"reasoning_content": opening.start(1) + skipped, "content": len(content) - len(answer)}
                elif "</think>" in content:  # a stray closing mark must not make the template cut the text
                    texts, base = {"reasoning_content": "", **texts}, {"reasoning_content": 0, **base}
            elif opening:
                think_end = opening.end()
        name = message.get("name")
        if name is not None:
            if not isinstance(name, str):
                raise UserError(f"message {i} ({role}): 'name' must be text, not {type(name).__name__}")
            texts["name"], base["name"] = name, 0
        return _Fields(role, texts, base, think_end)

    def _prefix_end(self, messages: Sequence[Mapping[str, Any]], last: int, prefix: str | None) -> int:
        if prefix is None:
            return 0
        if last < 0:
            raise UserError("prefix: there is no assistant message for it to open")
        if not messages[last]["content"].startswith(prefix):
            raise UserError(f"prefix: message {last} does not start with {prefix!r}")
        return len(prefix)

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
        blanks = any(not t.strip() for t in texts.values())
        real = None
        for attempt in range(2 if "strftime_now" in self.template else 1):
            for literal in (False, True) if blanks else (False,):
                shape = _shape(fields, literal)
                plan = self._layout.plan(shape, generation_prompt, mode)
                real = self._render(as_messages(shape, {**texts}), generation_prompt) if real is None else real
                if plan.skeleton.fill(texts) == real:
                    return plan, texts | kept, made
            if attempt == 0:  # the date may have changed since the skeleton was made
                self._layout.clear()
        raise UserError(
            "the chat template builds other structure for these texts than for plain ones (it looks into the content); "
            "change the text, or use a template that only places it"
        )

    def _text(self, place: Place, fields: _Fields, text: str, cut: int) -> Piece:
        """The ids of one text field with their spans; ``cut``: end of the prefix in the raw content."""
        text, shift = place.slot.trim(text)
        role, (i, field) = ROLE_ID[fields.role], place.slot.key
        if fields.role != "assistant" or field == "name":
            return make_piece(self.encoder.encode(text, head=place.head), i, role, _PROMPT)
        plain = _THINKING if field == "reasoning_content" else _BODY
        if not cut and not fields.think_end:
            return make_piece(self.encoder.encode(text, head=place.head), i, role, plain, i)
        ids, offsets = self.encoder.encode_with_offsets(text, head=place.head)
        piece = make_piece(ids, i, role, plain, i)
        start = np.array([a for a, _ in offsets], np.int64) + shift + fields.base[field]
        piece.span[start < fields.think_end] = _THINKING
        piece.span[start < cut] = _PREFIX
        return piece

    def _prefill(self, prefill: str) -> Piece:
        slot, head = self._layout.answer
        kept = prefill if slot.left == "" else prefill.lstrip(slot.left)
        return make_piece(self.encoder.encode(kept, head=head), -1, ROLE_ID["assistant"], _PREFIX)

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
