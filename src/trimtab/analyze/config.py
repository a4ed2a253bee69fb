"""Settings of the measurements of a model's inside. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from trimtab.config import Config

TokenMeasure = Literal["loss", "logit_grad", "head_grad", "grad_norm"]
MEASURED: tuple[TokenMeasure, ...] = ("loss", "logit_grad", "head_grad", "grad_norm")


class ProbeConfig(Config):
    """Linear probes per layer: safe against harmful requests (2601.07087)."""

    folds: int = Field(5, ge=2, description="Folds of the cross-validation; prompts about one thing stay together.")
    l2: float = Field(1.0, gt=0, description="Strength of the L2 penalty (1 / C of the logistic regression).")
    batch: int = Field(64, ge=1, description="Prompts read side by side.")
    bootstrap: int = Field(500, ge=50, description="Resamples of the prompts behind each interval.")
    ablate: bool = Field(True, description="Take the best layer's direction out of the model and look at its refusals.")


class PerplexityConfig(Config):
    """Perplexity on text that was never trained on."""

    n: int = Field(400, gt=0, description="Held-out Tidewater documents.")
    length: int = Field(128, ge=16, description="Tokens per packed row.")
    batch: int = Field(32, ge=1, description="Rows read side by side.")


class TokenConfig(Config):
    """How hard single tokens pull on a model (2601.01624's mechanism claim; docs/analysis.md)."""

    measures: tuple[TokenMeasure, ...] = Field(
        MEASURED,
        min_length=1,
        description="What is measured of every trained token; `grad_norm` takes nearly all the time.",
    )
    projections: int = Field(64, ge=1, description="Passes behind `grad_norm`; its relative error is near 1/sqrt(2 K).")
    exact: bool = Field(False, description="One backward pass per token in place of the projections; slow.")
    batch: int = Field(2048, ge=1, description="Tokens read side by side; a longer row is read alone.")
    bootstrap: int = Field(1000, ge=50, description="Resamples of the rows behind each interval.")
    sequences: int = Field(6, ge=0, description="Rows shown token by token in the heat-map.")

    @field_validator("measures")
    @classmethod
    def _in_order(cls, value: tuple[TokenMeasure, ...]) -> tuple[TokenMeasure, ...]:
        if len(set(value)) != len(value):
            raise ValueError("a measure is given twice")
        return tuple(name for name in MEASURED if name in value)


class MarginConfig(Config):
    """The safety alignment margin: the mean silhouette of a model's answers-to-be by mode (2508.14904, sec. 3.3)."""

    features: tuple[Literal["logits", "hidden"], ...] = Field(
        ("logits",),
        min_length=1,
        description="The points: `logits` of the first tokens of an answer, as in the paper, or `hidden` states there.",
    )
    distances: tuple[Literal["cosine", "euclidean"], ...] = Field(
        ("euclidean", "cosine"), min_length=1, description="Distances; the paper does not say which it takes."
    )
    tokens: int = Field(
        1,
        ge=1,
        description="First tokens of an answer, one after the other by the model's own choice; each is a figure.",
    )
    layers: tuple[int, ...] = Field(
        (), description="Layers of `hidden` (0: what enters the first block); left out: all of them."
    )
    batch: int = Field(64, ge=1, description="Prompts read side by side.")
    bootstrap: int = Field(500, ge=50, description="Resamples of the prompts behind each interval.")

    @model_validator(mode="after")
    def _each_once(self) -> MarginConfig:
        for name in ("features", "distances", "layers"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name}: one is given twice")
        if self.layers and "hidden" not in self.features:
            raise ValueError("'layers' are those of 'hidden'; name it among the 'features'")
        return self


class AuditConfig(Config):
    """Whether a control token can be typed into a model, or coaxed out of it (docs/levers/modes.md)."""

    spoofs: int = Field(
        10_000,
        ge=0,
        description="Attempts to write a control token as text, through the renderer and by plain templating.",
    )
    leaks: int = Field(
        64, ge=0, description="Answers that are searched for control tokens, over all ways of asking for them."
    )
    max_new_tokens: int = Field(48, ge=1, description="Longest of these answers, in tokens.")
    batch: int = Field(32, ge=1, description="Answers decoded side by side.")

    @model_validator(mode="after")
    def _something(self) -> AuditConfig:
        if not self.spoofs and not self.leaks:
            raise ValueError("'spoofs' and 'leaks' are both 0: there is nothing to do")
        return self
