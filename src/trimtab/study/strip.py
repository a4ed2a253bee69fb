"""``trimtab data strip``: a set without its boilerplate openings, and the report of what went."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trimtab.artifact import write_atomic
from trimtab.data import sources
from trimtab.data.sources import SourceConfig
from trimtab.errors import UserError
from trimtab.levers.boilerplate import StripConfig, strip_rows

SHOWN = 12


def strip_file(source: SourceConfig, config: StripConfig, out: Path) -> None:
    """Write the stripped rows to ``out`` (JSON lines) and what was removed to ``<out>.report.json``; print the openings.

    Both files are whole or not there. ``UserError`` where nothing would be left, or ``out`` has another ending than .jsonl.
    """
    if out.suffix != ".jsonl":
        raise UserError(f"--out {out}: rows are written as JSON lines; give a name that ends in .jsonl")
    rows, report = strip_rows(sources.rows(source), config)
    if not rows:
        raise UserError(f"{source.source_label}: every response was nothing but boilerplate, so nothing was written")
    told = {"source": source.source_label, "settings": config.plain(), **report.plain(most=1000)}
    lines = (json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows)
    write_atomic(out, "".join(lines))
    write_atomic(out.with_name(f"{out.name}.report.json"), json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    console = Console(highlight=False)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("rows", "found by", "opening"):
        table.add_column(column, justify="right" if column == "rows" else "left")
    for opening in told["openings"][:SHOWN]:
        table.add_row(str(opening["rows"]), opening["found"], Text(opening["text"]))
    if told["openings"]:
        console.print(table)
    more = told["different"] - SHOWN
    console.print(
        f"{report.changed} of {report.rows} rows lost an opening"
        + (f" ({more} more openings in the report)" if more > 0 else "")
        + (f"; {len(report.emptied)} were nothing else and are left out" if report.emptied else "")
        + f"\n{out}\n{out}.report.json"
    )
