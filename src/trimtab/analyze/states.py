"""What a model holds of a prompt: its residual stream after every block, pooled over the prompt's tokens.

Layer 0 is what enters the first block, layer l what leaves block l, before the final norm: the stream that the blocks
write to, and that ``analyze.ablation`` takes a direction out of. States are pooled while the model runs, so memory is that
of one batch and of two vectors per prompt and layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from trimtab.errors import UserError

Pooling = Literal["mean", "last"]
POOLINGS: tuple[Pooling, ...] = ("mean", "last")
Floats = NDArray[np.float32]
Edit = Callable[[int, torch.Tensor], torch.Tensor | None]


@dataclass(frozen=True)
class States:
    """Pooled states of n prompts: ``mean`` over a prompt's tokens and its ``last`` token, float32[layers + 1, n, hidden]."""

    mean: Floats
    last: Floats

    def of(self, pooling: Pooling) -> Floats:
        return self.mean if pooling == "mean" else self.last


def blocks_of(model: Any) -> list[torch.nn.Module]:
    """The blocks of a decoder, in order. ``UserError`` for a model that does not keep them in one list."""
    wanted = int(getattr(model.config, "num_hidden_layers", 0))
    for module in model.modules():
        if wanted and isinstance(module, torch.nn.ModuleList) and len(module) == wanted:
            return list(module)
    raise UserError(f"{type(model).__name__}: its blocks are not in one list of num_hidden_layers; it cannot be probed")


@contextmanager
def streamed(model: Any, visit: Edit) -> Iterator[None]:
    """While the context lasts, ``visit(layer, stream)`` sees the stream [batch, tokens, hidden] of every layer; what it
    returns, unless None, takes the stream's place. All hooks are removed afterwards, whatever happens."""
    blocks = blocks_of(model)
    handles: list[Any] = []

    def entering(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        stream = args[0] if args else kwargs["hidden_states"]
        changed = visit(0, stream)
        if changed is None:
            return None
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

    def leaving(layer: int) -> Callable[..., Any]:
        def hook(module: Any, args: Any, output: Any) -> Any:
            changed = visit(layer, output[0] if isinstance(output, tuple) else output)
            if changed is None:
                return None
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    try:
        handles.append(blocks[0].register_forward_pre_hook(entering, with_kwargs=True))
        handles += [block.register_forward_hook(leaving(i + 1)) for i, block in enumerate(blocks)]
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def hidden_states(model: Any, prompts: Sequence[NDArray[Any]], batch: int, pad_id: int = 0) -> States:
    """States of ``prompts`` (token ids, one array each), ``batch`` of them side by side, in the order given.

    Prompts of like length go together and are padded on the right, where a causal model cannot see the padding; padding
    is in no mean. ``UserError`` for an empty prompt or none.
    """
    if not prompts or any(len(ids) == 0 for ids in prompts):
        raise UserError("prompts: there must be one, and none may be empty")
    device = next(model.parameters()).device
    layers = len(blocks_of(model)) + 1
    hidden = int(model.config.hidden_size)
    mean, last = (np.empty((layers, len(prompts), hidden), np.float32) for _ in range(2))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            sizes = torch.tensor([len(prompts[i]) for i in chosen], device=device)
            ids = np.full((len(chosen), len(prompts[chosen[-1]])), pad_id, np.int64)
            for row, i in enumerate(chosen):
                ids[row, : len(prompts[i])] = prompts[i]
            mask = torch.arange(ids.shape[1], device=device)[None] < sizes[:, None]
            _pool(model, torch.from_numpy(ids).to(device), mask, sizes, chosen, mean, last)
    finally:
        model.train(training)
    return States(mean, last)


def _pool(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, sizes: torch.Tensor, where: list[int], mean: Floats, last: Floats
) -> None:
    rows = torch.arange(len(where), device=ids.device)

    def visit(layer: int, stream: torch.Tensor) -> None:
        kept = stream.float() * mask[:, :, None]
        mean[layer, where] = (kept.sum(1) / sizes[:, None]).cpu().numpy()
        last[layer, where] = stream[rows, sizes - 1].float().cpu().numpy()

    with streamed(model, visit):
        inner = getattr(model, "base_model", model)  # without the output layer: no logits are needed
        inner(input_ids=ids, attention_mask=mask.long(), use_cache=False)
