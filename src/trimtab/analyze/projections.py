"""Directions in a model's parameter space: random ones, and a few found ones that the random ones stay clear of.

A stack of k directions is a dict of parameter name -> float32[k, *shape].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trimtab.seeds import seed_of

Stack = dict[str, Tensor]
_INDEPENDENT = 1e-4
"""Directions of less than this share of the largest (squared, each first scaled to length 1) are sums of the others."""


def random_directions(like: Mapping[str, Tensor], seed: int, first: int, count: int, guides: Stack | None) -> Stack:
    """Directions ``first`` .. ``first + count - 1``, N(0, 1) of each parameter's shape, at right angles to ``guides``.

    Functions of the seed, the number and the parameter's name alone: drawn on the CPU, so that every device is given the
    same ones, however many are drawn at once.
    """
    drawn: Stack = {}
    for name, value in like.items():
        parts = [
            torch.randn(value.shape, generator=torch.Generator().manual_seed(seed_of("projection", seed, k, name)))
            for k in range(first, first + count)
        ]
        drawn[name] = torch.stack(parts).to(value.device)
    if guides is None:
        return drawn
    along = torch.stack([v.flatten(1) @ guides[name].flatten(1).T for name, v in drawn.items()]).sum(0)
    return {name: v.sub_(torch.tensordot(along, guides[name], 1)) for name, v in drawn.items()}


def orthonormal(stack: Stack) -> Stack | None:
    """Orthonormal directions that span those of ``stack``, or None if all of these are zero.

    By the eigenvectors of their inner products, twice: the first pass leaves errors of the size of its condition.
    """
    for _ in range(2):
        flat = [part.flatten(1) for part in stack.values()]
        gram = torch.stack([(part.double() @ part.double().T).cpu() for part in flat]).sum(0)
        there = gram.diagonal() > 0
        if not there.any():
            return None
        scale = torch.where(there, gram.diagonal(), 1.0).rsqrt()
        values, vectors = torch.linalg.eigh(gram * scale[:, None] * scale)
        kept = values > _INDEPENDENT * values[-1]
        turn = ((vectors[:, kept] / values[kept].sqrt()).T * scale).float()
        stack = {name: torch.tensordot(turn.to(part.device), part, 1) for name, part in stack.items()}
    return stack


def sliced(stack: Stack, part: slice) -> Stack:
    """Some of the directions of a stack."""
    return {name: value[part] for name, value in stack.items()}
