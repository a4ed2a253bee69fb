"""Causal attention that can be differentiated forwards, and a model with its output layer taken off.

torch's fused attention has no forward derivative, and the eager one makes every T x T array several times over for each
direction. Here the weights of a block of queries are computed once for all directions, what lies behind the block is never
looked at, and the derivative of the softmax is folded into two matrix products:

    dO = (P * dS) V + P dV - rowsum(P * dS) O,    dS = dQ K' + Q dK'

Only plain causal attention is done: no mask, no window, no softcap. Who uses it compares the model's states with those
of its own attention first (``token_gradients``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

FORWARD_MODE = "trimtab_causal"
"""Name under which transformers finds ``causal_attention``; it makes no mask for a name that it has no mask for."""
_BLOCK = 128
"""Queries at once: fits a core's cache at a few thousand keys."""


class _Causal(torch.autograd.Function):
    """Queries, keys, values float[B, H, T, D] (queries scaled) to outputs of the same shape."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([_weights(q, k, lo, hi) @ v[..., :hi, :] for lo, hi in _blocks(q)], -2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_forward(*inputs, output)

    @staticmethod
    def jvp(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
        q, k, v, out = ctx.saved_tensors
        # dQ K' + Q dK' as one product of twice the width
        queries = torch.cat([dq, q.expand_as(dq)], -1)
        keys = torch.cat([k.expand_as(dk), dk], -1).transpose(-1, -2)
        found = []
        for lo, hi in _blocks(q):
            p = _weights(q, k, lo, hi)
            moved = (queries[..., lo:hi, :] @ keys[..., :hi]).mul_(p)
            drift = moved.sum(-1, keepdim=True) * out[..., lo:hi, :]
            found.append(moved @ v[..., :hi, :] + p @ dv[..., :hi, :] - drift)
        return torch.cat(found, -2)


def _blocks(q: Tensor) -> list[tuple[int, int]]:
    length = q.shape[-2]
    return [(lo, min(lo + _BLOCK, length)) for lo in range(0, length, _BLOCK)]


def _weights(q: Tensor, k: Tensor, lo: int, hi: int) -> Tensor:
    """Attention of the queries [lo, hi) to the keys before ``hi``."""
    scores = q[..., lo:hi, :] @ k[..., :hi, :].transpose(-1, -2)
    later = torch.ones(hi - lo, hi, dtype=torch.bool, device=q.device).triu(lo + 1)
    return scores.masked_fill(later, -torch.inf).softmax(-1)


def causal_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **rest: Any
) -> tuple[Tensor, None]:
    """What transformers calls in a layer: query [B, H, T, D], key and value [B, H / groups, T, D] -> [B, T, H, D]."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out: Tensor = _Causal.apply(query * scaling, key, value)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(FORWARD_MODE, causal_attention)


@contextmanager
def headless(model: Any, attention: str) -> Iterator[None]:
    """While the context lasts, the model's ``logits`` are the states float[B, T, hidden] that its output layer would be
    given, and it attends by ``attention``; then it is as before."""
    head, own = model.get_output_embeddings(), model.config._attn_implementation
    model.set_output_embeddings(nn.Identity())
    model.config._attn_implementation = attention
    try:
        yield
    finally:
        model.config._attn_implementation = own
        model.set_output_embeddings(head)
