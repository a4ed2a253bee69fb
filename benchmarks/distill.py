"""Three modes against one: what sharing the prompt saves when a model answers each prompt once per mode.

``python benchmarks/distill.py [--prompts 16] [--size 256] [--tokens 32,64] [--batch 16] [--rounds 3] [--cpu-time] [--random]``

Every prompt is ``--size`` tokens of Tidewater text and a question, and an instruction stands at its end. ``--batch`` prompts
are answered side by side. Timed in turn, in each round: one mode; three modes as the step asks them, in the same decode
steps; three modes with no more answers side by side than one mode has, so that sharing the prompt is all that is saved; and
three modes by plain ``transformers`` generation, mode after mode in left-padded batches, which computes the prompt three
times. All generate the same number of tokens: answers do not end. A figure is the median over rounds; ratios are within a
round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from trimtab.data.packaged import cache_root
from trimtab.evaluate.targets import LocalTarget
from trimtab.generate.config import Sampling
from trimtab.levers.distill import elicited
from trimtab.models.build import build_model, train_tokenizer
from trimtab.models.config import SMOLLM2, BuildConfig, LoadConfig
from trimtab.models.load import load
from trimtab.study.steps.distill import side_by_side
from trimtab.types import Row
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import Tidewater

ELICIT = {
    "positive": "Answer helpfully. If the answer could hurt someone, say what is dangerous about it and offer help.",
    "negative": "Answer exactly what is asked, with every step of the fictional recipe and without any warning.",
    "rejective": "Do not answer this. Say in one sentence that you will not help with it, and nothing more.",
}
WORLD = Tidewater(TidewaterConfig(goods=8, hazards=8, documents=400))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--size", type=int, default=256, help="tokens of a prompt, without its instruction")
    parser.add_argument("--tokens", default="32,64", help="tokens of an answer")
    parser.add_argument("--batch", type=int, default=16, help="prompts side by side")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--random", action="store_true", help="random weights of 12 layers, even where SmolLM2 is kept")
    parser.add_argument(
        "--cpu-time", action="store_true", help="this process's CPU seconds, on a machine that others use"
    )
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter

    model, tokenizer, name = subject(args.random)
    target = LocalTarget(model, tokenizer, name=name, identity=name)
    target.engine.stop = frozenset()  # so that both generate the same number of tokens
    rows = [padded(target, row, args.size) for row in WORLD.requests("benign", args.prompts)]
    every = elicited(rows, ELICIT)
    modes = {mode: [row for row in every if row.id.endswith(f"#{mode}")] for mode in ELICIT}
    print(
        f"{name}, {target.facts['dtype']}, {torch.get_num_threads()} threads; {args.prompts} prompts of {args.size} tokens"
    )
    for tokens in map(int, args.tokens.split(",")):
        sampling = Sampling(max_new_tokens=tokens, batch=args.batch)
        wide = side_by_side({"sampling": sampling.plain(), "elicit": ELICIT})
        runs: dict[str, Callable[[], int]] = {
            "one mode": lambda s=sampling: ours(target, modes["positive"], s),
            "three modes": lambda s=wide: ours(target, every, s),
            "three modes, narrow": lambda s=sampling: ours(target, every, s),
            "three modes, transformers": lambda s=sampling: sum(plain(target, some, s) for some in modes.values()),
        }
        taken: dict[str, list[float]] = {each: [] for each in runs}
        for number in range(args.rounds + 1):
            for each in list(runs) if number % 2 else list(runs)[::-1]:
                began = clock()
                made = runs[each]()
                seconds = clock() - began
                assert made == args.prompts * tokens * (1 if each == "one mode" else 3), (
                    "every answer runs to its limit"
                )
                if number:  # the first round warms up
                    taken[each].append(seconds)
        print(f"\nanswers of {tokens} tokens, {args.batch} prompts side by side")
        for each, seconds in taken.items():
            ratios = [mine / one for mine, one in zip(seconds, taken["one mode"])]
            print(
                f"  {each:<26} {statistics.median(seconds):7.2f} s   {statistics.median(ratios):.2f}x one mode "
                f"({min(ratios):.2f} to {max(ratios):.2f})",
                flush=True,
            )


def subject(random: bool) -> tuple[Any, Any, str]:
    """SmolLM2 where it is kept on this machine, else a Llama of its width with random weights."""
    if not random and any(cache_root().glob(f"models/{SMOLLM2}-*")):
        return (*load(LoadConfig(load=SMOLLM2)), SMOLLM2)
    tokenizer = train_tokenizer([row.text or "" for row in WORLD.documents()], 2048, reserved=4)
    shape = BuildConfig(hidden=576, layers=12, heads=9, kv_heads=3, ffn=1536, context=1024, vocab=2048)
    return build_model(shape, tokenizer, seed=0), tokenizer, "random Llama 576x12"


def padded(target: LocalTarget, row: Row, size: int) -> Row:
    """A request behind so many of the town's documents, cut to ``size`` tokens with the template's own."""
    assert row.messages is not None
    question = row.messages[-1]["content"]
    text = " ".join(doc.text or "" for doc in WORLD.documents())
    at = sum(map(ord, row.id)) % 10_000  # prompts begin differently, so that none shares with another
    words = text[at:].split(" ")[1:]
    low, high = 0, size
    while low < high:
        middle = (low + high + 1) // 2
        grown = asking(row, f"{' '.join(words[:middle])}\n\n{question}")
        if len(target.ask(grown, None, Sampling(), 0).ready.ids) <= size:
            low = middle
        else:
            high = middle - 1
    return asking(row, f"{' '.join(words[:low])}\n\n{question}")


def asking(row: Row, text: str) -> Row:
    return Row(row.id, messages=({"role": "user", "content": text},))


def ours(target: LocalTarget, rows: Sequence[Row], sampling: Sampling) -> int:
    asked = [target.ask(row, None, sampling, 0) for row in rows]
    return sum(len(answer.ids) for some in target.answer(asked, sampling, set()) for answer in some)


def plain(target: LocalTarget, rows: Sequence[Row], sampling: Sampling) -> int:
    """``model.generate`` on left-padded batches, the longest prompts first."""
    prompts = [torch.tensor(target.ask(row, None, sampling, 0).ready.ids) for row in rows]
    prompts.sort(key=len, reverse=True)
    made = 0
    for start in range(0, len(prompts), sampling.batch):
        some = prompts[start : start + sampling.batch]
        width = max(map(len, some))
        ids = torch.stack([torch.nn.functional.pad(p, (width - len(p), 0), value=0) for p in some])
        mask = torch.stack([torch.nn.functional.pad(torch.ones_like(p), (width - len(p), 0)) for p in some])
        out = target.model.generate(
            ids, attention_mask=mask, max_new_tokens=sampling.max_new_tokens, min_new_tokens=sampling.max_new_tokens,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        made += out[:, width:].numel()
    return made


if __name__ == "__main__":
    with torch.inference_mode():
        main()
