"""Learning-rate schedules over the token budget (torch-free): cosine, WSD (warm-up, stable, decay) and
constant.

Every step trains the same number of tokens, so a share of the tokens is a share of the steps. The schedule is
always that of the whole budget, also where a call trains a part of it only: this is what lets arms share a
trunk.
"""

from __future__ import annotations

import math

from trimtab.train.config import TrainConfig


def lr_at(step: int, total: int, config: TrainConfig) -> float:
    """Learning rate of the step with index ``step`` (0 .. total - 1) out of ``total``.

    The warm-up ends at the peak, at its last step; cosine and wsd reach ``min_lr * lr`` at the last step of
    all.
    """
    assert 0 <= step < total, f"step {step} lies outside the budget of {total}"
    warm = round(config.warmup * total)
    if step < warm:
        return config.lr * (step + 1) / warm
    if config.schedule == "constant":
        return config.lr
    falling = total - warm if config.schedule == "cosine" else round(config.decay * total)
    left = total - 1 - step  # steps still to come after this one
    if left >= falling:
        return config.lr
    # `done` runs from just above 0 (wsd) or 0 (cosine, whose first step is the peak itself) to 1 at the last
    # step.
    if config.schedule == "cosine":
        done = 1 - left / max(falling - 1, 1)
        share = (1 + math.cos(math.pi * done)) / 2
    else:
        share = left / falling
    return config.lr * (config.min_lr + (1 - config.min_lr) * share)
