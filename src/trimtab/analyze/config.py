"""Settings of the measurements of a model's inside. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

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
