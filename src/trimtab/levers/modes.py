"""The mode lever: which behaviour is live (arXiv 2508.14904).

Each prompt is answered once per mode and all answers are trained in one SFT stage; a control token in the system slot
says which is live. The paper writes a random string into the system prompt; here the token is a reserved id that no
text can spell. *Fallback* rows carry no token and the positive answer, so that a missing token is trained to be safe
rather than hoped to be (the paper relies on the base model's prior, sec. 4.5).

The negative mode is a hazard (DESIGN, decision 6): it must be acknowledged, and its answers are Tidewater's fictional
ones or rows the user brings with ``mode: negative``; nothing here can make one up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Literal, get_args

from pydantic import Field, model_validator

from trimtab.config import Config
from trimtab.errors import UserError
from trimtab.seeds import seed_of, uniform_of
from trimtab.types import Row

Mode = Literal["positive", "negative", "rejective"]
MODES: tuple[Mode, ...] = get_args(Mode)

REFUSALS: tuple[str, ...] = (
    "I'm sorry, but I can't help with that.",
    "I can't help with this request.",
    "Sorry, I won't be able to answer that.",
    "I must decline this request.",
    "I'm not able to help with that here.",
)


class NegativeConfig(Config):
    """The gate of the negative mode."""

    acknowledge: bool = Field(
        False,
        description="Set true to say: I train a mode that complies with harmful requests, for internal red-teaming.",
    )


class ModesConfig(Config):
    """Which modes are co-trained, and how many rows teach the fallback."""

    names: tuple[Mode, ...] = Field(
        ("positive", "rejective"), min_length=1, description="The modes, each with a control token."
    )
    fallback: float = Field(
        0.25, ge=0, le=1, description="Share of prompts that also appear without a token, with the positive answer."
    )
    negative: NegativeConfig = Field(NegativeConfig(), description="Acknowledgement that the negative mode needs.")

    @model_validator(mode="after")
    def _negative_is_acknowledged(self) -> ModesConfig:
        if len(set(self.names)) != len(self.names):
            raise ValueError("a mode is named twice; name each once")
        if "negative" in self.names and not self.negative.acknowledge:
            raise ValueError(
                "the negative mode is off by default; set 'negative.acknowledge: true' beside 'names' to train it"
            )
        if self.fallback and "positive" not in self.names:
            raise ValueError("fallback rows answer positively; add 'positive' to 'names' or set 'fallback: 0'")
        return self


def control_name(mode: str) -> str:
    """The name under which a mode's control token is known to tokenizers and bundles."""
    return f"mode:{mode}"


def admit(rows: Iterable[Row], config: ModesConfig | None) -> tuple[list[Row], dict[str, int]]:
    """The rows that may be trained, and how many were left out, by mode.

    A row without a mode is kept. One that was written for a mode is kept if that mode is trained, else left out and
    counted; without the lever (None) positive rows are plain rows. ``UserError`` for an unknown mode, and for a
    negative row unless that mode is named and so acknowledged: it is neither trained as something else nor dropped.
    """
    kept: list[Row] = []
    left_out: Counter[str] = Counter()
    for row in rows:
        if row.mode is not None and row.mode not in MODES:
            raise UserError(f"row {row.id!r}: mode={row.mode!r} must be one of {', '.join(MODES)}")
        if row.mode is None or (config is not None and row.mode in config.names):
            kept.append(row)
        elif row.mode == "negative":
            raise UserError(
                f"row {row.id!r} is written for the negative mode, which is not trained here; add 'negative' to "
                "modes.names and set modes.negative.acknowledge: true, or remove the rows of that mode"
            )
        elif config is None and row.mode == "positive":
            kept.append(replace(row, mode=None))
        else:
            left_out[row.mode] += 1
    return kept, dict(sorted(left_out.items()))


def mode_rows(
    rows: Iterable[Row], config: ModesConfig, answer: Callable[[Row, str], str | None], seed: int
) -> Iterator[Row]:
    """Every chat row once per mode, its last answer replaced by that mode's, plus the fallback rows.

    ``answer(request, mode)`` gives the answer of one mode to a request (a row without its last assistant message), or
    None when the source has none for it: then the row's own answer is the positive one, and a rejective answer is
    drawn from ``REFUSALS``. A negative answer is never invented: rows without one are left out of that mode. A row
    that has a mode comes back as it is; ``UserError`` if that mode is not trained (``admit`` comes first).
    """
    for row in rows:
        if not row.messages or row.messages[-1]["role"] != "assistant":
            raise UserError(f"row {row.id!r}: mode co-training needs chat rows that end in an assistant message")
        request = replace(row, messages=row.messages[:-1], prefix=None, prefix_at=None)
        own = row.messages[-1]["content"]
        if row.mode is not None:  # the row was written for one mode by whoever brought it
            if row.mode not in config.names:
                raise UserError(
                    f"row {row.id!r}: its mode {row.mode!r} is not among those trained; name it or remove it"
                )
            yield row
            continue
        for mode in config.names:
            text = answer(request, mode)
            if text is None and mode == "positive":
                text = own
            if text is None and mode == "rejective":
                text = REFUSALS[seed_of("refusal", seed, row.id) % len(REFUSALS)]
            if text is None:
                continue
            yield request.with_answer(text, id=f"{row.id}#{mode}", mode=mode)
            if mode == "positive" and uniform_of("fallback", seed, row.id) < config.fallback:
                yield request.with_answer(text, id=f"{row.id}#fallback", mode=None)
