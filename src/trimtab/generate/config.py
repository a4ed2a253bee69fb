"""How answers are sampled. Torch-free."""

from __future__ import annotations

from pydantic import Field, model_validator

from trimtab.config import Config

SHORT_CIRCUIT = "short-circuit"
"""``Generation.finish`` of an answer that SafeBeam withheld: none of the texts that it could still become was safe enough."""


class SafeBeam(Config):
    """SafeBeam (2504.16980, alg. 1): beam search that drops the candidates after which the harmfulness tag is likeliest."""

    beams: int = Field(4, ge=1, description="Beams kept after each step (k).")
    candidates: int = Field(8, ge=2, description="Likeliest next tokens tried per beam (N); half of all are dropped.")
    floor: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Probabilities of the tag below this one count as equal, so that likelihood decides among candidates "
        "that are all harmless; 0: the paper's rule, which drops half of them also then.",
    )
    short_circuit: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Withhold an answer once even its least risky candidate gives the tag this probability.",
    )


class Sampling(Config):
    """Decoding settings; the defaults are greedy."""

    temperature: float = Field(0.0, ge=0, description="0 is greedy: the likeliest token every time.")
    top_k: int | None = Field(None, ge=1, description="Sample among the k likeliest tokens only.")
    top_p: float | None = Field(None, gt=0, le=1, description="Sample among the likeliest tokens that sum to p.")
    max_new_tokens: int = Field(128, ge=1, description="Longest answer in tokens.")
    samples: int = Field(1, ge=1, description="Answers per prompt, each with random numbers of its own.")
    max_repeats: int | None = Field(
        None, ge=2, description="End an answer (finish `length`) whose tail is one phrase so many times; null: never."
    )
    batch: int = Field(16, ge=1, description="Answers decoded side by side.")
    safebeam: SafeBeam | None = Field(None, description="Decode by SafeBeam instead; the model must know the tag.")

    @model_validator(mode="after")
    def _sampled(self) -> Sampling:
        if self.safebeam is not None and (self.temperature > 0 or self.samples > 1 or self.max_repeats is not None):
            raise ValueError("'safebeam' is a search: leave temperature, samples and max_repeats out")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(f"samples={self.samples} needs temperature > 0: greedy answers would all be equal")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ValueError("'top_k' and 'top_p' need temperature > 0")
        return self
