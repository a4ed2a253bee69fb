"""Who writes the interventions: Tidewater's templates, or a chat model; and what a chat model will cost.

A writer gets documents and gives one ``Written`` for each, in order: a text, or none and why. It judges the form of what it
writes (too short, not an article); what the text says is scored again by the block that asked for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

from trimtab.corpus import prompts
from trimtab.corpus.chat import Chat, EndpointChat, Reply
from trimtab.corpus.config import INTERVENTIONS, LEVELS, EndpointWriter, Intervention, ModelWriter
from trimtab.corpus.config import Writer as WriterConfig
from trimtab.corpus.documents import Document, score_of
from trimtab.corpus.lazy import Lazy
from trimtab.corpus.windows import windows
from trimtab.errors import UserError
from trimtab.seeds import digest, seed_of
from trimtab.types import Message, Row
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import Tidewater

NO_ANSWER, CUT = "no answer", "cut off at max_tokens"


@dataclass(frozen=True, slots=True)
class Written:
    """What was written of one document. With a ``reason`` it is of no use, and ``text`` is what there is of it.

    metadata  what belongs on the written document beside its origin
    """

    text: str
    reason: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


class Writer(Protocol):
    """One who writes. ``moral_from``: articles are made from the raw document, or from its refusal dialogue."""

    identity: str
    moral_from: Literal["unsafe", "refuse"]

    def write(self, kind: Intervention, documents: Sequence[Document]) -> Iterator[Written]: ...


def make_writer(
    config: WriterConfig | None,
    *,
    world: TidewaterConfig,
    seed: int,
    work: Path | None = None,
    chat: Chat | None = None,
) -> Writer | None:
    """The writer that the settings describe; None where nobody writes.

    work  where an endpoint's answers are kept, so that a killed run asks nothing twice
    chat  the loaded model of kind "model"
    """
    if config is None:
        return None
    if isinstance(config, EndpointWriter):
        chat = EndpointChat(config.endpoint, work)
    elif not isinstance(config, ModelWriter):
        return TidewaterWriter(world)
    if chat is None:
        raise UserError("write: kind 'model' needs its model loaded; run it from a recipe")
    return ChatWriter(chat, config.max_tokens, config.temperature, config.window, seed)


class TidewaterWriter(Lazy):
    """Tidewater's templates; for documents of that town, whose metadata says what each is about."""

    moral_from: Literal["unsafe", "refuse"] = "unsafe"

    def __init__(self, world: TidewaterConfig) -> None:
        self.world = world
        self.identity = digest({"writer": "tidewater", "world": world.plain()})

    @cached_property
    def town(self) -> Tidewater:
        return Tidewater(self.world)

    def write(self, kind: Intervention, documents: Sequence[Document]) -> Iterator[Written]:
        make: Callable[[Row], Row | None] = getattr(self.town, kind)
        for doc in documents:
            if not {"item", "index"} <= doc.metadata.keys():
                raise UserError(
                    f"write: document {doc.id!r} is none of Tidewater's, whose templates know its own hazards alone; "
                    "choose another writer"
                )
            row = Row(id=doc.id, text=doc.text, category=doc.metadata.get("category"), metadata=doc.metadata)
            made = make(row)
            yield Written("", prompts.NOTHING) if made is None else Written(made.text or "", metadata={"score": 0})


class ChatWriter:
    """A chat model that writes as ``prompts`` asks. It is shown the first ``window`` characters of a document.

    seed  draws the style of a retelling, and goes, mixed with the document's id, into every call
    """

    moral_from: Literal["unsafe", "refuse"] = "refuse"

    def __init__(self, chat: Chat, max_tokens: int, temperature: float, window: int, seed: int) -> None:
        self.chat = chat
        self.max_tokens, self.temperature, self.window, self.seed = max_tokens, temperature, window, seed
        self.identity = digest({
            "writer": "chat", "chat": chat.identity, "prompts": prompts.VERSION, "max_tokens": max_tokens,
            "temperature": temperature, "window": window, "seed": seed,
        })  # fmt: skip

    def write(self, kind: Intervention, documents: Sequence[Document]) -> Iterator[Written]:
        asked = [self.prompt(kind, doc) for doc in documents]
        # 31 bits: some services take no larger seed.
        seeds = [seed_of("write", kind, self.seed, doc.id) & 0x7FFFFFFF for doc in documents]
        for reply, (_, style) in zip(self._replies([m for m, _ in asked], seeds), asked, strict=True):
            if reply.text is None:
                yield Written("", reply.reason)
                continue
            text = prompts.clean(reply.text)
            reason = CUT if reply.cut else prompts.flaw(kind, text)
            yield Written(text, reason, {"style": style} if style else {})

    def prompt(self, kind: Intervention, doc: Document) -> tuple[list[Message], str | None]:
        """What the model is asked about a document, and the style drawn for it."""
        style = prompts.style_of(self.seed, doc.id) if kind == "rephrase" else None
        return prompts.write_messages(kind, windows(doc.text, self.window)[0], style), style

    def _replies(self, asked: Sequence[Sequence[Message]], seeds: Sequence[int]) -> Iterator[Reply]:
        settings: dict[str, Any] = {"max_tokens": self.max_tokens, "temperature": self.temperature, "seeds": seeds}
        if isinstance(self.chat, EndpointChat):
            with closing(self.chat.ask(asked, **settings)) as replies:
                yield from replies
        else:
            for text in self.chat.write(asked, **settings):
                yield Reply(text, NO_ANSWER if text is None else "")


# -- what it will cost -------------------------------------------------------------------------------------------------

CHARS_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Cost:
    """What a chat model will be asked: an estimate at four characters a token, and an upper bound for what it writes.

    price  in the currency of ``price_in`` and ``price_out`` (per million tokens)
    """

    calls: int
    prompt_tokens: int
    completion_tokens: int
    price: float

    def __str__(self) -> str:
        price = f", at most {self.price:,.2f} by the prices given" if self.price else ""
        return (
            f"{self.calls:,} calls, about {self.prompt_tokens:,} prompt tokens and at most {self.completion_tokens:,} "
            f"written (an estimate: {CHARS_PER_TOKEN} characters a token){price}"
        )


def estimate_cost(
    config: EndpointWriter | ModelWriter,
    documents: Iterable[Document],
    *,
    kinds: Sequence[Intervention] = INTERVENTIONS,
    seed: int = 0,
) -> Cost:
    """The cost of writing ``kinds`` from scored documents, before anything is asked.

    The prompts are the real ones. Every answer is counted at ``max_tokens``, and the dialogue that an article is made from
    as half of that; answers kept by a run before are not taken off, further tries are not added.
    """
    writer = ChatWriter(_Nobody(), config.max_tokens, config.temperature, config.window, seed)
    calls = characters = 0
    for doc in documents:
        for kind in kinds:
            if score_of(doc.metadata, doc.id) not in LEVELS[kind]:
                continue
            shown: Document = doc
            if kind == "moral":
                dialogue = "x" * min(config.max_tokens * CHARS_PER_TOKEN // 2, config.window)
                shown = _Text(dialogue, doc.id, doc.metadata)
            calls += 1
            characters += sum(len(message["content"]) for message in writer.prompt(kind, shown)[0])
    prompt, written = math.ceil(characters / CHARS_PER_TOKEN), calls * config.max_tokens
    price = 0.0
    if isinstance(config, EndpointWriter):
        price = (prompt * config.price_in + written * config.price_out) / 1e6
    return Cost(calls, prompt, written, price)


@dataclass
class _Text:
    text: str
    id: str
    metadata: dict[str, Any]


class _Nobody:
    """A chat that is never asked."""

    identity = "nobody"

    def write(
        self, prompts: Sequence[Sequence[Message]], *, max_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> Iterator[str | None]:
        raise AssertionError("an estimate asks nothing")
