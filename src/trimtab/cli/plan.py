"""``trimtab plan``: what a recipe would do, what it would cost, what is done already and what sharing saves."""

from __future__ import annotations

from typing import Annotated

import typer

from trimtab.cli.options import Out, Overrides, RecipePath, study_directory


def register(app: typer.Typer) -> None:
    @app.command()
    def plan(
        recipe: RecipePath,
        set_: Overrides = None,
        out: Out = None,
        steps: Annotated[
            bool, typer.Option("--steps", help="List every step, also of a large plan (else by stage).")
        ] = False,
    ) -> None:
        """Show a study's steps, tokens, FLOPs and estimated time, and what each source is read; nothing is done."""
        from trimtab.recipe.load import load_recipe
        from trimtab.study.execute import study_store
        from trimtab.study.plan import make_plan
        from trimtab.study.show import print_plan

        model, arms = load_recipe(recipe, set_ or [])
        print_plan(make_plan(model, arms), study_store(study_directory(out, model.name)), every=steps)
