"""Write docs/recipe.md from the recipe's types and docs/tasks.md from the tasks' cards.

``--check`` fails if a page on disk is not what would be written.
"""

from __future__ import annotations

import sys
import types
import typing
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from trimtab.config import Config
from trimtab.data.promptsets import SETS
from trimtab.evaluate.tasks import GROUPS, TASKS
from trimtab.recipe.model import Recipe
from trimtab.recipe.stages import Stage

HEAD = """# Recipe reference

Generated from the types by `make docs`; do not edit. A recipe is one YAML file. Any field can be set from the command line
(`--set stages.base.budget=300k`) and by a scale (`scales: {quick: {path: value}}`). `set` and `sweep` of an arm group may
vary anything below `stages` and `world`, and nothing else: `seeds` and the like hold for all arms. The dotted path is the
same in all four; list items go by index. A token count may be written `600k`, `0.6M` or `600B`.
"""

TASKS_HEAD = """# Tasks of an evaluation

Generated from the cards by `make docs`; do not edit. `trimtab tasks` prints the list, `trimtab tasks NAME` one card.

A task is asked for by its name, several by the name of a group. The groups need no Hub: their prompts come out of pinned
packages (sha256 checked, nothing of a package is run) or from Trimtab itself. Tasks of the Hub are read at the commit
below; `datasets` keeps them, so a later run needs no network. Prompts only: columns that hold completions or
optimisation targets are not read.

**How the Hub's commits, columns and counts were checked.** GSM8K, MBPP, TruthfulQA and XSTest are read at the commits and by
the columns that `inspect-evals==0.26.0` uses; the commits of JailbreakBench, OR-Bench and WildJailbreak are those that
several public loaders pin. They were read in those sources, not on the Hub. A set whose columns or number of rows are not
what its card says is refused.

**What the default judge can say.** `refusal` (the refusal match) tells refusals, never harm: for the safety tasks it gives
`refusal_rate` and a lower bound of `safe_at_1`; the headline needs a rubric or a classifier. `numeric`, `choice` and
`code` compare with the known answer, `tidewater` is exact.

**Limits nest.** `n` prompts of a task are drawn by seed from the ids, so the prompts of a smaller limit are part of those of a
larger one, and two models that are given one limit answer the same prompts.
"""


def main() -> int:
    pages = {"recipe.md": recipe_page(), "tasks.md": tasks_page()}
    stale = []
    for name, page in pages.items():
        path = Path(__file__).with_name(name)
        if not path.exists() or path.read_text(encoding="utf-8") != page:
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_text(page, encoding="utf-8")
    if stale and "--check" in sys.argv:
        print(f"not current: {', '.join(f'docs/{name}' for name in stale)}; run `make docs`", file=sys.stderr)
        return 1
    return 0


def recipe_page() -> str:
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
    return page + sets()


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
        "For `source: {name: ...}`: files of pinned packages, checked by sha256 (nothing of a package is run), data sets of",
        "the Hub at a pinned commit, and sets of our own. [Tasks](tasks.md) has the cards of those that an evaluation uses.",
        "",
        "| name | rows | harm | licence | from | what it is |",
        "|---|---|---|---|---|---|",
    ]
    for card in SETS.values():
        lines.append(
            f"| `{card.name}` | {card.rows} | {card.harm or 'mixed'} | {card.licence} | {card.origin} | {card.about} |"
        )
    return "\n".join(lines) + "\n"


def tasks_page() -> str:
    lines = [TASKS_HEAD, "## Groups\n", "| group | tasks |", "|---|---|"]
    lines += [f"| `{group}` | {', '.join(f'`{name}`' for name in members)} |" for group, members in GROUPS.items()]
    lines += [
        "\n## Tasks\n",
        "| task | rows | harm | headline metric | judge | Hub | about |",
        "|---|---|---|---|---|---|---|",
    ]
    for card in TASKS.values():
        hub = "" if card.offline else "needed"
        lines.append(
            f"| [`{card.name}`](#{card.name}) | {card.rows} | {card.harm} | `{card.metric}` | `{card.judge}` | {hub} "
            f"| {card.about} |"
        )
    for card in TASKS.values():
        low, high = card.range
        taken = "all of them" if card.default is None else f"{card.default} without a limit"
        lines += [
            f"\n### {card.name}\n",
            f"{card.about}\n",
            f"- source: {card.source}; licence {card.licence}",
            f"- revision: {card.revision if card.set is None else f'`{card.revision}`'}",
            f"- rows: {card.rows}, of which are taken: {taken}; harm class: {card.harm}; category: {card.category}",
            f"- metric: `{card.metric}`, {low:g} to {high:g}, better: {card.direction}; judge: `{card.judge}`",
        ]
        lines += [f"- {caveat}" for caveat in card.caveats]
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
    if isinstance(field.default, tuple) and field.default and isinstance(field.default[0], Config):
        return ", ".join(f"`{{kind: {part.kind}}}`" for part in field.default)
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return "null" if value is None else f"`{value}`"


if __name__ == "__main__":
    raise SystemExit(main())
