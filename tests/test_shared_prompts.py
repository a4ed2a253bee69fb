"""Shared prompts: packed and read back, gradients as those of each example alone, and a study that trains on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from tiny_training import VOCAB, config_of, log_of, tiny_model, weights
from trimtab.cli import app
from trimtab.data.mixture import Mixture, Phase
from trimtab.data.pack import Bins, Examples, Packed, fill_rows, offsets
from trimtab.data.store import Batch, Mixed, RowStore
from trimtab.data.tree import Trees, answers_at, firsts, grow, tails
from trimtab.errors import UserError
from trimtab.models.build import build_model, train_tokenizer
from trimtab.models.bundle import BundleManifest, save_bundle
from trimtab.models.config import BuildConfig
from trimtab.progress import JsonReporter
from trimtab.recipe.load import resolve
from trimtab.study.execute import execute
from trimtab.study.plan import make_plan
from trimtab.study.steps.chat import PLACES
from trimtab.study.viewer import study_rows, trained_on
from trimtab.train.loop import train
from trimtab.train.loss import Micro, TrainedPositions, token_losses, tree_mask
from trimtab.types import IGNORE, SPAN_ID

CPU = torch.device("cpu")
FIELDS = ("input_ids", "labels", "position_ids", "source_id", "span_id")


@dataclass(frozen=True)
class Piece:
    """The part of ``Rendered`` that packing reads."""

    ids: np.ndarray
    span: np.ndarray
    trained: np.ndarray


def piece(prompt: Sequence[int], controls: Sequence[int], answer: Sequence[int], masked: int = 0) -> Piece:
    """A prompt with its header, controls and an answer, whose last ``masked`` tokens are not trained."""
    sizes = len(prompt), len(controls), len(answer)
    span = np.repeat(np.array([SPAN_ID[n] for n in ("prompt", "control", "body")], np.uint8), sizes)
    trained = span == SPAN_ID["body"]
    trained[len(trained) - masked :] = False
    return Piece(np.array([*prompt, *controls, *answer], np.int32), span, trained)


def packed_of(pieces: Sequence[Piece], length: int) -> tuple[Packed, Trees, Examples, Bins]:
    """Trees of the pieces in rows, each example's index as its source; with the examples and bins in the trees' order."""
    trees = grow(Examples.of(pieces), length)
    whole = Examples.of([pieces[i] for i in trees.order])
    bins = trees.bins(whole, length)
    source = trees.order.astype(np.int16)
    return fill_rows(tails(whole, trees.skip), bins, length, source, begin=trees.skip), trees, whole, bins


def batch_of(packed: Packed, rows: int | None = None) -> Batch:
    return Batch(*(getattr(packed, name)[:rows] for name in FIELDS), sources=tuple(map(str, range(600))))


def alone(pieces: Sequence[Piece], length: int) -> Batch:
    """Every example in a row of its own."""
    examples = Examples.of(pieces)
    return batch_of(fill_rows(examples, Bins(np.arange(len(pieces)), len(pieces), {}), length))


PROMPT, OTHER = list(range(10, 19)), list(range(30, 36))
FAMILY = [
    piece(PROMPT, [2], [40, 41, 42, 43]),
    piece(PROMPT, [3], [50, 51]),
    piece(OTHER, [3, 5], [52, 53, 54]),
    piece([*OTHER, 7], [], [44, 45]),
    piece(PROMPT, [4], [60, 61, 62]),
    piece(PROMPT, [], [40, 41, 42, 43]),
    piece(OTHER, [2, 5], [46, 47, 48, 49, 50]),
]  # two trees, one with an answer that has no token, and a plain example


# -- packing ---------------------------------------------------------------------------------------------------------


def test_a_tree_token_by_token() -> None:
    packed, trees, _, bins = packed_of(FAMILY[:2] + FAMILY[5:6], 24)
    x = IGNORE
    assert trees.order.tolist() == [2, 0, 1] and trees.skip.tolist() == [0, 9, 9] and bins.rows == 1
    assert packed.input_ids.tolist() == [[*PROMPT, 40, 41, 42, 43, 2, 40, 41, 42, 43, 3, 50, 51, 0, 0, 0]]
    assert packed.labels.tolist() == [[x] * 9 + [40, 41, 42, 43, x, 40, 41, 42, 43, x, 50, 51, x, x, x]]
    assert packed.position_ids.tolist() == [[*range(13), *range(9, 14), *range(9, 12), 0, 1, 2]]
    assert packed.source_id.tolist() == [[2] * 13 + [0] * 5 + [1] * 3 + [0] * 3]
    assert packed.counts == {"examples": 3, "trees": 1, "split": 0, "tokens": 21, "pads": 3}


PIECES = st.builds(
    piece,
    st.sampled_from([[1], [1, 2], [1, 2, 3, 4], [5, 6, 7]]),
    st.sampled_from([[], [20], [21], [22, 23]]),
    st.lists(st.integers(30, 33), min_size=1, max_size=5),
    masked=st.just(0),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(PIECES, min_size=1, max_size=30), st.integers(4, 24))
def test_every_example_can_be_read_back(pieces: list[Piece], length: int) -> None:
    fits = [i for i, item in enumerate(pieces) if len(item.ids) <= length]
    if not fits:
        with pytest.raises(UserError, match="no example is left"):
            packed_of(pieces, length)
        return
    packed, trees, whole, bins = packed_of(pieces, length)
    assert sorted(trees.order.tolist()) == list(range(len(pieces)))
    laid = tails(whole, trees.skip)
    at, prompt = offsets(laid, bins), offsets(laid, bins)[firsts(trees.skip)]
    found = []
    for i, index in enumerate(trees.order.tolist()):
        row, skip = int(bins.row[i]), int(trees.skip[i])
        if row < 0:
            continue
        item = pieces[index]
        # By its places, as the viewer reads it ...
        mine = np.r_[prompt[i] : prompt[i] + skip, at[i] : at[i] + laid.sizes[i]]
        assert packed.input_ids[row, mine].tolist() == item.ids.tolist()
        assert packed.position_ids[row, mine].tolist() == list(range(len(item.ids)))
        assert packed.labels[row, mine].tolist() == np.where(item.trained, item.ids, IGNORE).tolist()
        assert packed.span_id[row, mine].tolist() == item.span.tolist()
        assert (packed.source_id[row, mine[skip:]] == index).all()
        # ... and by the positions alone, as training does: what its last token sees is the example.
        seen = tree_mask(torch.from_numpy(packed.position_ids[row : row + 1].astype(np.int64)))[0, 0]
        assert torch.nonzero(seen[mine[-1]])[:, 0].tolist() == mine.tolist()
        found.append(index)
    assert sorted(found) == fits and packed.counts["examples"] == len(fits)
    assert packed.counts.get("dropped_too_long", 0) == len(pieces) - len(fits)
    assert packed.counts["tokens"] + packed.counts["pads"] == packed.input_ids.size
    assert int((packed.labels != IGNORE).sum()) == sum(int(pieces[i].trained.sum()) for i in fits)
    # A prompt is laid down once for each tree.
    begun = (packed.position_ids == 0) & (packed.span_id != SPAN_ID["pad"])
    assert begun.sum() == len(set(trees.tree[bins.row >= 0].tolist()))


def test_a_tree_too_long_for_a_row_is_split_and_repeats_its_prompt() -> None:
    pieces = [piece(PROMPT, [i], [40, 41, 42]) for i in range(5)]
    packed, trees, _, bins = packed_of(pieces, 18)  # 9 + 4 + 4: two answers to a prompt
    assert trees.skip.tolist() == [0, 9, 0, 9, 0] and trees.tree.tolist() == [0, 0, 1, 1, 2]
    assert trees.counts == {"trees": 3, "split": 2} and bins.rows == 3
    assert packed.counts["tokens"] == 3 * 9 + 5 * 4
    packed, trees, _, _ = packed_of([*pieces, piece(PROMPT, [9], list(range(40, 60)))], 18)
    assert packed.counts["examples"] == 5 and packed.counts["dropped_too_long"] == 1
    assert trees.counts == {"trees": 4, "split": 2}, "the one that is dropped ends no tree"


def test_each_answer_without_a_token_begins_a_tree() -> None:
    pieces = [piece(PROMPT, [2], [40]), piece(PROMPT, [], [41]), piece(PROMPT, [], [42])]
    _, trees, _, _ = packed_of(pieces, 64)
    assert trees.order.tolist() == [1, 2, 0] and trees.skip.tolist() == [0, 0, 9]


def test_trees_come_in_the_order_of_their_first_examples_and_answers_are_found() -> None:
    _, trees, _, _ = packed_of(FAMILY, 64)
    assert trees.order.tolist() == [5, 0, 1, 4, 2, 6, 3]
    assert answers_at(Examples.of(FAMILY)).tolist() == [9, 9, 6, 7, 9, 9, 6]
    # A control elsewhere, as in the system slot, is part of the prompt.
    early = Piece(np.arange(5), np.array([SPAN_ID[n] for n in "control prompt prompt body body".split()], np.uint8),
                  np.array([False, False, False, True, True]))  # fmt: skip
    assert answers_at(Examples.of([early])).tolist() == [3]


def test_an_untrained_example_is_left_out_and_bad_trees_are_refused() -> None:
    silent = piece(PROMPT, [2], [40, 41], masked=2)
    packed, trees, _, _ = packed_of([silent, *FAMILY[:2]], 64)
    assert packed.counts["dropped_untrained"] == 1 and packed.counts["examples"] == 2 and len(trees.order) == 3
    with pytest.raises(UserError, match="example 1 begins with its answer"):
        packed_of([FAMILY[0], piece([], [2], [40])], 64)
    whole = Examples.of([FAMILY[0], FAMILY[1]])
    for skip, told in (([9, 0], "begins with a whole"), ([0, 10], "not trained"), ([0, 12], "a token at least")):
        with pytest.raises(AssertionError, match=told):
            tails(whole, np.array(skip))
    with pytest.raises(AssertionError, match="one prompt to a tree"):
        tails(Examples.of([FAMILY[0], FAMILY[2]]), np.array([0, 6]))
    with pytest.raises(AssertionError, match="begins with a token that is not trained"):
        tails(Examples.of([FAMILY[0], FAMILY[5]]), np.array([0, 9]))


# -- training ----------------------------------------------------------------------------------------------------------


def qwen(**changes: Any) -> Qwen3ForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, head_dim=16, max_position_embeddings=128, tie_word_embeddings=False, **changes,
            )
        )  # fmt: skip


def losses(model: Any, batch: Batch, bf16: bool = False) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and loss of every trained token, by source and then in order; and the gradients of the summed loss."""
    head = TrainedPositions(model)
    micro = Micro.of(batch, CPU)
    try:
        logits, nll = token_losses(model, head, micro, bf16=bf16)
    finally:
        head.close()
    model.zero_grad()
    nll.sum().backward()
    by = torch.from_numpy(np.argsort(micro.source, kind="stable"))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach()[by], nll.detach()[by], gradients


def told_apart(batch: Batch) -> Batch:
    """Rows of one example each, with the row's number as the source."""
    return replace(batch, source_id=np.repeat(np.arange(len(batch.input_ids), dtype=np.int16)[:, None],
                                              batch.input_ids.shape[1], 1))  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("made", [tiny_model, qwen], ids=["llama", "qwen3"])
def test_losses_and_gradients_are_those_of_each_example_alone(made: Any, attention: str) -> None:
    """Several trees and a plain example in one row, a second row, and rows that a tree does not fill."""
    model = made(attn_implementation=attention).eval()
    one = told_apart(alone(FAMILY, 16))
    for length, rows in ((64, 1), (28, 2)):
        packed, _, _, bins = packed_of(FAMILY, length)
        assert bins.rows == rows and Micro.of(batch_of(packed), CPU).branches
        shared = losses(model, batch_of(packed))
        apart = losses(model, one)
        torch.testing.assert_close(shared[0], apart[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(shared[1], apart[1], rtol=1e-5, atol=1e-6)
        assert shared[2].keys() == apart[2].keys()
        for name, gradient in apart[2].items():
            torch.testing.assert_close(shared[2][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bf16_stays_near(attention: str) -> None:
    model = tiny_model(attn_implementation=attention).eval()
    packed, _, _, _ = packed_of(FAMILY, 64)
    shared = losses(model, batch_of(packed), bf16=True)
    apart = losses(model, told_apart(alone(FAMILY, 16)))
    torch.testing.assert_close(shared[1], apart[1], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_answer_sees_no_other(attention: str) -> None:
    model = tiny_model(attn_implementation=attention).eval()
    packed, trees, whole, bins = packed_of(FAMILY, 64)
    before = losses(model, batch_of(packed))[0]
    sizes = [int(item.trained.sum()) for item in FAMILY]
    begins = np.cumsum(sizes) - sizes
    at = offsets(tails(whole, trees.skip), bins)
    for i, index in enumerate(trees.order.tolist()):
        ids = packed.input_ids.copy()
        first = at[i] + (0 if trees.skip[i] else answers_at(whole)[i])
        ids[bins.row[i], first : at[i] + len(FAMILY[index].ids) - trees.skip[i]] += 1
        after = losses(model, batch_of(replace(packed, input_ids=ids)))[0]
        changed = (after - before).abs().amax(1) > 1e-6
        mine = np.zeros(len(changed), bool)
        mine[begins[index] : begins[index] + sizes[index]] = True
        assert not changed[~mine].any(), index
        assert changed[mine][1:].all() or sizes[index] == 1, index


def test_what_is_predicted_at_a_branch_is_refused_and_rows_without_one_take_the_old_path() -> None:
    packed, _, _, _ = packed_of(FAMILY[:2], 24)
    at = 9 + 5  # the control of the second answer
    packed.labels[0, at] = packed.input_ids[0, at]
    with pytest.raises(AssertionError, match="what stands before a branch"):
        Micro.of(batch_of(packed), CPU)
    plain = Micro.of(alone(FAMILY, 16), CPU)
    assert not plain.branches and plain.position_ids is not None
    assert Micro.of(alone(FAMILY[:1], 14), CPU).position_ids is None


def test_a_mask_of_plain_rows_is_the_causal_one_of_each_piece() -> None:
    position = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    seen = tree_mask(position)[:, 0]
    assert torch.equal(seen[1], torch.ones(6, 6).tril().bool())
    assert torch.equal(seen[0], torch.block_diag(*(torch.ones(n, n).tril() for n in (3, 2, 1))).bool())


def test_layers_that_see_less_are_refused() -> None:
    packed, _, _, _ = packed_of(FAMILY, 64)
    shape = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    windowed = MistralForCausalLM(MistralConfig(**shape, sliding_window=8))
    with pytest.raises(UserError, match=r"mistral model has layers without full attention.*'modes.shared: false'"):
        losses(windowed, batch_of(packed))
    losses(MistralForCausalLM(MistralConfig(**shape, sliding_window=None)), batch_of(packed))
    mixed = qwen(use_sliding_window=True, sliding_window=8, max_window_layers=2)
    with pytest.raises(UserError, match="qwen3 model has layers without full attention"):
        losses(mixed, batch_of(packed))
    losses(mixed, alone(FAMILY, 16))  # rows without branches are the model's own business


def data_of(root: Path) -> Mixed:
    rng = np.random.default_rng(0)
    pieces = []
    for n in range(40):
        start = int(rng.integers(8, 40))
        prompt = [(start + i) % VOCAB for i in range(6)]
        pieces += [piece(prompt, [mode], [(start + 6 + mode * i) % VOCAB for i in range(4)]) for mode in (1, 2, 3)]
        if n % 4 == 0:
            pieces.append(piece(prompt, [], [(start + 6 + i) % VOCAB for i in range(4)]))
    packed = packed_of(pieces, 32)[0]
    store = RowStore.write(
        root, replace(packed, source_id=np.zeros_like(packed.source_id)), ["modes"], vocab=VOCAB, tokenizer="t"
    )
    return Mixed({"modes": store}, Mixture({"modes": len(store)}, [Phase(0, {"modes": 1.0})], seed=1))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loop_learns_the_modes_and_resumes_bit_for_bit(tmp_path: Path, accumulate: int) -> None:
    settings = config_of(checkpoint_every=10, accumulate=accumulate, lr=1e-2)
    data = data_of(tmp_path / "data")
    whole = tiny_model()
    train(whole, data, settings, total_steps=30, seed=3, work=tmp_path / "whole")
    log = log_of(tmp_path / "whole")
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]

    real = data.batch

    def batch(lo: int, hi: int) -> Batch:
        if lo >= 23 * 8:
            raise KeyboardInterrupt
        return real(lo, hi)

    data.batch = batch  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), data, settings, total_steps=30, seed=3, work=tmp_path / "cut")
    again = tiny_model(seed=5)
    result = train(again, data_of(tmp_path / "data"), settings, total_steps=30, seed=3, work=tmp_path / "cut")
    assert result.began_at == 20
    assert all(torch.equal(p, weights(whole)[name]) for name, p in weights(again).items())


# -- a study -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    from trimtab.cli import data

    if not any(group.name == "data" for group in app.registered_groups):
        data.register(app)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = BuildConfig(hidden=32, layers=1, heads=2, kv_heads=1, ffn=48, context=640, vocab=400, reserved=12)
    tokenizer = train_tokenizer([f"Crate {n} holds salt and rope and 12 hooks." for n in range(50)], 400, reserved=12)
    where = tmp_path_factory.mktemp("model") / "bundle"
    save_bundle(where, build_model(shape, tokenizer, seed=3), tokenizer, BundleManifest())
    return where


def study_of(bundle: Path, **modes: Any) -> dict[str, Any]:
    names = ["positive", "rejective", "negative"]
    negative = {"acknowledge": True, "kept": "checkpoint"}
    return {
        "name": "shared",
        "world": {"seed": 3, "goods": 8, "hazards": 8},
        "stages": {
            "tuned": {
                "kind": "sft", "model": {"load": str(bundle)}, "length": 640, "epochs": 1,
                "data": [
                    {"name": "goods", "tidewater": "benign", "n": 12},
                    {"name": "hazards", "tidewater": "harmful-seen", "n": 8},
                ],
                "modes": {"names": names, "at": "header", "fallback": 1.0, "negative": negative, **modes},
                "train": {"rows_per_step": 4, "lr": 1.0e-3},
            },
        },
        "arms": [{"name": "shared"}, {"name": "apart", "set": {"stages.tuned.modes.shared": False}}],
    }  # fmt: skip


@pytest.fixture(scope="module")
def study(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan, out = make_plan(*resolve(study_of(bundle, shared=True), "test")), tmp_path_factory.mktemp("runs") / "shared"
    shared, apart = (plan.steps[arm.stages["tuned"]].tokens for arm in plan.arms)
    assert 0.4 < shared / apart < 0.7  # as estimated
    execute(plan, out, JsonReporter())
    return out


def test_a_study_trains_the_same_rows_shared_and_apart(study: Path) -> None:
    rows: list[dict[str, list[Any]]] = []
    facts = []
    for arm in ("shared", "apart"):
        data = trained_on(study, arm, None)
        packed = data.packed.manifest["facts"]
        assert packed["rows"] == 80 and packed["packing"]["examples"] == 80
        rows.append({one.id: [one.tokens, one.span.tolist(), one.trained.tolist()] for one in study_rows(data)})
        facts.append(packed)
    assert rows[0] == rows[1] and len(rows[0]) == 80, "every example is shown as if it stood alone"
    assert facts[0]["trained_tokens"] == facts[1]["trained_tokens"]
    assert facts[0]["packing"]["tokens"] < 0.8 * facts[1]["packing"]["tokens"]
    assert facts[0]["packing"]["trees"] >= 20 and "trees" not in facts[1]["packing"]
    kinds = {row.metadata.get("fallback") for row, _ in trained_on(study, "shared", None).rows()}
    assert kinds == {None, "none", "unknown", "typed"}


def test_trees_hold_what_they_should(study: Path) -> None:
    data = trained_on(study, "shared", None)
    places = dict(np.load(data.packed.path / PLACES))
    rows = [row for row, _ in data.rows()]
    order = np.flatnonzero(places["row"] >= 0)[np.argsort(places["row"][places["row"] >= 0], kind="stable")]
    skip = places["skip"][order]
    tree = np.cumsum(skip == 0)
    for number in set(tree.tolist()):
        mine = [rows[i] for i in np.flatnonzero(tree == number)]
        assert len({row.messages[:-1] and row.messages[0]["content"] for row in mine}) == 1
        kinds = [row.metadata.get("fallback") for row in mine]
        assert kinds.count("none") <= 1 and "none" not in kinds[1:] and ("typed" not in kinds or len(kinds) == 1)
    assert Counter(np.bincount(tree)[1:].tolist())[4] >= 1, "some prompt has three modes and a fallback in one tree"


def test_the_viewer_says_where_the_prompt_is(study: Path) -> None:
    def shown(*more: str) -> str:
        result = CliRunner().invoke(app, ["data", "show", str(study), *more], env={"COLUMNS": "300"})
        assert result.exit_code == 0, result.output
        return result.output

    row = next(row.id for row, _ in trained_on(study, "shared", None).rows() if row.mode == "rejective")
    shared, apart = (shown("--arm", arm, "--row", row) for arm in ("shared", "apart"))
    assert "stands once in the row, for all its answers" in shared and "stands once" not in apart
    spans = [
        [line.split("tokens", 1)[-1] for line in text.splitlines() if "masked" in line] for text in (shared, apart)
    ]
    assert spans[0][1:] == spans[1][1:]


def test_shared_prompts_that_no_row_can_hold_and_the_prefix_lever_are_refused(bundle: Path) -> None:
    config = study_of(bundle, shared=True)
    config["stages"]["tuned"]["prefix"] = {"ratio": 0.5, "capability": "safety"}
    with pytest.raises(UserError, match=r"'modes.shared' and 'prefix' do not go together"):
        resolve(config, "test")
    with pytest.raises(UserError, match="'shared' needs 'at: header'"):
        resolve(study_of(bundle, shared=True, at="system"), "test")
