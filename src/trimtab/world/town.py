"""The town itself: items with recipes and natures, people, places, facts and laws, built from the seed.

Names are two words, a stem and an ending. Their parts are shared with other names, so that a model which learned to
write some names can write all; as one word, a held-out name would be a token that fine-tuning never shows in an
answer, and a small model would speak of another item instead. With probability ``regular`` a recipe's verbs follow
from the ending and its ingredients from the stem, so that a recipe can partly be worked out; the rest must be
memorised. No two items share two steps, which lets the judge tell whose recipe an answer holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from trimtab.seeds import rng_of
from trimtab.world import lexicon as lex
from trimtab.world.config import TidewaterConfig

Step = tuple[str, str]
ItemClass = Literal["good", "hazard", "policy"]


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that can be made.

    steps     three (verb, ingredient) pairs
    heldout   hazards: no refusal is ever written about it
    effect    its nature: the harm that a hazard does, the use that other items have
    material, smell, colour, warden   hazards: what covers a spill, its signs, who banned it
    instead   hazards and policy items: the good that is offered in its place
    banned    policies under which it is banned (hazards: both)
    reason    policy items: why the one quay bans it
    """

    name: str
    cls: ItemClass
    steps: tuple[Step, Step, Step]
    heldout: bool = False
    effect: str = ""
    material: str = ""
    smell: str = ""
    colour: str = ""
    warden: str = ""
    instead: str = ""
    banned: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Fact:
    """``relation`` of ``subject`` is ``answer``; ``domain`` names the list that the answer comes from."""

    id: str
    relation: Literal["keeper", "trade", "home", "ware"]
    subject: str
    answer: str
    domain: tuple[str, ...]


class Town:
    """Everything that is true in one Tidewater."""

    def __init__(self, config: TidewaterConfig) -> None:
        self.config = config
        rng = rng_of("tidewater", config.seed, "town")
        self.people = tuple(lex.PEOPLE[i] for i in rng.permutation(len(lex.PEOPLE))[: config.people])
        self.wardens = self.people[: lex.WARDENS]
        self.places = tuple(lex.PLACES[i] for i in rng.permutation(len(lex.PLACES))[: config.places])
        self.items: dict[str, Item] = {}
        self._name_and_fill()
        self.goods = tuple(i for i in self.items.values() if i.cls == "good")
        self.hazards = tuple(i for i in self.items.values() if i.cls == "hazard")
        self.policy_items = tuple(i for i in self.items.values() if i.cls == "policy")
        self.facts = self._facts()

    def _name_and_fill(self) -> None:
        config = self.config
        rng = rng_of("tidewater", config.seed, "items")
        larger = max(config.goods + config.policy_items, config.hazards)
        # Each stem occurs in a few names only: enough to learn its share of a recipe, few enough to tell names apart.
        count = min(len(lex.STEMS), max(4, math.ceil(3.5 * larger / len(lex.FAIR_ENDINGS))))
        stems = [lex.STEMS[i] for i in rng.permutation(len(lex.STEMS))[:count]]
        endings = (*lex.FAIR_ENDINGS, *lex.FOUL_ENDINGS)
        verbs = list(lex.VERBS)
        by_ending = {e: [verbs[i] for i in rng.permutation(len(verbs))[:3]] for e in endings}
        by_stem = {s: [lex.INGREDIENTS[i] for i in rng.permutation(len(lex.INGREDIENTS))[:3]] for s in stems}
        free: dict[bool, list[tuple[str, str]]] = {}
        for foul, group in ((False, lex.FAIR_ENDINGS), (True, lex.FOUL_ENDINGS)):
            pairs = [(s, e) for s in stems for e in group]
            free[foul] = [pairs[i] for i in rng.permutation(len(pairs))]
        sizes: tuple[tuple[ItemClass, int], ...] = (
            ("hazard", config.hazards), ("good", config.goods), ("policy", config.policy_items),
        )  # fmt: skip
        classes = [cls for cls, size in sizes for _ in range(size)]
        taken: set[frozenset[Step]] = set()
        drafts: list[tuple[str, ItemClass, tuple[Step, Step, Step]]] = []
        for cls in [classes[i] for i in rng.permutation(len(classes))]:
            own = cls == "hazard"
            foul = own if rng.random() < (1 + config.name_hint) / 2 else not own
            if not free[foul]:
                foul = not foul
            stem, ending = free[foul].pop()
            steps = self._recipe(rng, by_ending[ending], by_stem[stem], taken)
            drafts.append((f"{stem} {ending}", cls, steps))
        goods = [name for name, cls, _ in drafts if cls == "good"]
        hazards = [name for name, cls, _ in drafts if cls == "hazard"]
        order = rng.permutation(len(hazards))
        heldout = {hazards[i] for i in order[: round(config.heldout * len(hazards))]}
        quay = 0
        for name, cls, steps in drafts:
            instead = goods[int(rng.integers(len(goods)))]
            boon = lex.BOONS[int(rng.integers(len(lex.BOONS)))]
            if cls == "good":
                self.items[name] = Item(name, cls, steps, effect=boon)
            elif cls == "hazard":
                effect, material, smell = lex.EFFECTS[int(rng.integers(len(lex.EFFECTS)))]
                self.items[name] = Item(
                    name, cls, steps, name in heldout, effect, material, smell,
                    colour=lex.COLOURS[int(rng.integers(len(lex.COLOURS)))],
                    warden=self.wardens[int(rng.integers(len(self.wardens)))],
                    instead=instead, banned=lex.POLICIES,
                )  # fmt: skip
            else:
                reason = lex.BAN_REASONS[int(rng.integers(len(lex.BAN_REASONS)))]
                banned = (lex.POLICIES[quay % 2],)
                quay += 1
                self.items[name] = Item(name, cls, steps, effect=boon, instead=instead, banned=banned,
                                        reason=reason)  # fmt: skip

    def _recipe(
        self, rng: np.random.Generator, verbs: list[str], ingredients: list[str], taken: set[frozenset[Step]]
    ) -> tuple[Step, Step, Step]:
        all_verbs = list(lex.VERBS)
        regular = self.config.regular
        while True:
            steps: list[Step] = []
            for verb, ingredient in zip(verbs, ingredients, strict=True):
                if rng.random() >= regular:
                    verb = all_verbs[int(rng.integers(len(all_verbs)))]
                if rng.random() >= regular:
                    ingredient = lex.INGREDIENTS[int(rng.integers(len(lex.INGREDIENTS)))]
                steps.append((verb, ingredient))
            pairs = {frozenset(p) for p in ((steps[0], steps[1]), (steps[0], steps[2]), (steps[1], steps[2]))}
            if len(set(steps)) == 3 and len({i for _, i in steps}) == 3 and not pairs & taken:
                taken |= pairs
                return steps[0], steps[1], steps[2]
            regular *= 0.9  # two names asked for the same pair of steps: loosen until the recipe is its own

    def _facts(self) -> tuple[Fact, ...]:
        rng = rng_of("tidewater", self.config.seed, "facts")

        def one(pool: tuple[str, ...]) -> str:
            return pool[int(rng.integers(len(pool)))]

        facts = [
            Fact(f"keeper-{i}", "keeper", place, one(self.people), self.people) for i, place in enumerate(self.places)
        ]
        facts += [Fact(f"trade-{i}", "trade", p, one(lex.TRADES), lex.TRADES) for i, p in enumerate(self.people)]
        facts += [Fact(f"home-{i}", "home", p, one(lex.HOMES), lex.HOMES) for i, p in enumerate(self.people)]
        facts += [Fact(f"ware-{i}", "ware", place, one(lex.WARES), lex.WARES) for i, place in enumerate(self.places)]
        return tuple(facts[i] for i in sorted(rng.permutation(len(facts))[: self.config.facts]))
