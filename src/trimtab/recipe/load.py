"""Reading a recipe: YAML, ``scale``, ``--set a.b=c`` and an arm's settings, in that order; errors name the field.

A path such as ``stages.base.timing.start`` is the same in ``--set``, ``scales``, ``set`` and ``sweep``. Lists take an
index (``stages.answers.tasks.0.n``).
"""

from __future__ import annotations

import copy
import difflib
import itertools
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from trimtab.config import Config
from trimtab.errors import UserError
from trimtab.recipe.model import ArmGroup, Recipe


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
    pairs = [_parse_override(text) for text in overrides]
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
    for group in recipe.arms:
        mine = list(_arms(raw, group, origin, fixed))
        if isinstance(group.baseline, int):
            mine = [replace(arm, against=mine[group.baseline].id) for arm in mine]
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
    for number, values in enumerate(combinations):
        settings = dict(group.set) | dict(zip(group.sweep, values, strict=True))
        data = copy.deepcopy(raw)
        for path, value in settings.items():
            put(data, path, value, origin=f"arms '{group.name}'")
        swept = {_short(path, group.sweep): value for path, value in zip(group.sweep, values, strict=True)}
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


def put(data: Any, path: str, value: Any, *, origin: str) -> None:
    """Set ``path`` in raw recipe data; sections on the way are made. Unknown fields are found by validation."""
    *sections, last = path.split(".")
    here = data
    for part in sections:
        if isinstance(here, list):
            here = here[_index(here, part, path, origin)]
        elif isinstance(here, dict):
            if here is data.get("stages") and part not in here:
                close = difflib.get_close_matches(part, here, n=1)
                meant = f"; did you mean {close[0]!r}?" if close else f" ({', '.join(here)})"
                raise UserError(f"{origin}: {path}: there is no stage {part!r}{meant}")
            if here.get(part) is None:
                here[part] = {}
            here = here[part]
        else:
            raise UserError(f"{origin}: {path}: {part!r} lies below a plain value")
    if isinstance(here, list):
        here[_index(here, last, path, origin)] = copy.deepcopy(value)
    elif isinstance(here, dict):
        here[last] = copy.deepcopy(value)
    else:
        raise UserError(f"{origin}: {path}: {last!r} lies below a plain value")


def _index(items: list[Any], part: str, path: str, origin: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise UserError(f"{origin}: {path}: {part!r} is not an index of a list of {len(items)} (0..{len(items) - 1})")
    return int(part)


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {text!r}: write path=value, such as --set stages.base.budget=300k")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"--set {text!r}: the value is not valid YAML; quote it") from None


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice (YAML keeps the last in silence)."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
        if not isinstance(key, str | int | float):
            raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping; ``UserError`` with the line where it is wrong."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory; name a recipe file (.yaml)") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UserError(f"{path}, line {line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a recipe is a mapping with 'name', 'stages' and 'arms'")
    return data


def validate(raw: dict[str, Any], origin: str) -> Recipe:
    """The typed recipe, or one ``UserError`` line that names the first wrong field."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{origin}: {explain(error, raw, Recipe)}") from None


def explain(error: ValidationError, raw: Any, model: type[Config]) -> str:
    """The first problem of a pydantic error in one line: the path as the user wrote it, what is wrong, what was meant."""
    problems = error.errors()
    first = problems[0]
    path = _user_path(first["loc"], raw, absent=first["type"] in ("missing", "extra_forbidden"))
    kind, message = first["type"], str(first["msg"]).removeprefix("Value error, ")
    name = str(first["loc"][-1]) if first["loc"] else ""
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(name, _known_fields(model), n=1, cutoff=0.6)
        message = f"unknown field {name!r}" + (f"; did you mean {close[0]!r}?" if close else "; see docs/recipe.md")
    elif kind == "missing":
        message = "this field is required"
    elif kind.startswith("union_tag"):
        message = "'kind' must be one of corpus, pretrain, sft, generate, judge"
    elif kind not in ("value_error", "assertion_error"):
        message += f" (got {first['input']!r:.60})"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return (f"{path}: {message}" if path else message) + more


def _user_path(location: tuple[int | str, ...], raw: Any, absent: bool) -> str:
    """Pydantic's location without the union tags it adds: only keys that the data has, and an absent last one."""
    parts: list[str] = []
    here = raw
    for number, part in enumerate(location):
        last = number == len(location) - 1
        if isinstance(here, Mapping) and (part in here or (last and absent)):
            parts.append(str(part))
            here = here.get(part)
        elif isinstance(here, list | tuple) and isinstance(part, int) and part < len(here):
            parts.append(str(part))
            here = here[part]
    return ".".join(parts)


@cache
def _known_fields(model: type[Config]) -> list[str]:
    """Names of all fields below a settings class, for "did you mean"."""
    names: set[str] = set()
    seen: set[Any] = set()

    def visit(annotation: Any) -> None:
        if isinstance(annotation, type) and issubclass(annotation, Config) and annotation not in seen:
            seen.add(annotation)
            for name, field in annotation.model_fields.items():
                names.add(name)
                visit(field.annotation)
        for argument in typing.get_args(annotation):
            visit(argument)

    visit(model)
    return sorted(names)
