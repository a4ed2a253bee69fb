"""Settings from YAML files and ``--set`` overrides: read strictly, checked by type, explained in one line."""

from __future__ import annotations

import copy
import difflib
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from trimtab.config import Config
from trimtab.errors import UserError

C = TypeVar("C", bound=Config)


def load_settings(
    path: Path | None, overrides: Sequence[str], model: type[C], what: str, *, option: str = "--set"
) -> C:
    """Settings of a type from a file (None: its defaults) with overrides that ``option`` gave. ``what`` is what the file is
    called."""
    raw = {} if path is None else read_yaml(path, what)
    for text in overrides:
        key, value = parse_override(text)
        put(raw, key, value, origin=option)
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{path or option}: {explain(error, raw, model)}") from None


def put(data: Any, path: str, value: Any, *, origin: str) -> None:
    """Set ``path`` in raw data; sections on the way are made. Unknown fields are found by validation."""
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


def parse_override(text: str) -> tuple[str, Any]:
    """``a.b=value``, the value being YAML."""
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
        # The key "<<" takes over another mapping; what is written beside it overrides it.
        merge = key_node.tag == "tag:yaml.org,2002:merge"
        key = "<<" if merge else loader.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
        if not isinstance(key, str | int | float):
            raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read_yaml(path: Path, what: str = "recipe") -> dict[str, Any]:
    """A YAML mapping; ``UserError`` with the line where it is wrong."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory; name a {what} file (.yaml)") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UserError(f"{path}, line {line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a {what} is a mapping of fields to values")
    return data


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
        known = str(first.get("ctx", {}).get("expected_tags", "")).replace("'", "")
        message = f"'kind' must be one of {known}" if known else "'kind' is missing; docs/recipe.md lists the kinds"
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
