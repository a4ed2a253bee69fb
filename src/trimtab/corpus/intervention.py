"""What the three interventions share: choose documents, have them written, check, score again, pass on or drop.

A block passes every document on as it is and yields what was written of it right after it, with

    metadata["source"]      rephrase, refuse or moral
    metadata["from"], ["from_score"]      the raw document's id and score
    metadata["score"], ["scores"], ["score_reason"]      those of the written text, where it was scored

and the rest of the raw document's metadata (category, origin, licence). What is not written, or is of no use, is counted
as ``dropped_<reason>`` and goes to the exclusion writer with ``metadata["drop_reason"]``, as far as there is any text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.writers.disk_base import DiskWriter
from datatrove.utils.batching import batched

from trimtab.corpus.config import INTERVENTIONS, LEVELS, Intervention, Source
from trimtab.corpus.documents import score_of, source_of
from trimtab.corpus.prompts import NOTHING, SHORT
from trimtab.corpus.scorers import Scored, Scorer, check_names, score_all
from trimtab.corpus.writers import Writer, Written
from trimtab.errors import UserError

WORDS = 5
"""Fewest words of any written text (a chat model's must have more: ``prompts.WORDS``)."""
_OWN = (
    "score",
    "scores",
    "score_reason",
    "tags",
    "speakers",
    "style",
    "from",
    "from_score",
    "drop_reason",
    "token_count",
)
"""Metadata that belongs to one text and is not handed on to what is made of it."""


class Rewrite(PipelineStep):
    """Base of ``Rephrase``, ``Refuse`` and ``Moral``.

    writer    who writes
    scorers   who scores what was written; those that read metadata alone are left out; () for nobody
    accept    highest score that a written text may have
    batch     documents held at once
    """

    type = "INTERVENTION"
    kind: Intervention

    def __init__(
        self,
        writer: Writer,
        scorers: Sequence[Scorer] = (),
        *,
        accept: int = 0,
        batch: int = 256,
        exclusion_writer: DiskWriter | None = None,
    ) -> None:
        super().__init__()
        self.writer, self.accept, self.batch, self.exclusion_writer = writer, accept, batch, exclusion_writer
        self.scorers = [scorer for scorer in scorers if scorer.reads_text]
        if scorers:
            if not self.scorers:
                raise UserError(
                    "score: only metadata is read, and what is written has none; add a scorer that reads text, or set "
                    "rescore: false"
                )
            check_names(self.scorers)

    @property
    def reads(self) -> Source:
        """The source that it is made from."""
        return "unsafe"

    def takes(self, doc: Document) -> bool:
        """Whether the intervention is made from this document. ``UserError`` for one that has no score."""
        if source_of(doc.metadata, doc.id) != self.reads:
            return False
        # A refusal dialogue was made from the levels in question, also one that came ready and does not say from which.
        return self.reads in INTERVENTIONS or score_of(doc.metadata, doc.id) in LEVELS[self.kind]

    def checked(self, text: str) -> tuple[str, str]:
        """(the text in its proper form, why it is of no use or '')."""
        return text, SHORT if len(text.split()) < WORDS else ""

    def extra(self) -> dict[str, Any]:
        """Metadata of every document of this kind."""
        return {}

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        with self.exclusion_writer or nullcontext() as dropped:
            for batch in batched(data or (), self.batch):
                with self.track_time("batch"):
                    made = dict(self._made([doc for doc in batch if self.takes(doc)]))
                for doc in batch:
                    self.stat_update("total")
                    yield doc
                    if (new := made.get(id(doc))) is None:
                        continue
                    reason = new.metadata.get("drop_reason")
                    self.stat_update(f"dropped_{reason}" if reason else "written")
                    if reason is None:
                        self.update_doc_stats(new)
                        yield new
                    elif dropped is not None:
                        dropped.write(new, rank)

    def _made(self, chosen: list[Document]) -> Iterator[tuple[int, Document]]:
        """(id of the document object, what was written of it)."""
        if not chosen:
            return
        found: list[tuple[Written, str, str]] = []
        for written in self.writer.write(self.kind, chosen):
            text, reason = written.text, written.reason
            if not reason:
                text, reason = self.checked(text) if text.strip() else ("", NOTHING)
            found.append((written, text, reason))
        assert len(found) == len(chosen), "a writer gives one text per document"
        good = [text for _, text, reason in found if not reason]
        scored = iter(score_all(self.scorers, good) if self.scorers and good else [])
        for doc, (written, text, reason) in zip(chosen, found):
            marks = {**self.extra(), **written.metadata}
            if not reason and self.scorers:
                result, given = next(scored)
                marks |= {"score": result.score, "scores": given, "score_reason": result.reason}
                reason = self._verdict(result)
            yield id(doc), self._document(doc, text, {**marks, **({"drop_reason": reason} if reason else {})})

    def _verdict(self, result: Scored) -> str:
        if result.score is None:
            return f"no score after writing: {result.reason}"
        return f"still unsafe (score {result.score})" if result.score > self.accept else ""

    def _document(self, doc: Document, text: str, marks: dict[str, Any]) -> Document:
        raw = str(doc.metadata.get("from", doc.id))
        kept = {name: value for name, value in doc.metadata.items() if name not in _OWN}
        level = doc.metadata.get("from_score", doc.metadata.get("score"))
        own = {"source": self.kind, "from": raw, "from_score": level}
        return Document(text=text, id=f"{raw}-{self.kind}", metadata={**kept, **own, **marks})
