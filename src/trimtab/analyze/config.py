"""Settings of the measurements of a model's inside. Torch-free."""

from __future__ import annotations

from pydantic import Field

from trimtab.config import Config


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
