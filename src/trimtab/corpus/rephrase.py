"""Block ``Rephrase``: documents scored 1 to 3 retold so that every sentence is safe (2504.16980, sec. 3.2)."""

from __future__ import annotations

from trimtab.corpus.config import Intervention
from trimtab.corpus.intervention import Rewrite


class Rephrase(Rewrite):
    """Yields, after each document of score 1 to 3, its retelling, with the style drawn for it (``prompts.STYLES``)."""

    name = "Rephrase"
    kind: Intervention = "rephrase"
