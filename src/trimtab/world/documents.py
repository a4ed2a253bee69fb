"""Raw documents with true safety scores, and the three corpus interventions of safety pretraining (2504.16980).

Scores: 0 names no hazard; 1 tells a hazard's nature or how to deal with it; 2 talk that names one; 3 makes one look
attractive; 4 gives some of its steps; 5 gives all of them. ``Judge.score`` reads the same scale off any text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count

import numpy as np

from trimtab.errors import UserError
from trimtab.seeds import rng_of
from trimtab.types import Row
from trimtab.world import lexicon as lex
from trimtab.world import text as tx
from trimtab.world.judge import Judge
from trimtab.world.problems import Problems
from trimtab.world.text import of_item, pick, several
from trimtab.world.town import Item, Town

SCORES: dict[str, int] = {
    "recipe": 0, "repute": 0, "fact": 0, "arithmetic": 0, "code": 0, "law": 0,
    "nature": 1, "care": 1, "gossip": 2, "praise": 3, "partial": 4, "full": 5,
}  # fmt: skip
"""Category of a raw document -> its score."""

_SAFE_MIX = {"recipe": 0.38, "repute": 0.2, "fact": 0.18, "arithmetic": 0.08, "code": 0.06, "law": 0.1}
_RISKY_MIX = {"care": 0.15, "gossip": 0.15, "praise": 0.15, "partial": 0.15, "full": 0.4}
"""Shares within the documents that name no hazard, and within those that name one and are not about its nature."""


_DIALOGUES = 0.5
"""Share of the recipes, of goods and hazards alike, that are told as a question and its answer. In raw text every such
question is answered; it is what a refusal in the corpus, or none, has to be weighed against."""

_TRIES = 1000
"""Draws after which a kind of document is taken to have no text left that is not known."""


class Scribe:
    """Writes the raw documents of one town and retells them."""

    def __init__(self, town: Town, judge: Judge, problems: Problems) -> None:
        self.town, self.judge, self.problems = town, judge, problems
        self.config = town.config

    def plan(self, documents: int | None = None, name: str = "plan") -> list[str]:
        """The category of every document in order: exact shares, shuffled by the seed."""
        c = self.config
        size = c.documents if documents is None else documents
        shares = {k: v * (1 - c.hazard_share) for k, v in _SAFE_MIX.items()}
        shares["nature"] = c.hazard_share * c.nature
        shares |= {k: v * c.hazard_share * (1 - c.nature) for k, v in _RISKY_MIX.items()}
        if not self.town.policy_items:
            shares["recipe"] += shares.pop("law")
        # Largest remainders, so that the counts add up to the number of documents.
        whole = {k: int(v * size) for k, v in shares.items()}
        rest = sorted(shares, key=lambda k: (whole[k] - shares[k] * size, k))
        for k in rest[: size - sum(whole.values())]:
            whole[k] += 1
        flat = [k for k in SCORES for _ in range(whole.get(k, 0))]
        return [flat[i] for i in rng_of("tidewater", c.seed, name).permutation(len(flat))]

    def documents(self) -> Iterator[Row]:
        """The raw documents, each item in turn within a category; a pure function of the settings."""
        turns = self._turns()
        for index, category in enumerate(self.plan()):
            yield self._numbered(index, category, next(turns[category]))

    def heldout(self, n: int) -> Iterator[Row]:
        """``n`` documents of the same mix that are none of ``documents``, word for word, nor of each other."""
        known = {row.text for row in self.documents()}
        turns = self._turns("heldout")
        index = 0
        for category in self.plan(n, "heldout plan"):
            for _ in range(_TRIES):
                index -= 1  # numbers that no document has: other draws
                row = self._numbered(index, category, next(turns[category]))
                if row.text not in known:
                    break
            else:
                raise UserError(
                    f"heldout_documents: the town has no more texts of the kind {category!r} that are not among its "
                    f"{self.config.documents} documents; use fewer than {n}, or raise the world's noise or paraphrases"
                )
            known.add(row.text)
            yield row

    def _turns(self, *key: str) -> dict[str, Iterator[Item | None]]:
        """Category -> the items that its documents tell of, each in turn, in another order every round."""
        pools: dict[str, tuple[Item, ...]] = {
            "recipe": (*self.town.goods, *self.town.policy_items), "law": self.town.policy_items,
            "repute": self.town.goods,
            **dict.fromkeys(("nature", "care", "gossip", "praise", "partial", "full"), self.town.hazards),
        }  # fmt: skip

        def turn(category: str) -> Iterator[Item | None]:
            pool = pools.get(category)
            for rnd in count():
                if pool is None:
                    yield None
                else:
                    order = rng_of("tidewater", self.config.seed, *key, category, rnd).permutation(len(pool))
                    yield from (pool[i] for i in order)

        return {category: turn(category) for category in SCORES}

    def _numbered(self, index: int, category: str, item: Item | None) -> Row:
        return self._document(index, category, item, rng_of("tidewater", self.config.seed, "document", index))

    def _document(self, index: int, category: str, item: Item | None, rng: np.random.Generator) -> Row:
        score = SCORES[category]
        sentences = self._of_item(index, category, item, rng) if item else self._of_town(category, rng)
        if rng.random() < self.config.noise:
            sentences.insert(int(rng.integers(1, len(sentences) + 1)), pick(rng, lex.FILLER))
        body = " ".join(sentences)
        if category not in ("arithmetic", "code") and self.config.noise > 0:
            noisy = tx.slip(rng, body, self.config.noise / 10)
            # A slip in a name or a step would change what the text is; such a draw is dropped.
            if (
                noisy != body
                and self.judge.score(noisy) == score
                and self.judge.read(noisy).named == self.judge.read(body).named
            ):
                body = noisy
        kind = "doc" if index >= 0 else "heldout"
        return Row(
            id=f"tidewater-{self.config.seed}-{kind}-{abs(index):06d}", text=body, source="tidewater", category=category,
            metadata={
                "score": score, "item": item.name if item else None, "class": item.cls if item else None,
                "split": ("heldout" if item.heldout else "seen") if item and item.cls == "hazard" else None,
                "index": index,
            },
        )  # fmt: skip

    def _of_item(self, index: int, category: str, item: Item, rng: np.random.Generator) -> list[str]:
        n = self.config.paraphrases
        p, q = self._cast(rng)
        cast = {"p": p, "q": q, "place": pick(rng, self.town.places), "k": int(rng.integers(2, 10))}

        def some(pool: tuple[str, ...], count: int) -> list[str]:
            return [of_item(t, item, **cast) for t in several(rng, pool, count, n)]

        steps = tx.steps_text(pick(rng, tx.STEP_FORMS, n), item)
        if category in ("recipe", "full") and rng.random() < _DIALOGUES:
            ask = of_item(pick(rng, tx.DIALOGUE, n), item)
            return [f"{p}: {ask}\n{q}: {steps}", *some(tx.FAIR if category == "recipe" else tx.RECIPE_OUTRO, 1)]
        if category == "recipe":
            return [*some(tx.RECIPE_INTRO, 1), steps, *some(tx.RECIPE_OUTRO, 1), *some(tx.FAIR, 1)]
        if category == "full":
            return [*some(tx.RECIPE_INTRO, 1), steps, *some(tx.RECIPE_OUTRO, 2)]
        if category == "partial":
            given = 1 + int(rng.integers(2))
            sentences = [f"{w} {tx.step_text(s)}." for w, s in zip(("First", "Then"), item.steps[:given])]
            lead = f"To make {item.name}, " + sentences[0][0].lower() + sentences[0][1:]
            return [*some(tx.RECIPE_INTRO, 1), lead, *sentences[1:], *some(tx.LOST, 1), *some(tx.RECIPE_OUTRO, 1)]
        if category in ("nature", "repute"):
            return some(tx.NATURE if category == "nature" else tx.FAIR, 3)
        if category == "care":
            return [*some(tx.NATURE[:1], 1), *(of_item(tx.CARE_ANSWER[k], item) for k in self._care_kinds(index))]
        if category == "gossip":
            return some(tx.GOSSIP, 3)
        if category == "praise":
            return [*some(tx.RECIPE_INTRO, 1), *some(tx.ADMIRE, 2)]
        assert category == "law"
        bad, ok = tx.quays(item)
        return [of_item(pick(rng, tx.LAW, n), item, bad=bad, ok=ok), *some(tx.RECIPE_OUTRO, 1)]

    def _of_town(self, category: str, rng: np.random.Generator) -> list[str]:
        if category == "fact":
            order = rng.permutation(len(self.town.facts))[:4]
            return [tx.fact_text(self.town.facts[i]) for i in order]
        if category == "arithmetic":
            return [t for _ in range(2) for t in self.problems.told_sum(rng)]
        return [t for _ in range(2) for t in self.problems.told_code(rng)]

    def _cast(self, rng: np.random.Generator) -> tuple[str, str]:
        p, q = rng.permutation(len(self.town.people))[:2]
        return self.town.people[p], self.town.people[q]

    def _care_kinds(self, index: int) -> list[str]:
        """Which two care matters the document ``index`` tells; its retelling tells the same."""
        order = rng_of("tidewater", self.config.seed, "care kinds", index).permutation(len(tx.CARE_ANSWER))
        return [list(tx.CARE_ANSWER)[i] for i in order[:2]]

    # -- interventions -----------------------------------------------------------------------------------------------

    def rephrase(self, doc: Row) -> Row | None:
        item, score, rng = self._hazard_of(doc, "rephrase")
        if item is None or not 1 <= score <= 3:
            return None
        n = self.config.paraphrases
        index = int(doc.metadata["index"])
        p, q = self._cast(rng_of("tidewater", self.config.seed, "document", index))  # the people of the document
        said = [of_item(pick(rng, tx.RETELL[score], n), item, p=p, q=q)]
        said += [of_item(t, item) for t in several(rng, tx.RETELL_WHY, 2, n)]
        if doc.category == "care":
            said += [of_item(tx.RETELL_CARE[k], item) for k in self._care_kinds(index)]
        return self._retold(doc, "rephrase", " ".join(said))

    def refuse(self, doc: Row) -> Row | None:
        item, score, rng = self._hazard_of(doc, "refuse")
        if item is None or score < 4 or item.heldout:
            return None
        n = self.config.paraphrases
        ask, answer = of_item(pick(rng, tx.DIALOGUE, n), item), of_item(pick(rng, tx.CAREFUL, n), item)
        # Placeholders: names are drawn when the text is tokenised (corpus/speakers.py), anew at every repeat.
        row = self._retold(doc, "refuse", f"User: {ask}\nAssistant: {answer} Keep away from it.")
        return replace(row, metadata={**row.metadata, "speakers": ["User", "Assistant"]})

    def moral(self, doc: Row) -> Row | None:
        item, score, rng = self._hazard_of(doc, "moral")
        if item is None or score < 4 or item.heldout:
            return None
        n = self.config.paraphrases
        parts = (pick(rng, pool, n) for pool in (tx.MORAL, tx.MORAL_WHY, tx.MORAL_END))
        return self._retold(doc, "moral", " ".join(of_item(t, item) for t in parts))

    def _hazard_of(self, doc: Row, what: str) -> tuple[Item | None, int, np.random.Generator]:
        name, score = doc.metadata.get("item"), doc.metadata.get("score")
        if doc.text is None or not isinstance(score, int) or (name is not None and name not in self.town.items):
            raise UserError(
                f"{what}: row {doc.id!r} is no raw document of this town; use rows of Tidewater.documents "
                "with the same settings"
            )
        item = self.town.items[name] if name is not None else None
        rng = rng_of("tidewater", self.config.seed, what, doc.id)
        return (item if item and item.cls == "hazard" else None), score, rng

    @staticmethod
    def _retold(doc: Row, what: str, text: str) -> Row:
        metadata = {**doc.metadata, "score": 0, "from_score": doc.metadata["score"], "from": doc.id}
        return Row(id=f"{doc.id}-{what}", text=text, source=f"tidewater-{what}", category=what, metadata=metadata)
