"""What the blocks know of a document: its score, and which of the five sources it belongs to. Free of DataTrove."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast

from trimtab.corpus.config import SOURCES, Source
from trimtab.errors import UserError


class Document(Protocol):
    """What is used of a DataTrove document."""

    text: str
    id: str
    metadata: dict[str, Any]


def score_of(metadata: Mapping[str, Any], id: str) -> int:
    """The document's score. ``UserError`` where there is none: the block that scores must come first."""
    score = metadata.get("score")
    if type(score) is not int or not 0 <= score <= 5:
        raise UserError(
            f"document {id!r}: metadata.score must be an integer from 0 to 5, not {score!r}; score it first"
        )
    return score


def source_of(metadata: Mapping[str, Any], id: str) -> Source:
    """``metadata["source"]`` where it is one of ours, else "clean" for score 0 and "unsafe" for 1 to 5."""
    source = metadata.get("source")
    if source in SOURCES:
        return cast(Source, source)
    return "clean" if score_of(metadata, id) == 0 else "unsafe"
