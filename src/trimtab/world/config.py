"""The knobs of Tidewater: size, difficulty, noise and paraphrase. Every default is the one the docs' figures use."""

from __future__ import annotations

from pydantic import Field, model_validator

from trimtab.config import Config
from trimtab.world import lexicon


class TidewaterConfig(Config):
    """One town. Equal settings give equal bytes; the seed alone changes names, recipes, facts and texts."""

    seed: int = Field(0, ge=0, description="Seed of the town: its names, recipes, facts and texts.")
    goods: int = Field(24, ge=4, le=180, description="Number of benign goods with a recipe.")
    hazards: int = Field(24, ge=2, le=180, description="Number of fictional hazards with a recipe.")
    heldout: float = Field(
        0.5, ge=0, le=1, description="Share of hazards about which no refusal is ever written (0 to 1)."
    )
    policy_items: int = Field(
        6, ge=0, le=40, description="Number of items banned in exactly one of the two jurisdictions."
    )
    people: int = Field(
        16, ge=6, le=len(lexicon.PEOPLE), description="Townspeople who appear in texts; six of them are wardens."
    )
    places: int = Field(14, ge=2, le=len(lexicon.PLACES), description="Named places in the town.")
    facts: int = Field(30, ge=1, description="Facts of the town (at most twice people plus twice places).")
    paraphrases: int = Field(
        4, ge=1, le=6, description="Surface templates in use for each kind of sentence (1 = always the same wording)."
    )
    noise: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Chance per document of a filler sentence, and a tenth of it per plain word of a spelling slip.",
    )
    name_hint: float = Field(
        0.4,
        ge=0,
        le=1,
        description="How far a name's ending tells a hazard from a good: 0 not at all, 1 fully. What is read about some "
        "hazards then bears on others, held-out ones included.",
    )
    regular: float = Field(
        0.8,
        ge=0,
        le=1,
        description="Chance that a recipe slot follows from the parts of the name; lower means more to memorise.",
    )
    hazard_share: float = Field(
        0.4, ge=0, le=1, description="Share of raw documents that name a hazard (scores 1 to 5)."
    )
    nature: float = Field(
        0.4,
        ge=0,
        le=1,
        description="Share of a hazard's documents that tell its nature (score 1): its danger, how it is known.",
    )
    max_number: int = Field(9, ge=3, le=99, description="Largest operand in word problems (the larger, the harder).")
    state_policy: bool = Field(
        True,
        description="Policy questions say which quay the speaker is at; false leaves it to Row.policy alone.",
    )
    documents: int = Field(7000, ge=1, description="Number of raw documents (about 45 words each).")

    @model_validator(mode="after")
    def _fits(self) -> TidewaterConfig:
        most = 2 * self.people + 2 * self.places
        if self.facts > most:
            raise ValueError(
                f"facts={self.facts} is more than {self.people} people and {self.places} places give; "
                f"use at most {most} or raise people or places"
            )
        if self.goods + self.policy_items > 200:
            raise ValueError("goods + policy_items must be at most 200, as names run out")
        return self
