"""The command line: one file per verb; parses, calls one function below, prints."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

import trimtab
from trimtab.errors import TrimtabError

app = typer.Typer(
    name="trimtab",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"trimtab {trimtab.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """The small levers that turn a language model's safety: plan a study, run it, read its report."""


def main() -> None:
    """Entry point: errors are one line on standard error; exit code 2 for the user's mistakes, 1 for faults."""
    # OpenMP threads that spin while they wait make two jobs on one machine ten times slower than each alone; waiting
    # asleep costs nothing measurable here. It is read when torch is loaded, which no command has done yet.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from trimtab.cli import (
        analyze,
        audit,
        chat,
        compare,
        corpus,
        data,
        eval,
        exchange,
        gate,
        judge,
        judge_card,
        plan,
        report,
        run,
        tasks,
        view,
        world,
    )

    for module in (
        plan,
        run,
        report,
        eval,
        view,
        chat,
        judge,
        judge_card,
        compare,
        gate,
        tasks,
        data,
        corpus,
        analyze,
        audit,
        exchange,
        world,
    ):
        module.register(app)
    try:
        app()
    except TrimtabError as error:
        print(f"trimtab: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except Exception as error:
        if os.environ.get("TRIMTAB_DEBUG"):
            raise
        said = " ".join(str(error).split()) or "no message"
        print(f"trimtab: unexpected {type(error).__name__}: {said:.300}; TRIMTAB_DEBUG=1 shows where", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("trimtab: stopped; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
