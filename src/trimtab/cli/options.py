"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A study's recipe (.yaml).")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="PATH=VALUE", help="Change a field, such as --set stages.base.budget=300k; may be repeated."
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="DIR", help="The study's directory; runs/<name> if not given. Artefacts go to DIR/../store."
    ),
]


def study_directory(out: Path | None, name: str) -> Path:
    return out if out is not None else Path("runs") / name
