"""``trimtab audit``: the audit of a bundle's control tokens, outside a study."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trimtab.analyze.config import AuditConfig
from trimtab.analyze.metrics import MEASURES
from trimtab.models.config import LoadConfig
from trimtab.progress import make_reporter
from trimtab.study.steps.audit import write_audit
from trimtab.study.token_files import checked
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import Tidewater


def audit_to(model: Mapping[str, Any], settings: Mapping[str, Any], out: Path | None, seed: int) -> dict[str, Any]:
    """Audit a model; what ``audit.json`` holds is returned, and written into the directory ``out``, if there is one.

    model, settings  fields of ``LoadConfig`` and ``AuditConfig``
    """
    from trimtab.analyze.audit.whole import audit
    from trimtab.evaluate.targets import open_local
    from trimtab.machine import quieten

    load, how = checked(LoadConfig, model), checked(AuditConfig, settings)
    quieten()
    target = open_local(load)
    reporter = make_reporter()
    reporter.start("audit", target.name, 1, 1)
    try:
        _, told = audit(
            target, how, Tidewater(TidewaterConfig()), seed,
            lambda what, done, of: reporter.update("audit", {"step": done, "total": of, "note": what}),
        )  # fmt: skip
    finally:
        reporter.close()
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_audit(out, told)
    return told


def print_audit(told: Mapping[str, Any]) -> None:
    """The figures, where anything got through, and what is wrong."""
    console = Console(width=None if Console().is_terminal else 120)
    names = ", ".join(told["controls"]) or "none"
    table = Table(title=f"control tokens: {escape(names)}", box=box.SIMPLE_HEAD)
    table.add_column("figure", no_wrap=True)
    for heading in ("value", "95 %", "n"):
        table.add_column(heading, justify="right", no_wrap=True)
    for id, (value, low, high, n) in told["figures"].items():
        said = ("-", "-") if not n else (f"{value:.4g}", "-" if low == high else f"{low:.4g} to {high:.4g}")
        table.add_row(MEASURES[id].title, *said, str(n))
    console.print(table)
    if told["token"] is None:
        console.print("It has no control tokens: there is nothing to type, and nothing to leak.")
    for by in ("place", "spelling") if told["spoofs"] else ():
        through = [f"{name} {row['typed']}/{row['n']}" for name, row in told["spoofs"][by].items() if row["typed"]]
        if through:
            console.print(escape(f"typed, by {by}: {', '.join(through)}"))
    for line in told["problems"]:
        console.print(f"problem: {escape(line)}")
