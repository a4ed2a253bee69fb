"""What planning an arm's stages shares: what has been planned so far, how a model is named, and how a step is added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal

from trimtab.data.sources import source_identity
from trimtab.errors import UserError
from trimtab.evaluate.panel import TaskConfig
from trimtab.levers.prefix import PrefixConfig
from trimtab.models.config import BuildConfig, LoadConfig
from trimtab.models.load import identity
from trimtab.recipe.model import Recipe
from trimtab.recipe.stages import ChatSource, ModelRef
from trimtab.study.graph import Cell, Plan, Step
from trimtab.study.naming import name_of
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import Tidewater


class Building:
    """One arm under way; an equal step that is in the plan already is used again."""

    def __init__(self, plan: Plan, recipe: Recipe, arm: str, seed: int, cuts: Mapping[str, set[int]]) -> None:
        self.plan, self.recipe, self.arm, self.seed, self.cuts = plan, recipe, arm, seed, cuts
        self.ends: dict[str, str] = {}
        self.cells: dict[str, Cell] = {}
        self.used: list[str] = []
        self.tokenizers: dict[str, str] = {}
        self.pretrained: set[str] = set()
        self.spelt: dict[str, str | None] = {}  # stage -> where its tokenizer is, if it is there already
        self.shapes: dict[str, BuildConfig | LoadConfig] = {}
        self.openings: dict[str, PrefixConfig | None] = {}  # stage -> the prefix lever of the model that it makes

    def end_of(self, name: str, needed: str) -> str:
        if needed not in self.ends:
            raise UserError(f"stage {name!r} needs stage {needed!r}: list it in the arm group's 'stages' too")
        return self.ends[needed]

    def prompting(self, wanted: str, model: ModelRef) -> str:
        """``auto`` resolved: a model that was only pretrained knows no chat template."""
        if wanted != "auto":
            return wanted
        return "completion" if isinstance(model, str) and model in self.pretrained else "chat"

    def rows(
        self, path: str, parts: Sequence[ChatSource | TaskConfig], split: Literal["train", "eval"]
    ) -> list[dict[str, Any]]:
        """Parts of a data set or a panel as config, with the identity of what files and packages hold; ``UserError``
        that names the part, if the town has fewer requests than it asks for."""
        plain = []
        for number, part in enumerate(parts):
            if part.tidewater is not None:
                try:
                    _there(self.recipe.world, part.tidewater, part.n or 1, split, part.policy)
                except UserError as error:
                    raise UserError(f"{path}.{number}: {error}") from None
            content = {"content": source_identity(part.source)} if part.source else {}
            plain.append(part.plain() | content)
        return plain

    def model(self, name: str, ref: ModelRef) -> tuple[dict[str, Any], dict[str, str]]:
        """How a step's config and inputs name the model it starts from."""
        if isinstance(ref, str):
            return {}, {"model": self.end_of(name, ref)}
        return {"load": ref.plain(), "identity": identity(ref)}, {}

    def spelling(self, ref: ModelRef) -> str | None:
        """Where a model's tokenizer is loaded from; None for one that is made in the study."""
        return self.spelt[ref] if isinstance(ref, str) else ref.load

    def shape(self, ref: ModelRef) -> BuildConfig | LoadConfig:
        return self.shapes[ref] if isinstance(ref, str) else ref

    def step(
        self,
        kind: str,
        name: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, str],
        *,
        tokens: int = 0,
        flops: float = 0.0,
        shape: str = "",
    ) -> str:
        id = name_of(kind, config, inputs)
        self.plan.steps.setdefault(id, Step(id, kind, name, config, inputs, tokens, flops, shape))
        self.used.append(id)
        return id


@cache
def _town(world: TidewaterConfig) -> Tidewater:
    return Tidewater(world)


@cache
def _there(world: TidewaterConfig, kind: str, n: int, split: Literal["train", "eval"], policy: str | None) -> None:
    """``UserError`` if the town has no ``n`` requests of a kind; asked once however many arms ask."""
    _town(world).requests(kind, n, split=split, policy=policy)
