"""The timing lever: when safety data enters pretraining (arXiv 2601.07087, on the interventions of 2504.16980).

A budget of pretraining tokens is split at ``start``. Before it the model reads safe text only (score 0, the paper's
choice) or raw text; from it on, what was scored unsafe is replaced by its interventions: rephrased (scores 1-3),
refused (4-5) and turned into moral education. ``start: 1`` is the paper's "never" arm, ``start: 0`` its parent's setup.
The unsafe share keeps its size on both sides of the start, so arms differ in what those tokens say, not in how many.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from trimtab.config import Config


class Interventions(Config):
    """How the share of unsafe text is split once the interventions have started; the three add up to 1."""

    rephrase: float = Field(0.4, ge=0, le=1, description="Safe retellings of text scored 1-3.")
    refuse: float = Field(0.4, ge=0, le=1, description="Dialogues that refuse, made from text scored 4-5.")
    moral: float = Field(0.2, ge=0, le=1, description="Articles on why it is refused, made from text scored 4-5.")

    @model_validator(mode="after")
    def _adds_up(self) -> Interventions:
        total = self.rephrase + self.refuse + self.moral
        if abs(total - 1) > 1e-9:
            raise ValueError(f"rephrase + refuse + moral must be 1, not {total:g}")
        return self


class TimingConfig(Config):
    """When the interventions start, and what is read before."""

    start: float = Field(
        0.0, ge=0, le=1, description="Start of the interventions as a fraction of the token budget (1 = never)."
    )
    before: Literal["safe_only", "raw"] = Field(
        "safe_only",
        description="What is read before the start: score-0 text only (the paper), or raw text with the unsafe share.",
    )
    unsafe_share: float = Field(
        0.3, gt=0, lt=1, description="Share of tokens that raw text scored 1-5 has, or its interventions."
    )
    interventions: Interventions = Field(Interventions(), description="Split of that share after the start.")


def phases(config: TimingConfig, rows: int) -> list[tuple[int, dict[str, float]]]:
    """The curriculum as ``[(first row, {source: weight})]`` over ``rows`` packed rows; weights of a phase add up to 1.

    The start is rounded to the nearest row. A phase without rows is left out.
    """
    clean = 1 - config.unsafe_share
    before = {"clean": 1.0} if config.before == "safe_only" else {"clean": clean, "unsafe": config.unsafe_share}
    split = config.interventions.plain()
    after = {"clean": clean} | {name: config.unsafe_share * share for name, share in split.items() if share > 0}
    start = round(config.start * rows)
    return [(first, weights) for first, end, weights in ((0, start, before), (start, rows, after)) if first < end]
