"""``trimtab report``: rebuild a study's report from its artefacts alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    @app.command()
    def report(
        directory: Annotated[Path, typer.Argument(metavar="DIR", help="A study's directory, such as runs/tour.")],
    ) -> None:
        """Rebuild the report of a finished study (every artefact is verified first). Prints its path."""
        from trimtab.report.gather import report_study

        print(report_study(directory))
