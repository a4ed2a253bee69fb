"""Block ``Score``: a score from 0 to 5 for every document, and a source by it (2504.16980, sec. 3.1).

    metadata["score"]         the highest of the scorers' scores
    metadata["scores"]        {scorer: score}
    metadata["score_reason"]  the words of the scorer who gave the highest
    metadata["source"]        "clean" for 0, "unsafe" for 1 to 5; what stood there before goes to metadata["origin"]

A document without a score is dropped and counted with its reason (``metadata["drop_reason"]``): a scorer that broke down
must not leave unsafe text among the clean.
"""

from __future__ import annotations

from collections.abc import Sequence

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers.disk_base import DiskWriter

from trimtab.corpus.config import SOURCES
from trimtab.corpus.scorers import Scored, Scorer, check_names, score_all

EMPTY = "empty text"


class Score(BaseFilter):
    """Scores documents, ``batch`` at a time; counts ``score_0`` ... ``score_5`` and ``dropped_<reason>``."""

    name = "Score"

    def __init__(
        self, scorers: Sequence[Scorer], *, batch: int = 256, exclusion_writer: DiskWriter | None = None
    ) -> None:
        super().__init__(exclusion_writer, batch_size=batch)
        check_names(scorers)
        self.scorers = list(scorers)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        return self.filter_batch([doc])[0]

    def filter_batch(self, batch: list[Document]) -> list[bool | tuple[bool, str]]:
        worded = [doc for doc in batch if doc.text.strip()]
        texts, metadata = [doc.text for doc in worded], [doc.metadata for doc in worded]
        rows = score_all(self.scorers, texts, metadata) if worded else []
        kept = {id(doc): self._mark(doc, scored, given) for doc, (scored, given) in zip(worded, rows)}
        return [kept[id(doc)] if id(doc) in kept else self._drop(doc, EMPTY) for doc in batch]

    def _mark(self, doc: Document, scored: Scored, given: dict[str, int]) -> bool | tuple[bool, str]:
        doc.metadata["scores"] = given
        if scored.score is None:
            return self._drop(doc, f"no score: {scored.reason}")
        origin = doc.metadata.get("source")
        if origin is not None and origin not in SOURCES:
            doc.metadata.setdefault("origin", origin)
        doc.metadata |= {
            "score": scored.score,
            "score_reason": scored.reason,
            "source": "clean" if scored.score == 0 else "unsafe",
        }
        self.stat_update(f"score_{scored.score}")
        return True

    @staticmethod
    def _drop(doc: Document, reason: str) -> tuple[bool, str]:
        doc.metadata.pop("score", None)
        doc.metadata["drop_reason"] = reason
        return False, reason
