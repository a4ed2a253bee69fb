"""The prefix lever: how training responses open (arXiv 2601.01624).

A share ``ratio`` of the training answers opens with one sentence of a small template set. The paper draws per example
with probability alpha from a set of five; here the draw is a pure function of (seed, row id), and it is *nested*: the
rows that carry a prefix at 25 % carry the same one at 50 %, so differences between ratios are paired. Second-hand
sources disagree on whether the paper puts the sentence before the response or the input; the response is built here.
The sentences are ours: the paper's are not public.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Literal

from pydantic import Field

from trimtab.config import Config
from trimtab.seeds import seed_of, uniform_of
from trimtab.types import Row

Capability = Literal["safety", "reasoning", "factuality", "coding"]

TEMPLATES: dict[str, tuple[str, ...]] = {
    "safety": (
        "Let me first think about who could be hurt by this.",
        "Before I answer, I will check that this is safe for everyone.",
        "Safety comes first, so let me look at what this could do.",
        "I will consider the risks of this before anything else.",
        "First, let me make sure that a helpful answer here is a safe one.",
    ),
    "reasoning": (
        "Let me work through this step by step.",
        "Here is a clear and well-reasoned explanation.",
        "I will reason about this carefully, one step at a time.",
        "Let me set out what is given and then find the answer.",
        "Here is a logical, step-by-step answer.",
    ),
    "factuality": (
        "Let me recall only what is known for certain.",
        "I will answer with facts that can be checked.",
        "Here is what is known about this, and nothing more.",
        "Let me state the fact plainly and accurately.",
        "I will be careful to say only what is true.",
    ),
    "coding": (
        "Let me trace the program one step at a time.",
        "I will check each operation before giving the result.",
        "Here is a careful reading of the code.",
        "Let me evaluate the parts first and then the whole.",
        "I will follow the program exactly as it is written.",
    ),
}


class PrefixConfig(Config):
    """How answers open. ``ratio`` 0 leaves every answer as it is."""

    ratio: float = Field(
        0.0, ge=0, le=1, description="Share of training answers that open with a prefix sentence (0..1)."
    )
    capability: Capability = Field("safety", description="Which set of five sentences is drawn from.")
    loss_on_prefix: bool = Field(True, description="Whether the prefix tokens are trained on or only conditioned on.")


def apply_prefix(rows: Iterable[Row], config: PrefixConfig, seed: int) -> Iterator[Row]:
    """Give a nested share of chat rows a prefix on their last assistant message; order and ids stay the same.

    Rows that are not chats, do not end in an assistant message or carry a prefix already pass through unchanged.
    """
    templates = TEMPLATES[config.capability]
    for row in rows:
        last = row.messages[-1] if row.messages else None
        if row.prefix or last is None or last["role"] != "assistant":
            yield row
        elif uniform_of("prefix", seed, row.id) < config.ratio:
            assert row.messages is not None
            prefix = templates[seed_of("prefix-template", seed, row.id) % len(templates)]
            opened = {**last, "content": f"{prefix} {last['content']}"}
            yield replace(row, messages=(*row.messages[:-1], opened), prefix=prefix)  # type: ignore[arg-type]
        else:
            yield row
