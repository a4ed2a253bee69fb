"""What a model is made of or loaded from, and the names of the tokens our own tokenizers are born with. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from trimtab.config import Config

PAD = "<|pad|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
HARM_TAG = "<|potentially_unsafe|>"
"""The harmfulness tag of 2504.16980: one id, written by data preparation and by the model, never by a user's text."""
HARM_TAGS = (HARM_TAG, "<potentially_unsafe_content>")
"""What the tag is called: by us, and in the tokenizers that 2504.16980 released."""

SMOLLM2 = "smollm2-135m-instruct"
R1_STAND_IN = "r1-stand-in"
NAMED = (SMOLLM2, R1_STAND_IN)
"""The models that ``LoadConfig.load`` knows by name, and that need no network: one comes out of a pinned package, the other
is made here, untrained, in the form of R1-style models (``models.stand_in``)."""


def control_token(slot: int) -> str:
    """Name of reserved control token number ``slot``; which mode a slot means is the bundle's business."""
    return f"<|control_{slot}|>"


class BuildConfig(Config):
    """A small Llama-architecture model and its tokenizer, both made from scratch.

    The defaults are a model of 1.0 M parameters that learns Tidewater in minutes on a laptop.
    """

    hidden: int = Field(128, ge=8, description="Width of the residual stream.")
    layers: int = Field(4, ge=1, description="Decoder layers.")
    heads: int = Field(4, ge=1, description="Attention heads; must divide `hidden` into even head sizes.")
    kv_heads: int = Field(2, ge=1, description="Key/value heads (grouped-query attention); must divide `heads`.")
    ffn: int = Field(352, ge=8, description="Inner width of the SwiGLU feed-forward block.")
    context: int = Field(512, ge=8, description="Longest sequence in tokens.")
    vocab: int = Field(2048, ge=300, description="Tokens in the vocabulary, special and reserved ones included.")
    reserved: int = Field(16, ge=0, le=256, description="Control tokens present from birth, free for modes.")
    tie: bool = Field(True, description="Share the input embedding with the output head.")
    rope_theta: float = Field(10_000.0, gt=0, description="Base of the rotary position embedding.")
    norm_eps: float = Field(1e-5, gt=0, description="Epsilon of RMSNorm.")
    init_std: float = Field(0.02, gt=0, description="Standard deviation of the initial weights.")

    @model_validator(mode="after")
    def _shapes_fit(self) -> BuildConfig:
        if self.hidden % self.heads or (self.hidden // self.heads) % 2:
            raise ValueError(
                f"hidden={self.hidden} must be heads={self.heads} times an even number; change one of them"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} must divide heads={self.heads}")
        if self.vocab < 256 + 4 + self.reserved:
            raise ValueError(
                f"vocab={self.vocab} is too small: 256 bytes + 4 special + {self.reserved} reserved tokens must fit"
            )
        return self


class LoadConfig(Config):
    """A model that exists: a Hub id, a local Hub-layout directory, the packaged ``smollm2-135m-instruct``, or
    ``r1-stand-in``, which is made on the spot."""

    load: str = Field(
        min_length=1,
        description=f"Hub id, local directory, `{SMOLLM2}` (from the `smollm2` extra, offline), or `{R1_STAND_IN}` (a tiny "
        "untrained model in the form of R1-style ones, to try a recipe with).",
    )
    revision: str | None = Field(
        None, description="Hub commit or tag. Pin it: without one, `main` is used and a study cannot see it move."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Type of the loaded weights; `auto` is the one they were saved in."
    )
