"""What a step computes: the loss of every trained token, its parts by source and span, and their gradients.

Labels are shifted here, once, and nowhere else. The output layer runs on trained positions only (a pre-hook
selects them), so masked prompts and padding cost no logits; the softmax and the loss are fp32 whatever the
precision. Attention stays inside a piece because transformers builds a block-causal mask from
``position_ids`` that restart, if it is given neither a mask nor a cache. A batch of rows that never restart
takes the plain causal path, and one with answers that share a prompt (``data.tree``) is given a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from trimtab.data.store import Batch
from trimtab.errors import UserError
from trimtab.types import IGNORE, SPANS


@dataclass(frozen=True)
class Micro:
    """One forward pass: B rows of T tokens, N of which are trained.

    input_ids int64[B, T]; position_ids int64[B, T] or None (no row restarts); branches, whether answers share a
    prompt; index int64[N], the flattened positions whose next token is trained; target int64[N], these tokens;
    source, span int16/uint8[N] (numpy), the target's groups
    """

    input_ids: Tensor
    position_ids: Tensor | None
    branches: bool
    index: Tensor
    target: Tensor
    source: NDArray[np.int16]
    span: NDArray[np.uint8]

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> Micro:
        rows, columns = np.nonzero(batch.labels[:, 1:] != IGNORE)
        target = (rows, columns + 1)  # the one shift
        broken = batch.position_ids[:, 1:] != batch.position_ids[:, :-1] + 1
        branch = broken & (batch.position_ids[:, 1:] > 0)
        assert (batch.labels[:, 1:][branch] == IGNORE).all(), "what stands before a branch is not what it goes on from"

        def tensor(array: NDArray[Any]) -> Tensor:
            return torch.from_numpy(array.astype(np.int64)).to(device, non_blocking=True)

        return cls(
            input_ids=tensor(batch.input_ids),
            position_ids=tensor(batch.position_ids) if broken.any() else None,
            branches=bool(branch.any()),
            index=tensor(rows * batch.labels.shape[1] + columns),
            target=tensor(batch.labels[target]),
            source=batch.source_id[target],
            span=batch.span_id[target],
        )


def tree_mask(position_ids: Tensor) -> Tensor:
    """bool[B, 1, T, T], True where the token of a row (second to last axis) sees another: those up to itself of its own
    run of positions and, in a branch, those of its example's first run whose positions are below the branch's first."""
    column = torch.arange(position_ids.shape[1], device=position_ids.device)
    broken = torch.ones_like(position_ids, dtype=torch.bool)
    broken[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1

    def latest(begins: Tensor) -> Tensor:
        """The column in which what each token belongs to begins."""
        return torch.where(begins, column, 0).cummax(1).values

    run, root = latest(broken), latest(position_ids == 0)
    below = position_ids[:, None, :] < position_ids.gather(1, run)[:, :, None]
    own, shared = run[:, :, None] == run[:, None, :], (root[:, :, None] == run[:, None, :]) & below
    return ((own | shared) & (column[:, None] >= column))[:, None]


class TrainedPositions:
    """Makes a causal LM return logits float[N, vocab] of the positions in ``index`` instead of [B, T,
    vocab]."""

    def __init__(self, model: Any) -> None:
        implementation = model.config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            raise UserError(
                f"attention {implementation!r} would look across packed examples; load the model with "
                "attn_implementation='sdpa' (or 'eager')"
            )
        head = model.get_output_embeddings()
        if head is None:
            raise UserError(f"{type(model).__name__} has no output layer; training needs a causal language model")
        self.index: Tensor | None = None
        self.config = model.config.get_text_config()
        self._handle = head.register_forward_pre_hook(self._select)

    def _select(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert self.index is not None, "set the positions before the forward pass"
        return (args[0].flatten(0, 1).index_select(0, self.index), *args[1:])

    def mask(self, position_ids: Tensor) -> Tensor:
        """``tree_mask`` as the model's attention takes it; ``UserError`` for layers that see less than all before them."""
        config = self.config
        kinds = {*(getattr(config, "layer_types", None) or ()), "full_attention"}
        windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        if len(kinds) > 1 or any(windows):
            raise UserError(
                f"modes.shared: this {config.model_type} model has layers without full attention, which would not keep to "
                "the branches of a shared prompt; set 'modes.shared: false'"
            )
        seen = tree_mask(position_ids)
        if config._attn_implementation == "sdpa":
            return seen
        return torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, torch.finfo(torch.float32).min)

    def close(self) -> None:
        self._handle.remove()


def token_losses(model: nn.Module, head: TrainedPositions, micro: Micro, *, bf16: bool) -> tuple[Tensor, Tensor]:
    """Logits float32[N, vocab] and negative log-likelihood float32[N] (nats) of the trained tokens."""
    head.index = micro.index
    mask = None
    if micro.branches:
        assert micro.position_ids is not None
        mask = head.mask(micro.position_ids)
    with torch.autocast(micro.input_ids.device.type, dtype=torch.bfloat16, enabled=bf16):
        # Without use_cache=False the model makes a cache, and with a cache packed rows are not told apart.
        output = model(input_ids=micro.input_ids, attention_mask=mask, position_ids=micro.position_ids, use_cache=False)
    logits = output.logits.float()
    return logits, functional.cross_entropy(logits, micro.target, reduction="none")


@torch.no_grad()
def logit_gradients(logits: Tensor, target: Tensor) -> Tensor:
    """||softmax - onehot||_2 of each token, float32[N]: how hard it pulls on its logits, 0 .. sqrt(2)."""
    p = logits.softmax(-1)
    at_target = p.gather(-1, target[:, None])[:, 0]
    return (torch.linalg.vector_norm(p, dim=-1).square() - 2 * at_target + 1).clamp_min(0).sqrt()


class Figures:
    """Sums of a step by source and by span: tokens, loss, logit gradient; float64[3, sources + spans]."""

    def __init__(self, sources: Sequence[str]) -> None:
        self.sources = tuple(sources)
        self.sums = np.zeros((3, len(self.sources) + len(SPANS)))

    def add(self, micro: Micro, nll: Tensor, pull: Tensor | None = None) -> None:
        values = [np.ones(len(micro.source)), _numpy(nll), _numpy(nll if pull is None else pull)]
        for row, value in zip(self.sums, values, strict=True):
            row[: len(self.sources)] += np.bincount(micro.source, value, len(self.sources))
            row[len(self.sources) :] += np.bincount(micro.span, value, len(SPANS))

    def groups(self, by: str) -> tuple[tuple[str, ...], NDArray[np.float64]]:
        """Names and sums [3, G] of the sources or the spans."""
        cut = len(self.sources)
        return (self.sources, self.sums[:, :cut]) if by == "source" else (SPANS, self.sums[:, cut:])

    def record(self, by: str, gradients: dict[str, float] | None = None) -> dict[str, dict[str, float]]:
        """``{name: {loss, tokens, share, logit_grad[, grad_norm]}}`` of the groups that have trained
        tokens."""
        names, (tokens, loss, pull) = self.groups(by)
        out: dict[str, dict[str, float]] = {}
        for i, name in enumerate(names):
            if not tokens[i]:
                continue
            out[name] = {
                "loss": float(loss[i] / tokens[i]),
                "tokens": int(tokens[i]),
                "share": float(tokens[i] / tokens.sum()),
                "logit_grad": float(pull[i] / tokens[i]),
            }
            if gradients is not None:
                out[name]["grad_norm"] = gradients[name]
        return out

    def worst(self) -> str:
        """The source whose loss is not finite, or else the largest."""
        names, (tokens, loss, _) = self.groups("source")
        mean = np.where(tokens > 0, loss / np.maximum(tokens, 1), -np.inf)
        return names[int(np.argmax(np.where(np.isfinite(mean) | (tokens == 0), mean, np.inf)))]


class GroupGradients:
    """The gradient of each group's share of the loss, summed over micro-batches: one flat float32[P] per
    group.

    ``.grad`` is not touched, so training goes on as if nothing had been measured. Costs one backward pass and
    one copy of the trained parameters per group.
    """

    def __init__(self, names: Sequence[str], parameters: Sequence[nn.Parameter]) -> None:
        self.names, self.parameters = tuple(names), list(parameters)
        size = sum(p.numel() for p in self.parameters)
        self.flat = torch.zeros(len(self.names), size, device=self.parameters[0].device)

    def add(self, nll: Tensor, group: NDArray[Any], count: int) -> None:
        for i in np.unique(group):
            chosen = torch.from_numpy(np.flatnonzero(group == i)).to(nll.device)
            grads = torch.autograd.grad(
                nll.index_select(0, chosen).sum() / count,
                self.parameters,
                retain_graph=True,
                allow_unused=True,
            )
            parts = [
                torch.zeros(p.numel(), device=nll.device) if g is None else g.reshape(-1).float()
                for g, p in zip(grads, self.parameters, strict=True)
            ]
            self.flat[int(i)] += torch.cat(parts)

    def norms(self) -> dict[str, float]:
        return dict(zip(self.names, torch.linalg.vector_norm(self.flat, dim=1).tolist(), strict=True))


def _numpy(values: Tensor) -> NDArray[np.float64]:
    return values.detach().double().cpu().numpy()
