"""Settings of the training loop (torch-free). Durations are shares of the token budget, never steps of one
segment."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from trimtab.config import Config


class LoraSettings(Config):
    """Low-rank adapters: everything else is frozen, and checkpoints hold the adapters alone."""

    r: int = Field(default=16, ge=1, description="Rank of the adapters.")
    alpha: float = Field(default=32.0, gt=0, description="Scale of the adapters: alpha / r multiplies their output.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapters' input while training.")
    targets: tuple[str, ...] = Field(
        default=("all-linear",),
        min_length=1,
        description="Module names to adapt; `all-linear` for every linear layer.",
    )
    train_control_rows: bool = Field(
        default=True, description="Also train the embedding rows of the control tokens (and only these rows)."
    )


class TrainConfig(Config):
    """One training run or one segment of it. A step is ``rows_per_step`` rows over all processes."""

    rows_per_step: int = Field(default=32, ge=1, description="Rows of the global batch, whatever the world size.")
    accumulate: int = Field(default=1, ge=1, description="Micro-batches that a step is cut into (memory, not result).")
    lr: float = Field(default=3e-3, gt=0, description="Peak learning rate.")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        default="cosine",
        description="Learning rate after the warm-up; `wsd` stays at the peak, then falls linearly.",
    )
    warmup: float = Field(default=0.02, ge=0, le=1, description="Share of the token budget for the linear warm-up.")
    decay: float = Field(default=0.2, ge=0, le=1, description="Share of the budget in which `wsd` falls to `min_lr`.")
    min_lr: float = Field(default=0.1, ge=0, le=1, description="Learning rate at the end, as a share of `lr`.")
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="AdamW's betas.")
    weight_decay: float = Field(default=0.1, ge=0, description="AdamW's weight decay, on matrices only.")
    clip: float = Field(default=1.0, gt=0, description="Largest norm of the gradient; longer ones are scaled down.")
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="`bf16` runs the model under autocast; weights, optimizer and loss stay fp32.",
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="Recompute activations in the backward pass: less memory, about a third slower.",
    )
    lora: LoraSettings | None = Field(default=None, description="Train adapters instead of the whole model.")
    log_every: int = Field(default=10, ge=1, description="Steps between the lines of the log.")
    checkpoint_every: int = Field(default=200, ge=0, description="Steps between checkpoints; 0 for none.")
    gradients_by: Literal["none", "source", "span"] = Field(
        default="none", description="Log the exact gradient norm of each group's share of the loss."
    )
    gradients_every: int = Field(
        default=100,
        ge=1,
        description="Steps between those gradient norms (one more backward pass per group each).",
    )
    tracker: Literal["trackio", "wandb", "tensorboard"] | None = Field(
        default=None,
        description="Also send the log to this tracker, through Accelerate; JSON lines are always written.",
    )

    @model_validator(mode="after")
    def _sizes(self) -> TrainConfig:
        if self.rows_per_step % self.accumulate:
            raise ValueError(
                f"rows_per_step ({self.rows_per_step}) must be a multiple of accumulate ({self.accumulate})"
            )
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(f"warmup ({self.warmup}) and decay ({self.decay}) add up to more than the whole budget")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), not {self.betas}")
        return self
