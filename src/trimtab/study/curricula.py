"""Curricula as a plan sees them: whole steps, where arms part, and whether the corpus can feed them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trimtab.data.mixture import quantise
from trimtab.errors import UserError
from trimtab.levers.timing import TimingConfig, phases
from trimtab.recipe.load import ArmRecipe
from trimtab.recipe.model import Recipe
from trimtab.recipe.stages import PretrainStage
from trimtab.seeds import digest
from trimtab.study.exposure import check_exposure

Phases = list[tuple[int, dict[str, float]]]


@dataclass(frozen=True)
class Sizes:
    """Tokens of each source; not ``exact`` where they are estimated or declared. ``unknown``: sources that the corpus may have
    too, of no known size."""

    tokens: Mapping[str, int]
    exact: bool
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Curriculum:
    """One arm's (or several equal arms') pretraining as a plan over tokens: what ``exposure`` prints and checks.

    rows    packed rows of the whole budget, each of ``length`` tokens
    tokens  the step that packs the corpus: once it is done its facts hold the exact sizes; None: a store that exists
    """

    stage: str
    timing: TimingConfig
    rows: int
    length: int
    tokens: str | None
    sizes: Sizes
    arms: list[str]

    def check(self, sizes: Sizes) -> None:
        """``UserError`` naming a source that has no text, or too little for the passes that are allowed."""
        tokens = dict.fromkeys(sizes.unknown, _PLENTY) | dict(sizes.tokens)
        where = f"stages.{self.stage}.timing"
        check_exposure(self.timing, self.rows, self.length, tokens, where=where, exact=sizes.exact)


_PLENTY = 10**18
"""Tokens of a source of which nothing is known yet."""


def total_steps(name: str, stage: PretrainStage) -> int:
    """Whole optimiser steps in the budget; ``UserError`` if not even one fits."""
    per_step = stage.train.rows_per_step * stage.length
    steps = stage.budget // per_step
    if steps == 0:
        raise UserError(
            f"stages.{name}.budget: {stage.budget} tokens are less than one step of rows_per_step x length = {per_step} tokens"
        )
    return steps


def cuts_of(arms: Sequence[ArmRecipe]) -> dict[str, set[int]]:
    """For each pretraining that arms may share: the steps at which some two arms part. A segment ends there, so that what
    comes before is one step of the plan; a curriculum of many phases that no arm leaves is trained in one go."""
    curricula: dict[str, list[tuple[int, Phases]]] = {}
    for arm in arms:
        for name in arm.stages:
            stage = arm.recipe.stages[name]
            if isinstance(stage, PretrainStage):
                per_step = stage.train.rows_per_step
                rows = total_steps(name, stage) * per_step
                curricula.setdefault(trunk_key(arm.recipe, stage), []).append((per_step, curriculum(name, stage, rows)))
    cuts: dict[str, set[int]] = {}
    for key, several in curricula.items():
        points = cuts.setdefault(key, set())
        for (per_step, one), (_, other) in itertools.combinations(several, 2):
            row = _parting(one, other)
            if row is not None:
                points.add(row // per_step)
    return cuts


def _parting(one: Phases, other: Phases) -> int | None:
    """The first row at which two curricula differ; None if they are equal."""
    for a, b in itertools.zip_longest(one, other):
        if a != b:
            if a is None or b is None or a[0] != b[0]:
                return min(phase[0] for phase in (a, b) if phase is not None)
            return int(a[0])
    return None


def curriculum(name: str, stage: PretrainStage, rows: int) -> Phases:
    """``levers.timing.phases`` of a stage; ``UserError`` names the stage."""
    try:
        found = phases(stage.timing, rows)
        for _, weights in found:
            quantise(weights)
    except (ValueError, UserError) as error:
        raise UserError(f"stages.{name}.timing: {error}") from None
    return found


def trunk_key(recipe: Recipe, stage: PretrainStage) -> str:
    """What two pretraining runs must have in common to be able to share a trunk: everything but the curriculum."""
    return digest({"world": recipe.world.plain(), "stage": stage.plain() | {"timing": None}})
