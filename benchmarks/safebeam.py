"""What SafeBeam costs beside greedy decoding and top-k sampling: the same prompts, answers of one length, in one run.

``python benchmarks/safebeam.py [--beams 4] [--candidates 8] [--tokens 64] [--rounds 9] [--threads 1] [--only tiny,deep]``

Models have random weights, no end token and a context that fits: what an answer says does not change its time, and every
answer has all its tokens. ``tiny`` is the model of the Tidewater studies (1.0 M parameters); ``deep`` has the proportions of
SmolLM2-135M at a tenth of its size. Decoders take turns round by round; a ratio is made within a round, and its median,
least and most over the rounds are shown. Latency is that of one prompt, cost that of sixteen side by side.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch

from trimtab.generate.config import SafeBeam, Sampling
from trimtab.generate.engine import Engine
from trimtab.generate.schedule import Prompt
from trimtab.models.build import build_model, train_tokenizer
from trimtab.models.config import BuildConfig

MODELS = {
    "tiny": BuildConfig(hidden=128, layers=4, vocab=1536),
    "deep": BuildConfig(hidden=192, layers=15, heads=3, kv_heads=1, ffn=512, vocab=8192),
}
TAG = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of every answer")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of every prompt")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="tiny,deep")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        f"k={args.beams}, N={args.candidates}; prompts of {args.prompt} tokens, answers of {args.tokens}; "
        f"{args.threads} thread(s), {args.rounds} rounds"
    )
    tokenizer = train_tokenizer([f"Boat {n} sails at dawn with the tide." for n in range(50)], 300, reserved=16)
    for name in args.only.split(","):
        model = build_model(MODELS[name], tokenizer, seed=1)
        engine = Engine(model, stop_ids=[], banned_ids=range(20), tag_id=TAG)
        size = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"\n{name}: {size:.1f} M parameters, {MODELS[name].layers} layers, vocabulary {MODELS[name].vocab}")
        measure(engine, MODELS[name].vocab, args)


def measure(engine: Engine, vocab: int, args: argparse.Namespace) -> None:
    search = SafeBeam(beams=args.beams, candidates=args.candidates)
    samplings = {
        "greedy": Sampling(max_new_tokens=args.tokens),
        "top-k": Sampling(max_new_tokens=args.tokens, temperature=1.0, top_k=50),
        "SafeBeam": Sampling(max_new_tokens=args.tokens, safebeam=search),
    }
    rng = np.random.default_rng(0)
    prompts = [Prompt(rng.integers(20, vocab, args.prompt), seed=i, key=f"p{i}") for i in range(16)]
    for title, some in (("one prompt", prompts[:1]), (f"{len(prompts)} prompts side by side", prompts)):
        runs: dict[str, Callable[[], float]] = {
            name: lambda s=sampling, p=some: timed(engine, p, s)  # type: ignore[misc]
            for name, sampling in samplings.items()
        }
        for once in runs.values():
            once()
        before = (engine.cost.passes, engine.cost.steps, engine.cost.tokens)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for round_ in range(args.rounds):
            for name in list(runs)[:: 1 if round_ % 2 == 0 else -1]:
                seconds[name].append(runs[name]())
        passes, steps, tokens = (
            now - then
            for now, then in zip((engine.cost.passes, engine.cost.steps, engine.cost.tokens), before, strict=True)
        )
        most = args.beams * args.candidates
        assert tokens <= most * steps, "more look-aheads than the search may make"
        print(
            f"  {title}: {tokens / steps:.1f} single-token passes per step (at most {most}), {passes} passes of the model"
        )
        for name, took in seconds.items():
            print(f"    {name:<9} {spread([s / args.tokens * 1000 for s in took], 'ms')} per token")
        for other in ("greedy", "top-k"):
            print(
                f"    SafeBeam / {other:<7} {spread([a / b for a, b in zip(seconds['SafeBeam'], seconds[other])], 'x')}"
            )


def timed(engine: Engine, prompts: list[Prompt], sampling: Sampling) -> float:
    began = time.perf_counter()
    made = sum(len(o.ids) for some in engine.generate(prompts, sampling) for o in some)
    took = time.perf_counter() - began
    assert made == len(prompts) * sampling.max_new_tokens
    return took


def spread(values: list[float], unit: str) -> str:
    return f"{statistics.median(values):6.2f} {unit} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
