"""Mixture and token store: tokens per second on one core, and the time to seek, against
``datasets.interleave_datasets``.

``python benchmarks/mixture.py [--rows 40000] [--length 128] [--batch 32] [--seconds 1.0]``

Both read the same tokens from disk, memory-mapped, mixed from four sources by the same weights, in batches of
the same size. Ours gives the five arrays of the batch contract; ``datasets`` gives the ids alone, in numpy
format.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from trimtab.data.mixture import Mixture, Phase
from trimtab.data.pack import Packed
from trimtab.data.store import Mixed, RowStore
from trimtab.types import SPAN_ID

WEIGHTS = {"web": 0.6, "code": 0.2, "safe": 0.15, "refuse": 0.05}


def packed_of(rows: int, length: int, seed: int) -> Packed:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 50_000, (rows, length)).astype(np.int32)
    position = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    span = np.full((rows, length), SPAN_ID["text"], np.uint8)
    return Packed(ids, ids.copy(), position, np.zeros((rows, length), np.int16), span)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=40_000, help="rows of all sources together")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=1.0, help="how long each is timed")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as root:
        packed = {
            name: packed_of(int(args.rows * share), args.length, i) for i, (name, share) in enumerate(WEIGHTS.items())
        }
        stores = {
            name: RowStore.write(Path(root) / name, p, [name], vocab=50_000, tokenizer="t")
            for name, p in packed.items()
        }
        began = time.perf_counter()
        rows = {name: len(store) for name, store in stores.items()}
        # A hundred phases: a ramp.
        ramp = [Phase(i * 1003, {**WEIGHTS, "safe": 0.15 + i / 1000, "web": 0.6 - i / 1000}) for i in range(100)]
        mixture = Mixture(rows, ramp, seed=0)
        mixed = Mixed(stores, mixture)
        print(f"mixture of {len(WEIGHTS)} sources and {len(ramp)} phases built in {time.perf_counter() - began:.3f} s")

        def speed(size: int) -> float:
            mixed.batch(0, size)
            began, at = time.perf_counter(), 0
            while time.perf_counter() - began < args.seconds:
                mixed.batch(at, at + size)
                at += size
            return at * args.length / (time.perf_counter() - began) / 1e6

        ours = {size: speed(size) for size in (args.batch, 8 * args.batch)}
        for size, rate in ours.items():
            print(f"trimtab    batch {size:4}: {rate:7.1f} M tokens/s")
        seeks = []
        for position in np.random.default_rng(0).integers(0, 10**12, 50):
            fresh = Mixed(stores, mixture)
            began = time.perf_counter()
            fresh.batch(int(position), int(position) + args.batch)
            seeks.append(time.perf_counter() - began)
        print(f"trimtab    seek to any of 10^12 rows: median {statistics.median(seeks) * 1e3:.1f} ms, "
              f"largest {max(seeks) * 1e3:.1f} ms")  # fmt: skip

        import datasets

        datasets.disable_progress_bars()
        sets = []
        for name, p in packed.items():
            made = datasets.Dataset.from_dict({"input_ids": list(p.input_ids)})
            made.save_to_disk(str(Path(root) / f"arrow-{name}"))
            sets.append(datasets.load_from_disk(str(Path(root) / f"arrow-{name}")).with_format("numpy"))
        shares = list(WEIGHTS.values())
        began = time.perf_counter()
        mapped = datasets.interleave_datasets(sets, shares, seed=0, stopping_strategy="all_exhausted")
        print(f"datasets   interleave (map style) built in {time.perf_counter() - began:.3f} s, {len(mapped)} rows")
        began, at = time.perf_counter(), 0
        while time.perf_counter() - began < args.seconds:
            at = at % (len(mapped) - args.batch)
            mapped[at : at + args.batch]["input_ids"]
            at += args.batch
        done = at * args.length
        theirs = done / (time.perf_counter() - began) / 1e6
        print(f"datasets   batch {args.batch:4}: {theirs:7.1f} M tokens/s (map style)")
        streams = [s.to_iterable_dataset() for s in sets]
        stream = datasets.interleave_datasets(streams, shares, seed=0, stopping_strategy="all_exhausted")
        began, count = time.perf_counter(), 0
        for batch in stream.with_format("numpy").iter(args.batch):
            count += batch["input_ids"].size
            if time.perf_counter() - began > args.seconds:
                break
        print(
            f"datasets   batch {args.batch:4}: {count / (time.perf_counter() - began) / 1e6:7.1f} M tokens/s (stream)"
        )
        far = args.rows // 2
        began = time.perf_counter()
        next(iter(itertools.islice(stream.skip(far).iter(args.batch), 1)))
        print(f"datasets   seek to row {far} (stream.skip): {(time.perf_counter() - began) * 1e3:.1f} ms")
        print(f"trimtab / datasets (map style), batch {args.batch}: {ours[args.batch] / theirs:.1f}x")


if __name__ == "__main__":
    main()
