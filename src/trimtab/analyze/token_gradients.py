"""How hard each single token pulls on a model: its loss and the norms of that loss's gradient (the mechanism claim of
2601.01624, whose own definition of "gradient magnitude" is not public).

With h the state that the output layer W is given, p the softmax and y the target's one-hot vector:

- ``logit_grad``  ||p - y||_2, the gradient with respect to the logits;
- ``head_grad``   ||p - y||_2 ||h||_2, the gradient with respect to W alone: it is the outer product of p - y and h. Where W
  is tied to the input embedding, the gradient of the shared matrix has a second part, through the inputs; it is in
  ``grad_norm`` and not in ``head_grad``;
- ``grad_norm``   ||g||_2, the gradient with respect to all parameters (or the trainable ones).

**Forward-mode random projection.** For a direction v one Jacobian-vector product gives <g_t, v> of every token t at once,
and for v ~ N(0, I) the mean of <g_t, v>^2 is ||g_t||^2: K passes give the norms of all tokens, whatever their number. One
backward pass per token gives the same exactly (``exact``).

**What is known is not estimated.** g = a + b, where a is the part through W, whose norm is closed. With x = <a, v> and
y = <b, v>, and z = y^2 (W untied, or not among the parameters: a and b do not overlap) or z = y^2 + 2 x y (tied), E[z] is
||g||^2 - ||a||^2. And tokens pull alike: those of one span share directions, in which errors do not average out over the
span. So a quarter of the passes goes along *guides* q, orthonormal sums of gradients with random signs (one backward pass
each; Meyer et al. 2021, "Hutch++", take the trace of a matrix so), and the random directions stay at right angles to them:

    ||g||^2  ~  ||a||^2 + sum over guides of z(q) + mean over random directions of z(v)

This is unbiased for every K. The relative error of a norm is near 1 / sqrt(2 K), 8.8 % at K = 64, or less. The square root
of an unbiased square is too small by its relative variance over 8; that is put back with the sample variance, to first
order. Errors of tokens with like gradients go together: means over many tokens err less than single tokens do, but not by
the square root of their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap
from torch.nn import functional

from trimtab.analyze.causal import FORWARD_MODE, headless
from trimtab.analyze.projections import Stack, orthonormal, random_directions, sliced
from trimtab.errors import UserError
from trimtab.seeds import rng_of

Parameters = Literal["all", "trainable"]
Floats = NDArray[np.float64]
Progress = Callable[[int, int], None]
_GUIDES = 4
"""One pass in so many goes along a guide."""
_LOGITS, _FLOATS, _HELD, _SIDE = 2**24, 2**27, 2**29, 16
"""Bounds of memory: logits at once; numbers of the directions that are pushed through together; numbers of all guides (of
a large model there are fewer guides); and how many directions go together at most, since more are no faster."""


@dataclass(frozen=True)
class TokenRow:
    """One row alone: ``ids`` int[T]; ``at`` int[N], the positions (1 .. T - 1) whose tokens are measured; ``group`` int[N],
    which tokens are averaged together later (their spans): guides are sums within a group."""

    ids: NDArray[Any]
    at: NDArray[Any]
    group: NDArray[Any]


@dataclass(frozen=True)
class TokenValues:
    """float64[N] of each measured token, the rows' tokens one after another; ``grad_norm`` and its standard error
    ``grad_se`` are None where they were not asked for; ``grad_se`` is 0 if exact and NaN for one projection."""

    loss: Floats
    logit_grad: Floats
    head_grad: Floats
    grad_norm: Floats | None = None
    grad_se: Floats | None = None


@dataclass(frozen=True)
class _Batch:
    """Rows side by side, padded on the right, where a causal model cannot see it: ``ids`` int64[B, T]; ``index`` int64[n],
    flattened positions whose next token is measured; ``target`` int64[n]; ``slots``, ``group`` int64[n]: where its values
    go, and what they are averaged with."""

    ids: Tensor
    index: Tensor
    target: Tensor
    slots: NDArray[np.int64]
    group: NDArray[np.int64]


class TokenGradients:
    """Measures tokens of one causal LM in fp32, whatever its own precision and device; the model is left as it was.

    parameters  "all", or "trainable": those that require a gradient, such as the adapters alone

    ``UserError`` for a model without a linear output layer, one that does more with its logits than that layer (softcap,
    scale), one that has no forward derivative, and one without such parameters.
    """

    def __init__(self, model: Any, parameters: Parameters = "all") -> None:
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            said = "no output layer" if head is None else f"an output layer that is not linear ({type(head).__name__})"
            raise UserError(f"{type(model).__name__} has {said}; token gradients need a causal language model with one")
        self.model = model
        own = dict(model.named_parameters())  # tied parameters once, under their first name
        self.weights = {name: p.detach().float() for name, p in own.items()}
        self.chosen = [n for n, p in own.items() if p.is_floating_point() and (parameters == "all" or p.requires_grad)]
        if not self.chosen:
            raise UserError("parameters: 'trainable', but no parameter of the model requires a gradient; use 'all'")
        self.device = head.weight.device
        names = {id(p): name for name, p in own.items()}
        self._weight = names[id(head.weight)]
        self._bias = names[id(head.bias)] if head.bias is not None else None
        embedding = model.get_input_embeddings()
        self.tied = embedding is not None and getattr(embedding, "weight", None) is head.weight
        self._apart = {self._bias} if self.tied else {self._bias, self._weight}  # not in a model without its head
        self._moved = [name for name in self.chosen if name not in self._apart]
        self._attention = ""

    @property
    def size(self) -> int:
        """How many parameters the gradient is taken with respect to."""
        return sum(self.weights[name].numel() for name in self.chosen)

    def measure(
        self,
        rows: Sequence[TokenRow],
        *,
        projections: int | None,
        seed: int,
        exact: bool = False,
        batch: int = 2048,
        progress: Progress = lambda done, total: None,
    ) -> TokenValues:
        """The values of all measured tokens.

        projections  K; None leaves ``grad_norm`` out, unless ``exact``
        exact        one backward pass per token in place of the projections
        batch        tokens read side by side, at most; a longer row is read alone
        progress     called with (passes done, passes in all)
        """
        if projections is not None and projections < 1:
            raise UserError(f"projections: {projections}; at least 1 is needed")
        batches = list(self._batches(rows, batch))
        if not batches:
            raise UserError("no token to measure: no row has a trained token that follows another")
        count = sum(len(one.slots) for one in batches)
        with _evaluating(self.model), torch.no_grad():
            self._settle_attention(batches[0])
            loss, pull, head, closed = self._plain(batches, count)
            if exact:
                return TokenValues(loss, pull, head, self._backwards(rows, progress), np.zeros(count))
            if projections is None:
                return TokenValues(loss, pull, head)
            if not self._moved:  # only the output layer is chosen
                return TokenValues(loss, pull, head, np.sqrt(closed), np.zeros(count))
            known, total, squares, drawn = self._project(batches, count, projections, seed, progress)
        return TokenValues(loss, pull, head, *_norms(closed + known, total, squares, drawn))

    # ------------------------------------------------------------------ one batch

    def _batches(self, rows: Sequence[TokenRow], size: int) -> Iterator[_Batch]:
        """The longest rows first: what does not fit, or cannot be done, is known at once."""
        starts = np.cumsum([0, *(len(row.at) for row in rows)])
        order = sorted((i for i, row in enumerate(rows) if len(row.at)), key=lambda i: -len(rows[i].ids))
        while order:
            length = len(rows[order[0]].ids)
            side = max(1, size // length)
            some, order = order[:side], order[side:]
            ids = np.zeros((len(some), length), np.int64)
            for place, i in enumerate(some):
                ids[place, : len(rows[i].ids)] = rows[i].ids
            index = np.concatenate([place * length + rows[i].at - 1 for place, i in enumerate(some)])  # the one shift
            target = np.concatenate([rows[i].ids[rows[i].at] for i in some])
            slots = np.concatenate([starts[i] + np.arange(len(rows[i].at)) for i in some])
            group = np.concatenate([rows[i].group for i in some]).astype(np.int64)
            yield _Batch(self._tensor(ids), self._tensor(index), self._tensor(target), slots, group)

    def _tensor(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.asarray(values).astype(np.int64)).to(self.device)

    def _states(self, batch: _Batch, weights: Mapping[str, Tensor], attention: str) -> Tensor:
        """What the output layer is given at the measured positions, float32[n, hidden]."""
        held = {name: w for name, w in weights.items() if name not in self._apart}
        with headless(self.model, attention):
            out = functional_call(self.model, held, (), {"input_ids": batch.ids, "use_cache": False}).logits
        return out.flatten(0, 1).index_select(0, batch.index)

    def _head(self, h: Tensor) -> Tensor:
        return functional.linear(h, self.weights[self._weight], self.weights[self._bias] if self._bias else None)

    def _pull(self, h: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Loss float[n] and p - y float[n, vocab]."""
        logp = self._head(h).log_softmax(-1)
        nll = -logp.gather(-1, target[:, None])[:, 0]
        d = logp.exp_()
        d[torch.arange(len(target), device=d.device), target] -= 1
        return nll, d

    def _parts(self, batch: _Batch) -> list[slice]:
        """The measured tokens of a batch in parts whose logits fit."""
        step = max(1, _LOGITS // self.weights[self._weight].shape[0])
        return [slice(lo, lo + step) for lo in range(0, len(batch.slots), step)]

    def _plain(self, batches: Sequence[_Batch], count: int) -> tuple[Floats, Floats, Floats, Floats]:
        """Loss, logit gradient, head gradient, and ||a||^2 of the chosen parameters of the output layer."""
        loss, pull, head, closed = (np.zeros(count) for _ in range(4))
        weight, bias = (float(name in self.chosen) for name in (self._weight, self._bias))
        for one in batches:
            states = self._states(one, self.weights, self._attention)
            for part in self._parts(one):
                h, slots = states[part], one.slots[part]
                nll, d = self._pull(h, one.target[part])
                loss[slots] = _numpy(nll)
                pull[slots] = _numpy(torch.linalg.vector_norm(d, dim=-1))
                head[slots] = pull[slots] * _numpy(torch.linalg.vector_norm(h, dim=-1))
        closed = weight * head**2 + bias * pull**2
        return loss, pull, head, closed

    def _settle_attention(self, batch: _Batch) -> None:
        """Find the attention that gives what the model itself gives, on the longest row (it stands first)."""
        n = int((batch.index < batch.ids.shape[1]).sum())
        row = _Batch(batch.ids[:1], batch.index[:n], batch.target[:n], batch.slots[:n], batch.group[:n])
        out = functional_call(self.model, self.weights, (), {"input_ids": row.ids, "use_cache": False}).logits
        want = out[0].index_select(0, row.index)
        for attention in (FORWARD_MODE, "eager"):
            if torch.allclose(self._head(self._states(row, self.weights, attention)), want, atol=1e-3, rtol=1e-3):
                self._attention = attention
                return
        raise UserError(
            f"{type(self.model).__name__}: its logits are not what its output layer makes of its last state (a softcap, a "
            "scale, an attention of its own); its token gradients cannot be measured"
        )

    # ------------------------------------------------------------------ projections

    def _project(
        self, batches: Sequence[_Batch], count: int, passes: int, seed: int, progress: Progress
    ) -> tuple[Floats, Floats, Floats, int]:
        """Of ||b||^2 + 2 <a, b>: what the guides know; sums of z and of z^2 over the random directions; their number."""
        size = sum(self.weights[name].numel() for name in self._moved)
        wanted = min(passes // _GUIDES, _HELD // size)
        work = (wanted + passes) * len(batches)
        guides = self._guides(batches, wanted, seed, lambda done: progress(done, work)) if wanted else None
        found = len(guides[self._moved[0]]) if guides is not None else 0
        widest = max(one.ids.numel() for one in batches) * self.weights[self._weight].shape[1]
        side = int(np.clip(_FLOATS // (size + 24 * widest), 1, _SIDE))
        known, total, squares = (np.zeros(count) for _ in range(3))
        done = wanted * len(batches)
        like = {name: self.weights[name] for name in self._moved}
        for random, last in ((False, found), (True, passes - found)):
            for lo in range(0, last, side):
                hi = min(lo + side, last)
                if random:
                    stack = random_directions(like, seed, lo, hi - lo, guides)
                else:
                    stack = sliced(guides or {}, slice(lo, hi))
                for one in batches:
                    for slots, z in self._along(one, stack):
                        if random:
                            total[slots] += _numpy(z.sum(0))
                            squares[slots] += _numpy(z.square().sum(0))
                        else:
                            known[slots] += _numpy(z.sum(0))
                    done += hi - lo
                    progress(done, work)
        return known, total, squares, passes - found

    def _along(self, batch: _Batch, stack: Stack) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """z float64[k, n] of the batch's tokens along k directions, part by part with its slots."""
        h, dh = self._pushed(batch, stack)
        for part in self._parts(batch):
            _, d = self._pull(h[part], batch.target[part])
            y = torch.einsum("nh,knh->kn", d @ self.weights[self._weight], dh[:, part])
            z = y.square()
            if self._weight in stack:  # tied, or it would not be moved
                z += 2 * y * torch.einsum("knh,nh->kn", d @ stack[self._weight], h[part])
            yield batch.slots[part], z.double()

    def _pushed(self, batch: _Batch, stack: Stack) -> tuple[Tensor, Tensor]:
        """The states float[n, hidden] and their derivatives float[k, n, hidden] along k directions."""
        still = {name: value for name, value in self.weights.items() if name not in stack}
        moving = {name: self.weights[name] for name in stack}

        def states(part: dict[str, Tensor]) -> Tensor:
            return self._states(batch, still | part, self._attention)

        try:
            pushed = vmap(lambda v: jvp(states, (moving,), (v,)), out_dims=(None, 0))(stack)  # type: ignore[arg-type]
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError, ValueError) as error:
            said = " ".join(str(error).split())
            raise UserError(
                f"{type(self.model).__name__} cannot be differentiated forwards ({said:.200}); use 'exact'"
            ) from error
        return pushed[0], pushed[1]

    def _guides(self, batches: Sequence[_Batch], count: int, seed: int, tell: Callable[[int], None]) -> Stack | None:
        """Orthonormal directions that many tokens share: sums of b over a group with random signs, the groups in turn."""
        leaves = {n: w.detach().requires_grad_(n in self._moved) for n, w in self.weights.items()}
        wanted = [leaves[name] for name in self._moved]
        sums = {name: torch.zeros(count, *self.weights[name].shape, device=self.device) for name in self._moved}
        groups = np.unique(np.concatenate([one.group for one in batches]))
        tokens = sum(len(one.slots) for one in batches)
        signs = [rng_of("guide", seed, k).choice([-1.0, 1.0], tokens) for k in range(count)]
        for number, one in enumerate(batches):
            with torch.enable_grad():
                states = self._states(one, leaves, self.model.config._attn_implementation)
            pulls = [
                self._pull(states[part], one.target[part])[1] @ self.weights[self._weight] for part in self._parts(one)
            ]
            u = torch.cat(pulls)
            for k in range(count):
                sign = signs[k][one.slots] * (one.group == groups[k % len(groups)])
                along = u * torch.from_numpy(sign).to(u)[:, None]
                grads = torch.autograd.grad(states, wanted, along, retain_graph=k + 1 < count, allow_unused=True)
                for name, grad in zip(self._moved, grads, strict=True):
                    if grad is not None:
                        sums[name][k] += grad
            tell((number + 1) * count)
        return orthonormal(sums)

    # ------------------------------------------------------------------ reference

    def _backwards(self, rows: Sequence[TokenRow], progress: Progress) -> Floats:
        """The exact norms, by one backward pass per token."""
        leaves = {n: w.detach().requires_grad_(n in self.chosen) for n, w in self.weights.items()}
        wanted = [leaves[name] for name in self.chosen]
        found: list[float] = []
        total = sum(len(row.at) for row in rows)
        for row in rows:
            if not len(row.at):
                continue
            ids, at = self._tensor(row.ids), self._tensor(row.at)
            with torch.enable_grad():
                given = {"input_ids": ids[None], "use_cache": False}
                logits = functional_call(self.model, leaves, (), given).logits[0]
                nll = functional.cross_entropy(logits[at - 1], ids[at], reduction="none").unbind()
            for loss in nll:
                grads = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
                found.append(sum(float(g.double().square().sum()) for g in grads if g is not None) ** 0.5)
                progress(len(found), total)
        return np.array(found)


def _norms(known: Floats, total: Floats, squares: Floats, drawn: int) -> tuple[Floats, Floats]:
    """Norms and their standard errors, from what is known of the squares and the sums over the random directions."""
    mean = total / drawn
    square = np.maximum(known + mean, 0.0)
    norm = np.sqrt(square)
    if drawn == 1:
        return norm, np.full(len(norm), np.nan)
    variance = np.maximum(squares / drawn - mean**2, 0) / (drawn - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = np.where(square > 0, variance / square**2, np.inf)  # relative variance of the square
        error = np.where(square > 0, norm * np.sqrt(spread) / 2, np.inf)
    # A token whose square is lost in its noise gets no correction: the expansion does not hold there.
    return norm * np.where(spread < 1, 1 + spread / 8, 1.0), error


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Dropout off, then the model as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _numpy(values: Tensor) -> Floats:
    found: Floats = values.detach().double().cpu().numpy()
    return found
