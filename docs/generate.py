"""Write docs/recipe.md from the recipe's types. ``--check`` fails if the page on disk is not what would be written."""

from __future__ import annotations

import sys
import types
import typing
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from trimtab.config import Config
from trimtab.data.promptsets import CARDS
from trimtab.recipe.model import Recipe, Stage

HEAD = """# Recipe reference

Generated from the types by `make docs`; do not edit. A recipe is one YAML file. Any field can be set from the command line
(`--set stages.base.budget=300k`) and by a scale (`scales: {quick: {path: value}}`). `set` and `sweep` of an arm group may
vary anything below `stages` and `world`, and nothing else: `seeds` and the like hold for all arms. The dotted path is the
same in all four; list items go by index. A token count may be written `600k`, `0.6M` or `600B`.
"""


def main() -> int:
    page = HEAD
    todo: list[type[Config]] = [Recipe, *typing.get_args(typing.get_args(Stage)[0])]
    done: list[type[Config]] = []
    while todo:
        model = todo.pop(0)
        if model in done:
            continue
        done.append(model)
        page += section(model)
        for field in model.model_fields.values():
            todo += [kind for kind in settings_in(field.annotation) if kind not in done]
    page += sets()
    path = Path(__file__).with_name("recipe.md")
    if "--check" in sys.argv:
        if not path.exists() or path.read_text(encoding="utf-8") != page:
            print("docs/recipe.md is not current: run `make docs`", file=sys.stderr)
            return 1
        return 0
    path.write_text(page, encoding="utf-8")
    return 0


def section(model: type[Config]) -> str:
    doc = " ".join((model.__doc__ or "").split())
    lines = [f"\n## {model.__name__}\n", doc, "", "| field | type | default | what it is |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        assert field.description, f"{model.__name__}.{name} has no description"
        text = field.description.replace("|", "\\|")
        lines.append(f"| `{name}` | {show(field.annotation)}{bounds(field.metadata)} | {default(field)} | {text} |")
    return "\n".join(lines) + "\n"


def sets() -> str:
    lines = [
        "\n## Named sets\n",
        "For `source: {name: ...}`. Each is one file of a pinned package, checked by sha256; nothing of the package is run.",
        "",
        "| name | rows | harm | licence | package | what it is |",
        "|---|---|---|---|---|---|",
    ]
    for card in CARDS.values():
        package = f"`{card.wheel.requirement}`"
        lines.append(
            f"| `{card.name}` | {card.rows} | {card.harm or 'mixed'} | {card.licence} | {package} | {card.about} |"
        )
    return "\n".join(lines) + "\n"


def settings_in(annotation: Any) -> list[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [kind for argument in typing.get_args(annotation) for kind in settings_in(argument)]


def show(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "null"
    if annotation is Any:
        return "any"
    if origin is typing.Annotated:
        return show(arguments[0])
    if origin is typing.Literal:
        return " \\| ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(show(argument) for argument in arguments)
    if origin in (list, tuple):
        return "list of " + show(arguments[0])
    if origin is dict:
        return f"map of {show(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true/false"}.get(
        annotation.__name__, annotation.__name__
    )


def bounds(metadata: list[Any]) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [f"{sign} {getattr(m, key):g}" for m in metadata for key, sign in signs.items() if hasattr(m, key)]
    return f" ({', '.join(found)})" if found else ""


def default(field: Any) -> str:
    if field.default_factory is not None:
        return f"`{field.default_factory()}`"
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, Config):
        return "its defaults"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return "null" if value is None else f"`{value}`"


if __name__ == "__main__":
    raise SystemExit(main())
