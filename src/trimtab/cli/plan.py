"""``trimtab plan``: what a recipe would do, what it would cost, what is done already and what sharing saves."""

from __future__ import annotations

import typer

from trimtab.cli.options import Out, Overrides, RecipePath, study_directory


def register(app: typer.Typer) -> None:
    @app.command()
    def plan(recipe: RecipePath, set_: Overrides = None, out: Out = None) -> None:
        """Show a study's steps, tokens, FLOPs and estimated time, without doing anything."""
        from trimtab.recipe.load import load_recipe
        from trimtab.study.execute import study_store
        from trimtab.study.plan import make_plan
        from trimtab.study.show import print_plan

        model, arms = load_recipe(recipe, set_ or [])
        print_plan(make_plan(model, arms), study_store(study_directory(out, model.name)))
