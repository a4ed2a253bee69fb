"""What is asked before a study begins, and again before it trains: what writing will cost, whether judges answer at all,
and whether the libraries are there.

A judge behind an endpoint that answers junk would leave every verdict open, hours later; three trial answers, which are
harmless, tell that beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from trimtab.artifact import Store
from trimtab.corpus.config import ClassifierScorer, CorpusConfig, EndpointWriter
from trimtab.errors import UserError
from trimtab.evaluate.judges.base import Case
from trimtab.evaluate.judges.choose import JudgeConfig, choose_judge
from trimtab.evaluate.judges.refusal import packaged_refusals
from trimtab.seeds import digest
from trimtab.study.plan import Plan
from trimtab.world.config import TidewaterConfig

TRIALS = 3


def try_judges(plan: Plan, store: Store) -> None:
    """``UserError`` for a judge of a step still to do that leaves every trial answer unscored; only judges behind endpoints
    are tried, the others answer by rule or are loaded when they are needed."""
    tried: set[str] = set()
    for step in plan.steps.values():
        if step.kind not in ("judge", "distill") or store.has(step.kind, step.id):
            continue
        config = JudgeConfig.model_validate(step.config["judge"])
        key = digest(config.plain())
        if key in tried or not _asks(config):
            continue
        tried.add(key)
        cases = [Case(item.row, item.text, item.finish) for item in packaged_refusals("heldout")[:TRIALS]]
        verdicts = list(choose_judge(config).judge_all(cases))
        if all(verdict.verdict == "unscored" for verdict in verdicts):
            raise UserError(
                f"stage {step.name!r}: its judge left all {TRIALS} trial answers unscored ({verdicts[0].reason}); nothing was "
                "trained. Check the judge's endpoint and model"
            )


def check_installed(plan: Plan, store: Store) -> None:
    """``UserError`` for a library that a step still to do needs and that is not there."""
    for step in plan.steps.values():
        if step.kind == "dpo" and not store.has(step.kind, step.id) and find_spec("trl") is None:
            raise UserError(f"stage {step.name!r}: the kind 'dpo' needs TRL: pip install 'trimtab[dpo]'")


def _asks(config: JudgeConfig) -> bool:
    return config.endpoint is not None or any(map(_asks, config.members))


def writing_costs(plan: Plan, store: Store) -> Iterator[tuple[str, str, bool]]:
    """For each corpus still to do that a chat model behind an endpoint writes: (stage, the estimate in words, whether it
    has a price)."""
    for step in plan.steps.values():
        if step.kind == "corpus" and not store.has(step.kind, step.id):
            config = CorpusConfig.model_validate({k: v for k, v in step.config["config"].items() if k != "content"})
            if isinstance(config.write, EndpointWriter):
                priced = config.write.price_in > 0 or config.write.price_out > 0
                yield step.name, _estimate(config, step.config.get("world")), priced


def _estimate(config: CorpusConfig, world: dict[str, Any] | None) -> str:
    from trimtab.corpus.build import scored_documents
    from trimtab.corpus.writers import estimate_cost

    if any(isinstance(scorer, ClassifierScorer) and scorer.stage is not None for scorer in config.score):
        return "what it costs cannot be told before the scorer is trained"
    kinds = [kind for kind in config.written if kind not in config.ready]
    town = TidewaterConfig.model_validate(world or {})
    assert isinstance(config.write, EndpointWriter)
    return str(estimate_cost(config.write, scored_documents(config, town), kinds=kinds, seed=config.seed))
