"""Step ``scorer``: a safety classifier trained on labelled texts, and its card on texts that were held out."""

from __future__ import annotations

from trimtab.corpus.config import ScorerTraining
from trimtab.study.execute import Context
from trimtab.study.steps.common import check_unchanged


def run_scorer(context: Context) -> None:
    """Leave ``model/`` (Hub layout, what a corpus stage scores with) and ``score_card.json``."""
    from trimtab.train.scorer import train_scorer

    check_unchanged(context)
    config = ScorerTraining.model_validate(context.step.config["config"])
    result = train_scorer(config, context.draft.path / "model", progress=context.progress)
    context.draft.write_json("score_card.json", result["card"])
    context.draft.tokens = result["facts"]["tokens"]
    context.draft.facts = result["facts"] | {"at": result["card"]["at"], "exact": result["card"]["exact"]}
