"""Reading a recipe: YAML, ``scale``, ``--set a.b=c`` and an arm's settings, in that order; errors name the field.

A path such as ``stages.base.timing.start`` is the same in ``--set``, ``scales``, ``set`` and ``sweep``. Lists take an
index (``stages.answers.tasks.0.n``).
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trimtab.errors import UserError
from trimtab.recipe.model import ArmGroup, Recipe
from trimtab.settings import explain, parse_override, put, read_yaml


@dataclass(frozen=True)
class ArmRecipe:
    """One arm: its group, its label, what it sets or sweeps, and the recipe as it holds for this arm."""

    id: str
    label: str
    group: str
    settings: dict[str, Any]
    stages: tuple[str, ...]
    against: str | None
    recipe: Recipe


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> tuple[Recipe, list[ArmRecipe]]:
    """The recipe and its arms, all validated. ``overrides`` are ``a.b=value`` with a YAML value; ``UserError`` if wrong."""
    raw = read_yaml(path)
    pairs = [parse_override(text) for text in overrides]
    for key, value in pairs:
        if key in ("scale", "scales"):
            put(raw, key, value, origin="--set")
    scale = raw.get("scale", "full")
    cuts = raw.get("scales") or {}
    if scale != "full" and isinstance(cuts, Mapping) and isinstance(cuts.get(scale), Mapping):
        for key, value in cuts[scale].items():
            put(raw, key, value, origin=f"scales.{scale}")
    for key, value in pairs:
        if key not in ("scale", "scales"):
            put(raw, key, value, origin="--set")
    return resolve(raw, str(path), fixed=[key for key, _ in pairs])


def resolve(raw: dict[str, Any], origin: str, fixed: Sequence[str] = ()) -> tuple[Recipe, list[ArmRecipe]]:
    """Validate raw recipe data and each of its arms. ``fixed`` paths were set by the user and may not be swept over."""
    recipe = validate(raw, origin)
    arms: list[ArmRecipe] = []
    made = {group.name: list(_arms(raw, group, origin, fixed)) for group in recipe.arms}
    count = Counter(arm.label for mine in made.values() for arm in mine)
    for group in recipe.arms:
        mine = made[group.name]
        if group.labels is None and any(count[arm.label] > 1 for arm in mine):  # groups that sweep the same
            mine = [replace(arm, label=f"{group.name}, {arm.label}") for arm in mine]
        if isinstance(group.baseline, int):
            mine = [replace(arm, against=mine[group.baseline].id) for arm in mine]
        elif isinstance(group.baseline, dict):
            mine = [replace(arm, against=mine[number].id) for arm, number in zip(mine, _twins(group), strict=True)]
        arms += mine
    labels = {arm.label: arm.id for arm in arms}
    if len(labels) != len(arms):
        twice = next(arm.label for arm in arms if labels[arm.label] != arm.id)
        raise UserError(f"{origin}: arms: two arms are called {twice!r}; give one of them another label")
    for group in recipe.arms:
        if isinstance(group.baseline, str):
            if group.baseline not in labels:
                raise UserError(
                    f"{origin}: arms '{group.name}': baseline {group.baseline!r} is no arm's label ({', '.join(labels)})"
                )
            arms = [replace(a, against=labels[group.baseline]) if a.group == group.name else a for a in arms]
    return recipe, [replace(arm, against=None) if arm.against == arm.id else arm for arm in arms]


def _twins(group: ArmGroup) -> Iterator[int]:
    """For each arm of a sweep the number of the arm that has the baseline's values and is like it in all else."""
    assert isinstance(group.baseline, dict)
    places = list(itertools.product(*(range(len(values)) for values in group.sweep.values())))
    wanted = [group.sweep[path].index(group.baseline[path]) if path in group.baseline else None for path in group.sweep]
    for place in places:
        yield places.index(tuple(mine if want is None else want for mine, want in zip(place, wanted)))


def _arms(raw: dict[str, Any], group: ArmGroup, origin: str, fixed: Sequence[str]) -> Iterator[ArmRecipe]:
    for path in [*group.set, *group.sweep]:
        if path.split(".")[0] not in ("stages", "world"):
            raise UserError(
                f"{origin}: arms '{group.name}': {path!r} cannot be varied; only paths below 'stages' and 'world' can"
            )
        for key in fixed:
            if path == key or path.startswith(key + ".") or key.startswith(path + "."):
                raise UserError(
                    f"--set {key}: the arm group '{group.name}' sets {path!r} itself; change it there, "
                    f"such as --set 'arms.0.sweep={{{path}: [...]}}'"
                )
    combinations = itertools.product(*group.sweep.values())
    told = itertools.product(*(group.names.get(path, values) for path, values in group.sweep.items()))
    for number, (values, names) in enumerate(zip(combinations, told, strict=True)):
        settings = dict(group.set) | dict(zip(group.sweep, values, strict=True))
        data = copy.deepcopy(raw)
        for path, value in settings.items():
            put(data, path, value, origin=f"arms '{group.name}'")
        swept = {_short(path, group.sweep): name for path, name in zip(group.sweep, names, strict=True)}
        label = ", ".join(f"{k} {_show(v)}" for k, v in swept.items()) or group.name
        if group.labels:
            label = group.labels[number]
        yield ArmRecipe(
            id=f"{group.name}/{label}".replace(" ", "_"),
            label=label,
            group=group.name,
            settings=swept or _flat(group.set),
            stages=group.stages or tuple(data["stages"]),
            against=None,
            recipe=validate(data, f"{origin}, arm {label!r}"),
        )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted paths with plain values, without the leading ``stages.``; for tables."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        path = f"{prefix}{key}".removeprefix("stages.")
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{path}.")
        else:
            flat[path] = ", ".join(map(str, value)) if isinstance(value, list) else value
    return flat


def _short(path: str, others: Mapping[str, Any]) -> str:
    """The last part of a path, or as many as are needed to tell it from the other swept paths."""
    parts = path.split(".")
    for count in range(1, len(parts) + 1):
        tail = ".".join(parts[-count:])
        if sum(other == tail or other.endswith("." + tail) for other in others) <= 1:
            return tail
    return path


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def validate(raw: dict[str, Any], origin: str) -> Recipe:
    """The typed recipe, or one ``UserError`` line that names the first wrong field."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{origin}: {explain(error, raw, Recipe)}") from None
