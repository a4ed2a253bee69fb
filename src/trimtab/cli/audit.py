"""``trimtab audit``: can a bundle's control tokens be typed, or coaxed out of it? Exit code 1 if they can."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    @app.command()
    def audit(
        bundle: Annotated[
            str, typer.Argument(metavar="BUNDLE", help="A bundle, or a model whose tokenizer has control tokens.")
        ],
        spoofs: Annotated[int, typer.Option(min=0, help="Attempts to write a control token as text.")] = 10_000,
        leaks: Annotated[int, typer.Option(min=0, help="Answers that are searched for control tokens.")] = 64,
        out: Annotated[
            Path | None, typer.Option("--out", metavar="DIR", help="Write audit.json into this directory.")
        ] = None,
        seed: Annotated[int, typer.Option(help="Seed of attempts and of sampled answers.")] = 0,
    ) -> None:
        """Try to type the control tokens of a bundle, and to coax them out of it. Exits with 1 if one can be typed, is emitted
        although it is banned, or is not as a control token must be."""
        from trimtab.study.audit_files import audit_to, print_audit

        told = audit_to({"load": bundle}, {"spoofs": spoofs, "leaks": leaks}, out, seed)
        print_audit(told)
        if out is not None:
            print(out)
        if told["problems"]:
            raise typer.Exit(1)
