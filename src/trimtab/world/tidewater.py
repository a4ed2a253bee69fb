"""Tidewater, the sandbox world: one seeded fictional harbour town behind one door (docs/tidewater.md).

Everything is a pure function of the settings: equal settings give equal bytes. Nothing here imports torch. The rows
are those of ``trimtab.types``; the judge is exact and needs no more of a request than its metadata.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from trimtab.types import Row, Verdict
from trimtab.world.config import TidewaterConfig
from trimtab.world.documents import Scribe
from trimtab.world.judge import JUDGE_ID, Judge
from trimtab.world.lexicon import POLICIES
from trimtab.world.problems import Problems
from trimtab.world.requests import KINDS, MODES, Clerk
from trimtab.world.town import Town
from trimtab.world.wrappers import WRAPPERS, wrap

__all__ = ["JUDGE_ID", "KINDS", "MODES", "POLICIES", "WRAPPERS", "Tidewater", "TidewaterConfig"]

Split = Literal["train", "eval"]


class Tidewater:
    """One town: its documents, requests, answers, preference pairs, wrappers and judge."""

    def __init__(self, config: TidewaterConfig | None = None) -> None:
        self.config = config or TidewaterConfig()
        self.town = Town(self.config)
        self._judge = Judge(self.town)
        problems = Problems(self.town)
        self._scribe = Scribe(self.town, self._judge, problems)
        self._clerk = Clerk(self.town, problems)

    # -- raw text and its interventions (2504.16980) -------------------------------------------------------------------

    def documents(self) -> Iterator[Row]:
        """Raw text rows in a shuffled order, ``config.documents`` of them.

        ``metadata``: ``score`` (true safety score 0-5), ``item``, ``class`` (good, hazard, policy) and ``split`` (seen,
        heldout; None where no hazard is named). ``category``: one of ``documents.SCORES``.
        """
        return self._scribe.documents()

    def heldout_documents(self, n: int) -> list[Row]:
        """``n`` raw documents for measuring, not for training: drawn like ``documents``, in the same mix, from other random
        numbers; none is word for word one of ``documents``, or of each other. ``metadata`` as there.

        A smaller ``n`` is no beginning of a larger one. What a town says in few ways (its laws) is mostly known from
        ``documents``, so that the new texts of these kinds are those with a filler or a slip. ``UserError`` where a kind has no
        text left.
        """
        return list(self._scribe.heldout(n))

    def rephrase(self, doc: Row) -> Row | None:
        """A document of score 1-3 retold safely (score 0: it warns, every sentence alone does); None for other scores.

        Held-out hazards are retold too: a warning tells their nature and is no refusal.
        """
        return self._scribe.rephrase(doc)

    def refuse(self, doc: Row) -> Row | None:
        """A document of score 4-5 about a seen hazard as a dialogue that refuses; else None.

        Its speakers are the placeholders "User" and "Assistant" (``metadata["speakers"]``).
        """
        return self._scribe.refuse(doc)

    def moral(self, doc: Row) -> Row | None:
        """A document of score 4-5 about a seen hazard as an article on why the town refuses; else None."""
        return self._scribe.moral(doc)

    def score(self, text: str) -> int:
        """True safety score 0-5 of any text, by the judge's own rules (to re-score what an intervention returned)."""
        return self._judge.score(text)

    # -- requests and answers ------------------------------------------------------------------------------------------

    def requests(self, kind: str, n: int, *, split: Split = "train", policy: str | None = None) -> list[Row]:
        """The first ``n`` requests of a kind (``KINDS``): one user message each, ids unique and stable.

        Training and evaluation differ in wording, and in the numbers of sums and programs. ``policy`` narrows kind
        "policy" to one quay (None: both) and is written on the rows of every kind. ``metadata``: kind, class (benign,
        harmful, contrast: what the request is under its policy), item, truth or answer, split.

        Raises ``UserError`` for an unknown kind, split or policy, for held-out kinds of the training split, and when
        ``n`` is more than there are distinct requests (the message says how many).
        """
        return self._clerk.requests(kind, n, split, policy)

    def answer(self, request: Row, mode: str = "positive", *, style: str = "constructive") -> str:
        """The answer a mode gives (2508.14904, sec. 3.1), the same every time for a request's id.

        positive    harmless: the true answer; harmful: declines, says why by the item's nature, offers help (score 2)
        negative    complies always: a hazard's fictional steps (score 0)
        rejective   a short refusal always (score 1)

        ``style="refuse"`` makes the positive mode decline without offering help (score 1).
        """
        return self._clerk.answer(request, mode, style)

    def chats(
        self, kind: str, n: int, *, split: Split = "train", mode: str = "positive", policy: str | None = None,
        style: str = "constructive",
    ) -> list[Row]:  # fmt: skip
        """Requests with the mode's answer appended; ``row.mode`` is set and the id ends in it."""
        rows = self.requests(kind, n, split=split, policy=policy)
        return [replace(r.with_answer(self.answer(r, mode, style=style), mode=mode), id=f"{r.id}-{mode}") for r in rows]

    def preferences(
        self, kind: str, n: int, *, split: Split = "train", policy: str | None = None
    ) -> list[dict[str, Any]]:
        """``{"prompt", "chosen", "rejected"}`` as message lists, of the ``requests`` in their order; chosen is the positive
        answer.

        Rejected is the steps for a harmful request, a wrong answer for facts, sums and programs, and a refusal for the
        other harmless requests.
        """
        pairs: list[dict[str, Any]] = []
        for row in self.requests(kind, n, split=split, policy=policy):
            if row.harm == "harmful":
                rejected = self.answer(row, "negative")
            elif kind in ("fact", "arithmetic", "code"):
                rejected = self._clerk.wrong(row)
            else:
                rejected = self.answer(row, "rejective")
            assert row.messages is not None
            pairs.append({
                "prompt": [dict(m) for m in row.messages],
                "chosen": [{"role": "assistant", "content": self.answer(row)}],
                "rejected": [{"role": "assistant", "content": rejected}],
            })  # fmt: skip
        return pairs

    def wrap(self, request: Row, wrapper: str) -> Row:
        """The request inside one of ``WRAPPERS`` (see ``world/wrappers.py``); class, truth and judging stay the same."""
        return wrap(self.town, request, wrapper)

    def judge(self, request: Row, text: str) -> Verdict:
        """The exact verdict on ``text`` as the assistant's answer to ``request`` (rules: ``world/judge.py``).

        Only ``request.metadata`` is read, so it works after a JSON round trip. ``detail``: ``steps`` given, ``accuracy``
        (share of the item's true steps), ``helpful``, ``said`` (the number or word that answers a sum, program or fact) or
        ``no_answer``. A row that is no request of this town is a ``UserError``.
        """
        return self._judge.judge(request.metadata, text)
