"""``trimtab run``: do what is missing of a study and write its report."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from trimtab.cli.options import Out, Overrides, RecipePath, study_directory


def register(app: typer.Typer) -> None:
    @app.command()
    def run(
        recipe: RecipePath,
        set_: Overrides = None,
        out: Out = None,
        workers: Annotated[
            int, typer.Option(min=1, help="Steps to run side by side, each with its share of the cores.")
        ] = 1,
        yes: Annotated[bool, typer.Option("--yes", help="Go on where writing a corpus has a price.")] = False,
    ) -> None:
        """Run a study; steps that are done are not done again. Prints the path of the report."""
        from trimtab.progress import make_reporter
        from trimtab.recipe.load import load_recipe
        from trimtab.report.gather import report_is_current, report_study
        from trimtab.study.execute import execute, study_store
        from trimtab.study.plan import make_plan
        from trimtab.study.show import print_costs

        started = time.monotonic()
        model, arms = load_recipe(recipe, set_ or [])
        plan = make_plan(model, arms)
        directory = study_directory(out, model.name)
        print_costs(plan, study_store(directory), agreed=yes)
        reporter = make_reporter()
        try:
            done = execute(plan, directory, reporter, workers)
        finally:
            reporter.close()
        if not done and report_is_current(directory):
            print(f"nothing to do: all {len(plan.steps)} steps are done")
            print(directory / "report.html")
            return
        path = report_study(directory)
        before = f"; {len(plan.steps) - done} were done before" if done < len(plan.steps) else ""
        print(f"{done} steps done in {time.monotonic() - started:.0f} s{before}")
        print(path)
