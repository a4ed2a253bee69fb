"""From scored documents to the five sources of a timing study (arXiv 2504.16980, sec. 3 and 7.1).

    score 0 -> clean    scores 1-5 -> unsafe (kept raw)    1-3 -> rephrase    4-5 -> refuse and moral

The writers of the interventions are passed in, so that Tidewater's templates and a chat model are the same to this file.
Every document that yields no intervention is counted with its reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from trimtab.errors import UserError
from trimtab.types import Row

SOURCES = ("clean", "unsafe", "rephrase", "refuse", "moral")
"""What a corpus holds: score-0 text; raw text scored 1-5; and the three interventions made from it."""

Writer = Callable[[Row], Row | None]


def split_sources(
    documents: Iterable[Row], *, rephrase: Writer, refuse: Writer, moral: Writer
) -> tuple[dict[str, list[Row]], Counter[str]]:
    """Sort documents into sources and write their interventions; returns (source -> rows, reason -> count).

    Documents carry ``metadata["score"]``, an integer 0..5 (``UserError`` otherwise).
    """
    sources: dict[str, list[Row]] = {name: [] for name in SOURCES}
    counts: Counter[str] = Counter()
    for document in documents:
        score = document.metadata.get("score")
        if not isinstance(score, int) or not 0 <= score <= 5:
            raise UserError(f"document {document.id!r}: metadata.score must be an integer from 0 to 5, not {score!r}")
        counts[f"score {score}"] += 1
        sources["clean" if score == 0 else "unsafe"].append(document)
        writers = (
            {"rephrase": rephrase} if 1 <= score <= 3 else {"refuse": refuse, "moral": moral} if score >= 4 else {}
        )
        for name, writer in writers.items():
            written = writer(document)
            if written is None:
                counts[f"{name}: nothing written"] += 1
            else:
                sources[name].append(written)
    return sources, counts
