"""Gradient norms of every token: how far the projections are from one backward pass per token, and how much faster.

``python benchmarks/token_gradients.py [--length 2048] [--projections 64] [--steps 120] [--sample 256]``

The tour's model (hidden 128, 4 layers, vocabulary 1536, tied), trained for a moment on Tidewater's chats; one row of
``length`` tokens, chats one after another of which half open with a prefix. The peer is the plain loop: one forward pass,
then ``torch.autograd.grad(loss[t], parameters, retain_graph=True)`` for each token, with torch's fused attention. It is timed
on ``sample`` tokens spread evenly over the row (``--sample 0``: all), and these are what the projections are compared with.
The second peer, on 32 tokens, reads and differentiates only the row's beginning up to each token, which costs it less. Times are
CPU times of one thread: a busy machine counts little. Numbers to reach, at
K = 64: 10 % per token (RMS of the relative error), 3 % on the means of
prefix and body, and 10 times the plain loop's speed; the
script ends with 1 if they are not reached.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
import torch
from torch.nn import functional

from trimtab.analyze.token_gradients import TokenGradients, TokenRow
from trimtab.data.render import Renderer
from trimtab.levers.prefix import PrefixConfig, apply_prefix
from trimtab.models.build import build_model, train_tokenizer
from trimtab.models.config import BuildConfig
from trimtab.types import SPAN_ID
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import Tidewater

PER_TOKEN, PER_SPAN, FASTER = 0.10, 0.03, 10.0


def material(length: int) -> tuple[BuildConfig, object, np.ndarray, np.ndarray]:
    """A model's shape, a tokenizer, and a stream of rendered chats: ids and spans, int[N] each."""
    town = Tidewater(TidewaterConfig())
    rows = [row for kind in ("benign", "harmful-seen", "fact") for row in town.chats(kind, 120)]
    tokenizer = train_tokenizer([m["content"] for row in rows for m in row.messages or ()], 1536)
    opened = apply_prefix(rows, PrefixConfig(ratio=0.5), 0)
    rendered = [Renderer(tokenizer).row(row) for row in sorted(opened, key=lambda row: row.hash())]
    ids, span = (np.concatenate([getattr(r, name) for r in rendered]) for name in ("ids", "span"))
    shape = BuildConfig(hidden=128, layers=4, heads=4, kv_heads=4, ffn=352, context=length, vocab=1536)
    return shape, tokenizer, ids, span


def trained(shape: BuildConfig, tokenizer: object, ids: np.ndarray, steps: int) -> torch.nn.Module:
    model = build_model(shape, tokenizer, seed=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        rows = torch.from_numpy(np.stack([ids[at : at + 128] for at in rng.integers(0, len(ids) - 128, 8)])).long()
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def norm_of(loss: torch.Tensor, parameters: list[torch.nn.Parameter], keep: bool) -> float:
    grads = torch.autograd.grad(loss, parameters, retain_graph=keep)
    return sum(float(g.square().sum()) for g in grads) ** 0.5


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--projections", type=int, default=64)
    parser.add_argument("--steps", type=int, default=120, help="training before it, at 8 x 128 tokens")
    parser.add_argument("--sample", type=int, default=256, help="tokens the peers do; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    shape, tokenizer, stream, spans = material(args.length)
    model = trained(shape, tokenizer, stream, args.steps)
    ids, span = stream[: args.length], spans[: args.length]
    count = args.length - 1
    some = np.unique(np.linspace(0, count - 1, args.sample or count).astype(int))

    gradients = TokenGradients(model)
    began = time.process_time()
    row = TokenRow(ids, np.arange(1, args.length), span[1:])
    found = gradients.measure([row], projections=args.projections, seed=args.seed, batch=args.length)
    ours = time.process_time() - began
    print(
        f"trimtab    {count} tokens, {gradients.size} parameters, {args.projections} projections: {ours:.1f} s, one thread"
    )

    tensor, parameters = torch.from_numpy(ids).long()[None], list(model.parameters())
    began = time.process_time()
    losses = functional.cross_entropy(
        model(input_ids=tensor, use_cache=False).logits[0, :-1], tensor[0, 1:], reduction="none"
    )
    forward = time.process_time() - began
    began = time.process_time()
    exact = np.array([norm_of(losses[t], parameters, True) for t in some])
    plain = forward + (time.process_time() - began) * count / len(some)
    del losses
    few = some[:: max(1, len(some) // 32)]
    print(f"plain loop {len(some)} of the tokens timed, all of them: {plain:.0f} s   {plain / ours:.1f}x")

    began = time.process_time()
    for t in few:
        logits = model(input_ids=tensor[:, : t + 1], use_cache=False, logits_to_keep=1).logits[0]
        norm_of(functional.cross_entropy(logits, tensor[0, t + 1 : t + 2]), parameters, False)
    short = (time.process_time() - began) * count / len(few)
    print(f"beginnings {len(few)} of the tokens timed, all of them: {short:.0f} s   {short / ours:.1f}x")

    assert found.grad_norm is not None and found.grad_se is not None
    ratio = found.grad_norm[some] / exact
    error = float(np.sqrt(np.mean((ratio - 1) ** 2)))
    said = float(np.sqrt(np.mean((found.grad_se[some] / found.grad_norm[some]) ** 2)))
    print(f"per token  RMS relative error {100 * error:.1f} % (its own standard errors say {100 * said:.1f} %)")
    means = {}
    for name in ("prefix", "body", "prompt", "structure"):
        mine = span[1:][some] == SPAN_ID[name]
        if mine.any():
            means[name] = float(found.grad_norm[some][mine].mean() / exact[mine].mean() - 1), int(mine.sum())
    print("per span   " + ", ".join(f"{name} {100 * off:+.1f} % ({n} tokens)" for name, (off, n) in means.items()))
    worst = max(abs(means[name][0]) for name in ("prefix", "body"))  # the spans that are trained and compared
    reached = error <= PER_TOKEN and worst <= PER_SPAN and plain / ours >= FASTER
    print(f"{'reached' if reached else 'NOT reached'}: {PER_TOKEN:.0%} per token, {PER_SPAN:.0%} per span, {FASTER:g}x")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
