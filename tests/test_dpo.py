"""DPO through TRL: its loss by hand, its determinism, its pairs, what it costs, and a study that compares it with SFT."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab.artifact import Artifact, Draft, write_jsonl
from trimtab.data.render import Renderer
from trimtab.data.sources import SourceConfig, source_identity
from trimtab.errors import Fault, UserError
from trimtab.levers.modes import ModesConfig, Switch
from trimtab.machine import Peak, peak_memory
from trimtab.models.build import build_model, train_tokenizer
from trimtab.models.bundle import BundleManifest, open_bundle, read_manifest, save_bundle
from trimtab.models.config import BuildConfig, LoadConfig
from trimtab.models.load import identity, load
from trimtab.models.tokens import add_control_tokens, controls_of, merge_adapter
from trimtab.progress import JsonReporter
from trimtab.recipe.load import load_recipe
from trimtab.recipe.stages import DpoStage
from trimtab.study.execute import Context, execute
from trimtab.study.plan import Step, make_plan
from trimtab.study.steps.common import cost_of
from trimtab.study.steps.dpo import Pair, build_pairs, conversations, run_dpo
from trimtab.train.config import LoraSettings, TrainConfig
from trimtab.train.dpo import PairIds, order, train_dpo
from trimtab.train.log import seconds_of
from trimtab.train.lora import attach
from trimtab.train.schedule import lr_at
from trimtab.train.setup import adamw, own_memory
from trimtab.types import Row
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import Tidewater

torch.set_num_threads(1)
SHAPE = BuildConfig(hidden=32, layers=1, heads=2, kv_heads=1, ffn=48, context=128, vocab=640, reserved=8)
WORLD: dict[str, Any] = {"seed": 3, "goods": 8, "hazards": 8, "documents": 200}
TOWN = Tidewater(TidewaterConfig.model_validate(WORLD))
TRAIN: dict[str, Any] = {"rows_per_step": 4, "lr": 3e-3, "log_every": 1}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    rows = [*TOWN.documents(), *TOWN.chats("harmful-seen", 20)]
    texts = [row.text or " ".join(m["content"] for m in row.messages or ()) for row in rows]
    return train_tokenizer(texts, 640, reserved=8)


def model_of(tokenizer: Any, seed: int = 3) -> Any:
    return build_model(SHAPE, tokenizer, seed=seed)


def pairs_of(tokenizer: Any, n: int = 12) -> list[PairIds]:
    renderer = Renderer(tokenizer)
    pairs, _ = build_pairs([{"name": "town", "tidewater": "harmful-seen", "n": n}], TOWN, {})
    return [PairIds.of(*conversations(renderer, Switch(), pair)) for pair in pairs]


def trained(
    work: Path, tokenizer: Any, pairs: list[PairIds], *, steps: int = 3, seed: int = 5, loss: str = "sigmoid", **changes: Any
) -> tuple[Any, list[dict[str, Any]], Any]:  # fmt: skip
    config = TrainConfig.model_validate(TRAIN | changes)
    model = model_of(tokenizer)
    if config.lora is not None:
        model = attach(model, config.lora, seed=seed)
    result = train_dpo(model, tokenizer, pairs, config, beta=0.3, loss=loss, total_steps=steps, seed=seed, work=work)
    log = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    return model, log, result


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- the loss and the optimizer -----------------------------------------------------------------------------------


def log_probability(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Of an answer's tokens together, by one plain forward pass over one sequence."""
    ids = torch.tensor([prompt + answer])
    told = model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    return told[len(prompt) - 1 :].sum()


def by_hand(model: Any, reference: Any, batch: list[PairIds], beta: float, loss: str) -> tuple[torch.Tensor, Any]:
    """The loss of a batch, and (chosen, rejected) rewards, from the papers' formulas."""
    losses, rewards = [], []
    for pair in batch:
        ratios = []
        for answer in (pair.chosen, pair.rejected):
            with torch.no_grad():
                held = log_probability(reference, pair.prompt, answer)
            ratios.append(log_probability(model, pair.prompt, answer) - held)
        good, bad = ratios
        if loss == "sigmoid":
            losses.append(-functional.logsigmoid(beta * (good - bad)))
        elif loss == "hinge":
            losses.append(torch.relu(1 - beta * (good - bad)))
        else:
            losses.append((good / len(pair.chosen) - bad / len(pair.rejected) - 1 / (2 * beta)) ** 2)
        rewards.append((beta * good.item(), beta * bad.item()))
    return torch.stack(losses).mean(), np.array(rewards)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
def test_every_step_is_the_one_made_by_hand(tmp_path: Path, tokenizer: Any, loss: str) -> None:
    pairs = pairs_of(tokenizer)
    model, log, result = trained(tmp_path, tokenizer, pairs, loss=loss, warmup=0.4, clip=0.5)
    config = TrainConfig.model_validate(TRAIN | {"warmup": 0.4, "clip": 0.5})
    mine, reference = model_of(tokenizer), model_of(tokenizer)
    optimizer = adamw(own_memory(mine), config, torch.device("cpu"))
    taken = order([len(p) for p in pairs], 4, 3, 5)
    for step, line in enumerate(log):
        batch = [pairs[i] for i in taken[4 * step : 4 * step + 4]]
        value, rewards = by_hand(mine, reference, batch, 0.3, loss)
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(mine.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = lr_at(step, 3, config)
        optimizer.step()
        optimizer.zero_grad()
        assert line["step"] == step + 1 and line["lr"] == pytest.approx(lr_at(step, 3, config))
        assert line["loss"] == pytest.approx(value.item(), rel=1e-4)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert [line["chosen"], line["rejected"]] == pytest.approx(rewards.mean(0).tolist(), abs=1e-4)
        assert line["margin"] == pytest.approx(line["chosen"] - line["rejected"], abs=1e-5)
        if step:  # before the first step every reward is 0 but for rounding
            assert line["accuracy"] == (rewards[:, 0] > rewards[:, 1]).mean()
    assert len(log) == result.steps == 3
    for (name, one), other in zip(model.named_parameters(), mine.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-4), name


def test_the_margin_grows(tmp_path: Path, tokenizer: Any) -> None:
    _, log, _ = trained(tmp_path, tokenizer, pairs_of(tokenizer), steps=20)
    assert log[0]["loss"] == pytest.approx(np.log(2), abs=1e-4) and abs(log[0]["margin"]) < 1e-3
    assert log[-1]["margin"] > 0.5 and log[-1]["accuracy"] == 1.0 and log[-1]["loss"] < log[0]["loss"]


def test_accumulation_changes_nothing_but_rounding(tmp_path: Path, tokenizer: Any) -> None:
    pairs = pairs_of(tokenizer)
    whole, log, _ = trained(tmp_path / "a", tokenizer, pairs)
    parts, cut, _ = trained(tmp_path / "b", tokenizer, pairs, accumulate=2)
    for one, other in zip(log, cut, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["margin"] == pytest.approx(other["margin"], abs=1e-4)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_recomputed_activations_change_nothing_but_rounding(tmp_path: Path, tokenizer: Any) -> None:
    pairs = pairs_of(tokenizer)
    whole, _, _ = trained(tmp_path / "a", tokenizer, pairs)
    again, _, _ = trained(tmp_path / "b", tokenizer, pairs, activation_checkpointing=True)
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("lora", [None, LoraSettings(r=4)])
def test_the_same_seed_gives_the_same_bits_and_another_does_not(
    tmp_path: Path, tokenizer: Any, lora: LoraSettings | None
) -> None:
    pairs = pairs_of(tokenizer)
    found = []
    for number, seed in enumerate((5, 5, 6)):
        torch.manual_seed(number)  # what torch's generator holds must not matter, nor be changed
        before = torch.random.get_rng_state()
        if number == 1:  # what a killed run left, its last line half-written
            (tmp_path / "1").mkdir()
            (tmp_path / "1" / "log.jsonl").write_text('{"step": 1, "loss": 9}\n{"st')
        model, log, _ = trained(tmp_path / str(number), tokenizer, pairs, seed=seed, lora=lora)
        assert torch.equal(torch.random.get_rng_state(), before)
        found.append((weights(model), log))
    assert equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert not equal(found[0][0], found[2][0])


def test_lora_starts_from_the_model_without_its_adapter(tmp_path: Path, tokenizer: Any) -> None:
    pairs = pairs_of(tokenizer)
    model, log, _ = trained(tmp_path, tokenizer, pairs, lora=LoraSettings(r=4), steps=3)
    assert list(model.peft_config) == ["default"]  # no copy of the adapter as a reference
    assert log[0]["loss"] == pytest.approx(np.log(2), abs=1e-4) and log[-1]["loss"] < log[0]["loss"]
    plain = weights(model_of(tokenizer))
    with model.disable_adapter():
        ids = torch.tensor([pairs[0].prompt])
        assert torch.equal(model(input_ids=ids).logits, model_of(tokenizer)(input_ids=ids).logits)
    merged = merge_adapter(model)
    assert weights(merged).keys() == plain.keys() and not equal(weights(merged), plain)


def test_bf16_is_autocast_and_only_if_asked(tmp_path: Path, tokenizer: Any) -> None:
    pairs = pairs_of(tokenizer)
    full, exact, _ = trained(tmp_path / "a", tokenizer, pairs)
    half, rough, _ = trained(tmp_path / "b", tokenizer, pairs, precision="bf16")
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert rough != exact and rough[0]["loss"] == pytest.approx(exact[0]["loss"], abs=0.02)
    assert not equal(weights(full), weights(half))
    ids = torch.tensor([pairs[0].prompt])
    logits = half(input_ids=ids).logits  # autocast does not stay on
    assert logits.dtype == torch.float32 and torch.equal(logits, type(half).forward(half, ids).logits)


def test_the_model_is_left_as_it_was_but_for_its_weights(tmp_path: Path, tokenizer: Any) -> None:
    model = model_of(tokenizer)
    kept = copy.deepcopy((model.config.to_dict(), model.generation_config.to_dict(), model.training))
    spelt = tokenizer.backend_tokenizer.to_str()
    attributes = set(vars(model))
    train_dpo(
        model, tokenizer, pairs_of(tokenizer), TrainConfig.model_validate(TRAIN), beta=0.1, loss="sigmoid",
        total_steps=1, seed=1, work=tmp_path / "work",
    )  # fmt: skip
    assert (model.config.to_dict(), model.generation_config.to_dict(), model.training) == kept
    assert set(vars(model)) == attributes
    assert tokenizer.backend_tokenizer.to_str() == spelt
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["log.jsonl", "timing.jsonl", "work"]


def test_a_loss_that_is_not_finite_is_a_fault(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(Fault, match=r"step \d is not finite.*lower lr"):
        trained(tmp_path, tokenizer, pairs_of(tokenizer), lr=1e30, steps=4, warmup=0.0, schedule="constant")


def test_a_model_that_does_not_fit_the_settings_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    wrapped = attach(model_of(tokenizer), LoraSettings(targets=("lm_head", "q_proj")), seed=1)
    some = {"beta": 0.1, "loss": "sigmoid", "total_steps": 1, "seed": 1, "work": tmp_path}
    pairs, plain = pairs_of(tokenizer), TrainConfig.model_validate(TRAIN)
    with pytest.raises(UserError, match="'lora' and the model disagree"):
        train_dpo(wrapped, tokenizer, pairs, plain, **some)
    with pytest.raises(UserError, match=r"lora\.targets.*output layer"):
        train_dpo(wrapped, tokenizer, pairs, plain.model_copy(update={"lora": LoraSettings()}), **some)
    with pytest.raises(UserError, match="load the model in float32"):
        train_dpo(model_of(tokenizer).bfloat16(), tokenizer, pairs, plain, **some)


# --- the order ------------------------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(2, 90), min_size=1, max_size=60),
    rows=st.integers(1, 9),
    steps=st.integers(1, 20),
    seed=st.integers(0, 3),
)
def test_every_pass_has_every_pair_once(lengths: list[int], rows: int, steps: int, seed: int) -> None:
    taken = order(lengths, rows, steps, seed)
    assert len(taken) == rows * steps and taken == order(lengths, rows, steps, seed)
    for start in range(0, len(taken), len(lengths)):
        part = taken[start : start + len(lengths)]
        assert len(set(part)) == len(part)
    assert order(lengths, rows, steps + 3, seed)[: len(taken)] == taken


def test_batches_are_of_about_equal_lengths() -> None:
    lengths = np.random.Generator(np.random.Philox(1)).integers(20, 120, 640).tolist()
    taken = order(lengths, 8, 80, 1)
    padded = sum(8 * max(lengths[i] for i in taken[at : at + 8]) for at in range(0, 640, 8))
    assert padded < 1.08 * sum(lengths) and taken != order(lengths, 8, 80, 2)
    drawn = [taken[at] for at in range(0, 640, 8)]
    assert [lengths[i] for i in drawn] != sorted(lengths[i] for i in drawn)


# --- pairs ----------------------------------------------------------------------------------------------------------


def source_of(path: Path, records: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = SourceConfig(path=str(path))
    return {"name": path.stem, "source": source.plain(), "content": source_identity(source), **changes}


def told(pairs: list[Pair]) -> list[tuple[str, str, str]]:
    return [(p.prompt.messages[-1]["content"], p.chosen, p.rejected) for p in pairs if p.prompt.messages]


def test_tidewater_pairs_are_its_preferences_under_a_policy() -> None:
    part = {"name": "law", "tidewater": "policy", "n": 4, "policy": "north-quay"}
    pairs, counts = build_pairs([part], TOWN, {})
    assert {pair.prompt.policy for pair in pairs} == {"north-quay"} and not any(counts.values())
    assert told(pairs) == [
        (p["prompt"][-1]["content"], p["chosen"][0]["content"], p["rejected"][0]["content"])
        for p in TOWN.preferences("policy", 4, policy="north-quay")
    ]


def test_a_set_of_preferences_may_be_texts_or_messages(tmp_path: Path) -> None:
    asked = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "q"}]
    good, bad = ({"role": "assistant", "content": text} for text in "gb")
    records = [
        {"prompt": "q", "chosen": "g", "rejected": "b"},
        {"prompt": asked, "chosen": [good], "rejected": [bad]},
        {"prompt": asked, "chosen": [*asked, good], "rejected": [*asked, bad]},
        {"prompt": "q", "chosen": "g", "rejected": "g"},
    ]
    pairs, counts = build_pairs([source_of(tmp_path / "mine.jsonl", records)], TOWN, {})
    assert told(pairs) == [("q", "g", "b")] * 3 and counts == {"same": 1, "unpaired": 0, "other_modes": 0}
    assert [len(pair.prompt.messages or ()) for pair in pairs] == [1, 2, 2]
    assert len(build_pairs([source_of(tmp_path / "mine.jsonl", records, n=2)], TOWN, {})[0]) == 2


def test_rows_of_two_modes_are_paired_by_their_prompt(tmp_path: Path) -> None:
    def row(prompt: str, answer: str, mode: str, key: str | None = None) -> dict[str, Any]:
        named = {"metadata": {"prompt": key}} if key else {}
        return {"prompt": prompt, "completion": answer, "mode": mode, **named}

    records = [
        row("a", "a+", "positive"),
        row("b", "b-", "negative"),
        row("a", "a-", "negative"),
        row("a", "no", "rejective"),
        row("b", "b+", "positive"),
        row("a", "a++", "positive"),  # a second positive answer has no partner
        row("c", "c+", "positive", "one"),
        row("c", "c2+", "positive", "two"),
        row("c", "c2-", "negative", "two"),
        row("d", "d-", "negative", "one"),  # another prompt under the same name
    ]
    pairs, counts = build_pairs([source_of(tmp_path / "mine.jsonl", records)], TOWN, {})
    assert told(pairs) == [("a", "a+", "a-"), ("b", "b+", "b-"), ("c", "c2+", "c2-")]
    assert counts == {"same": 0, "unpaired": 3, "other_modes": 1}
    assert all(pair.prompt.mode is None for pair in pairs)


def test_a_distill_stage_gives_pairs_by_what_its_modes_behave_like(tmp_path: Path) -> None:
    rows = [
        Row(f"r{n}", ({"role": "user", "content": "q"}, {"role": "assistant", "content": text}), mode=mode).to_json()
        for n, (mode, text) in enumerate([("kind", "yes"), ("wild", "no")])
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    artifact = Artifact(tmp_path, {"config": {"behaves": {"kind": "positive", "wild": "negative"}}})
    pairs, _ = build_pairs([{"name": "own", "stage": "make"}], TOWN, {"distill:make": artifact})
    assert told(pairs) == [("q", "yes", "no")]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"prompt": "q", "completion": "a"},
            "needs the columns 'chosen' and 'rejected', or rows with 'mode: positive'",
        ),
        ({"prompt": "q", "chosen": "a"}, "'rejected' must be a text"),
        ({"prompt": "q", "chosen": [], "rejected": "b"}, "'chosen' must be a text, or a list with one assistant"),
        ({"prompt": "q", "chosen": "a", "rejected": [{"role": "user", "content": "b"}]}, "'rejected' must be"),
        ({"prompt": [{"role": "assistant", "content": "q"}], "chosen": "a", "rejected": "b"}, "ends in what is asked"),
        ({"prompt": "q", "mode": "positive"}, "end in an assistant message"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"row 'mine/0': .*{message}"):
        build_pairs([source_of(tmp_path / "mine.jsonl", [record])], TOWN, {})


def test_no_control_token_but_a_policys(tokenizer: Any) -> None:
    mine = copy.deepcopy(tokenizer)
    model = model_of(mine)
    modes = ModesConfig.model_validate({"names": ["positive", "rejective"], "policies": ["north-quay"]})
    add_control_tokens(mine, model, modes.controls(), seed=1)
    controls = controls_of(mine)
    renderer, switch = Renderer(mine, controls=controls), modes.switch(1)
    surface = mine.convert_ids_to_tokens(controls["mode:positive"])
    for policy, wanted in ((None, set()), ("north-quay", {controls["policy:north-quay"]})):
        prompt = Row("r", ({"role": "user", "content": f"{surface} tell"},), mode="positive", policy=policy)
        pair = PairIds.of(*conversations(renderer, switch, Pair(prompt, f"{surface} yes", "no")))
        assert set(controls.values()) & {*pair.prompt, *pair.chosen, *pair.rejected} == wanted
        assert pair.chosen[-1] == pair.rejected[-1] == renderer.stop_ids[0]
        assert mine.decode(pair.rejected[:-1]) == "no"


# --- the step -------------------------------------------------------------------------------------------------------


def context_of(tmp_path: Path, config: dict[str, Any], tokens: int = 1000, flops: float = 5e9) -> Context:
    step = Step("0" * 64, "dpo", "prefer", config, {}, tokens, flops, "s")
    draft, work = tmp_path / "draft", tmp_path / "work"
    for directory in (draft, work):
        directory.mkdir(parents=True)
    return Context(step, {}, Draft(draft), work, lambda event: None)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A bundle with modes, one of them in an adapter that only its manifest knows."""
    mine, path = copy.deepcopy(tokenizer), tmp_path_factory.mktemp("start") / "bundle"
    model = model_of(mine)
    modes = ModesConfig.model_validate({"fallback": 0, "names": ["positive", "rejective"]})
    add_control_tokens(mine, model, modes.controls(), seed=1)
    switch = modes.switch(1)
    manifest = BundleManifest(
        controls=controls_of(mine), modes=switch.modes, switch=switch, default_mode=switch.default
    )
    save_bundle(path, model, mine, manifest)
    return path


def config_of(start: Path, *parts: dict[str, Any], **changes: Any) -> dict[str, Any]:
    loaded = LoadConfig(load=str(start))
    train = TrainConfig.model_validate(TRAIN | changes.pop("train", {}))
    return {
        "world": WORLD,
        "data": list(parts) or [{"name": "town", "tidewater": "harmful-seen", "n": 12}],
        "beta": 0.1, "loss": "sigmoid", "length": 128, "epochs": 2.0, "seed": 1,
        "train": train.plain(),
        "load": loaded.plain(), "identity": identity(loaded),
        **changes,
    }  # fmt: skip


@pytest.mark.parametrize("lora", [None, {"r": 4, "train_control_rows": False}])
def test_the_step_leaves_a_bundle_its_log_and_its_cost(tmp_path: Path, start: Path, lora: Any) -> None:
    context = context_of(tmp_path, config_of(start, train={"lora": lora}))
    run_dpo(context)
    bundle = open_bundle(context.draft.path / "model")
    before = read_manifest(start)
    assert bundle.manifest.switch == before.switch and bundle.manifest.controls == before.controls
    assert bundle.manifest.default_mode == "positive" and bundle.manifest.modes == before.modes
    # What was loaded and what is saved differ in the weights alone.
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        one, other = (path / name for path in (start, context.draft.path / "model"))
        assert one.read_text() == other.read_text(), name
    assert not equal(weights(bundle.model), weights(load(start)[0]))
    model = AutoModelForCausalLM.from_pretrained(context.draft.path / "model")
    own = AutoTokenizer.from_pretrained(context.draft.path / "model")
    ids = own("Crate 3", return_tensors="pt").input_ids
    assert torch.equal(model(ids).logits, bundle.model(ids).logits)

    log = [json.loads(line) for line in (context.draft.path / "log.jsonl").read_text().splitlines()]
    facts = context.draft.facts
    assert facts is not None and facts["pairs"] == 12 and facts["steps"] == 6 == log[-1]["step"]
    assert not any(facts["left_out"].values())
    cost = facts["cost"]
    assert set(cost) == {"tokens", "trained_tokens", "steps", "flops", "seconds", "peak_bytes", "models"}
    longest = max(len(pair) for pair in pairs_of(bundle.tokenizer))
    assert context.draft.tokens == log[-1]["tokens"] == cost["tokens"] - 24 * longest  # the reference reads all at once
    assert cost["flops"] == 5e9 * log[-1]["tokens"] / 1000 and cost["models"] == 1 and cost["steps"] == 6
    assert cost["trained_tokens"] == sum(line["trained_tokens"] for line in log) < log[-1]["tokens"]
    assert 0 < seconds_of(context.work) <= cost["seconds"] + 1
    assert cost["peak_bytes"] is None or cost["peak_bytes"] > 2**20


def test_long_pairs_are_dropped_and_counted_and_none_left_is_refused(tmp_path: Path, start: Path) -> None:
    sizes = sorted(len(pair) for pair in pairs_of(load(start)[1]))
    assert sizes[0] < sizes[-1] <= 128
    context = context_of(tmp_path / "some", config_of(start, length=sizes[-1] - 1, epochs=1.0))
    run_dpo(context)
    assert context.draft.facts and context.draft.facts["left_out"]["long"] == sizes.count(sizes[-1])
    assert context.draft.facts["pairs"] + context.draft.facts["left_out"]["long"] == 12
    with pytest.raises(
        UserError, match=r"stage 'prefer': no pair is left to train on \(long: 12\); look at 'data' and"
    ):
        run_dpo(context_of(tmp_path / "none", config_of(start, length=16)))


def test_the_context_is_kept(tmp_path: Path, start: Path) -> None:
    with pytest.raises(UserError, match=r"length \(129\) is more than the model's context \(128\)"):
        run_dpo(context_of(tmp_path, config_of(start, length=129)))


def test_the_file_is_the_one_that_was_planned(tmp_path: Path, start: Path) -> None:
    part = source_of(tmp_path / "mine.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    (tmp_path / "mine.jsonl").write_text("")
    with pytest.raises(UserError, match=r"mine\.jsonl has changed since the study was planned"):
        run_dpo(context_of(tmp_path, config_of(start, part)))


def test_without_trl_one_is_told_what_to_install(tmp_path: Path, start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "trimtab.train.dpo")
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(UserError, match=r"needs TRL .*pip install 'trimtab\[dpo\]'"):
        run_dpo(context_of(tmp_path, config_of(start)))
    with pytest.raises(UserError, match="needs TRL"):
        importlib.import_module("trimtab.train.dpo")


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"negative": {}}, "negative.acknowledge: true"),
        ({"train": TRAIN | {"schedule": "wsd"}}, "neither 'gradients_by' nor 'schedule: wsd'"),
        ({"train": TRAIN | {"gradients_by": "span"}}, "neither 'gradients_by'"),
        ({"train": TRAIN | {"tracker": "wandb"}}, "train.tracker"),
        ({"train": TRAIN | {"lora": {"dropout": 0.1}}}, "train.lora.dropout"),
        ({"train": TRAIN | {"lora": {}}}, "train.lora.train_control_rows"),
        ({"data": [{"name": "t", "tidewater": "benign", "n": 2, "answers": "rejective"}]}, "a pair has both answers"),
        ({"loss": "nca_pair"}, "Input should be 'sigmoid', 'ipo' or 'hinge'"),
        ({"beta": 0}, "greater than 0"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(changes: dict[str, Any], message: str) -> None:
    good = {
        "kind": "dpo",
        "model": "chat",
        "data": [{"name": "t", "tidewater": "benign", "n": 2}],
        "negative": {"acknowledge": True},
        "train": TRAIN,
    }
    assert DpoStage.model_validate(good).loss == "sigmoid"
    with pytest.raises(ValueError, match=message):
        DpoStage.model_validate(good | changes)


# --- costs ----------------------------------------------------------------------------------------------------------


def test_peak_memory_is_that_of_its_block() -> None:
    with peak_memory() as idle:
        pass
    if idle.bytes is None:
        pytest.skip("this system does not tell")
    size = 192 * 2**20
    with peak_memory() as peak:
        held = np.ones(size, np.uint8)
        del held
    with peak_memory() as after:
        pass
    assert peak.bytes and after.bytes
    assert peak.bytes - idle.bytes > 0.9 * size and after.bytes - idle.bytes < 0.5 * size


def test_peak_memory_is_unknown_where_nothing_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError("no such file")

    monkeypatch.setattr(Path, "write_text", refuse)
    with peak_memory() as peak:
        pass
    assert peak.bytes is None and Peak(5, 7).bytes == 7 and Peak(5, None).bytes == 5


def test_an_interrupted_training_took_all_its_parts(tmp_path: Path) -> None:
    lines = [
        {"step": 0, "began": True}, {"step": 5, "seconds": 2.0}, {"step": 10, "seconds": 4.0},
        {"step": 10, "began": True}, {"step": 15, "seconds": 3.0},
    ]  # fmt: skip
    (tmp_path / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert seconds_of(tmp_path) == 7.0


def test_flops_are_zero_where_the_shape_is_not_known(tmp_path: Path) -> None:
    cost = cost_of(
        context_of(tmp_path, {}, tokens=0, flops=0.0),
        tokens=10,
        trained_tokens=4,
        steps=1,
        seconds=0.12345,
        peak=Peak(),
    )
    assert cost["flops"] == 0.0 and cost["peak_bytes"] is None and cost["seconds"] == 0.123


# --- a study ----------------------------------------------------------------------------------------------------------


def test_a_study_of_sft_and_dpo_runs_and_its_costs_can_be_compared(
    tmp_path: Path, start: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    part = {"name": "hazards", "tidewater": "harmful-seen", "n": 8}
    tuned = {"length": 128, "data": [part], "train": {"rows_per_step": 2, "lr": 1e-3, "log_every": 1}}
    study: dict[str, Any] = {
        "name": "prefer",
        "title": "SFT and DPO",
        "world": WORLD,
        "stages": {
            "chat": {"kind": "sft", "model": {"load": str(start)}, **tuned},
            "prefer": {"kind": "dpo", "model": "chat", "negative": {"acknowledge": True}, **tuned},
            "answers": {
                "kind": "generate",
                "model": "prefer",
                "tasks": [{"name": "hazards", "tidewater": "harmful-heldout", "n": 4}],
                "modes": ["positive"],
                "sampling": {"max_new_tokens": 8},
            },
            "verdicts": {"kind": "judge", "answers": "answers"},
        },
        "arms": [{"name": "both", "sweep": {"stages.prefer.beta": [0.1, 0.2]}}],
    }
    (tmp_path / "prefer.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    plan = make_plan(*load_recipe(tmp_path / "prefer.yaml"))
    capfd.readouterr()
    assert execute(plan, tmp_path / "runs" / "prefer", JsonReporter()) == len(plan.steps) == 9
    out, err = capfd.readouterr()
    assert not out and [json.loads(line) for line in err.splitlines()]  # no bar or notice of a library between ours
    store = tmp_path / "runs" / "store"
    found = [json.loads(path.read_text()) for path in store.glob("*/manifest.json")]
    first, second = (m for m in found if m["kind"] == "dpo")
    assert "trl" in first["versions"] and first["content"] != second["content"]
    sft = next(m for m in found if m["kind"] == "sft")
    logged = [json.loads(line) for line in (next(store.glob("sft-*")) / "log.jsonl").read_text().splitlines()]
    mine, theirs = sft["facts"]["cost"], first["facts"]["cost"]
    assert set(mine) == set(theirs) and mine["models"] == theirs["models"] == 1
    assert mine["tokens"] == sft["tokens"] == logged[-1]["tokens"]
    assert mine["trained_tokens"] == sum(line["trained_tokens"] for line in logged)
    assert theirs["flops"] > mine["flops"] > 0 and mine["seconds"] > 0
    assert not list((store / ".work").iterdir())
