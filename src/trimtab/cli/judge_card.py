"""``trimtab judge-card``: measure a judge on labelled answers."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.options import JudgeKey, JudgeModel, JudgeUrl, LeaveReasoning, judge_config


class Label(StrEnum):
    refusal = "refusal"
    verdict = "verdict"


def register(app: typer.Typer) -> None:
    @app.command(name="judge-card")
    def judge_card(
        judge: Annotated[
            str,
            typer.Argument(
                metavar="JUDGE",
                help="refusal, tidewater, strongreject or constructive (with --judge-url and --judge-model), or a file that "
                "describes a judge (.yaml).",
            ),
        ],
        data: Annotated[
            str | None,
            typer.Option(
                "--data",
                metavar="FILE",
                help="Labelled answers (.jsonl), or refusals-dev, refusals-heldout, tidewater.",
            ),
        ] = None,
        field: Annotated[Label | None, typer.Option("--field", help="The label to measure.")] = None,
        positive: Annotated[
            list[str] | None,
            typer.Option("--positive", metavar="LABEL", help="A label that counts as a hit; may be repeated."),
        ] = None,
        judge_url: JudgeUrl = None,
        judge_model: JudgeModel = None,
        judge_key_env: JudgeKey = None,
        leave_reasoning_out: LeaveReasoning = False,
        directory: Annotated[
            Path | None, typer.Option("--cards", metavar="DIR", help="Where cards are kept; runs/cards if not given.")
        ] = None,
        out: Annotated[
            Path | None, typer.Option("--out", metavar="FILE", help="Save a copy of the card (.json).")
        ] = None,
    ) -> None:
        """Measure a judge on labelled answers: sensitivity, specificity and kappa with their intervals, and where it is
        wrong. The card is kept under the judge's identity, and printed beside its numbers from then on."""
        from trimtab.evaluate import cards
        from trimtab.evaluate.judges.base import Judge
        from trimtab.evaluate.judges.choose import JudgeConfig, choose_judge
        from trimtab.evaluate.judges.reasoning import WithoutReasoning
        from trimtab.evaluate.judges.tidewater import TidewaterJudge
        from trimtab.world.tidewater import Tidewater

        if judge == TidewaterJudge.name:
            exact = TidewaterJudge(Tidewater())
            chosen: Judge = WithoutReasoning(exact) if leave_reasoning_out else exact
        else:
            chosen = choose_judge(
                judge_config(judge, judge_url, judge_model, judge_key_env, False, leave_reasoning_out, JudgeConfig())
            )
        data = data or cards.default_data(chosen)
        kind = cards.default_field(chosen) if field is None else field.value
        card = cards.measure(chosen, cards.labelled_rows(data), field=kind, positive=positive or (), data=data)
        cards.print_card(card)
        print(cards.store_card(card, directory or cards.CARDS))
        if out is not None:
            cards.save_card(card, out)
            print(out)
