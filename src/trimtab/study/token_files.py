"""``trimtab analyze tokens``: token analysis of a model and rows from anywhere, outside a study."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trimtab.analyze.config import TokenConfig
from trimtab.config import Config
from trimtab.data import sources
from trimtab.data.sources import SourceConfig
from trimtab.errors import UserError
from trimtab.levers.prefix import PrefixConfig
from trimtab.models.config import LoadConfig
from trimtab.progress import make_reporter
from trimtab.settings import explain
from trimtab.study.steps.tokens import RANKING, measured, write_files
from trimtab.types import Row
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import KINDS, Tidewater

TIDEWATER_ROWS = 100
C = TypeVar("C", bound=Config)


def analyze_to(
    model: Mapping[str, Any],
    data: Sequence[str],
    out: Path,
    *,
    settings: Mapping[str, Any],
    prefix: Mapping[str, Any],
    seed: int,
    limit: int | None = None,
) -> None:
    """Measure rows and write ``tokens.parquet``, ``ranking.json`` and ``heatmap.html`` into the new directory ``out``.

    model, settings, prefix  fields of ``LoadConfig``, ``TokenConfig``, ``PrefixConfig``
    data                     each a file of rows, a named set, or ``tidewater:KIND``
    limit                    rows of each, the first ones; of Tidewater 100 if not given
    """
    load, how, opened = checked(LoadConfig, model), checked(TokenConfig, settings), checked(PrefixConfig, prefix)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: there is something already; name a new directory")
    rows = [row for spec in data for row in rows_of(spec, limit)]
    reporter = make_reporter()
    reporter.start("tokens", load.load, 1, 1)
    try:
        table = measured(
            load, rows, opened, how, seed, lambda done, of: reporter.update("tokens", {"step": done, "total": of})
        )
    finally:
        reporter.close()
    out.mkdir(parents=True, exist_ok=True)
    write_files(out, table, how, seed, load.load)


def rows_of(spec: str, limit: int | None) -> list[Row]:
    """The rows that ``--data`` names; ``UserError`` for what is neither a file, nor a named set, nor ``tidewater:KIND``."""
    kind = spec.removeprefix("tidewater:")
    if kind != spec:
        known = [name for name in KINDS if not name.endswith("heldout")]
        if kind not in known:
            raise UserError(f"--data {spec}: no kind of trained chats; use one of {', '.join(known)}")
        return [replace(row, mode=None) for row in Tidewater(TidewaterConfig()).chats(kind, limit or TIDEWATER_ROWS)]
    if spec not in sources.NAMED and not Path(spec).is_file():
        raise UserError(f"--data {spec}: neither a file, nor a named set, nor tidewater:KIND")
    where = {"name": spec} if spec in sources.NAMED else {"path": spec}
    return list(sources.rows(checked(SourceConfig, {**where, "limit": limit})))


def print_ranking(directory: Path, top: int) -> None:
    """Means of the spans, and the tokens that pull hardest."""
    read = json.loads((directory / RANKING).read_text(encoding="utf-8"))
    left_out = ", ".join(f"{count} {why}" for why, count in read["left_out"].items())
    measures = read["measures"]
    table = Table(title=f"{read['rows']} rows" + (f" (left out: {left_out})" if left_out else ""), box=box.SIMPLE_HEAD)
    for heading in ("token", "span"):
        table.add_column(heading, no_wrap=True)
    for heading in ("count", *measures, f"{measures[-1]} / body"):
        table.add_column(heading, justify="right", no_wrap=True)
    spans = [{"token": "all", "span": name, "ratio": {}, **figures} for name, figures in read["spans"].items()]
    for entry in [*spans, *read["tokens"][:top]]:
        ratio = entry["ratio"].get(measures[-1])
        shown = entry["token"] if entry in spans else json.dumps(entry["token"], ensure_ascii=False)
        table.add_row(
            escape(shown), entry["span"], str(entry["count"]), *(f"{entry[name][0]:.3g}" for name in measures),
            "-" if ratio is None else f"{ratio:.2f}",
        )  # fmt: skip
    Console(width=None if Console().is_terminal else 120).print(table)


def checked(kind: type[C], raw: Mapping[str, Any]) -> C:
    """Settings of a kind; ``UserError`` that names the field."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise UserError(explain(error, raw, kind)) from None
