"""Block ``Moral``: articles on why such requests are declined (2504.16980, sec. 3.4).

A chat model makes them out of the refusal dialogues, as the paper did, so the block stands after ``Refuse``; Tidewater's
templates make them out of the raw document.
"""

from __future__ import annotations

from trimtab.corpus.config import Intervention, Source
from trimtab.corpus.intervention import Rewrite


class Moral(Rewrite):
    """Yields an article after each refusal dialogue, or after each document of score 4 or 5 (``writer.moral_from``)."""

    name = "Moral"
    kind: Intervention = "moral"

    @property
    def reads(self) -> Source:
        return self.writer.moral_from
