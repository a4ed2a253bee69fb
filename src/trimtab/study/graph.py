"""What a plan is made of: steps, each named by a hash, and the arms that go through them. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trimtab.recipe.model import Recipe
from trimtab.study.curricula import Curriculum


@dataclass(frozen=True)
class Step:
    """One piece of work. ``tokens`` are trained, or generated at most; ``flops`` follow from them."""

    id: str
    kind: str
    name: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    tokens: int
    flops: float
    shape: str

    @property
    def short(self) -> str:
        return f"{self.kind}-{self.id[:16]}"


@dataclass(frozen=True)
class Cell:
    """Where a stage stands in the grid of a panel (or in a row of it, for measurements without a decoder)."""

    stage: str
    model: str
    decoder: str | None = None


@dataclass(frozen=True)
class PlannedArm:
    """One arm at one seed: which step stands at the end of each of its stages, and all steps on the way."""

    id: str
    label: str
    group: str
    seed: int
    against: str | None
    settings: Mapping[str, Any]
    stages: Mapping[str, str]
    cells: Mapping[str, Cell]
    steps: tuple[str, ...]


@dataclass
class Plan:
    """Steps in an order in which each follows its inputs, the arms made of them, and their curricula."""

    recipe: Recipe
    steps: dict[str, Step] = field(default_factory=dict)
    arms: list[PlannedArm] = field(default_factory=list)
    curricula: dict[str, Curriculum] = field(default_factory=dict)

    def arms_of(self, step_id: str) -> list[PlannedArm]:
        return [arm for arm in self.arms if step_id in arm.steps]

    def unshared(self) -> list[Step]:
        """The steps as they would be trained if every arm did all of its own."""
        return [self.steps[step] for arm in self.arms for step in arm.steps]
