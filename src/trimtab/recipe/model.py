"""The recipe: one YAML file that describes a study as stages x arms x seeds.

``stages`` are defined once; an arm group sets or sweeps any of their fields by dotted path, and says through which
stages its arms go. Equal steps of different arms are one step (see ``study.plan``).
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator, model_validator

from trimtab.config import Config
from trimtab.recipe.stages import NEEDS, CorpusStage, Stage
from trimtab.world.config import TidewaterConfig


class ArmGroup(Config):
    """Arms that are read together: the lever they pull, what they set, what they sweep."""

    name: str = Field(description="Name of the group; 'timing', 'prefix' and 'mode' are explained in the report.")
    set: dict[str, Any] = Field(default_factory=dict, description="Dotted path -> value, for all arms of the group.")
    sweep: dict[str, list[Any]] = Field(
        default_factory=dict,
        description="Dotted path below `stages` or `world` -> values; several paths make a product.",
    )
    stages: tuple[str, ...] | None = Field(None, description="Stages that these arms go through; null means all.")
    names: dict[str, tuple[str, ...]] = Field(
        default_factory=dict,
        description="Swept path -> a name for each of its values, for labels and tables (of a model's shape, say).",
    )
    labels: tuple[str, ...] | None = Field(
        None, description="A label for each arm, in sweep order; null names them by value."
    )
    baseline: int | str | dict[str, Any] = Field(
        0,
        description="What these arms are compared with: an arm of the group (0 = the first), the label of any arm, or "
        "{swept path: value}: for each arm, the one that has this value and is like it in all else.",
    )

    @field_validator("sweep")
    @classmethod
    def _values(cls, value: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for path, values in value.items():
            if not values:
                raise ValueError(f"{path} has no values to sweep")
        return value

    @model_validator(mode="after")
    def _labels_match(self) -> ArmGroup:
        size = 1
        for values in self.sweep.values():
            size *= len(values)
        if self.labels is not None and (len(self.labels) != size or len(set(self.labels)) != size):
            raise ValueError(f"'labels' needs {size} different labels, one for each arm of the sweep")
        for path, names in self.names.items():
            if path not in self.sweep:
                raise ValueError(f"'names' names the values of {path!r}, which is not swept")
            if len(names) != len(self.sweep[path]) or len(set(names)) != len(names):
                raise ValueError(
                    f"'names' of {path!r} needs {len(self.sweep[path])} different names, one for each value"
                )
        if isinstance(self.baseline, dict):
            if not self.baseline:
                raise ValueError("'baseline' is empty; give {swept path: value}")
            for path, value in self.baseline.items():
                if value not in self.sweep.get(path, ()):
                    raise ValueError(f"'baseline': {value!r} is no value that {path!r} is swept over")
        if isinstance(self.baseline, int) and not 0 <= self.baseline < size:
            raise ValueError(f"'baseline' is {self.baseline}, but the group has {size} arm(s), counted from 0")
        return self


class Recipe(Config):
    """A study. See docs/recipe.md for every field."""

    name: str = Field(description="Short name; the results go to runs/<name>.")
    title: str = Field("", description="Title of the report.")
    question: str = Field("", description="What the study asks, in a sentence or two.")
    notes: tuple[str, ...] = Field((), description="Sentences that the report prints as they are.")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="Every arm is run once per seed.")
    world: TidewaterConfig = Field(TidewaterConfig(), description="The sandbox world that Tidewater parts come from.")
    stages: dict[str, Stage] = Field(
        min_length=1, description="Stages by name, in order; a later one names an earlier one."
    )
    arms: tuple[ArmGroup, ...] = Field(min_length=1, description="The arm groups.")
    scale: str = Field("full", description="Which entry of 'scales' is applied ('full' = none).")
    scales: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Name -> {dotted path: value}; cuts such as 'quick'."
    )

    @field_validator("name")
    @classmethod
    def _slug(cls, value: str) -> str:
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", value):
            raise ValueError("use lower-case letters, digits, '-', '_' and '.' only: it names a directory")
        return value

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) != len(value):
            raise ValueError("a seed is given twice")
        return value

    @model_validator(mode="after")
    def _stages_fit(self) -> Recipe:
        made: dict[str, str] = {}
        for name, stage in self.stages.items():
            for field, kinds in NEEDS[stage.kind].items():
                given = getattr(stage, field)
                for wanted in given if isinstance(given, tuple) else (given,):
                    if isinstance(wanted, str) and made.get(wanted) not in kinds:
                        raise ValueError(
                            f"stages.{name}.{field}: {wanted!r} is not an earlier {' or '.join(kinds)} stage"
                            + (f" (earlier: {', '.join(made)})" if made else "")
                            + ("; to load a model write {load: ...}" if field == "model" else "")
                        )
            for part in (*getattr(stage, "data", ()), *getattr(stage, "prompts", ())):
                wanted = getattr(part, "stage", None)
                if wanted is not None and made.get(wanted) != "distill":
                    raise ValueError(f"stages.{name}: part {part.name!r}: {wanted!r} is not an earlier distill stage")
            if isinstance(stage, CorpusStage):
                for scorer in stage.score:
                    wanted = getattr(scorer, "stage", None)
                    if wanted is not None and made.get(wanted) != "scorer":
                        raise ValueError(f"stages.{name}.score: {wanted!r} is not an earlier scorer stage")
            made[name] = stage.kind
        for number, group in enumerate(self.arms):
            for name in group.stages or ():
                if name not in self.stages:
                    raise ValueError(f"arms.{number}.stages: {name!r} is not a stage ({', '.join(self.stages)})")
        names = [group.name for group in self.arms]
        if len(set(names)) != len(names):
            raise ValueError("arms: two groups have the same name")
        if self.scale != "full" and self.scale not in self.scales:
            known = ", ".join(["full", *self.scales])
            raise ValueError(f"scale: {self.scale!r} is not one of {known}")
        return self
