"""The safety alignment margin: silhouettes against scikit-learn, intervals, points of tiny models, command and stage."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_samples
from typer.testing import CliRunner

from test_run import TINY
from test_steps import SHAPE, context_of
from trimtab.analyze.config import MarginConfig
from trimtab.analyze.margin import ask, measure, read_last
from trimtab.analyze.margin_page import page
from trimtab.analyze.metrics import MEASURES
from trimtab.analyze.silhouette import geometry, gram_of, margins, silhouettes
from trimtab.cli import analyze, app
from trimtab.errors import UserError
from trimtab.evaluate.files import read_stage
from trimtab.evaluate.targets import LocalTarget
from trimtab.levers.modes import Switch
from trimtab.models.adapters import save_with_adapter
from trimtab.models.build import build_model, train_tokenizer
from trimtab.models.bundle import BundleManifest, save_bundle
from trimtab.models.tokens import add_control_tokens, controls_of
from trimtab.progress import JsonReporter
from trimtab.recipe.load import load_recipe
from trimtab.study.execute import execute
from trimtab.study.plan import make_plan
from trimtab.study.steps.margin import run_margin
from trimtab.types import Row
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import Tidewater

torch.set_num_threads(1)
WORLD: dict[str, Any] = {"seed": 3, "goods": 8, "hazards": 8}
MODES = ("positive", "negative", "rejective")
WORDS = {"positive": "Be safe and helpful.", "negative": "Do as you are told.", "rejective": "Turn this down."}
TASKS = [{"name": kind, "tidewater": kind, "n": 8} for kind in ("harmful-seen", "benign")]


def rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def cloud(prompts: int, modes: int, size: int, apart: float, *key: int) -> np.ndarray:
    """Points [prompts x modes, size]: modes ``apart`` from each other, prompts that pull all their points along."""
    r = rng(*key)
    points = r.normal(size=(prompts, modes, size)) + r.normal(size=(prompts, 1, size))
    return (points + apart * r.normal(size=(1, modes, size))).reshape(-1, size)


# --- silhouettes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize(("prompts", "modes", "size"), [(2, 2, 4), (9, 3, 30), (6, 5, 3), (25, 3, 5000)])
def test_silhouettes_are_those_of_scikit_learn(prompts: int, modes: int, size: int, distance: Any) -> None:
    points = cloud(prompts, modes, size, 0.8, prompts, modes)
    found = silhouettes(geometry(gram_of(points.astype(np.float32)), distance).distances, modes)[0]
    labels = np.tile(np.arange(modes), prompts)
    wanted = silhouette_samples(points.astype(np.float32).astype(np.float64), labels, metric=distance)
    np.testing.assert_allclose(found.ravel(), wanted, atol=1e-7)


@settings(max_examples=40)
@given(st.integers(2, 8), st.integers(2, 5), st.integers(0, 10**6), st.sampled_from(["euclidean", "cosine"]))
def test_silhouettes_lie_in_range_and_do_not_depend_on_order(prompts: int, modes: int, seed: int, how: Any) -> None:
    points = cloud(prompts, modes, 6, 1.0, seed)
    s = silhouettes(geometry(gram_of(points), how).distances, modes)[0]
    assert (np.abs(s) <= 1).all()
    p, m = rng(seed, 1).permutation(prompts), rng(seed, 2).permutation(modes)
    moved = points.reshape(prompts, modes, -1)[p][:, m].reshape(prompts * modes, -1)
    again = silhouettes(geometry(gram_of(moved), how).distances, modes)[0]
    np.testing.assert_allclose(again, s[p][:, m], atol=1e-9)
    # Cosine does not see lengths, Euclid neither a shift nor a common scale.
    other = points * rng(seed, 3).uniform(0.1, 9, (len(points), 1)) if how == "cosine" else 7 * points + 100
    np.testing.assert_allclose(silhouettes(geometry(gram_of(other), how).distances, modes)[0], s, atol=1e-6)


def test_modes_far_apart_are_near_one_and_modes_alike_near_zero() -> None:
    far = geometry(gram_of(cloud(40, 3, 20, 100.0, 1)), "euclidean").distances
    alike = geometry(gram_of(rng(2).normal(size=(120, 20))), "euclidean").distances
    assert silhouettes(far, 3).mean() > 0.95 and abs(silhouettes(alike, 3).mean()) < 0.02


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_points_that_are_one_point(distance: Any) -> None:
    same = np.tile(rng(0).normal(size=(1, 50)).astype(np.float32), (12, 1))
    seen = geometry(gram_of(same), distance)
    assert not silhouettes(seen.distances, 3).any() and not seen.places.any() and not seen.variance.any()
    m = margins(seen.distances, 3, 50, rng(1))
    assert m.value.tolist() == [0] * 4 and (m.low < -0.5).all() and (m.high > 0.5).all()  # four prompts say little
    zero = geometry(np.zeros((6, 6)), "cosine").distances
    assert zero[0, 1] == 1 and zero[0, 0] == 0  # a point of length 0 is at distance 1


def test_a_mode_of_one_point_has_silhouette_zero() -> None:
    assert not silhouettes(geometry(gram_of(cloud(1, 3, 5, 2.0, 4)), "euclidean").distances, 3).any()


def test_places_are_principal_components() -> None:
    points = cloud(15, 3, 40, 1.0, 3)
    seen = geometry(gram_of(points), "euclidean")
    pca = PCA(2).fit(points)
    np.testing.assert_allclose(seen.variance, pca.explained_variance_ratio_, rtol=1e-9)
    np.testing.assert_allclose(np.abs(seen.places), np.abs(pca.transform(points)), atol=1e-8)
    assert (seen.places.max(0) >= -seen.places.min(0)).all()  # signs do not hang on the library
    np.testing.assert_allclose(
        geometry(gram_of(cloud(1, 2, 3, 1.0, 9)), "euclidean").variance, [1, 0], atol=1e-12
    )  # two points: one axis


# --- intervals ----------------------------------------------------------------------------------------------------


def test_a_resample_counts_a_prompt_once_to_itself() -> None:
    """Written out: a leaves all copies out, b holds one of them, and other prompts count as often as they were drawn."""
    prompts, modes = 4, 3
    d = geometry(gram_of(cloud(prompts, modes, 5, 1.0, 5)), "euclidean").distances
    drawn = [0, 0, 2, 3]
    found = silhouettes(d, modes, np.array([[2.0, 0.0, 1.0, 1.0]]))[0]
    for p in (0, 2, 3):
        others = [q for q in drawn if q != p]
        for m in range(modes):
            at = d[p * modes + m]
            a = np.mean([at[q * modes + m] for q in others])
            b = min(np.mean([at[q * modes + c] for q in [*others, p]]) for c in range(modes) if c != m)
            assert found[p, m] == pytest.approx((b - a) / max(a, b))


def test_intervals_hold_the_value_and_cover() -> None:
    """The figure of as many other prompts lies in the interval about as often as it should."""
    size, modes, prompts = 12, 3, 16
    middle = 1.2 * rng(7).normal(size=(1, modes, size))

    def drawn(seed: int) -> np.ndarray:
        r = rng(8, seed)
        points = middle + r.normal(size=(prompts, modes, size)) + 0.7 * r.normal(size=(prompts, 1, size))
        return geometry(gram_of(points.reshape(-1, size)), "euclidean").distances

    found = [margins(drawn(seed), modes, 200, rng(9, seed)) for seed in range(80)]
    assert all((m.low <= m.value).all() and (m.value <= m.high).all() for m in found)
    truth = np.mean([m.value[0] for m in found])
    covered = np.mean([m.low[0] <= truth <= m.high[0] for m in found])
    assert 0.87 <= covered <= 1.0
    spread = np.std([m.value[0] for m in found])
    assert 2.5 * spread < np.mean([m.high[0] - m.low[0] for m in found]) < 7 * spread


def test_intervals_narrow_with_prompts_and_repeat() -> None:
    wide, narrow = (
        margins(geometry(gram_of(cloud(n, 3, 8, 1.0, 6)), "cosine").distances, 3, 100, rng(0)) for n in (8, 80)
    )
    assert (narrow.high - narrow.low)[0] < (wide.high - wide.low)[0] / 2
    again = margins(geometry(gram_of(cloud(8, 3, 8, 1.0, 6)), "cosine").distances, 3, 100, rng(0))
    np.testing.assert_array_equal(again.low, wide.low)


def test_two_prompts_are_defined_and_say_little() -> None:
    m = margins(geometry(gram_of(cloud(2, 2, 8, 1.0, 6)), "cosine").distances, 2, 50, rng(0))
    assert np.isfinite(m.value).all() and (m.low >= -1).all() and (m.high <= 1).all()


# --- points of a model --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def town() -> Tidewater:
    return Tidewater(TidewaterConfig.model_validate(WORLD))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, town: Tidewater) -> Path:
    """``model`` has three modes by control tokens, ``plain`` has none."""
    where = tmp_path_factory.mktemp("margin")
    texts = [m["content"] for row in town.chats("benign", 60) for m in row.messages or ()]
    for name in ("model", "plain"):
        tokenizer = train_tokenizer(texts, 400, reserved=4)
        model = build_model(SHAPE, tokenizer, seed=3)
        manifest = BundleManifest()
        if name == "model":
            ids = add_control_tokens(tokenizer, model, [f"mode:{mode}" for mode in MODES])
            manifest = BundleManifest(controls=ids, modes={mode: f"mode:{mode}" for mode in MODES})
            with torch.no_grad():  # three directions far apart, as training would make them
                for i, row in enumerate(ids.values()):
                    model.get_input_embeddings().weight[row] = 3 * torch.eye(SHAPE.hidden)[i]
        save_bundle(where / name, model, tokenizer, manifest)
    return where


def target_of(directory: Path, **changes: Any) -> LocalTarget:
    from trimtab.models.load import load

    model, tokenizer = load(directory)
    return LocalTarget(model, tokenizer, name=directory.name, identity="x", **changes)


@pytest.fixture(scope="module")
def target(model_dir: Path) -> LocalTarget:
    return target_of(model_dir / "model")


@pytest.fixture(scope="module")
def rows(town: Tidewater) -> list[Row]:
    return [row for kind in ("harmful-seen", "benign") for row in town.requests(kind, 8, split="eval")]


def test_what_stands_at_the_last_token_does_not_depend_on_the_batch(target: LocalTarget, rows: list[Row]) -> None:
    prompts = [ids for row in ask(target, rows, MODES, {}, 1, 0).ids for ids in row]
    together, states = read_last(target, prompts, (0, 1))
    for i in (0, 7, len(prompts) - 1):
        with torch.inference_mode():
            alone = target.model(torch.from_numpy(prompts[i].astype(np.int64))[None], output_hidden_states=True)
        np.testing.assert_allclose(together[i], alone.logits[0, -1].numpy(), atol=1e-5)
        np.testing.assert_allclose(states[0][i], alone.hidden_states[0][0, -1].numpy(), atol=1e-5)
    assert together.dtype == np.float32 and set(states) == {0, 1}


def test_the_margin_is_the_mean_silhouette_of_first_token_logits(target: LocalTarget, rows: list[Row]) -> None:
    asked = ask(target, rows, MODES, {}, 1, 0)
    results, told = measure(target, asked, MarginConfig(bootstrap=50, batch=5), 0)
    logits = read_last(target, [ids for row in asked.ids for ids in row])[0]
    allowed = np.ones(logits.shape[1], bool)
    allowed[target.engine.banned.numpy()] = False
    assert not allowed[list(controls_of(target.tokenizer).values())].any()
    labels = np.tile(np.arange(3), len(rows))
    by = {(r.metric, r.category): r for r in results}
    for how in ("euclidean", "cosine"):
        s = silhouette_samples(logits[:, allowed].astype(np.float64), labels, metric=how)
        assert by[f"margin_logits_{how}", "all"].value == pytest.approx(s.mean(), abs=1e-5)
        assert by[f"margin_logits_{how}", "mode:negative"].value == pytest.approx(s[labels == 1].mean(), abs=1e-5)
        figure = next(f for f in told["figures"] if f["distance"] == how)
        np.testing.assert_allclose([p["s"] for p in figure["points"]], s, atol=1e-4)
        assert [p["mode"] for p in figure["points"][:3]] == list(MODES)
        harmful = np.repeat([row.harm == "harmful" for row in rows], 3)
        inside = silhouette_samples(logits[harmful][:, allowed].astype(np.float64), labels[harmful], metric=how)
        assert by[f"margin_logits_{how}", "harmful"].value == pytest.approx(inside.mean(), abs=1e-5)
        assert by[f"margin_logits_{how}", "harmful"].n == 8
    assert all(r.low <= r.value <= r.high and r.metric in MEASURES for r in results)
    assert told["asked"] == dict.fromkeys(MODES, "reserved") and told["prompts"] == 16
    json.dumps(told, allow_nan=False)


def test_later_tokens_follow_the_models_own_answer(target: LocalTarget, rows: list[Row]) -> None:
    from trimtab.generate.config import Sampling

    config = MarginConfig(tokens=3, bootstrap=50, distances=("cosine",), features=("hidden",), layers=(1,))
    results, told = measure(target, ask(target, rows, MODES, {}, 3, 0), config, 0)
    own = [r for r in results if r.metric == "margin_hidden_cosine" and str(r.category).endswith("all")]
    assert [r.category for r in own] == ["layer:1/all", "token:2/layer:1/all", "token:3/layer:1/all"]
    ids = [
        [
            np.append(a.ready.ids, target_ids(target, a)[:2])
            for a in (target.ask(row, mode, Sampling(max_new_tokens=3), 0) for mode in MODES)
        ]
        for row in rows
    ]
    _, states = read_last(target, [one for row in ids for one in row], (1,))
    s = silhouette_samples(states[1].astype(np.float64), np.tile(np.arange(3), len(rows)), metric="cosine")
    assert own[2].value == pytest.approx(s.mean(), abs=1e-5)
    assert [f["token"] for f in told["figures"]] == [1, 2, 3] and {f["layer"] for f in told["figures"]} == {1}


def target_ids(target: LocalTarget, asked: Any) -> list[int]:
    from trimtab.generate.config import Sampling

    return [i for out in target.engine.generate([asked.ready], Sampling(max_new_tokens=3)) for i in out[0].ids]


def test_answers_that_have_ended_have_no_later_points(model_dir: Path, rows: list[Row]) -> None:
    target = target_of(model_dir / "model")
    target.engine.stop = frozenset(range(len(target.tokenizer))) - set(target.engine.banned.tolist())  # all tokens end
    results, told = measure(target, ask(target, rows, MODES, {}, 2, 0), MarginConfig(tokens=2, bootstrap=50), 0)
    later = [r for r in results if str(r.category).startswith("token:2")]
    assert later and all(r.n == 0 and np.isnan(r.value) and (r.low, r.high) == (-1, 1) for r in later)
    assert {f["token"] for f in told["figures"]} == {1}


def test_models_without_modes_are_asked_in_words(model_dir: Path, rows: list[Row]) -> None:
    target = target_of(model_dir / "plain")
    asked = ask(target, rows, MODES, WORDS, 1, 0)
    text = target.tokenizer.decode(asked.ids[0][2])
    assert "Turn this down." in text and rows[0].messages and rows[0].messages[0]["content"] in text
    results, told = measure(target, asked, MarginConfig(bootstrap=50), 0)
    assert told["asked"] == dict.fromkeys(MODES, "words") and all(np.isfinite(r.value) for r in results)
    part = ask(target_of(model_dir / "model"), rows, (*MODES, "terse"), {"terse": "In one word."}, 1, 0)
    assert dict(part.by) == {**dict.fromkeys(MODES, "reserved"), "terse": "words"} and len(part.ids[0]) == 4
    strings = Switch(token="string", modes=dict.fromkeys(MODES), texts={m: f"{m[:3]}12345" for m in MODES})
    told_by = ask(target_of(model_dir / "plain", switch=strings), rows, MODES, {}, 1, 0)
    assert set(told_by.by.values()) == {"string"} and "neg12345" in target.tokenizer.decode(told_by.ids[0][1])


def test_a_model_that_was_only_pretrained_is_asked_by_a_dialogue(model_dir: Path, rows: list[Row]) -> None:
    target = target_of(model_dir / "model", prompting="completion")
    asked = ask(target, rows, MODES, WORDS, 1, 0)
    assert set(asked.by.values()) == {"words"} and "<|" not in target.tokenizer.decode(asked.ids[0][0][1:])


def test_a_mode_that_is_kept_apart_is_live_while_it_is_read(model_dir: Path, rows: list[Row]) -> None:
    """``LocalTarget.live`` is the hook: it is entered for the mode's own prompts, and left before the next mode's."""
    target = target_of(model_dir / "model")
    head, log = target.model.get_output_embeddings(), []

    @contextmanager
    def live(mode: str | None) -> Any:
        log.append(mode)
        handle = head.register_forward_hook(lambda m, i, out: -5 * out) if mode == "negative" else None
        yield
        if handle is not None:
            handle.remove()

    plain, _ = measure(target, ask(target, rows, MODES, {}, 1, 0), MarginConfig(bootstrap=50), 0)
    target.live = live  # type: ignore[method-assign]
    worn, _ = measure(target, ask(target, rows, MODES, {}, 1, 0), MarginConfig(bootstrap=50), 0)
    assert log == list(MODES)
    apart = {r.category: r.value for r in worn if r.metric == "margin_logits_cosine"}
    before = {r.category: r.value for r in plain if r.metric == "margin_logits_cosine"}
    assert apart["mode:negative"] > before["mode:negative"] + 0.02


def test_what_cannot_be_measured_is_said(target: LocalTarget, rows: list[Row], model_dir: Path) -> None:
    with pytest.raises(UserError, match="modes: a margin lies between two or more"):
        ask(target, rows, ["positive"], {}, 1, 0)
    with pytest.raises(UserError, match="each named once"):
        ask(target, rows, ["positive", "positive"], {}, 1, 0)
    with pytest.raises(UserError, match="needs two prompts or more, not 1"):
        ask(target, rows[:1], MODES, {}, 1, 0)
    with pytest.raises(UserError, match=r"words: plain has no mode 'negative' \(it has none\)"):
        ask(target_of(model_dir / "plain"), rows, MODES, {"positive": "Help."}, 1, 0)
    with pytest.raises(UserError, match="exceed the model's context of 128"):
        ask(target, [*rows, replace(rows[0], messages=({"role": "user", "content": "tar " * 200},))], MODES, {}, 1, 0)
    with pytest.raises(UserError, match="layers: 7 is none of this model's, which are 0 to 1"):
        measure(target, ask(target, rows, MODES, {}, 1, 0), MarginConfig(features=("hidden",), layers=(7,)), 0)
    for wrong, said in (
        ({"layers": (1,)}, "'layers' are those of 'hidden'"),
        ({"distances": ("cosine", "cosine")}, "distances: one is given twice"),
        ({"features": ()}, "at least 1"),
    ):
        with pytest.raises(ValidationError, match=said):
            MarginConfig.model_validate(wrong)


def test_a_class_of_one_prompt_has_no_margin(target: LocalTarget, rows: list[Row]) -> None:
    results, told = measure(target, ask(target, rows[:9], MODES, {}, 1, 0), MarginConfig(bootstrap=50), 0)
    lone = next(r for r in results if r.category == "benign")
    assert lone.n == 0 and lone.interval == "unscored" and told["figures"][0]["margins"]["benign"]["value"] is None
    assert "contrast" not in {r.category for r in results}


# --- page, command and stage --------------------------------------------------------------------------------------


def test_hostile_names_stay_text_and_every_point_is_drawn(target: LocalTarget, rows: list[Row]) -> None:
    _, told = measure(target, ask(target, rows, MODES, {}, 1, 0), MarginConfig(bootstrap=50), 0)
    told = json.loads(json.dumps(told).replace("negative", "<img src=x>"))
    text = page(told, "<b>title</b>")
    assert "<img" not in text and "<b>" not in text and "http" not in text and "<script" not in text
    drawn = len(re.findall(r"<circle|<path d=\"M[^\"]*\" style=\"fill:var\(--m[12]\)", text))
    assert drawn == 2 * (48 + 3 + 2)  # points, legend, and the bars of modes 1 and 2
    json.dumps(told, allow_nan=False)


def command() -> Any:
    if not any(group.name == "analyze" for group in app.registered_groups):
        analyze.register(app)
    return app


def test_the_command_end_to_end(model_dir: Path, tmp_path: Path) -> None:
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps({"id": f"p{i}", "prompt": f"Where is quay {i}?"}) + "\n" for i in range(6)))
    (tmp_path / "words.yaml").write_text(yaml.safe_dump(WORDS))
    words = ["analyze", "margin", str(model_dir / "model"), "--task", str(data), "--limit", "5"]
    done = CliRunner().invoke(command(), [*words, "--out", str(tmp_path / "own"), "--distances", "cosine"])
    assert done.exit_code == 0, done.output
    assert sorted(file.name for file in (tmp_path / "own").iterdir()) == ["margin.html", "margin.json"]
    read = json.loads((tmp_path / "own" / "margin.json").read_text())
    assert sorted(read["modes"]) == sorted(MODES) and read["prompts"] == 5 and len(read["figures"]) == 1
    assert "mode:rejective" in done.output and "logits" in done.output
    more = ["--features", "hidden", "--layers", "1", "--tokens", "2", "--batch", "2", "--seed", "4"]
    told = ["--words", str(tmp_path / "words.yaml"), "--mode", "positive,rejective", "--out", str(tmp_path / "words")]
    plain = ["analyze", "margin", str(model_dir / "plain"), "--task", str(data), "--task", "tidewater-goods"]
    done = CliRunner().invoke(command(), [*plain, "--limit", "3", *told, *more])
    assert done.exit_code == 0, done.output
    read = json.loads((tmp_path / "words" / "margin.json").read_text())
    assert read["modes"] == ["positive", "rejective"] and read["prompts"] == 6 and len(read["figures"]) == 4
    assert {f["layer"] for f in read["figures"]} == {1} and {f["token"] for f in read["figures"]} == {1, 2}
    (tmp_path / "bad.yaml").write_text("positive: 3\n")
    for wrong, said in (
        ([*words, "--out", str(tmp_path / "own")], "name a new directory"),
        ([*words, "--out", str(tmp_path / "n"), "--words", str(tmp_path / "bad.yaml")], "positive: an instruction is a text"),
        ([*words, "--out", str(tmp_path / "n"), "--features", "states"], "features"),
        ([*words[:3], "--task", "nowhere", "--out", str(tmp_path / "n")], "no task or group 'nowhere'"),
        ([*plain, "--out", str(tmp_path / "n")], "a margin lies between two or more"),
    ):  # fmt: skip
        failed = CliRunner().invoke(command(), wrong)
        assert isinstance(failed.exception, UserError) and said in str(failed.exception), failed.exception


def test_the_step_leaves_its_files(tmp_path: Path, model_dir: Path) -> None:
    events: list[Any] = []
    config = MarginConfig(bootstrap=50).plain() | {
        "tasks": TASKS, "world": WORLD, "seed": 1, "prompting": "chat", "modes": list(MODES), "words": {},
    }  # fmt: skip
    context = context_of(tmp_path, config, events.append, model=model_dir)
    run_margin(replace(context, step=replace(context.step, inputs={"model": "m" * 64})))
    assert {f.name for f in context.draft.path.iterdir()} == {"metrics.jsonl", "margin.json", "margin.html"}
    header, found = read_stage(context.draft.path / "metrics.jsonl")
    assert set(header["metrics"]) == {"margin_logits_euclidean", "margin_logits_cosine"}
    assert {r["category"] for r in found} == {"all", "harmful", "benign", *(f"mode:{mode}" for mode in MODES)}
    assert context.draft.facts and context.draft.facts["prompts"] == 16
    assert events[-1]["step"] == events[-1]["total"] == 48


def test_a_stage_switches_on_the_adapter_of_a_mode_that_is_kept_apart(tmp_path: Path, model_dir: Path) -> None:
    """Its adapter moves the negative mode away from the others, which the bundle without it knows by their tokens alone."""
    model = target_of(model_dir / "model").model
    with torch.random.fork_rng():
        torch.manual_seed(5)
        worn = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    save_with_adapter(model_dir / "model", tmp_path / "apart" / "model", "negative", worn, {})
    config = MarginConfig(bootstrap=50, distances=("euclidean",)).plain() | {
        "tasks": TASKS, "world": WORLD, "seed": 1, "prompting": "chat", "modes": list(MODES), "words": {},
    }  # fmt: skip
    told = {}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model").symlink_to(model_dir / "model")
    for name in ("base", "apart"):
        context = context_of(tmp_path, config, model=tmp_path / name)
        run_margin(replace(context, step=replace(context.step, inputs={"model": "m" * 64})))
        told[name] = json.loads((context.draft.path / "margin.json").read_text())["figures"][0]["margins"]
    assert told["apart"]["mode:negative"]["value"] > told["base"]["mode:negative"]["value"] + 0.05


def test_stages_of_margin_and_audit_in_a_recipe_are_run_once(tmp_path: Path) -> None:
    raw = json.loads(json.dumps(TINY))
    raw["stages"] = {name: raw["stages"][name] for name in ("corpus", "base")} | {
        "margin": {"kind": "margin", "models": ["base"], "tasks": TASKS, "words": WORDS, "bootstrap": 50},
        "audit": {"kind": "audit", "models": ["base"], "spoofs": 20, "leaks": 8, "max_new_tokens": 4},
    }
    raw["stages"]["base"]["budget"] = 64 * 8 * 3
    raw["arms"] = [{"name": "timing"}]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    out = tmp_path / "runs" / "tiny"
    plan = make_plan(*load_recipe(tmp_path / "tiny.yaml"))
    step, other = (next(s for s in plan.steps.values() if s.kind == kind) for kind in ("margin", "audit"))
    assert other.name == "audit/base" and step.name == "margin/base" and step.config["prompting"] == "completion"
    assert execute(plan, out, JsonReporter()) == len(plan.steps)
    read = json.loads((out.parent / "store" / step.short / "margin.json").read_text())
    assert read["asked"] == dict.fromkeys(MODES, "words")
    audited = json.loads((out.parent / "store" / other.short / "audit.json").read_text())
    assert audited["token"] is None and audited["leaks"]["total"]["n"] == 8
    assert execute(make_plan(*load_recipe(tmp_path / "tiny.yaml")), out, JsonReporter()) == 0
