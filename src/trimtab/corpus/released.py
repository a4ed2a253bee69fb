"""The data sets that 2504.16980 released, as sources by their id on the Hub: folders by score, Parquet of text, id, metadata.

    documents: [{hub: locuslab/fineweb_annotated, revision: d96861c, folders: [score_0, score_1, ...]}]
    ready: {refuse: {hub: locuslab/refuseweb, revision: a2cb2e1, folders: [score_4_refusal, score_5_refusal]}}

The names of folders and the revisions are those that users of the sets report; the number in a folder's name
becomes ``metadata["score"]`` or, of what was rewritten, ``metadata["from_score"]`` (``data.sources``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trimtab.data.sources import SourceConfig
from trimtab.errors import UserError


@dataclass(frozen=True, slots=True)
class Released:
    """One released set: the commit to read, its folders, the licence on its page."""

    revision: str
    folders: tuple[str, ...]
    licence: str = "ODC-BY"


RELEASED: dict[str, Released] = {
    "locuslab/fineweb_annotated": Released("d96861c", tuple(f"score_{level}" for level in range(6))),
    "locuslab/safeweb": Released("f73f213", tuple(f"score_{level}_rephrased" for level in (1, 3, 4, 5))),
    "locuslab/refuseweb": Released("a2cb2e1", ("score_4_refusal", "score_5_refusal")),
    "locuslab/moral_education": Released("579300f", ("score_4_morals", "score_5_morals")),
}
"""Hub id -> what is known of it (no folder of level 2 is reported for safeweb)."""


def released(hub: str, *, copy: Path | None = None, limit: int | None = None) -> SourceConfig:
    """The source of a released set: all its folders, from the Hub or from a downloaded ``copy``; ``limit`` rows in all."""
    if hub not in RELEASED:
        raise UserError(f"{hub!r} is no released set; known are {', '.join(RELEASED)}")
    known = RELEASED[hub]
    if copy is not None:
        return SourceConfig(path=str(copy), folders=known.folders, label=hub, limit=limit)
    return SourceConfig(hub=hub, revision=known.revision, folders=known.folders, limit=limit)


def licence_of(source: SourceConfig) -> str | None:
    """The licence of a source that says none of itself, where it is known."""
    known = RELEASED.get(source.hub or source.source_label)
    return known.licence if known is not None else None
