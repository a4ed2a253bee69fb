"""After a cut, and with another number of readers, a run reads on in the same order, bit for bit (no training here).

That the training loop itself resumes bit for bit, is killed without harm and gives the same with two processes is held by
``test_train_loop.py``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from trimtab.data.mixture import Mixture, Phase
from trimtab.data.pack import Packed
from trimtab.data.store import Batch, Mixed, RowStore
from trimtab.levers.timing import TimingConfig, phases
from trimtab.types import SPAN_ID

ROWS, LENGTH, BATCH, NEXT = 9000, 16, 12, 50
SIZES = {"clean": 900, "rephrase": 120, "refuse": 31, "moral": 70}
FIELDS = ("input_ids", "labels", "position_ids", "source_id", "span_id")
CUTS = np.random.default_rng(4).integers(0, ROWS // BATCH - NEXT, 20).tolist()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stores")
    for number, (name, rows) in enumerate(SIZES.items()):
        ids = np.random.default_rng(number).integers(0, 4000, (rows, LENGTH)).astype(np.int32)
        position = np.tile(np.arange(LENGTH, dtype=np.int32), (rows, 1))
        span = np.full(ids.shape, SPAN_ID["text"], np.uint8)
        packed = Packed(ids, ids.copy(), position, np.zeros(ids.shape, np.int16), span)
        RowStore.write(root / name, packed, [name], vocab=4000, tokenizer="t")
    return root


def opened(root: Path) -> Mixed:
    """As a fresh process opens it: a curriculum with a ramp, so that cuts fall into phases, ramps and far beyond."""
    stores = {name: RowStore.open(root / name) for name in SIZES}
    plan = phases(TimingConfig(start=0.2, ramp=0.3, exposure="matched"), ROWS)
    rows = {name: len(store) for name, store in stores.items()}
    return Mixed(stores, Mixture(rows, [Phase(row, weights) for row, weights in plan], seed=3))


def tensors(batch: Batch) -> list[torch.Tensor]:
    return [torch.from_numpy(getattr(batch, name)) for name in FIELDS]


@pytest.fixture(scope="module")
def uncut(root: Path) -> list[list[torch.Tensor]]:
    """Every batch of a run that one reader reads without a break."""
    mixed = opened(root)
    return [tensors(mixed.batch(step * BATCH, (step + 1) * BATCH)) for step in range(ROWS // BATCH)]


class Steps(Dataset[list[torch.Tensor]]):
    """The batches from a cut on; each worker opens the stores for itself."""

    def __init__(self, root: Path, cut: int) -> None:
        self.root, self.cut, self.mixed = root, cut, None

    def __len__(self) -> int:
        return NEXT

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        mixed = self.mixed = self.mixed or opened(self.root)
        step = self.cut + index
        return tensors(mixed.batch(step * BATCH, (step + 1) * BATCH))


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("number", "cut"), list(enumerate(CUTS)))
def test_the_next_batches_are_the_same_with_any_number_of_workers(root: Path, uncut, number: int, cut: int) -> None:
    workers = 1 + number % 4
    loader = DataLoader(Steps(root, cut), batch_size=None, num_workers=workers)
    read = list(loader)
    assert len(read) == NEXT
    assert all(equal(batch, uncut[cut + step]) for step, batch in enumerate(read))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_next_batches_are_the_same_with_any_number_of_ranks(root: Path, uncut, ranks: int) -> None:
    mine = BATCH // ranks
    readers = [opened(root) for _ in range(ranks)]
    for cut in CUTS:
        for step in range(cut, cut + NEXT):
            parts = [
                tensors(reader.batch(step * BATCH + rank * mine, step * BATCH + (rank + 1) * mine))
                for rank, reader in enumerate(readers)
            ]
            assert equal([torch.cat(columns) for columns in zip(*parts, strict=True)], uncut[step])


def test_another_seed_or_curriculum_is_another_order(root: Path, uncut) -> None:
    mixed = opened(root)
    stores = {name: RowStore.open(root / name) for name in SIZES}
    other = Mixed(stores, Mixture(mixed.mixture.rows, [Phase(0, {"clean": 1, "refuse": 1})], seed=3))
    assert not equal(tensors(other.batch(0, BATCH)), uncut[0])
    assert other.fingerprint(BATCH) != mixed.fingerprint(BATCH)
