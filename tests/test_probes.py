"""Probes: the states are the model's, the regression is scikit-learn's, the figures are the textbook's, and the protocol
finds what is there and nothing where nothing is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve

from test_steps import SHAPE, context_of
from tiny_training import VOCAB, tiny_model
from trimtab.analyze import probes
from trimtab.analyze.auroc import cluster_weights, curve_figures, percentiles, separation
from trimtab.analyze.config import ProbeConfig
from trimtab.analyze.logistic import fit_scores
from trimtab.analyze.metrics import MEASURES, measure_cards, measure_of, plain_row, result_of
from trimtab.analyze.probes import Prompts, folds_of, out_of_fold, probe, shuffled_labels, splits_of
from trimtab.analyze.states import States, blocks_of, hidden_states, streamed
from trimtab.errors import UserError
from trimtab.evaluate.files import read_stage
from trimtab.evaluate.metrics import from_plain
from trimtab.models.build import build_model, train_tokenizer
from trimtab.models.bundle import BundleManifest, save_bundle
from trimtab.seeds import rng_of
from trimtab.study.steps.analyze import run_probes
from trimtab.types import Row
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import Tidewater

torch.set_num_threads(1)
QUICK = ProbeConfig(bootstrap=60)
WORLD: dict[str, Any] = {"seed": 3, "goods": 8, "hazards": 8, "documents": 300}


# --- states -----------------------------------------------------------------------------------------------------


def prompts_of(sizes: list[int]) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(1, VOCAB, size) for size in sizes]


def test_states_are_those_of_each_prompt_alone() -> None:
    model = tiny_model().eval()
    ids = prompts_of([7, 3, 12, 1, 7, 5])
    states = hidden_states(model, ids, batch=4)
    assert states.mean.shape == states.last.shape == (3, 6, 32) and states.mean.dtype == np.float32
    for i, prompt in enumerate(ids):
        with torch.no_grad():
            own = model(torch.tensor(prompt[None]), output_hidden_states=True).hidden_states
            entering = model.get_input_embeddings()(torch.tensor(prompt))
        # The last of transformers' own states is behind the final norm; ours is before it.
        for layer, stream in enumerate([entering, own[1][0]]):
            np.testing.assert_allclose(states.mean[layer, i], stream.mean(0).numpy(), atol=1e-5)
            np.testing.assert_allclose(states.last[layer, i], stream[-1].numpy(), atol=1e-5)
        with torch.no_grad():
            normed = model.model.norm(torch.from_numpy(states.last[2, i]))
        np.testing.assert_allclose(normed.numpy(), own[2][0, -1].numpy(), atol=1e-5)


def test_batches_do_not_matter_and_nothing_is_left_behind() -> None:
    model = tiny_model().train()
    ids = prompts_of([4, 9, 2, 6, 6])
    one, all_ = (hidden_states(model, ids, batch) for batch in (1, 8))
    np.testing.assert_allclose(one.mean, all_.mean, atol=1e-5)
    np.testing.assert_allclose(one.last, all_.last, atol=1e-5)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_hooks_are_removed_after_an_error_too() -> None:
    model = tiny_model()

    def fails(layer: int, stream: torch.Tensor) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), streamed(model, fails):
        model(torch.tensor([[1, 2]]))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_cannot_be_probed_is_refused() -> None:
    with pytest.raises(UserError, match="prompts"):
        hidden_states(tiny_model(), [], 4)
    with pytest.raises(UserError, match="none may be empty"):
        hidden_states(tiny_model(), [np.array([1]), np.array([], int)], 4)
    linear = torch.nn.Linear(2, 2)
    linear.config = SHAPE  # type: ignore[assignment]
    with pytest.raises(UserError, match="not in one list"):
        blocks_of(linear)


# --- the regression ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d", "l2"), [(120, 10, 1.0), (40, 90, 1.0), (60, 20, 0.01), (50, 5, 30.0)])
def test_the_regression_is_that_of_scikit_learn(n: int, d: int, l2: float) -> None:
    rng = np.random.default_rng(n)
    x = rng.standard_normal((n + 20, d)) @ rng.standard_normal((d, d)) + 3
    y = x[:n, 0] + rng.standard_normal(n) > 4
    centre, spread = x[:n].mean(0), x[:n].std(0)
    scaled = (x - centre) / spread
    reference = LogisticRegression(C=1 / l2, class_weight="balanced", tol=1e-10, max_iter=20000).fit(scaled[:n], y)
    got = fit_scores(x[:n], y, x[n:], l2)
    np.testing.assert_allclose(got, reference.decision_function(scaled[n:]), atol=2e-3, rtol=1e-3)


def test_a_feature_that_does_not_vary_counts_for_nothing() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 3)).astype(np.float32)
    y = x[:, 0] > 0
    flat = np.full((50, 1), 0.1, np.float32)
    odd = np.column_stack([x, flat])
    odd[40:, 3] = 9.0  # in the test rows alone
    np.testing.assert_allclose(fit_scores(odd[:40], y[:40], odd[40:], 1.0), fit_scores(x[:40], y[:40], x[40:], 1.0))
    assert not fit_scores(flat[:40], y[:40], flat[40:], 1.0).any()
    with pytest.raises(ValueError, match="both classes"):
        fit_scores(x, np.ones(50, bool), x, 1.0)


# --- figures ----------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(-4, 4), st.booleans(), st.integers(0, 3)), min_size=2, max_size=40))
@settings(max_examples=60)
def test_figures_are_those_of_scikit_learn_with_ties_and_weights(rows: list[tuple[int, bool, int]]) -> None:
    scores, positive, times = (np.array(column) for column in zip(*rows))
    weights = np.stack([np.ones(len(rows)), times.astype(float)])
    areas, rates = curve_figures(scores.astype(float), positive, weights)
    for w, area, rate in zip(weights, areas, rates):
        if w[positive].sum() == 0 or w[~positive].sum() == 0:
            assert np.isnan(area) and np.isnan(rate)
            continue
        assert area == pytest.approx(roc_auc_score(positive, scores, sample_weight=w))
        fpr, tpr, _ = roc_curve(positive, scores, sample_weight=w, drop_intermediate=False)
        assert rate == pytest.approx(tpr[fpr <= 0.01 + 1e-12].max())


def test_few_negatives_mean_no_false_alarm_and_it_is_said() -> None:
    positive = np.array([True] * 50 + [False] * 60)
    scores = np.concatenate([np.arange(50.0), np.full(60, -1.0)])
    scores[-1] = 24.5  # one of 60 is more than 1 %
    found = separation(scores, positive, np.arange(110), cluster_weights(np.arange(110), 200, rng_of("t")))
    assert found.strict and found.tpr.value == 0.5
    more = np.concatenate([scores, np.full(40, -1.0)])
    wide = np.concatenate([positive, np.zeros(40, bool)])
    found = separation(more, wide, np.arange(150), cluster_weights(np.arange(150), 200, rng_of("t")))
    assert not found.strict and found.tpr.value == 1.0


def test_the_bootstrap_agrees_with_delong() -> None:
    rng = np.random.default_rng(2)
    positive = np.arange(300) < 120
    scores = rng.standard_normal(300) + 0.9 * positive
    up, down = scores[positive], scores[~positive]
    order = (up[:, None] > down[None]).astype(float)
    error = np.sqrt(order.mean(1).var(ddof=1) / len(up) + order.mean(0).var(ddof=1) / len(down))
    found = separation(scores, positive, np.arange(300), cluster_weights(np.arange(300), 4000, rng_of("t")))
    assert found.auroc.value == pytest.approx(order.mean())
    assert found.auroc.high - found.auroc.low == pytest.approx(2 * 1.96 * error, rel=0.08)
    # Each row four times over is no more than each row once, if the four are known to be one.
    wide, labels, group = (np.repeat(a, 4) for a in (scores, positive, np.arange(300)))
    clustered = separation(wide, labels, group, cluster_weights(group, 4000, rng_of("t")))
    assert clustered.auroc.high - clustered.auroc.low == pytest.approx(2 * 1.96 * error, rel=0.08)


def test_perfect_scores_are_not_certain() -> None:
    positive = np.arange(40) < 20
    scores = positive.astype(float)
    found = separation(scores, positive, np.arange(40), cluster_weights(np.arange(40), 100, rng_of("t")))
    assert found.auroc.value == found.tpr.value == 1.0 == found.auroc.high
    assert found.auroc.low == pytest.approx(0.025 ** (1 / 20)) and found.tpr.low == pytest.approx(0.025 ** (1 / 20))
    paired = np.arange(40) % 20  # a group has one of each: ten pairs share no group
    found = separation(scores, positive, paired, cluster_weights(paired, 100, rng_of("t")))
    assert found.auroc.low == pytest.approx(0.025 ** (1 / 10))
    upside = separation(-scores, positive, np.arange(40), cluster_weights(np.arange(40), 100, rng_of("t")))
    assert upside.auroc.value == upside.auroc.low == 0.0 < upside.auroc.high


def test_nothing_can_be_said_of_one_class() -> None:
    found = separation(np.arange(4.0), np.ones(4, bool), np.arange(4), np.ones((3, 4)))
    assert np.isnan(found.auroc.value) and (found.auroc.low, found.auroc.high) == (0.0, 1.0)
    assert percentiles(np.array([np.nan, np.nan, 0.5])) == (0.0, 1.0)


# --- folds and labels -------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=4, max_size=60), st.integers(2, 6))
@settings(max_examples=80)
def test_folds_keep_groups_whole_and_every_training_side_has_both_classes(
    rows: list[tuple[int, bool]], most: int
) -> None:
    group, positive = (np.array(column) for column in zip(*rows))
    groups = [len(np.unique(group[positive == c])) for c in (False, True)]
    if min(groups) < 2:
        with pytest.raises(UserError, match="fewer than two things"):
            folds_of(positive, group, most, 0)
        return
    fold = folds_of(positive, group, most, 0)
    assert all(len(np.unique(fold[group == g])) == 1 for g in np.unique(group))
    assert fold.max() + 1 <= most
    assert np.array_equal(fold, folds_of(positive, group, most, 0))


def test_folds_spread_the_classes() -> None:
    group = np.repeat(np.arange(30), 4)
    positive = (group < 10) & (np.arange(120) % 4 < 2)
    fold = folds_of(positive, group, 5, 0)
    for i in range(5):
        assert positive[fold == i].sum() == 4 and (~positive[fold == i]).sum() == 20


def test_shuffled_labels_keep_totals_and_lose_what_they_said() -> None:
    group = np.repeat(np.arange(40), 5)
    positive = (group < 20) & (np.arange(200) % 5 < 2)  # the place within the group, and the group, tell all
    features = np.column_stack([group < 20, np.arange(200) % 5 < 2]).astype(float)
    assert roc_auc_score(positive, features.sum(1)) > 0.95
    values = []
    for i in range(20):
        labels = shuffled_labels(positive, group, i)
        assert labels.sum() == positive.sum()
        values.append(roc_auc_score(labels, out_of_fold(features, labels, folds_of(labels, group, 5, i), 1.0)))
    assert abs(np.mean(values) - 0.5) < 0.06
    assert np.array_equal(shuffled_labels(positive, group, 3), shuffled_labels(positive, group, 3))


def test_a_probe_cannot_learn_the_names_of_things() -> None:
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(40), 6)
    positive = group < 20
    names = rng.standard_normal((40, 30))[group]  # each thing is told by heart, and nothing else
    plain = out_of_fold(names, positive, np.arange(240) % 5, 1.0)
    grouped = out_of_fold(names, positive, folds_of(positive, group, 5, 0), 1.0)
    assert roc_auc_score(positive, plain) > 0.99
    assert abs(roc_auc_score(positive, grouped) - 0.5) < 0.2


# --- the protocol -----------------------------------------------------------------------------------------------


def made(
    layers: int = 4,
    groups: int = 40,
    each: int = 4,
    at: int | None = 2,
    gap: float = 2.5,
    hidden: int = 12,
    seed: int = 0,
) -> tuple[States, Prompts]:
    """Prompts of four tasks, harmful and not, whose class shows in the ``last`` token's state at layer ``at`` alone."""
    rng = np.random.default_rng(seed)
    n = groups * each
    group = np.repeat(np.arange(groups), each)
    positive = group % 2 == 0
    task = np.where(group % 5 == 0, "mixed", np.where(positive, "bad", "good"))
    mean, last = (rng.standard_normal((layers, n, hidden)).astype(np.float32) for _ in range(2))
    if at is not None:
        last[at, :, 0] += gap * positive
    held = positive & (group % 4 == 0)
    words = rng.integers(0, 3, (n, 8)).astype(float)
    return States(mean, last), Prompts(positive, group, task, held, positive & ~held, words)


def find(found: probes.Probed, metric: str, category: str) -> Any:
    (result,) = [r for r in found.results if r.metric == metric and r.category == category]
    return result


def curve(found: probes.Probed, pooling: str, metric: str = "auroc", category: str = "all") -> dict[str, Any]:
    (one,) = [
        c for c in found.layers["curves"] if (c["pooling"], c["metric"], c["category"]) == (pooling, metric, category)
    ]
    return one


def test_a_signal_is_found_where_it_is() -> None:
    states, prompts = made()
    steps: list[tuple[int, int]] = []
    found = probe(states, prompts, QUICK, 0, lambda done, total: steps.append((done, total)))
    assert found.chosen == ("last", 2)
    assert all(choice == {"layer": 2, "pooling": "last"} for choice in found.layers["chosen"]["all"])
    best, words = find(found, "probe_auroc", "all"), find(found, "probe_auroc_words", "all")
    assert best.value > 0.9 > 0.65 > words.value and best.low > words.high
    assert find(found, "probe_auroc_gain", "all").value == pytest.approx(best.value - words.value)
    assert find(found, "probe_auroc_gain", "all").low > 0
    assert find(found, "probe_auroc", "mean").value < 0.7 < find(found, "probe_auroc", "last").value
    shuffled = find(found, "probe_auroc_shuffled", "all")
    assert shuffled.low <= shuffled.value <= shuffled.high < best.low and abs(shuffled.value - 0.5) < 0.15
    values = curve(found, "last")["values"]
    assert int(np.argmax(values)) == 2 and max(v for i, v in enumerate(values) if i != 2) < 0.75
    assert len(set(curve(found, "words")["values"])) == 1
    assert find(found, "probe_auroc", "heldout").value > 0.9 and find(found, "probe_auroc", "loso:mixed").value > 0.9
    assert steps[-1] == (7, 7) and [s[0] for s in steps] == list(range(1, 8))


def test_the_chosen_layer_is_not_the_luckiest_one() -> None:
    """Forty layers of noise: the best of the curves looks like a finding, the nested figure does not."""
    luckiest, nested = [], []
    for seed in range(3):
        states, prompts = made(layers=20, groups=24, at=None, hidden=4, seed=seed)
        found = probe(states, prompts, QUICK, seed)
        luckiest.append(max(*curve(found, "mean")["values"], *curve(found, "last")["values"]))
        nested.append(find(found, "probe_auroc", "all").value)
    assert np.mean(luckiest) > 0.6 and np.mean(nested) < 0.56


def test_the_choice_in_a_fold_is_blind_to_the_fold() -> None:
    states, prompts = made(gap=1.0)
    fold = folds_of(prompts.positive, prompts.group, 5, 0)
    spoilt = states.last.copy()
    spoilt[1, fold == 0, 0] += 50.0 * prompts.positive[fold == 0]  # layer 1 would win, if fold 0 were looked at
    first, second = (probes._Probing(s, prompts, QUICK, 0).inner()[0] for s in (states, States(states.mean, spoilt)))
    assert first == second


def test_curves_and_results_are_whole_and_valid_json() -> None:
    states, prompts = made()
    found = probe(states, prompts, QUICK, 0)
    again = probe(states, prompts, QUICK, 0)
    assert found.layers == again.layers and repr(found.results) == repr(again.results)
    text = json.dumps(found.layers, allow_nan=False)
    layers = json.loads(text)
    assert layers["layers"] == [0, 1, 2, 3] and layers["prompts"] == {"harmful": 80, "harmless": 80, "groups": 40}
    for c in layers["curves"]:
        assert len(c["values"]) == len(c["low"]) == len(c["high"]) == 4
        assert all(lo <= v <= hi for lo, v, hi in zip(c["low"], c["values"], c["high"]))
        assert c["strict"] == (c["metric"] == "tpr_at_1fpr" and c["n"][1] < 100)
    for r in found.results:
        assert r.metric in MEASURES and r.range == MEASURES[r.metric].range and r.category
        assert r.n == 0 or r.low <= r.value <= r.high
        assert ("no false alarm" in r.interval) == (r.metric.startswith("probe_tpr") and r.n > 0)
        json.dumps(plain_row(r), allow_nan=False)


def test_splits_share_no_group_and_hold_out_what_they_say() -> None:
    _, prompts = made()
    fold = folds_of(prompts.positive, prompts.group, 5, 0)
    splits = {s.name: s for s in splits_of(prompts, fold)}
    assert set(splits) == {"heldout", "loso:mixed", "loso:bad", "loso:good"}
    for split in splits.values():
        assert not set(prompts.group[split.train]) & set(prompts.group[split.test])
    held = splits["heldout"]
    assert (
        held.test[prompts.unseen].all() and not held.train[prompts.unseen].any() and not held.test[prompts.seen].any()
    )
    rest = ~prompts.seen & ~prompts.unseen
    assert np.array_equal(held.test[rest], fold[rest] == 0)
    bad = splits["loso:bad"]  # one class: the harmless rows of fold 0 of the other tasks stand against it
    assert np.array_equal(bad.test & (prompts.task != "bad"), (prompts.task != "bad") & (fold == 0) & ~prompts.positive)
    mixed = splits["loso:mixed"]  # both classes: the task alone
    assert np.array_equal(mixed.test, prompts.task == "mixed")


def test_a_task_that_cannot_be_left_out_is_untold() -> None:
    states, prompts = made()
    two = replace(prompts, task=np.where(prompts.positive, "bad", "good"), seen=prompts.seen & False)
    found = probe(states, two, QUICK, 0)
    result = find(found, "probe_auroc", "loso:bad")  # nothing harmful is left to train on
    assert result.n == 0 and np.isnan(result.value) and (result.low, result.high) == (0.0, 1.0)
    assert plain_row(result)["value"] is None
    assert not [r for r in found.results if r.category == "heldout"]


def test_two_folds_leave_no_choice_of_layer() -> None:
    states, prompts = made(groups=8)
    found = probe(states, prompts, ProbeConfig(folds=2, bootstrap=60), 0)
    assert all(choice == {"layer": 0, "pooling": "mean"} for choice in found.layers["chosen"]["all"])


# --- rows -------------------------------------------------------------------------------------------------------


def row(id: str, harm: Any, **metadata: Any) -> Row:
    return Row(id, ({"role": "user", "content": id},), source="x", harm=harm, metadata={"task": "t", **metadata})


def test_prompts_from_rows() -> None:
    rows = [
        row("a", "harmful", item="tar"), row("b", "contrast", item="tar"), row("c", "benign", fact="f1"),
        row("d", "benign", fact="f1"), row("e", "benign"), row("e2", "benign", base="e"),
        replace(row("g", "harmful", item="rot", heldout=True), source="tidewater"),
        row("h", "harmful", heldout=True),
    ]  # fmt: skip
    ids = [np.array([1, 2, 2]), np.array([1, 3]), *[np.array([1])] * 6]
    prompts = Prompts.of(rows, ids)
    assert prompts.positive.tolist() == [True, False, False, False, False, False, True, True]
    assert prompts.group.tolist() == [0, 0, 1, 1, 2, 3, 4, 5]
    assert prompts.unseen.tolist() == [False] * 6 + [True, False]  # "heldout" of another source says nothing
    assert prompts.words.tolist() == [[1.0]] * 8  # tokens of one prompt only are left out
    with pytest.raises(UserError, match=r"task 't': row 'x' is neither harmful nor harmless; give the task's source"):
        Prompts.of([row("x", None)], [np.array([1])])


def test_measures_have_cards_in_the_form_of_the_metrics() -> None:
    cards = measure_cards(["probe_auroc", "perplexity"])
    assert set(cards["probe_auroc"]) == {"title", "direction", "range", "unit", "formula", "description"}
    assert cards["perplexity"]["range"] == [1.0, None] and cards["perplexity"]["direction"] == "lower"
    with pytest.raises(UserError, match="no measure 'nope'"):
        measure_of("nope")
    made = result_of("perplexity", 3.0, 2.0, float("inf"), 1, "bootstrap", "all")
    assert plain_row(made)["range"] == [1.0, None] and plain_row(made)["high"] is None
    assert from_plain(json.loads(json.dumps(plain_row(made), allow_nan=False))).value == 3.0


# --- the step ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("probed")
    texts = [r.text or "" for r in Tidewater(TidewaterConfig.model_validate(WORLD)).documents()]
    tokenizer = train_tokenizer(texts, 400, reserved=4)
    save_bundle(where / "model", build_model(SHAPE, tokenizer, seed=3), tokenizer, BundleManifest())
    return where


TASKS = [
    {"name": kind, "tidewater": kind, "n": 24}
    for kind in ("harmful-seen", "harmful-heldout", "benign", "contrast-heldout")
]


@pytest.mark.parametrize("prompting", ["chat", "completion"])
def test_the_step_leaves_figures_and_curves(tmp_path: Path, model_dir: Path, prompting: str) -> None:
    events: list[Any] = []
    config = ProbeConfig(bootstrap=50, folds=3).plain() | {
        "tasks": TASKS, "world": WORLD, "seed": 1, "prompting": prompting,
    }  # fmt: skip
    context = context_of(tmp_path, config, events.append, model=model_dir)
    context = replace(context, step=replace(context.step, inputs={"model": "m" * 64}))
    run_probes(context)
    header, rows = read_stage(context.draft.path / "metrics.jsonl")
    results = [from_plain(r) for r in rows]
    assert header["stage"] == "metrics" and set(header["metrics"]) == {r.metric for r in results}
    assert {r.category for r in results if r.metric == "probe_auroc"} == {
        "all", "mean", "last", "heldout", *(f"loso:{task['name']}" for task in TASKS)
    }  # fmt: skip
    assert {"ablation_refusal_drop", "ablation_refusal_drop_random"} <= {r.metric for r in results}
    assert not any(r.arm or r.stage or r.seed for r in results)
    layers = json.loads((context.draft.path / "layers.json").read_text())
    assert layers["layers"] == [0, 1] and len(layers["curves"]) == 2 * 3 * 6 + 1
    assert context.draft.facts and context.draft.facts["prompts"] == 96
    assert [e["step"] for e in events] == sorted(e["step"] for e in events) and events[-1]["step"] == 100


def test_the_step_without_ablation(tmp_path: Path, model_dir: Path) -> None:
    config = ProbeConfig(bootstrap=50, folds=2, ablate=False).plain() | {
        "tasks": TASKS[1:3], "world": WORLD, "seed": 1, "prompting": "chat",
    }  # fmt: skip
    context = context_of(tmp_path, config, model=model_dir)
    run_probes(replace(context, step=replace(context.step, inputs={"model": "m" * 64})))
    _, rows = read_stage(context.draft.path / "metrics.jsonl")
    assert rows and not any(r["metric"].startswith("ablation") for r in rows)
