"""From a recipe to a plan: a DAG of steps, each named by the hash of its config, its code and its inputs.

Equal work is one step. Pretraining is cut wherever an arm's curriculum changes, so arms that read the same rows up to
some step share that trunk: a segment's identity holds only the part of the curriculum that it has seen. Torch-free, so
that planning and a rerun with nothing to do take a second.
"""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.recipe.load import ArmRecipe
from trimtab.recipe.model import Recipe
from trimtab.recipe.stages import (
    CorpusStage,
    DistillStage,
    DpoStage,
    GenerateStage,
    JudgeStage,
    PretrainStage,
    ScorerStage,
    SftStage,
    Stage,
)
from trimtab.study.curricula import cuts_of
from trimtab.study.graph import Cell, Plan, PlannedArm, Step
from trimtab.study.measuring import Measuring
from trimtab.study.training import Training

__all__ = ["Cell", "Plan", "PlannedArm", "Step", "make_plan"]


def make_plan(recipe: Recipe, arms: Sequence[ArmRecipe]) -> Plan:
    """The plan of a recipe; ``UserError`` for a schedule that cannot be, before anything is done."""
    plan = Plan(recipe)
    cuts = cuts_of(arms)
    for arm in arms:
        for seed in recipe.seeds:
            builder = _Arm(plan, arm.recipe, _at_seed(arm.id, seed, recipe), seed, cuts)
            for name in arm.stages:
                builder.add(name, arm.recipe.stages[name])
            plan.arms.append(
                PlannedArm(
                    id=_at_seed(arm.id, seed, recipe),
                    label=arm.label,
                    group=arm.group,
                    seed=seed,
                    against=_at_seed(arm.against, seed, recipe) if arm.against else None,
                    settings=arm.settings,
                    stages=builder.ends,
                    cells=builder.cells,
                    steps=tuple(dict.fromkeys(builder.used)),
                )
            )
    for one in plan.curricula.values():
        one.check(one.sizes)
    return plan


def _at_seed(arm: str, seed: int, recipe: Recipe) -> str:
    return arm if len(recipe.seeds) == 1 else f"{arm}@{seed}"


class _Arm(Training, Measuring):
    """Walks one arm's stages and adds their steps to the plan."""

    def add(self, name: str, stage: Stage) -> None:
        match stage:
            case ScorerStage():
                end = self.scorer(name, stage)
            case CorpusStage():
                end = self.corpus(name, stage)
            case PretrainStage():
                end = self.pretrain(name, stage)
            case SftStage():
                end = self.sft(name, stage)
            case DpoStage():
                end = self.dpo(name, stage)
            case DistillStage():
                end = self.distill(name, stage)
            case GenerateStage():
                end = self.generate(name, stage)
            case JudgeStage():
                end = self.judge(name, stage, self.end_of(name, stage.answers))
            case _:
                return self.grid(name, stage)
        self.ends[name] = end
