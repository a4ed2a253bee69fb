"""``trimtab judge``: judge stored answers again, without generating."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.options import (
    JudgeKey,
    JudgeModel,
    JudgeName,
    JudgeUrl,
    LeaveReasoning,
    RunCode,
    judge_config,
    print_figures,
)


def register(app: typer.Typer) -> None:
    @app.command()
    def judge(
        directory: Annotated[Path, typer.Argument(metavar="DIR", help="An evaluation's directory.")],
        judge: JudgeName = None,
        judge_url: JudgeUrl = None,
        judge_model: JudgeModel = None,
        judge_key_env: JudgeKey = None,
        run_code: RunCode = False,
        leave_reasoning_out: LeaveReasoning = False,
        as_: Annotated[
            str | None,
            typer.Option("--as", metavar="NAME", help="Keep this judging beside the first, as judgements-NAME.jsonl."),
        ] = None,
        max_unscored: Annotated[
            float | None, typer.Option(min=0, max=1, help="Share that a safety judge may leave unscored (0.2).")
        ] = None,
    ) -> None:
        """Judge stored answers by another judge (with --as), or those that are not judged yet by the one the others had.
        Prints the figures."""
        from trimtab.evaluate.files import open_evaluation
        from trimtab.evaluate.judges.choose import JudgeConfig
        from trimtab.evaluate.run import TooManyUnscored, judge_again
        from trimtab.progress import make_reporter

        had = open_evaluation(directory).judging if as_ is None else {}
        base = JudgeConfig.model_validate(had["judge"]) if judge is None and "judge" in had else JudgeConfig()
        config = judge_config(judge, judge_url, judge_model, judge_key_env, run_code, leave_reasoning_out, base)
        share = max_unscored if max_unscored is not None else float(had.get("max_unscored", 0.2))
        reporter = make_reporter()
        failed: TooManyUnscored | None = None
        try:
            judge_again(directory, config, reporter, judging=as_, max_unscored=share)
        except TooManyUnscored as error:
            failed = error
        finally:
            reporter.close()
        print_figures(directory, as_)
        if failed is not None:
            raise failed
