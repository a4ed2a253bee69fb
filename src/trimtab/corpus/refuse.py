"""Block ``Refuse``: documents scored 4 and 5 made into dialogues in which the request is declined (2504.16980, sec. 3.3).

The dialogue is stored with the placeholders "User:" and "Assistant:" at the start of its turns and ``metadata["speakers"]``;
``with_speakers`` puts names in their place when the text is tokenised.
"""

from __future__ import annotations

from typing import Any

from trimtab.corpus.config import Intervention
from trimtab.corpus.intervention import Rewrite
from trimtab.corpus.prompts import DIALOGUE
from trimtab.corpus.speakers import ASSISTANT, SPEAKERS, USER, read_dialogue, with_speakers

__all__ = ["SPEAKERS", "Refuse", "with_speakers"]


class Refuse(Rewrite):
    """Yields, after each document of score 4 or 5, its refusal dialogue; what is none is dropped as "not a dialogue"."""

    name = "Refuse"
    kind: Intervention = "refuse"

    def checked(self, text: str) -> tuple[str, str]:
        turns = read_dialogue(text)
        if turns is None:
            return text, DIALOGUE
        return super().checked("\n".join(f"{speaker}: {words}" for speaker, words in turns))

    def extra(self) -> dict[str, Any]:
        return {"speakers": [USER, ASSISTANT]}
