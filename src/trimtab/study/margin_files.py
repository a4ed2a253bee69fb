"""``trimtab analyze margin``: the safety alignment margin of a model, outside a study."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trimtab.analyze.config import MarginConfig
from trimtab.errors import UserError
from trimtab.evaluate.panel import TaskConfig, panel_rows
from trimtab.evaluate.tasks import resolve_panel
from trimtab.models.config import LoadConfig
from trimtab.progress import make_reporter
from trimtab.settings import read_yaml
from trimtab.study.steps.margin import MARGIN, write_files
from trimtab.study.token_files import checked
from trimtab.types import Row
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import Tidewater

LIMIT = 50


def margin_to(
    model: Mapping[str, Any],
    tasks: Sequence[str],
    out: Path,
    *,
    settings: Mapping[str, Any],
    modes: Sequence[str],
    words: Path | None,
    seed: int,
    limit: int = LIMIT,
) -> None:
    """Ask a model in its modes and write ``margin.json`` and ``margin.html`` into the new directory ``out``.

    model, settings  fields of ``LoadConfig`` and ``MarginConfig``
    tasks            each a task or group by name, or a file of prompts; ``limit`` prompts of each
    modes            which; none: all that the model has, else all that ``words`` tells
    words            a file (.yaml) of mode: instruction, for modes that the model does not have
    """
    from trimtab.analyze.margin import ask, measure
    from trimtab.evaluate.targets import open_local

    load, how = checked(LoadConfig, model), checked(MarginConfig, settings)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: there is something already; name a new directory")
    told = {} if words is None else _words(words)
    rows = _rows(tasks, limit)
    target = open_local(load)
    asked = ask(target, rows, list(modes or target.switch.modes or told), told, how.tokens, seed)
    reporter = make_reporter()
    reporter.start("margin", load.load, 1, 1)
    try:
        _, found = measure(
            target, asked, how, seed, lambda done, of: reporter.update("margin", {"step": done, "total": of})
        )
    finally:
        reporter.close()
    out.mkdir(parents=True, exist_ok=True)
    write_files(out, found, target.name)


def _words(path: Path) -> dict[str, str]:
    told = read_yaml(path, "file of instructions")
    wrong = next((mode for mode, text in told.items() if not isinstance(text, str) or not text.strip()), None)
    if wrong is not None:
        raise UserError(f"--words {path}: {wrong}: an instruction is a text")
    return told


def _rows(tasks: Sequence[str], limit: int) -> list[Row]:
    town = Tidewater(TidewaterConfig())
    found: list[TaskConfig] = []
    for name in tasks:
        if Path(name).is_file():
            found.append(checked(TaskConfig, {"name": Path(name).stem, "source": {"path": name, "limit": limit}}))
        else:
            found += resolve_panel([name], limit, town)
    return panel_rows(found, town)


def print_margins(directory: Path) -> None:
    """The margins of every set of points."""
    read = json.loads((directory / MARGIN).read_text(encoding="utf-8"))
    table = Table(title=f"{read['prompts']} prompts in {len(read['modes'])} modes", box=box.SIMPLE_HEAD)
    for heading in ("points", "token", "distance", "of"):
        table.add_column(heading, no_wrap=True)
    for heading in ("margin", "95 %", "prompts"):
        table.add_column(heading, justify="right", no_wrap=True)
    for figure in read["figures"]:
        points = "logits" if figure["layer"] is None else f"layer {figure['layer']}"
        for name, part in figure["margins"].items():
            said = ("-", "-") if not part["n"] else (f"{part['value']:.3f}", f"{part['low']:.3f} to {part['high']:.3f}")
            table.add_row(points, str(figure["token"]), figure["distance"], escape(name), *said, str(part["n"]))
    Console(width=None if Console().is_terminal else 120).print(table)
