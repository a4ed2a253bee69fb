"""What a step will cost, before it is done: FLOPs by formula, tokens by rule of thumb, seconds by the past.

Seconds come from finished steps of the same kind and shape in the store, where there are any; else from a rough rate for
this machine. They are estimates, and printed as such.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING

from trimtab.artifact import MANIFEST, Store
from trimtab.data.promptsets import SETS
from trimtab.evaluate.attacks.choose import choose_attack
from trimtab.evaluate.panel import TaskConfig
from trimtab.models.config import BuildConfig, LoadConfig
from trimtab.models.shape import shape_of as model_shape

if TYPE_CHECKING:
    from trimtab.recipe.stages import ChatSource, GenerateStage, SftStage
    from trimtab.study.graph import Step

TIDEWATER_CHAT = 55
OTHER_CHAT = 120
"""Tokens of one chat row: Tidewater's with a tokenizer of its own, and any other."""
PROMPT_SHARE = 0.6
"""Of the tokens of a chat row: those of its prompt, which answers may share (``modes.shared``)."""
OPENING = 14
"""Tokens of a prefix sentence; room for it is kept in every row, whatever the ratio."""

_CPU_FLOPS = {"fp32": 25e9, "bf16": 100e9}
"""Per core: small fp32 matrices, and training in bf16; measured on an x86-64 core with AVX-512."""
_FIXED = {
    "scorer": 120.0,
    "probes": 8.0,
    "perplexity": 3.0,
    "token_analysis": 30.0,
    "corpus": 2.0,
    "tokenizer": 2.0,
    "tokens": 3.0,
    "chats": 3.0,
    "packed": 0.2,
    "judge": 1.0,
    "pretrain": 2.0,
    "sft": 2.0,
    "adapter": 2.0,
    "dpo": 4.0,
    "distill": 3.0,
    "generate": 2.0,
    "margin": 3.0,
    "audit": 15.0,
}


def train_flops(model: BuildConfig | LoadConfig, sequence: int) -> float:
    """FLOPs per training token, or 0 where the shape is not known without a network."""
    shape = model_shape(model)
    return shape.train_flops_per_token(sequence) if shape else 0.0


def generate_flops(model: BuildConfig | LoadConfig, context: float = 128) -> float:
    """FLOPs per generated token, or 0 where the shape is not known without a network."""
    shape = model_shape(model)
    return shape.generate_flops_per_token(context) if shape else 0.0


def shape_of(model: BuildConfig | LoadConfig, lora: bool) -> str:
    """A short name under which speeds are remembered, such as ``llama-128x4-v2048``."""
    if isinstance(model, LoadConfig):
        name = f"{model.load}-{model.dtype}"
    else:
        name = f"llama-{model.hidden}x{model.layers}-v{model.vocab}"
    return name + ("-lora" if lora else "")


def chat_tokens(stage: SftStage, modes: int) -> int:
    """Tokens of one pass over an SFT stage's data with answers for so many modes (0: none), by rule of thumb."""
    copies = modes + stage.modes.fallback if modes and stage.modes is not None else 1.0
    if stage.modes is not None and stage.modes.shared:
        copies = PROMPT_SHARE + copies * (1 - PROMPT_SHARE)
    return round(
        parts_tokens(stage.data, isinstance(stage.model, str), 0 if stage.prefix is None else OPENING) * copies
    )


def parts_tokens(parts: Iterable[ChatSource], small: bool, more: int = 0) -> int:
    """Tokens of chat rows, ``more`` in each; ``small``: with a tokenizer that is made in the study."""
    return sum(rows_of(part) * (more + (TIDEWATER_CHAT if part.tidewater and small else OTHER_CHAT)) for part in parts)


def rows_of(part: ChatSource) -> int:
    """Rows of a part of a data set, as far as they are known without reading it."""
    taken = part.source.take or part.source.limit if part.source else None
    return part.n or taken or 1000


def answer_tokens(stage: GenerateStage) -> int:
    """Tokens generated if every answer ran to its limit."""
    attempts = sum(choose_attack(spec).budget for spec in stage.attacks)
    prompts = 0
    for task in stage.tasks:
        n = task.n or (task.source and (task.source.take or task.source.limit)) or 100
        prompts += n * (1 + (attempts if _may_be_harmful(task) else 0))
    return prompts * len(stage.modes or (None,)) * stage.sampling.samples * stage.sampling.max_new_tokens


def _may_be_harmful(task: TaskConfig) -> bool:
    """Whether a task's prompts are attacked, as far as is known before they are read."""
    if task.tidewater is not None:
        return task.tidewater.startswith("harmful")
    known = SETS.get(task.source.name) if task.source is not None and task.source.name is not None else None
    return known is None or known.harm in (None, "harmful")


class Speeds:
    """Seconds per step, learnt from the manifests in a store."""

    def __init__(self, store: Store) -> None:
        self._rates: dict[tuple[str, str], list[float]] = {}
        self._fixed: dict[str, list[float]] = {}
        for path in sorted(store.root.glob(f"*/{MANIFEST}")):
            try:
                manifest = json.loads(path.read_text(encoding="utf-8"))
                kind, seconds = str(manifest["kind"]), float(manifest["seconds"])
                tokens, shape = int(manifest["tokens"]), str(manifest["facts"].get("shape", ""))
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if manifest["facts"].get("resumed"):
                continue  # its seconds are those of the last part alone
            if tokens and shape and seconds > 0:
                self._rates.setdefault((kind, shape), []).append(tokens / seconds)
            elif not tokens:
                self._fixed.setdefault(kind, []).append(seconds)

    def seconds(self, step: Step) -> float:
        """Estimated wall time of a step on this machine."""
        rates = self._rates.get((step.kind, step.shape))
        if rates and step.tokens:
            return step.tokens / statistics.median(rates)
        if not step.tokens:
            return statistics.median(self._fixed.get(step.kind, [_FIXED[step.kind]]))
        train = step.config.get("train") or {}
        rate = _CPU_FLOPS[train.get("precision", "fp32")]
        return _FIXED[step.kind] + step.flops / (rate * (os.cpu_count() or 1))

    def total(self, steps: Iterable[Step]) -> float:
        return sum(self.seconds(step) for step in steps)


def count(value: float) -> str:
    """1234567 -> 1.23M; 0 -> -."""
    if not value:
        return "-"
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def clock(seconds: float) -> str:
    """75 -> 1:15; over an hour h:mm:ss; over four days in days."""
    if seconds >= 4 * 86400:
        return f"{seconds / 86400:,.0f} days"
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
