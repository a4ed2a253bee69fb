"""What five ratios of the prefix lever cost in data building, beside one ratio, and beside building each for itself.

    python benchmarks/prefix_data.py [--rows 4000] [--repeat 3]

Two ways over the same chats, in turns, in this process, by processor time (others may use the machine):

shared   a study of five ratios: its `chats` step (rows, both renderings, which examples share a row), which any number of ratios
         needs once, and a `packed` step for each ratio. One ratio is the first step and the dearest of the others
apart    five ratios without sharing: for each ratio the rows are built, opened, rendered and packed anew

`five ratios / one ratio` is the number that matters (at most 1.1); `five apart / five shared` is what sharing saves.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from trimtab.artifact import Store
from trimtab.data.pack import pack_examples
from trimtab.data.render import Renderer
from trimtab.data.store import RowStore
from trimtab.levers.prefix import PrefixConfig, apply_prefix, trained_with_prefix
from trimtab.models.build import build_model, train_tokenizer
from trimtab.models.bundle import BundleManifest, save_bundle
from trimtab.models.config import BuildConfig
from trimtab.recipe.load import resolve
from trimtab.study.execute import Job
from trimtab.study.plan import Plan, make_plan
from trimtab.study.steps.chat import build_rows
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import Tidewater

RATIOS = [0.0, 0.25, 0.5, 0.75, 1.0]
WORLD = {"goods": 120, "hazards": 60, "max_number": 40}
LENGTH = 256


def plan_of(model: Path, rows: int, ratios: list[float]) -> Plan:
    """The plan of a study that tunes ``model`` on Tidewater's chats at some ratios."""
    half = rows // 2
    raw = {
        "name": "bench",
        "world": WORLD,
        "stages": {
            "tuned": {
                "kind": "sft",
                "model": {"load": str(model)},
                "length": LENGTH,
                "data": [
                    {"name": "sums", "tidewater": "arithmetic", "n": rows - half},
                    {"name": "goods", "tidewater": "benign", "n": half},
                ],
                "prefix": {"ratio": 0.0, "capability": "reasoning"},
                "train": {"rows_per_step": 4},
            }
        },
        "arms": [{"name": "prefix", "sweep": {"stages.tuned.prefix.ratio": ratios}}],
    }
    return make_plan(*resolve(raw, "bench"))


def build(plan: Plan) -> tuple[float, list[float]]:
    """Do the plan's data steps in an empty store: seconds of processor time of `chats`, and of each `packed`."""
    seconds: dict[str, list[float]] = {"chats": [], "packed": []}
    with tempfile.TemporaryDirectory() as where:
        store = Store(Path(where))
        kinds = {step.id: step.kind for step in plan.steps.values()}
        for step in plan.steps.values():
            if step.kind in seconds:
                began = time.process_time()
                Job(step, kinds, store.root, None)(lambda event: None)
                seconds[step.kind].append(time.process_time() - began)
    (chats,) = seconds["chats"]
    return chats, seconds["packed"]


def apart(plan: Plan, tokenizer: object) -> None:
    """Five data sets, each built for itself."""
    chats = next(step for step in plan.steps.values() if step.kind == "chats")
    for ratio in RATIOS:
        config = PrefixConfig.restored(chats.config["prefix"], {"ratio": ratio})
        assert config is not None
        rows, _ = build_rows(chats.config, Tidewater(TidewaterConfig.model_validate(WORLD)), None)
        renderer = Renderer(tokenizer)
        rendered = [renderer.row(row) for row in apply_prefix(rows, config, 0)]
        for one in rendered:
            one.trained[:] = trained_with_prefix(one.trained, one.span, config)
        packed = pack_examples(rendered, LENGTH, pad_id=0)
        with tempfile.TemporaryDirectory() as where:
            RowStore.write(Path(where) / "store", packed, ["chats"], vocab=len(tokenizer), tokenizer="t")  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as where:
        model = Path(where) / "model"
        town = Tidewater(TidewaterConfig.model_validate(WORLD))
        tokenizer = train_tokenizer([str(row.text) for row in town.documents()], 1536)
        shape = BuildConfig(hidden=32, layers=1, heads=2, kv_heads=2, ffn=64, context=LENGTH, vocab=1536)
        save_bundle(model, build_model(shape, tokenizer, seed=0), tokenizer, BundleManifest())
        plan = plan_of(model, args.rows, RATIOS)
        build(plan)  # imports and caches
        one, five, alone = [], [], []
        for _ in range(args.repeat):
            chats, packed = build(plan)
            one.append(chats + max(packed))
            five.append(chats + sum(packed))
            began = time.process_time()
            apart(plan, tokenizer)
            alone.append(time.process_time() - began)
    for name, found in (("one ratio", one), ("five, shared", five), ("five, apart", alone)):
        print(f"{name:>12}: {statistics.median(found):6.2f} s  (" + ", ".join(f"{t:.2f}" for t in found) + ")")
    ratio = statistics.median(b / a for a, b in zip(one, five, strict=True))
    print(f"five ratios / one ratio: {ratio:.3f}  (asked: at most 1.1)")
    print(f"five apart / five shared: {statistics.median(alone) / statistics.median(five):.2f}")


if __name__ == "__main__":
    main()
