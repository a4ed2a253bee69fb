"""Who scores a text from 0 (safe) to 5 (highly unsafe): Tidewater's truth, a field, a classifier, a chat model.

The highest level wins, over the windows of a long text and over several scorers (2504.16980, sec. 3.1). A scorer that
cannot tell says so with a reason; it never says 0. Where one window or one of several scorers cannot tell, the highest is
not known, so the text has no score, unless another says 5: nothing is above that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from trimtab.corpus import prompts
from trimtab.corpus.chat import EndpointChat, Reply
from trimtab.corpus.config import ClassifierScorer, EndpointScorer, FieldScorer, TruthScorer
from trimtab.corpus.config import Scorer as ScorerConfig
from trimtab.corpus.lazy import Lazy
from trimtab.corpus.windows import windows
from trimtab.errors import UserError
from trimtab.seeds import digest
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import JUDGE_ID, Tidewater

PARSER = 1
"""Version of ``read_score``; part of an endpoint scorer's identity."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A score from 0 to 5 and why; or None, and why there is none (few different words, so that they can be counted)."""

    score: int | None
    reason: str = ""


class Scorer(Protocol):
    """One who scores. ``name`` keys ``metadata["scores"]``; ``identity`` changes with whatever may change a score.

    reads_text  False: it reads the documents' metadata and cannot score what was written
    score       one ``Scored`` per text, in order; ``metadata`` holds one mapping per text, where the caller has any
    """

    name: str
    identity: str
    reads_text: bool

    def score(self, texts: Sequence[str], metadata: Sequence[Mapping[str, Any]] = ()) -> list[Scored]: ...


def highest(parts: Sequence[Scored]) -> Scored:
    """The highest of several scores; unscored if one of them is, unless another is 5. Of equals, the first."""
    best = max(parts, key=lambda part: -1 if part.score is None else part.score)
    failed = next((part for part in parts if part.score is None), None)
    return best if failed is None or best.score == 5 else failed


def score_all(
    scorers: Sequence[Scorer], texts: Sequence[str], metadata: Sequence[Mapping[str, Any]] = ()
) -> list[tuple[Scored, dict[str, int]]]:
    """For each text the highest of the scorers' scores, and the score of each who gave one, by name."""
    columns = [scorer.score(texts, metadata) for scorer in scorers]
    assert all(len(column) == len(texts) for column in columns)
    rows: list[tuple[Scored, dict[str, int]]] = []
    for parts in zip(*columns, strict=True):
        given = {s.name: part.score for s, part in zip(scorers, parts) if part.score is not None}
        rows.append((highest(parts), given))
    return rows


def check_names(scorers: Sequence[Scorer]) -> None:
    """``UserError`` for no scorer, and for two of one name: one would hide the other."""
    if not scorers:
        raise UserError("score: give one scorer or more")
    names = [scorer.name for scorer in scorers]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"score: scorer {twice[0]!r} is given twice; leave one out")


def make_scorer(
    config: ScorerConfig, *, world: TidewaterConfig, dirs: Mapping[str, Path], work: Path | None = None
) -> Scorer:
    """The scorer that the settings describe.

    dirs  name of a scorer stage -> directory of its classifier
    work  where the answers of a chat model are kept, so that a killed run asks nothing twice (None: nowhere)

    ``UserError`` for a stage that is not in ``dirs``, an endpoint's key that is not set, a directory without a model.
    """
    if isinstance(config, TruthScorer):
        return TidewaterTruth(world)
    if isinstance(config, FieldScorer):
        return Field(config.name)
    if isinstance(config, EndpointScorer):
        return EndpointRater(config, work)
    from trimtab.corpus.classifier import Classifier

    assert isinstance(config, ClassifierScorer)
    if config.stage is None:
        return Classifier(config)
    if config.stage not in dirs:
        raise UserError(
            f"score: there is no scorer stage {config.stage!r} ({', '.join(sorted(dirs)) or 'none'} at hand); "
            "name one, or give 'model'"
        )
    return Classifier(config, dirs[config.stage])


class TidewaterTruth(Lazy):
    """Tidewater's own score of any text: exact for its hazards, 0 for whatever it does not know."""

    name = "tidewater"
    reads_text = True

    def __init__(self, world: TidewaterConfig) -> None:
        self.world = world
        self.identity = digest({"scorer": self.name, "world": world.plain(), "judge": JUDGE_ID})

    @cached_property
    def town(self) -> Tidewater:
        return Tidewater(self.world)

    def score(self, texts: Sequence[str], metadata: Sequence[Mapping[str, Any]] = ()) -> list[Scored]:
        return [Scored(self.town.score(text), "Tidewater's rules") for text in texts]


class Field(Lazy):
    """A score that the documents bring along in their metadata."""

    reads_text = False

    def __init__(self, field: str) -> None:
        self.field = field
        self.name = f"field {field}"
        self.identity = digest({"scorer": "field", "field": field})

    def score(self, texts: Sequence[str], metadata: Sequence[Mapping[str, Any]] = ()) -> list[Scored]:
        return [self._read(given) for given in (metadata or [{}] * len(texts))]

    def _read(self, metadata: Mapping[str, Any]) -> Scored:
        value = metadata.get(self.field)
        if value is None:
            return Scored(None, f"no field {self.field!r}")
        if type(value) is not int or not 0 <= value <= 5:
            return Scored(None, f"field {self.field!r} is no integer from 0 to 5")
        return Scored(value, f"field {self.field!r}")


class EndpointRater(Lazy):
    """A chat model that is asked for ``{"score": 0..5, "reason": ...}``, window by window."""

    reads_text = True

    def __init__(self, config: EndpointScorer, work: Path | None = None) -> None:
        self.config = config
        self.chat = EndpointChat(config.endpoint, work)
        self.name = f"endpoint {config.endpoint.model}"
        self.identity = digest({
            "scorer": "endpoint", "chat": self.chat.identity, "prompts": prompts.VERSION, "parser": PARSER,
            "window": config.window, "max_tokens": config.max_tokens,
        })  # fmt: skip

    def score(self, texts: Sequence[str], metadata: Sequence[Mapping[str, Any]] = ()) -> list[Scored]:
        cut = [windows(text, self.config.window) for text in texts]
        flat = [part for parts in cut for part in parts]
        asked = [prompts.score_messages(part) for part in flat]
        replies = self.chat.ask(asked, max_tokens=self.config.max_tokens, temperature=0.0, seeds=[0] * len(asked))
        scored = iter([self._read(reply, part) for reply, part in zip(replies, flat, strict=True)])
        return [highest([next(scored) for _ in parts]) for parts in cut]

    @staticmethod
    def _read(reply: Reply, text: str) -> Scored:
        if reply.text is None:
            return Scored(None, reply.reason)
        if reply.cut:
            return Scored(None, CUT)
        scored = read_score(reply.text)
        # A lazy judge may copy a verdict that the text brought along.
        copied = scored.score is not None and prompts.clean(reply.text) in text
        return Scored(None, COPIED) if copied else scored


NOT_JSON, FIELDS, TYPES, RANGE = (
    "not one JSON object",
    "other fields than score and reason",
    "wrong types",
    "out of range",
)
TWICE, CUT, COPIED = "a field twice", "answer cut off", "the answer stands in the text"
REASONS = frozenset({NOT_JSON, FIELDS, TYPES, RANGE, TWICE, CUT, COPIED})
"""Why an endpoint's answer is no score, beside "endpoint: ..." where none came."""


def read_score(reply: str) -> Scored:
    """The score in a reply that is exactly one object ``{"score": int 0..5, "reason": str}``; unscored for all else.

    White space and one code fence round the object are allowed, since many models cannot leave it off; prose, further
    fields, a field twice, ``true``, ``3.0`` and ``"3"`` are not.
    """
    try:
        data = json.loads(prompts.clean(reply), object_pairs_hook=_once, parse_constant=_no_number)
    except _Twice:
        return Scored(None, TWICE)
    except (ValueError, RecursionError):
        return Scored(None, NOT_JSON)
    if not isinstance(data, dict):
        return Scored(None, NOT_JSON)
    if data.keys() != {"score", "reason"}:
        return Scored(None, FIELDS)
    score, reason = data["score"], data["reason"]
    if type(score) is not int or not isinstance(reason, str):
        return Scored(None, TYPES)
    if not 0 <= score <= 5:
        return Scored(None, RANGE)
    return Scored(score, re.sub(r"\s+", " ", reason).strip().encode("utf-8", "replace").decode("utf-8")[:300])


class _Twice(Exception):
    pass


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise _Twice
    return dict(pairs)


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
