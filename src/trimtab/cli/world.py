"""``trimtab world``: read a few pages of Tidewater, the sandbox world."""

from __future__ import annotations

from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    @app.command()
    def world(
        kind: Annotated[
            str, typer.Argument(help="'documents', or a kind of request such as harmful-seen.")
        ] = "documents",
        n: Annotated[int, typer.Option("-n", min=1, help="How many.")] = 5,
        seed: Annotated[int, typer.Option(min=0, help="Seed of the world.")] = 0,
        mode: Annotated[str, typer.Option(help="Mode of the answers: positive or rejective.")] = "positive",
    ) -> None:
        """Print documents, or requests with their answers and the judge's verdict, from the sandbox world."""
        from trimtab.study.show import print_world

        print_world(kind, n, seed, mode)
