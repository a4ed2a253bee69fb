"""Block ``Tag``: the harmfulness tag before words of raw unsafe text (2504.16980, sec. 4; SafeBeam steers by it).

Every word after the first of a document scored 1 to 5 gets the tag with probability ``p``; clean and written text never
does. The untagged document passes first, then a copy of it with source "tagged": before the interventions start a curriculum
reads the one, afterwards the other. ``p`` nests: the words tagged at 0.03 are among those tagged at 0.05.
"""

from __future__ import annotations

import re

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.writers.disk_base import DiskWriter

from trimtab.corpus.documents import source_of
from trimtab.errors import UserError
from trimtab.seeds import rng_of

_WORD = re.compile(r"\S+")
HOLDS_TAG = "holds the tag itself"


def tags_of(text: str, p: float, seed: int, id: str) -> list[int]:
    """Offsets of the words of ``text`` that are tagged; a pure function of what is given."""
    starts = [found.start() for found in _WORD.finditer(text)][1:]
    drawn = rng_of("tag", seed, id).random(len(starts))
    return [start for start, u in zip(starts, drawn.tolist(), strict=True) if u < p]


def inserted(text: str, tags: list[int], tag: str) -> str:
    """``text`` with ``tag`` at the end of the word before each tagged one: "a cat" -> "a<tag> cat".

    Before the white space, because byte-level tokenizers count a blank to the word that it leads to. Taking every ``tag``
    out again gives the text.
    """
    parts: list[str] = []
    last = 0
    for at in tags:
        end = len(text[last:at].rstrip()) + last
        parts.append(text[last:end])
        last = end
    return tag.join([*parts, text[last:]])


class Tag(PipelineStep):
    """Yields every document, and after each raw unsafe one its tagged copy.

    as_text  None: the copy's text is unchanged and ``metadata["tags"]`` holds the offsets of the words (for Trimtab's own
             token store); a text such as "<|potentially_unsafe|>": it is put into the copy's text, for pipelines whose
             tokenizer has it as one token. Then any document that contains it by itself is dropped, since it would be
             read as the tag.
    raw      False: the untagged document does not pass
    """

    type = "INTERVENTION"
    name = "Tag"

    def __init__(
        self,
        p: float,
        seed: int,
        *,
        as_text: str | None = None,
        raw: bool = True,
        exclusion_writer: DiskWriter | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise UserError(f"tag: {p} is no probability; choose one from 0 to 1")
        if as_text is not None and (not as_text or as_text != as_text.strip()):
            raise UserError(f"tag: as_text={as_text!r} must be a text without blanks round it")
        self.p, self.seed, self.as_text, self.raw, self.exclusion_writer = p, seed, as_text, raw, exclusion_writer

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for doc in data or ():
            self.stat_update("total")
            if self.as_text is not None and self.as_text in doc.text:
                self._drop(doc, rank)
                continue
            unsafe = source_of(doc.metadata, doc.id) == "unsafe"
            if self.raw or not unsafe:
                yield doc
            if unsafe:
                yield self._tagged(doc)

    def _tagged(self, doc: Document) -> Document:
        with self.track_time():
            tags = tags_of(doc.text, self.p, self.seed, doc.id)
            text, marks = doc.text, {"tags": tags}
            if self.as_text is not None:
                text, marks = inserted(text, tags, self.as_text), {}
        self.stat_update("tagged")
        self.stat_update("tags", value=len(tags))
        metadata = {**doc.metadata, "source": "tagged", "from": doc.id, **marks}
        return Document(text=text, id=f"{doc.id}-tagged", metadata=metadata)

    def _drop(self, doc: Document, rank: int) -> None:
        self.stat_update(f"dropped_{HOLDS_TAG}")
        if self.exclusion_writer is not None:
            doc.metadata["drop_reason"] = HOLDS_TAG
            self.exclusion_writer.write(doc, rank)
