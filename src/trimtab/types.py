"""The plain types that travel through the house (DESIGN, "A row's journey").

They hold data and no behaviour beyond (de)serialising, import nothing above ``seeds`` and stay torch-free, so that
every floor can speak them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, NotRequired, TypedDict

from trimtab.errors import UserError
from trimtab.seeds import digest

Role = Literal["system", "user", "assistant", "tool"]
Harm = Literal["benign", "harmful", "contrast"]
PrefixAt = Literal["response", "input"]
Refusal = Literal["full", "partial", "none"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")
HARMS: tuple[Harm, ...] = ("benign", "harmful", "contrast")

IGNORE = -100
"""The ignore index: a label of -100 is masked. Labels are never shifted in data; the loss shifts once."""

SPANS: tuple[str, ...] = ("structure", "control", "prompt", "prefix", "body", "think", "tag", "text", "pad")
"""What a token is. ``Rendered.span`` and ``Batch.span_id`` index this tuple.

structure: template markers; control: mode/policy ids; prompt: system, user, tool text; prefix / body: the opening and
the rest of an assistant message; think: a reasoning block; tag: harmfulness tag; text: pretraining text; pad: padding.
"""
SPAN_ID: dict[str, int] = {name: i for i, name in enumerate(SPANS)}


class Message(TypedDict):
    """One chat message. ``content`` is text and only text; structure is the renderer's."""

    role: Role
    content: str
    name: NotRequired[str]


@dataclass(frozen=True, slots=True)
class Row:
    """One example, prompt or document: exactly one of ``messages`` and ``text`` is set.

    harm      class of the request under ``policy``: benign, harmful, or contrast (safe, but sharing words with harmful)
    prefix    the opening of the last assistant message (its content starts with it, or its reasoning, or the answer after
              that), or with ``prefix_at="input"`` of the last user message before it
    prefix_at where the prefix is; None means "response"
    category  topic within the source (recipe, fact, hazard, chemical_biological, ...)
    metadata  everything else, JSON-ready
    """

    id: str
    messages: tuple[Message, ...] | None = None
    text: str | None = None
    source: str = ""
    mode: str | None = None
    policy: str | None = None
    category: str | None = None
    harm: Harm | None = None
    prefix: str | None = None
    prefix_at: PrefixAt | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.text is None):
            raise UserError(f"row {self.id!r}: exactly one of 'messages' and 'text' must be set")
        if self.prefix_at not in (None, "response", "input"):
            raise UserError(f"row {self.id!r}: prefix_at={self.prefix_at!r} must be 'response' or 'input'")

    def hash(self) -> str:
        """Content hash (hex): changes when anything the model can see or a judge uses changes."""
        return digest(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """JSON-ready dict; fields that are None or empty are left out."""
        data = asdict(self)
        data["messages"] = None if self.messages is None else [dict(m) for m in self.messages]
        data["metadata"] = dict(self.metadata)
        return {k: v for k, v in data.items() if v not in (None, {}, "")}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """Inverse of ``to_json``; a missing id, an unknown field or a malformed message is a ``UserError``."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise UserError(f"row {data.get('id')!r}: unknown field {unknown[0]!r}; put extra fields under 'metadata'")
        if not isinstance(data.get("id"), str):
            raise UserError("row without a string 'id'")
        values = dict(data)
        if values.get("messages") is not None:
            values["messages"] = tuple(_message(m, values["id"]) for m in values["messages"])
        return cls(**values)

    def with_answer(self, content: str, **changes: Any) -> Row:
        """This row with one assistant message appended (and any other field replaced)."""
        assert self.messages is not None, "with_answer needs a chat row"
        return replace(self, messages=(*self.messages, {"role": "assistant", "content": content}), **changes)


def _message(data: Any, row_id: str) -> Message:
    if not isinstance(data, Mapping) or data.get("role") not in ROLES or not isinstance(data.get("content"), str):
        raise UserError(f"row {row_id!r}: a message needs a 'role' (one of {', '.join(ROLES)}) and a text 'content'")
    unknown = sorted(set(data) - {"role", "content", "name"})
    if unknown:
        raise UserError(f"row {row_id!r}: unknown message field {unknown[0]!r}")
    return dict(data)  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class Generation:
    """One sampled answer to one row.

    key       sha256 of (model, mode, rendered prompt ids, sampling, seed, sample): a rerun recognises finished work
    ids       generated token ids, the end token excluded
    finish    "stop" (end token), "length" (max_new_tokens) or "short-circuit" (SafeBeam ended it); where nothing was
              generated "blocked", "too-long", "filtered" or "rejected" (``evaluate.targets``), and in imports "error" (the
              sample failed) or "unknown" (the tool does not say)
    """

    key: str
    row_id: str
    row_hash: str
    model: str
    mode: str | None
    sampling: Mapping[str, Any]
    seed: int
    sample: int
    ids: tuple[int, ...]
    text: str
    finish: str

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        data["ids"] = list(self.ids)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Generation:
        return cls(**{**data, "ids": tuple(data["ids"])})


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge says of one answer. A judge that cannot tell says ``unscored`` with a reason, never ``safe``.

    verdict       safe | unsafe | unscored
    refusal       full | partial | none (None when not judged)
    constructive  0 risk or violation, 1 safety-motivated refusal, 2 safe and constructive (2508.14904, sec. 4.4)
    correct       for arithmetic, code and facts: was the answer right
    judge         the judge's identity hash
    """

    verdict: Literal["safe", "unsafe", "unscored"]
    judge: str
    reason: str = ""
    refusal: Refusal | None = None
    constructive: Literal[0, 1, 2] | None = None
    correct: bool | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Result:
    """One figure of a report: a value with its interval and everything needed to read it.

    value, low, high  on ``range``; low/high bound the 95 % interval named by ``interval``
    n                 rows behind it (clusters, where rows repeat a prompt); unscored rows are counted apart
    direction         "higher" or "lower" is better, or "none"
    budget            for figures of attacks: the most model queries that any one prompt was given
    """

    metric: str
    value: float
    low: float
    high: float
    n: int
    interval: str = "wilson"
    direction: Literal["higher", "lower", "none"] = "none"
    range: tuple[float, float] = (0.0, 1.0)
    unscored: int = 0
    arm: str = ""
    stage: str = ""
    mode: str | None = None
    category: str | None = None
    seed: int | None = None
    budget: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
