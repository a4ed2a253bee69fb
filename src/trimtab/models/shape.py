"""Parameters and FLOPs of a model from its settings or its config.json, for ``trimtab plan``. Torch-free.

Formulas (multiply and add count as two; norms, softmax and rotary embedding are left out, under 1 % together):

    N             weights that take part in a matrix product: all but norms and a separate input embedding
    forward       2 N + 4 * layers * heads * head_dim * t   per token that attends to t tokens (QK^T and AV)
    training      3 x forward with the causal mean t = sequence / 2, so 6 N + 6 * layers * heads * head_dim * sequence
    generation    forward with t = mean context (0 unless given), so 2 N by default
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import UserError
from trimtab.models.config import R1_STAND_IN, SMOLLM2, BuildConfig, LoadConfig
from trimtab.models.stand_in import SIZES


@dataclass(frozen=True, slots=True)
class Shape:
    """What the counts depend on. ``head_dim`` x ``heads`` need not equal ``hidden``."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int
    tie: bool

    @property
    def matrix_parameters(self) -> int:
        """N of the formulas: weights in matrix products, the output head once (tied or not)."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.ffn) + self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All weights of a Llama-style model: matrices, norms and, where it is not tied, the input embedding."""
        norms = (2 * self.layers + 1) * self.hidden
        return self.matrix_parameters + norms + (0 if self.tie else self.vocab * self.hidden)

    def train_flops_per_token(self, sequence: int) -> float:
        """FLOPs for one training token (forward and backward) in rows of ``sequence`` tokens."""
        return 6.0 * self.matrix_parameters + 6.0 * self.layers * self.heads * self.head_dim * sequence

    def generate_flops_per_token(self, context: float = 0.0) -> float:
        """FLOPs for one generated (or prefilled) token that attends to ``context`` earlier tokens."""
        return 2.0 * self.matrix_parameters + 4.0 * self.layers * self.heads * self.head_dim * context


SMOLLM2_SHAPE = Shape(
    hidden=576, layers=30, heads=9, kv_heads=3, head_dim=64, ffn=1536, vocab=49152, context=8192, tie=True
)

R1_SHAPES = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": Shape(1536, 28, 12, 2, 128, 8960, 151936, 131072, tie=False),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": Shape(3584, 28, 28, 4, 128, 18944, 152064, 131072, tie=False),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": Shape(4096, 32, 32, 8, 128, 14336, 128256, 131072, tie=False),
}
"""The models of arXiv 2601.01624, as their config.json has them (hidden, layers, heads, kv_heads, head_dim, ffn, vocab,
context), so that its study plans without a network."""


def shape_of(model: BuildConfig | LoadConfig) -> Shape | None:
    """The shape, or None for a Hub id whose config.json is neither in the local Hub cache nor known here (a plan does no
    network)."""
    if isinstance(model, BuildConfig):
        return Shape(
            hidden=model.hidden,
            layers=model.layers,
            heads=model.heads,
            kv_heads=model.kv_heads,
            head_dim=model.hidden // model.heads,
            ffn=model.ffn,
            vocab=model.vocab,
            context=model.context,
            tie=model.tie,
        )
    if model.load == SMOLLM2:
        return SMOLLM2_SHAPE
    if model.load == R1_STAND_IN:
        return shape_of(SIZES)
    local = Path(model.load).expanduser()
    if local.is_dir():
        return shape_on_disk(local)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.load, "config.json", revision=model.revision)
    return shape_on_disk(Path(found).parent) if isinstance(found, str) else R1_SHAPES.get(model.load)


def shape_on_disk(directory: Path) -> Shape:
    """The shape that ``directory/config.json`` describes (Llama-style names, as Qwen, Mistral and Gemma use too)."""
    path = directory / "config.json"
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {directory} is not a model directory in Hub layout") from None
    except ValueError:
        raise UserError(f"{path} is not valid JSON; fetch or save the model again") from None
    data = data.get("text_config", data)
    try:
        heads = int(data["num_attention_heads"])
        return Shape(
            hidden=int(data["hidden_size"]),
            layers=int(data["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(data.get("num_key_value_heads") or heads),
            head_dim=int(data.get("head_dim") or data["hidden_size"] // heads),
            ffn=int(data["intermediate_size"]),
            vocab=int(data["vocab_size"]),
            context=int(data["max_position_embeddings"]),
            tie=bool(data.get("tie_word_embeddings", False)),
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot read the model's shape (field {error}); is it a decoder-only model?") from None
