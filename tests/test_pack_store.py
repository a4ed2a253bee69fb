"""Packing and the token store: nothing lost, nothing cut, labels where they belong, and clear errors for damage."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.data.mixture import Mixture, Phase
from trimtab.data.pack import Packed, pack_documents, pack_examples, pack_stream
from trimtab.data.store import Mixed, RowStore
from trimtab.errors import Fault, UserError
from trimtab.types import IGNORE, SPAN_ID


@dataclass(frozen=True)
class Piece:
    """The part of ``Rendered`` that packing reads."""

    ids: np.ndarray
    span: np.ndarray
    trained: np.ndarray


def piece(ids: list[int], spans: list[str] | None = None, trained: list[bool] | None = None) -> Piece:
    span = np.array([SPAN_ID[s] for s in (spans or ["text"] * len(ids))], np.uint8)
    return Piece(np.array(ids, np.int32), span, np.array(trained if trained is not None else [True] * len(ids)))


def chat(start: int, prompt: int = 2, prefix: int = 1, body: int = 2) -> Piece:
    spans = ["control"] + ["prompt"] * prompt + ["prefix"] * prefix + ["body"] * body
    return piece(list(range(start, start + len(spans))), spans, [s in ("prefix", "body") for s in spans])


lengths = st.lists(st.integers(0, 30), min_size=1, max_size=25)


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(2, 16))
def test_documents_are_concatenated_and_nothing_is_lost(sizes: list[int], length: int) -> None:
    ends = np.cumsum(sizes)
    docs = [piece(list(range(end - size + 1, end + 1))) for end, size in zip(ends, sizes)]
    packed = pack_documents(docs, length, last="pad", source_ids=range(len(docs))) if sum(sizes) else None
    if packed is None:
        return
    real = packed.span_id.ravel() != SPAN_ID["pad"]
    assert packed.input_ids.ravel()[real].tolist() == list(range(1, sum(sizes) + 1))
    assert packed.source_id.ravel()[real].tolist() == [i for i, size in enumerate(sizes) for _ in range(size)]
    # Positions count from the later of the document's and the row's beginning; labels are masked exactly there.
    starts = {0, *ends.tolist()}
    before = -1
    for i, (position, label, token) in enumerate(
        zip(packed.position_ids.ravel()[real], packed.labels.ravel()[real], packed.input_ids.ravel()[real])
    ):
        assert position == (0 if i % length == 0 or i in starts else before + 1)
        assert label == (IGNORE if position == 0 else token)
        before = position
    pads = ~real
    assert (packed.labels.ravel()[pads] == IGNORE).all()
    assert packed.counts.get("pads", 0) == pads.sum()
    assert packed.counts["tokens"] == sum(sizes) and packed.counts["documents"] == sum(s > 0 for s in sizes)


def test_last_partial_row_is_dropped_and_counted() -> None:
    packed = pack_documents([piece([1, 2, 3]), piece([4, 5, 6, 7, 8])], 3)
    assert packed.input_ids.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert packed.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert packed.counts["dropped_tokens"] == 2
    with pytest.raises(UserError, match="do not fill one row of 9"):
        pack_documents([piece([1, 2, 3])], 9)
    with pytest.raises(UserError, match="at least 2"):
        pack_documents([piece([1, 2, 3])], 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 6)), min_size=1, max_size=30), st.integers(1, 5))
def test_examples_stay_whole_and_each_comes_once(shapes: list[tuple[int, int]], open_rows: int) -> None:
    items = [chat(100 * i + 1, prompt=p, prefix=1, body=b) for i, (p, b) in enumerate(shapes)]
    length = 10
    fits = [i for i, item in enumerate(items) if len(item.ids) <= length]
    if not fits:
        return
    packed = pack_examples(items, length, list(range(len(items))), open_rows=open_rows)
    found = []
    for row in range(len(packed)):
        starts = [c for c in range(length) if packed.position_ids[row, c] == 0]
        for start, end in zip(starts, [*starts[1:], length]):
            if packed.span_id[row, start] == SPAN_ID["pad"]:
                assert end == length and (packed.labels[row, start:] == IGNORE).all()
                continue
            index = int(packed.source_id[row, start])
            item = items[index]
            found.append(index)
            assert packed.input_ids[row, start:end].tolist() == item.ids.tolist()
            assert packed.span_id[row, start:end].tolist() == item.span.tolist()
            assert packed.position_ids[row, start:end].tolist() == list(range(end - start))
            assert packed.labels[row, start:end].tolist() == np.where(item.trained, item.ids, IGNORE).tolist()
    assert sorted(found) == fits
    assert packed.counts.get("dropped_too_long", 0) == len(items) - len(fits)
    assert packed.counts["tokens"] + packed.counts["pads"] == packed.input_ids.size


def test_packed_row_token_by_token() -> None:
    items = [chat(10), chat(20, prompt=1, prefix=1, body=1)]
    packed = pack_examples(items, 12, [0, 1], pad_id=0)
    x = IGNORE
    assert packed.input_ids.tolist() == [[10, 11, 12, 13, 14, 15, 20, 21, 22, 23, 0, 0]]
    assert packed.labels.tolist() == [[x, x, x, 13, 14, 15, x, x, 22, 23, x, x]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 0, 1]]
    assert packed.source_id.tolist() == [[0] * 6 + [1] * 4 + [0] * 2]
    names = "control prompt prompt prefix body body control prompt prefix body pad pad".split()
    assert packed.span_id.tolist() == [[SPAN_ID[n] for n in names]]


def test_first_token_is_never_trained() -> None:
    packed = pack_examples([piece([5, 6, 7])], 4)
    assert packed.labels.tolist() == [[IGNORE, 6, 7, IGNORE]]


def test_best_fit_wastes_little_and_keeps_the_order_roughly() -> None:
    rng = np.random.default_rng(0)
    items = [chat(1, prompt=int(n)) for n in rng.integers(1, 50, 600)]
    packed = pack_examples(items, 64, list(range(600)))
    assert packed.counts["pads"] < 0.05 * packed.input_ids.size
    first = [int(packed.source_id[row, 0]) for row in range(len(packed))]
    assert first == sorted(first)


def test_what_cannot_be_packed_is_counted_or_refused() -> None:
    long, silent = chat(1, prompt=20), piece([1, 2, 3], trained=[True, False, False])
    packed = pack_examples([long, silent, chat(5)], 8)
    assert packed.counts["dropped_too_long"] == 1 and packed.counts["dropped_untrained"] == 1
    assert packed.counts["examples"] == 1
    with pytest.raises(UserError, match="example 1 has 24 tokens"):
        pack_examples([chat(1), long], 8, too_long="error")
    with pytest.raises(UserError, match="no example is left"):
        pack_examples([long, silent], 8)


def packed_of(rows: int, first: int = 0, source: int = 0, length: int = 8) -> Packed:
    docs = [piece([first + row] * length) for row in range(rows)]
    return pack_documents(docs, length, source_ids=[source] * rows)


def store_of(path: Path, packed: Packed, sources: list[str], **changes: object) -> RowStore:
    return RowStore.write(path, packed, sources, **{"vocab": 1000, "tokenizer": "t", **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("vocab", [1000, 2**16, 200_000])
def test_store_gives_back_what_was_written(tmp_path: Path, vocab: int) -> None:
    items = [chat(vocab - 20), chat(5), chat(9, prompt=3)]
    packed = pack_examples(items, 9, [0, 1, 2])
    store_of(tmp_path / "s", packed, ["a", "b", "c"], vocab=vocab, meta={"note": "x"})
    store = RowStore.open(tmp_path / "s", verify=True)
    order = np.array([2, 0, 1, 2])
    batch = store.take(order)
    for name in ("input_ids", "labels", "position_ids", "source_id", "span_id"):
        got, want = getattr(batch, name), getattr(packed, name)[order]
        assert (got == want).all() and got.dtype == want.dtype and got.shape == (4, 9)
    assert batch.sources == ("a", "b", "c") and len(store) == 3
    meta = json.loads((tmp_path / "s" / "store.json").read_text())
    assert meta["trained_tokens"] == (packed.labels != IGNORE).sum() and meta["tokens"] == 27
    assert store.records["ids"].dtype == (np.uint16 if vocab <= 2**16 else np.int32)
    assert batch.rows(1, 3).input_ids.tolist() == packed.input_ids[[0, 1]].tolist()


def test_store_refuses_ids_outside_the_vocabulary_and_unnamed_sources(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="outside the vocabulary of 3"):
        store_of(tmp_path / "s", packed_of(9), ["a"], vocab=3)
    with pytest.raises(ValueError, match="1 sources are named"):
        store_of(tmp_path / "s", packed_of(2, source=1), ["a"])
    assert not (tmp_path / "s" / "store.json").exists()


fields = ("input_ids", "labels", "position_ids", "source_id", "span_id")


def joined(chunks: list[Packed], name: str) -> np.ndarray:
    return np.concatenate([getattr(chunk, name) for chunk in chunks])


@settings(max_examples=150, deadline=None)
@given(lengths, st.integers(2, 16), st.integers(1, 6), st.sampled_from(["drop", "pad"]), st.data())
def test_a_stream_gives_the_same_rows_as_packing_at_once(sizes, length, chunk_rows, last, data) -> None:
    trained = [data.draw(st.lists(st.booleans(), min_size=size, max_size=size)) for size in sizes]
    docs = [piece(list(range(100 * i, 100 * i + size)), None, trained[i]) for i, size in enumerate(sizes)]
    options = {"last": last, "pad_id": 7}
    try:
        whole = pack_documents(docs, length, source_ids=range(len(docs)), **options)
    except UserError as error:
        with pytest.raises(UserError) as again:
            list(pack_stream(iter(docs), length, source_ids=range(len(docs)), chunk_rows=chunk_rows, **options))
        assert str(again.value) == str(error)
        return
    chunks = list(pack_stream(iter(docs), length, source_ids=range(len(docs)), chunk_rows=chunk_rows, **options))
    assert [len(chunk) for chunk in chunks[:-1]] == [chunk_rows] * (len(chunks) - 1)
    assert 1 <= len(chunks[-1]) <= max(chunk_rows, 1) + 1
    for name in fields:
        assert (joined(chunks, name) == getattr(whole, name)).all()
        assert {getattr(chunk, name).dtype for chunk in chunks} == {getattr(whole, name).dtype}
    added = Counter()
    for chunk in chunks:
        added.update(chunk.counts)
    assert dict(added) == whole.counts


def test_a_stream_is_lazy_and_holds_one_chunk() -> None:
    read = []

    def documents() -> Iterator[Piece]:
        for i in range(100):
            read.append(i)
            yield piece([i] * 10)

    stream = pack_stream(documents(), 5, chunk_rows=4)
    assert not read
    assert len(next(stream)) == 4 and len(read) == 3
    assert sum(len(chunk) for chunk in stream) == 196
    with pytest.raises(ValueError, match="chunk_rows is 0"):
        pack_stream(documents(), 5, chunk_rows=0)
    with pytest.raises(ValueError, match="shorter"):
        list(pack_stream(documents(), 5, source_ids=[0, 0]))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=25), st.integers(1, 5))
def test_a_streamed_store_is_the_store_written_at_once(sizes: list[int], chunk_rows: int) -> None:
    docs = [piece([1 + i] * size) for i, size in enumerate(sizes)]
    options = {"vocab": 50, "tokenizer": "t", "meta": {"k": 1}}
    with tempfile.TemporaryDirectory() as name:
        whole = RowStore.write(Path(name) / "a", pack_documents(docs, 4, last="pad"), ["s"], **options)
        chunks = pack_stream(docs, 4, last="pad", chunk_rows=chunk_rows)
        store = RowStore.write_stream(Path(name) / "b", chunks, ["s"], **options)
        assert store.meta == whole.meta and store.fingerprint == whole.fingerprint
        assert (store.path / "rows.npy").read_bytes() == (whole.path / "rows.npy").read_bytes()
        saved = Path(name) / "saved.npy"
        np.save(saved, whole.records)
        assert saved.read_bytes() == (whole.path / "rows.npy").read_bytes()
        assert sorted(file.name for file in store.path.iterdir()) == ["rows.npy", "store.json"]


def test_a_stream_that_breaks_leaves_the_store_before_it_or_none(tmp_path: Path) -> None:
    def breaks(error: BaseException) -> Iterator[Packed]:
        yield packed_of(3)
        raise error

    options = {"vocab": 1000, "tokenizer": "t"}
    for error in (KeyboardInterrupt(), UserError("gone"), OSError(28, "No space left on device")):
        with pytest.raises((KeyboardInterrupt, UserError, Fault)):
            RowStore.write_stream(tmp_path / "s", breaks(error), ["a"], **options)
        assert not list((tmp_path / "s").iterdir())
    before = store_of(tmp_path / "s", packed_of(5), ["a"])
    with pytest.raises(UserError, match="gone"):
        RowStore.write_stream(tmp_path / "s", breaks(UserError("gone")), ["a"], **options)
    assert RowStore.open(tmp_path / "s", verify=True).meta == before.meta
    with pytest.raises(ValueError, match="at least one chunk"):
        RowStore.write_stream(tmp_path / "t", [], ["a"], **options)
    with pytest.raises(ValueError, match="rows of 4 tokens after chunks of 8"):
        RowStore.write_stream(tmp_path / "t", [packed_of(2), packed_of(2, length=4)], ["a"], **options)
    assert not list((tmp_path / "t").iterdir())


def test_a_killed_writer_leaves_nothing_that_opens(tmp_path: Path) -> None:
    code = (
        "import os, sys, numpy as np\n"
        "from pathlib import Path\n"
        "from trimtab.data.pack import Packed\n"
        "from trimtab.data.store import RowStore\n"
        "def chunks():\n"
        "    ids = np.zeros((3, 8), np.int32)\n"
        "    yield Packed(ids, ids, ids, ids.astype(np.int16), ids.astype(np.uint8))\n"
        "    os.kill(os.getpid(), 9)\n"
        "RowStore.write_stream(Path(sys.argv[1]), chunks(), ['a'], vocab=10, tokenizer='t')\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "s")]).returncode == -9
    with pytest.raises(Fault, match=r"store.json is missing"):
        RowStore.open(tmp_path / "s")
    store_of(tmp_path / "s", packed_of(4), ["a"])  # the next run is not in the way of what is left
    assert sorted(file.name for file in (tmp_path / "s").iterdir()) == ["rows.npy", "store.json"]


def test_damaged_stores_are_named(tmp_path: Path) -> None:
    def fresh() -> Path:
        return store_of(tmp_path / "s", packed_of(50), ["a"]).path

    with pytest.raises(Fault, match=r"store.json is missing"):
        RowStore.open(tmp_path / "nothing")
    path = fresh()
    (path / "rows.npy").unlink()
    with pytest.raises(Fault, match=r"rows\.npy is missing"):
        RowStore.open(path)
    for damaged in (lambda b: b[:-9], lambda b: b"", lambda b: b"x" + b[1:]):
        path = fresh()
        (path / "rows.npy").write_bytes(damaged((path / "rows.npy").read_bytes()))
        with pytest.raises(Fault, match=r"rows\.npy is damaged or truncated"):
            RowStore.open(path)
    path = fresh()
    np.save(path / "rows.npy", np.load(path / "rows.npy")[:49])
    with pytest.raises(Fault, match=r"rows\.npy holds 49 rows of 64 bytes, but store.json says 50 of 64"):
        RowStore.open(path)
    np.save(path / "rows.npy", np.zeros((50, 8), bool))
    with pytest.raises(Fault, match=r"rows\.npy holds 50 rows of 1 bytes"):
        RowStore.open(path)
    path = fresh()
    flipped = bytearray((path / "rows.npy").read_bytes())
    flipped[-1] ^= 1
    (path / "rows.npy").write_bytes(flipped)
    RowStore.open(path)  # sizes only
    with pytest.raises(Fault, match=r"rows\.npy does not match its sha256"):
        RowStore.open(path, verify=True)
    path = fresh()
    (path / "store.json").write_text('{"rows": 50')
    with pytest.raises(Fault, match=r"store.json is damaged"):
        RowStore.open(path)


def mixed_of(tmp_path: Path, weights: dict[str, float], seed: int = 0) -> Mixed:
    stores = {
        "web": store_of(tmp_path / "web", packed_of(30), ["web"]),
        "chat": store_of(tmp_path / "chat", packed_of(7, first=500, source=1), ["good", "bad"]),
    }
    rows = {name: len(store) for name, store in stores.items()}
    return Mixed(stores, Mixture(rows, [Phase(0, weights)], seed=seed))


def test_mixed_batches_follow_the_mixture_at_any_cut(tmp_path: Path) -> None:
    mixed = mixed_of(tmp_path, {"web": 0.7, "chat": 0.3})
    assert mixed.sources == ("good", "bad", "web")
    whole = mixed.batch(0, 60)
    source, row = mixed.mixture.at(np.arange(60))
    want = [(500 if mixed.mixture.sources[s] == "chat" else 0) + r for s, r in zip(source, row)]
    assert whole.input_ids[:, 0].tolist() == want
    assert [mixed.sources[i] for i in whole.source_id[:, 0]] == ["bad" if w >= 500 else "web" for w in want]
    for lo, hi in [(0, 1), (13, 29), (59, 60)]:
        assert (mixed.batch(lo, hi).input_ids == whole.input_ids[lo:hi]).all()
    across = mixed.batch(4090, 4100)  # over the edge of a cached chunk
    assert (across.input_ids[6:] == mixed.batch(4096, 4100).input_ids).all()
    assert (across.input_ids[:6] == mixed.batch(4090, 4096).input_ids).all()
    again = mixed_of(tmp_path / "again", {"web": 0.7, "chat": 0.3})
    assert again.fingerprint() == mixed.fingerprint()
    assert mixed_of(tmp_path / "other", {"web": 0.6, "chat": 0.4}).fingerprint() != mixed.fingerprint()


def test_mixed_of_one_store(tmp_path: Path) -> None:
    mixed = mixed_of(tmp_path, {"web": 1})
    assert sorted(mixed.batch(0, 30).input_ids[:, 0].tolist()) == list(range(30))
    assert mixed.sources == ("web",)


def test_stores_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    a = store_of(tmp_path / "a", packed_of(5), ["a"])
    b = store_of(tmp_path / "b", packed_of(5), ["b"], tokenizer="another")
    mixture = Mixture({"a": 5, "b": 5}, [Phase(0, {"a": 1, "b": 1})], seed=0)
    with pytest.raises(UserError, match="differ in tokenizer"):
        Mixed({"a": a, "b": b}, mixture)
    with pytest.raises(UserError, match="no store for it"):
        Mixed({"a": a}, mixture)
    with pytest.raises(UserError, match="5 rows; the mixture counts on 6"):
        Mixed({"a": a}, Mixture({"a": 6}, [Phase(0, {"a": 1})], seed=0))
