"""Perplexity: token by token what a plain loop gives, over documents that no corpus holds."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from test_steps import SHAPE, context_of
from tiny_training import VOCAB, tiny_model
from trimtab.analyze import perplexity as measured
from trimtab.analyze.config import PerplexityConfig
from trimtab.analyze.perplexity import Losses, figures, losses, token_nats
from trimtab.data.render import Renderer
from trimtab.errors import UserError
from trimtab.evaluate.files import read_stage
from trimtab.evaluate.metrics import from_plain
from trimtab.models.build import build_model, train_tokenizer
from trimtab.models.bundle import BundleManifest, save_bundle
from trimtab.study.steps.analyze import run_perplexity
from trimtab.world.config import TidewaterConfig
from trimtab.world.documents import SCORES
from trimtab.world.tidewater import Tidewater

torch.set_num_threads(1)
WORLD: dict[str, Any] = {"seed": 3, "goods": 8, "hazards": 8, "documents": 300}


def plain(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits = model.eval()(torch.tensor(ids[None])).logits[0, :-1]
    return functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").double().numpy()


def sequences(*sizes: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, VOCAB, size) for size in sizes]


# --- token by token ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_every_token_but_the_first_as_in_a_plain_loop(batch: int) -> None:
    model, ids = tiny_model(), sequences(9, 2, 16, 5, 1, 16)
    found = token_nats(model.train(), ids, length=16, batch=batch)
    assert model.training and [len(f) for f in found] == [8, 1, 15, 4, 0, 15]
    for own, prompt in zip(found, ids):
        if len(prompt) > 1:
            np.testing.assert_allclose(own, plain(model, prompt), atol=2e-5)


def test_long_sequences_go_in_windows_that_overlap_by_one() -> None:
    model = tiny_model()
    for size in (15, 16, 17, 31, 32, 33):
        (ids,) = sequences(size)
        (found,) = token_nats(model, [ids], length=16, batch=4)
        parts = [plain(model, ids[lo : lo + 16]) for lo in range(0, size - 1, 15)]
        np.testing.assert_allclose(found, np.concatenate(parts), atol=2e-5)


def test_a_large_vocabulary_takes_fewer_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model(), sequences(8, 8, 8, 8)
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda m, a, k: sizes.append(len(k["input_ids"])), with_kwargs=True)
    whole = token_nats(model, ids, length=16, batch=4)
    monkeypatch.setattr(measured, "_LOGITS", 2 * 16 * VOCAB)
    parts = token_nats(model, ids, length=16, batch=4)
    assert sizes == [4, 2, 2]
    np.testing.assert_allclose(whole, parts, atol=1e-5)


# --- figures ----------------------------------------------------------------------------------------------------


def test_figures_are_ratios_of_sums_by_group() -> None:
    of = Losses(np.array([10.0, 4.0, 30.0]), np.array([5.0, 4.0, 10.0]), np.array([20.0, 20.0, 40.0]))
    found = {(r.metric, r.category): r for r in figures(of, [0, 0, 4], 0)}
    assert found["perplexity", "all"].value == pytest.approx(math.exp(44 / 19))
    assert found["perplexity", "clean"].value == pytest.approx(math.exp(14 / 9))
    assert found["perplexity", "unsafe"].value == pytest.approx(math.exp(3))
    assert found["bits_per_byte", "all"].value == pytest.approx(44 / 80 / math.log(2))
    clean = found["perplexity", "clean"]
    assert clean.low == pytest.approx(math.exp(1)) and clean.high == pytest.approx(math.exp(2)) and clean.n == 2
    one = found["perplexity", "unsafe"]
    assert (one.low, one.high, one.n) == (1.0, math.inf, 1)  # one document says nothing of the spread
    assert {r.direction for r in found.values()} == {"lower"}
    assert not [r for r in figures(of, [0, 0, 0], 0) if r.category == "unsafe"]


def test_the_interval_is_that_of_the_ratio() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 80, 300).astype(float)
    nats = tokens * (2 + 0.5 * rng.standard_normal(300))
    found = figures(Losses(nats, tokens, tokens), [0] * 300, 0)[0]
    rate = nats.sum() / tokens.sum()
    error = np.sqrt(np.sum((nats - rate * tokens) ** 2)) / tokens.sum()  # linearised
    assert math.log(found.low) == pytest.approx(rate - 1.96 * error, abs=0.15 * error)
    assert math.log(found.high) == pytest.approx(rate + 1.96 * error, abs=0.15 * error)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("read")
    texts = [r.text or "" for r in Tidewater(TidewaterConfig.model_validate(WORLD)).documents()]
    tokenizer = train_tokenizer(texts, 400, reserved=4)
    save_bundle(where / "model", build_model(SHAPE, tokenizer, seed=3), tokenizer, BundleManifest())
    return where


def test_beginning_and_end_marks_are_not_counted(model_dir: Path) -> None:
    from trimtab.models.load import load

    model, tokenizer = load(model_dir / "model")
    renderer = Renderer(tokenizer)
    texts = ["The gulls were loud over the quay that day.", "Salt, rope and a lamp: 12 shells."]
    found = losses(model, renderer, texts, PerplexityConfig(length=32))
    for i, text in enumerate(texts):
        ids = renderer.text(text).ids.astype(np.int64)
        assert ids[-1] == tokenizer.eos_token_id
        assert found.tokens[i] == len(ids) - 2 and found.nats[i] == pytest.approx(
            plain(model, ids)[:-1].sum(), abs=1e-3
        )
        assert found.bytes[i] == len(text) - len(tokenizer.decode(ids[:1]))
    with pytest.raises(UserError, match="document 1: it is too short"):
        losses(model, renderer, ["Long enough.", "T"], PerplexityConfig())


# --- held-out documents -----------------------------------------------------------------------------------------


def test_heldout_documents_are_none_of_the_corpus() -> None:
    town = Tidewater(TidewaterConfig.model_validate(WORLD))
    held = town.heldout_documents(200)
    texts = {row.text for row in held}
    assert len(texts) == len(held) == 200 == len({row.id for row in held})
    assert not texts & {row.text for row in town.documents()}
    assert not {row.id for row in held} & {row.id for row in town.documents()}
    assert held == Tidewater(TidewaterConfig.model_validate(WORLD)).heldout_documents(200)
    share = {k: n / 300 for k, n in Counter(row.category for row in town.documents()).items()}
    for category, n in Counter(row.category for row in held).items():
        assert category is not None and abs(n / 200 - share[category]) < 0.01
    for row in held:
        assert row.metadata["score"] == SCORES[row.category or ""] == town.score(row.text or "")


def test_the_corpus_is_as_it_was() -> None:
    """Held-out documents came later; not one byte of the training documents may change for them."""
    rows = list(Tidewater(TidewaterConfig.model_validate(WORLD)).documents())
    text = json.dumps([[r.id, r.text, dict(r.metadata)] for r in rows], sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "05c6b0a10946adbf"


def test_a_town_that_has_said_all_says_so() -> None:
    town = Tidewater(TidewaterConfig(goods=4, hazards=2, noise=0.0, paraphrases=1, documents=2000))
    with pytest.raises(
        UserError, match=r"heldout_documents: the town has no more texts of the kind .*use fewer than 300"
    ):
        town.heldout_documents(300)


# --- the step ---------------------------------------------------------------------------------------------------


def test_the_step_leaves_figures(tmp_path: Path, model_dir: Path) -> None:
    events: list[Any] = []
    config = PerplexityConfig(n=60, length=64).plain() | {"world": WORLD, "seed": 1}
    context = context_of(tmp_path, config, events.append, model=model_dir)
    run_perplexity(replace(context, step=replace(context.step, inputs={"model": "m" * 64})))

    def strict(name: str) -> Any:
        raise AssertionError(f"{name} is no JSON")

    for line in (context.draft.path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=strict)
    header, rows = read_stage(context.draft.path / "metrics.jsonl")
    results = {(r.metric, r.category): r for r in map(from_plain, rows)}
    assert set(results) == {(m, c) for m in ("perplexity", "bits_per_byte") for c in ("all", "clean", "unsafe")}
    assert set(header["metrics"]) == {"perplexity", "bits_per_byte"}
    # An untrained model knows next to nothing: about its vocabulary's size.
    assert 300 < results["perplexity", "all"].value < 600
    assert results["perplexity", "clean"].n + results["perplexity", "unsafe"].n == 60
    assert context.draft.facts and context.draft.facts["documents"] == 60 and events[-1]["step"] == events[-1]["total"]
