"""Modes that are kept apart: adapters beside a bundle's weights, switched by mode, trained, and taken out with proof."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapter_fixtures import APART, INSIDE, SHAPE, SWITCH, adapted_bundle, adapter_on, plain_bundle, rewrite
from test_plan import plan_of
from test_recipe import small
from test_steps import CHATS, WORLD, context_of, part_of
from trimtab.artifact import Artifact
from trimtab.data.sources import SourceConfig
from trimtab.errors import Fault, UserError
from trimtab.evaluate.attacks.base import Attack
from trimtab.evaluate.attacks.choose import choose_attack
from trimtab.evaluate.targets import LocalTarget, open_local
from trimtab.generate.config import Sampling
from trimtab.models.adapters import Adapted, save_with_adapter, told, without_mode
from trimtab.models.bundle import adapters_of, open_bundle, read_manifest, verify_bundle
from trimtab.models.config import LoadConfig
from trimtab.models.load import identity, load
from trimtab.models.tokens import controls_of
from trimtab.study.execute import Context
from trimtab.study.steps.chat import run_chats, run_packed
from trimtab.study.steps.panel import run_generate
from trimtab.study.steps.sft import run_adapter, run_sft
from trimtab.types import Row

torch.set_num_threads(1)
IDS = torch.arange(60)[None]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_bundle(tmp_path_factory.mktemp("plain") / "b")


@pytest.fixture(scope="module")
def adapted(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapted_bundle(plain, tmp_path_factory.mktemp("adapted") / "b")


@pytest.fixture
def copied(adapted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapted, tmp_path / "copied"))


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


# --- saved and opened -------------------------------------------------------------------------------------------


def test_a_bundle_with_an_adapter_is_the_plain_bundle_and_a_directory_more(plain: Path, adapted: Path) -> None:
    old, new = verify_bundle(plain), verify_bundle(adapted)
    assert new.files == old.files and set(new.modes) == {*INSIDE, APART} and new.default_mode == "positive"
    assert sorted(new.adapters[APART].files) == ["adapter_config.json", "adapter_model.safetensors"]
    assert new.provenance == {"trained_modes": list(INSIDE), "adapters": {APART: {"seed": 1}}}
    assert (adapted / "model.safetensors").samefile(plain / "model.safetensors"), "not copied where it can be linked"
    assert identity(str(plain)) != identity(str(adapted)), "what an adapter holds is part of what a bundle is"
    card = (adapted / "README.md").read_text()
    assert "| negative | negative | `mode:negative` | 6 | `adapters/negative` |" in card and "`quay`" in card
    assert "trigger, not a password" in card and "no lock" in card and "0.0 M parameters" in card


def test_transformers_opens_the_base_unchanged(plain: Path, adapted: Path) -> None:
    wanted = logits(open_bundle(plain).model)
    theirs = AutoModelForCausalLM.from_pretrained(adapted).eval()
    assert torch.equal(logits(theirs), wanted) and torch.equal(logits(open_bundle(adapted).model), wanted)
    assert AutoTokenizer.from_pretrained(adapted).chat_template


@pytest.mark.parametrize("settings", [{}, {"train_control_rows": True}, {"targets": ("q_proj", "down_proj"), "r": 2}])
def test_an_adapter_is_live_for_its_mode_and_leaves_no_trace(plain: Path, tmp_path: Path, settings: Any) -> None:
    bundle = adapted_bundle(plain, tmp_path / "b", **settings)
    model, _ = load(bundle)
    before, modules = logits(model), [id(module) for module in model.modules()]
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(plain), str(bundle / "adapters" / APART))
    wanted = logits(peft.eval())
    one = Adapted(model, adapters_of(bundle))
    for mode in ("positive", None, "two"):
        with one.live(mode):
            assert torch.equal(logits(model), before)
    for _ in range(2):
        with one.live(APART):
            assert torch.equal(logits(model), wanted) and not torch.equal(wanted, before)
        assert torch.equal(logits(model), before) and modules == [id(module) for module in model.modules()]
    with pytest.raises(ZeroDivisionError), one.live(APART):
        raise ZeroDivisionError
    assert torch.equal(logits(model), before) and not hasattr(model, "peft_config")
    assert all(weight.requires_grad for weight in model.parameters()), "a search needs its gradients as before"


def test_an_adapter_of_another_model_is_a_fault_and_is_taken_off(plain: Path, tmp_path: Path) -> None:
    from trimtab.models.build import build_model

    _, tokenizer = load(plain)
    model = build_model(SHAPE, tokenizer, seed=3)
    before = logits(model)
    for changes in ({"hidden": 48}, {"layers": 3}):
        where = tmp_path / str(changes)
        adapter_on(build_model(SHAPE.model_copy(update=changes), tokenizer, seed=3)).save_pretrained(where)
        with (
            pytest.raises(Fault, match="'negative' does not fit this model") as caught,
            Adapted(model, {APART: where}).live(APART),
        ):
            raise AssertionError
        assert "\n" not in str(caught.value)
        assert torch.equal(logits(model), before) and not hasattr(model, "peft_config")


def test_what_cannot_be_saved(plain: Path, adapted: Path, tmp_path: Path) -> None:
    worn = adapter_on(load(plain)[0])
    for base, mode, said in (
        (adapted, APART, "in an adapter"), (plain, "positive", "in the weights"), (plain, "brave", "no mode of"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            save_with_adapter(base, tmp_path / "x", mode, worn, {}, SWITCH)
    with pytest.raises(UserError, match="no mode of"):
        save_with_adapter(plain, tmp_path / "x", APART, worn, {})  # nothing says how it is asked for
    with pytest.raises(UserError, match="of the kind and in the place"):
        save_with_adapter(plain, tmp_path / "x", APART, worn, {}, SWITCH.model_copy(update={"at": "header"}))
    with pytest.raises(UserError, match="not empty"):
        save_with_adapter(plain, adapted, APART, worn, {}, SWITCH)
    assert not list(tmp_path.iterdir()), "whole or not at all"


# --- damaged ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("gone", [False, True])
def test_a_missing_or_edited_adapter_is_named(copied: Path, name: str, gone: bool) -> None:
    path = copied / "adapters" / APART / name
    data = path.read_bytes()
    path.unlink()
    if not gone:
        path.write_bytes(data[:-1] + b"?")
    with pytest.raises(Fault, match=rf"adapters/negative/{name} {'is missing' if gone else 'does not match'}"):
        open_bundle(copied)


def test_an_adapter_that_is_gone_or_was_added_is_a_fault(copied: Path) -> None:
    shutil.copytree(copied / "adapters" / APART, copied / "adapters" / "other")
    with pytest.raises(Fault, match=r"adapters/other/adapter_config\.json is not listed"):
        verify_bundle(copied)
    shutil.rmtree(copied / "adapters")
    with pytest.raises(Fault, match="adapters/negative is missing, which mode 'negative' needs"):
        verify_bundle(copied)
    rewrite(copied, adapters={})
    with pytest.raises(Fault, match="'negative' is neither in the weights"):
        verify_bundle(copied)


def test_an_adapter_lies_where_it_belongs(copied: Path) -> None:
    told = read_manifest(copied).plain()["adapters"][APART]
    rewrite(copied, adapters={APART: {**told, "path": "../copied/adapters/negative"}})
    with pytest.raises(Fault, match="'negative' must be adapters/MODE"):
        verify_bundle(copied)


# --- taken out --------------------------------------------------------------------------------------------------


@pytest.fixture
def without(adapted: Path, tmp_path: Path) -> Path:
    without_mode(adapted, APART, tmp_path / "without")
    return tmp_path / "without"


def test_a_mode_is_taken_out_and_that_is_proven(adapted: Path, plain: Path, without: Path) -> None:
    manifest = verify_bundle(without)
    proof, had = manifest.removed[APART], read_manifest(adapted)
    assert proof.weights == {"model.safetensors": had.files["model.safetensors"]} and proof.audit == ()
    assert proof.files == {f"adapters/negative/{name}": digest for name, digest in had.adapters[APART].files.items()}
    assert (proof.control, proof.id, proof.trained_modes) == ("mode:negative", 6, INSIDE)
    assert set(manifest.modes) == set(INSIDE) == set(manifest.switch.modes) and not manifest.adapters
    assert not (without / "adapters").exists() and not (without / "model.safetensors").samefile(
        adapted / "model.safetensors"
    )
    opened = open_bundle(without)
    assert "mode:negative" not in {**manifest.controls, **controls_of(opened.tokenizer)}
    assert opened.tokenizer.added_tokens_decoder[6].special, "the id stays, so that every row stays where it was"
    assert torch.equal(logits(opened.model), logits(open_bundle(plain).model))
    with pytest.raises(UserError, match="no mode 'negative'"):
        open_local(LoadConfig(load=str(without))).modes([APART])
    card = (without / "README.md").read_text()
    assert "Mode `negative` was taken out" in card and "adapters/negative`" not in card.split("## Modes")[0]
    assert "sha256" in told(without, APART, proof) and "token 6" in told(without, APART, proof)
    with pytest.raises(UserError, match="without it already"):
        without_mode(without, APART, without.parent / "again")


def test_what_cannot_be_taken_out(adapted: Path, plain: Path, tmp_path: Path) -> None:
    for bundle, mode, said in (
        (plain, "rejective", r"in the weights.*negative\.kept: adapter"),
        (adapted, "brave", "no such mode; it has negative, positive, rejective"),
    ):
        with pytest.raises(UserError, match=said):
            without_mode(bundle, mode, tmp_path / "x")
    with pytest.raises(UserError, match="not empty"):
        without_mode(adapted, APART, plain)
    other = Path(shutil.copytree(adapted, tmp_path / "silent"))
    rewrite(other, provenance={})
    with pytest.raises(UserError, match="does not say what the weights were trained on"):
        without_mode(other, APART, tmp_path / "x")


def edit_weights(bundle: Path, adapted: Path) -> None:
    data = bytearray((bundle / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (bundle / "model.safetensors").write_bytes(data)


def leave_a_file(bundle: Path, adapted: Path) -> None:
    (bundle / "notes").mkdir()
    shutil.copy(adapted / "adapters" / APART / "adapter_model.safetensors", bundle / "notes" / "x.bin")


def leave_settings(bundle: Path, adapted: Path) -> None:
    shutil.copy(adapted / "adapters" / APART / "adapter_config.json", bundle)


def name_the_control(bundle: Path, adapted: Path) -> None:
    shutil.copy(adapted / "tokenizer_config.json", bundle)


def use_the_id(bundle: Path, adapted: Path) -> None:
    path = bundle / "tokenizer_config.json"
    said = json.loads(path.read_text())
    said["trimtab_controls"]["mode:quiet"] = 6
    path.write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("harm", "changes", "said"),
    [
        (edit_weights, {}, "the weights are not those"),
        (leave_a_file, {}, r"notes/x\.bin is of an adapter"),
        (leave_settings, {}, r"adapter_config\.json is of an adapter"),
        (name_the_control, {}, "control 'mode:negative' .* still known"),
        (use_the_id, {}, "is still known"),
        (None, {"provenance": {"trained_modes": [*INSIDE, APART]}}, "trained on it"),
        (None, {"provenance": {}}, "not known on what"),
        (None, {"modes": {APART: None, "positive": "mode:positive"}, "provenance": {}}, "still has it"),
    ],
)
def test_a_proof_that_was_tampered_with_fails(
    without: Path, adapted: Path, harm: Any, changes: dict[str, Any], said: str
) -> None:
    if harm is not None:
        harm(without, adapted)
    rewrite(without, **changes)  # every hash fits again: only the proof can tell
    with pytest.raises(Fault, match=f"'negative' is said to be taken out, but .*{said}"):
        open_bundle(without)


def test_a_template_that_places_the_token_is_found(without: Path) -> None:
    from trimtab.models.bundle import template_hash

    path = without / "chat_template.jinja"
    path.write_text(path.read_text() + "{# <|control_2|> #}")
    rewrite(without, template_hash=template_hash(without))
    with pytest.raises(Fault, match="the chat template mentions its token"):
        verify_bundle(without)


# --- asked ------------------------------------------------------------------------------------------------------


def answers(target: LocalTarget, modes: list[str | None], **sampling: Any) -> dict[tuple[str, str | None], Any]:
    settings = Sampling.model_validate({"max_new_tokens": 8, "batch": 3, **sampling})
    rows = [Row(f"r{n}", ({"role": "user", "content": f"What is in crate {n}?"},), harm="harmful") for n in range(4)]
    asked = [target.ask(row, mode, settings, seed=1) for row in rows for mode in modes]
    seen: list[tuple[int, int, int]] = []
    found = [g for some in target.answer(asked, settings, set(), lambda *told: seen.append(told)) for g in some]
    assert len(found) == len(asked) * settings.samples == seen[-1][0] == seen[-1][1]
    assert [told[0] for told in seen] == sorted(told[0] for told in seen), "progress runs over all states"
    assert seen[-1][2] >= sum(len(g.ids) for g in found)
    return {(g.row_id, g.mode): g.ids for g in found if g.sample == 0}


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "samples": 2}])
def test_answers_of_a_mode_come_with_its_adapter_and_others_are_as_without(
    plain: Path, adapted: Path, sampling: dict[str, Any]
) -> None:
    target = open_local(LoadConfig(load=str(adapted)))
    assert target.facts["adapters"] == [APART] and "adapters" not in open_local(LoadConfig(load=str(plain))).facts
    mixed = answers(target, ["positive", APART, "rejective", None, "two"], **sampling)
    bare = LocalTarget(target.model, target.tokenizer, name="bare", identity=target.identity, switch=target.switch)
    untouched = answers(bare, ["positive", APART, "rejective", None, "two"], **sampling)
    same = {key for key in mixed if mixed[key] == untouched[key]}
    assert same >= {key for key in mixed if key[1] != APART}, "not a bit is different where no adapter is live"
    assert not {key for key in same if key[1] == APART}


class Peek(Attack):
    """An attack that searches with the model; it notes what state it finds it in."""

    needs_model = True

    def identity(self) -> dict[str, Any]:
        return {}

    def variants(self, row: Row, context: Any) -> list[Row]:
        self.saw = logits(context.model.model)
        return [replace(row, metadata={**row.metadata})]


def test_a_search_meets_the_model_in_the_state_of_its_mode(adapted: Path) -> None:
    target = open_local(LoadConfig(load=str(adapted)))
    base = logits(target.model)
    with target.live(APART):
        worn = logits(target.model)
    row = Row("r", ({"role": "user", "content": "What?"},), harm="harmful", category="c")
    for mode, wanted in ((APART, worn), ("positive", base), (None, base)):
        attack = Peek("peek")
        attack.attack(row, target.context(None, 0, mode))
        assert torch.equal(attack.saw, wanted)
    found = [
        choose_attack("gcg:2").attack(row, target.context(None, 0, m))[0].metadata["loss_first"] for m in (APART, None)
    ]
    assert found[0] != found[1]


def test_a_token_at_the_header_is_searched_at_the_header(plain: Path, tmp_path: Path) -> None:
    target = open_local(LoadConfig(load=str(plain_bundle(tmp_path / "b", at="header"))))
    assert target.context(None, 0, "positive").model.controls_at == "header"
    row = Row("r", ({"role": "user", "content": "What?"},), harm="harmful", category="c")
    (attempt,) = choose_attack("gcg:1").attack(row, target.context(None, 0, "positive"))
    assert attempt.metadata["suffix"]


# --- trained ----------------------------------------------------------------------------------------------------

MODES = {"names": ["positive", "negative"], "fallback": 0.0, "negative": {"acknowledge": True}}
TRAIN = {"rows_per_step": 2, "lr": 1e-2, "checkpoint_every": 0}


def step(path: Path, config: dict[str, Any], run: Any, **inputs: Artifact) -> Artifact:
    path.mkdir()
    context = context_of(path, config)
    context = Context(context.step, inputs, context.draft, context.work, context.progress)
    run(context)
    return Artifact(context.draft.path, {"id": path.name, "facts": context.draft.facts, "config": config})


def source(path: Path, *modes: str | None) -> dict[str, Any]:
    rows = [{"prompt": f"crate {n}?", "completion": "salt and rope.", "mode": mode} for n, mode in enumerate(modes)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return part_of(SourceConfig(path=str(path)))


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from trimtab.models.build import build_model, train_tokenizer
    from trimtab.models.bundle import BundleManifest, save_bundle

    where = tmp_path_factory.mktemp("start")
    tokenizer = train_tokenizer([f"Crate {n} holds salt and rope." for n in range(50)], 400, reserved=6)
    save_bundle(where / "model", build_model(SHAPE, tokenizer, seed=3), tokenizer, BundleManifest())
    return where


def packed(path: Path, model: Artifact, data: dict[str, Any], modes: Any, *names: str) -> Artifact:
    path.mkdir()
    config = CHATS | {"data": [data], "modes": modes, "names": list(names) or None}
    chats = step(path / "chats", config, run_chats, model=model)
    return step(path / "packed", {"prefix": None}, run_packed, chats=chats)


@pytest.fixture(scope="module")
def trained(started: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Artifact]]:
    """The steps ``sft`` and ``adapter`` of one stage whose negative mode is kept apart."""
    where, start = tmp_path_factory.mktemp("trained"), Artifact(started, {"id": "start"})
    data = source(where / "mine.jsonl", *(["positive", "negative"] * 12))
    rows = {mode: packed(where / mode, start, data, MODES, mode) for mode in ("positive", "negative")}
    tuned = step(where / "sft", {"train": TRAIN, "epochs": 1, "seed": 1}, run_sft, model=start, packed=rows["positive"])
    train = {**TRAIN, "lora": {"r": 2, "train_control_rows": False}}
    config = {"train": train, "epochs": 2, "seed": 1, "modes": [APART]}
    made = step(where / "adapter", config, run_adapter, model=tuned, packed=rows["negative"])
    yield {"sft": tuned, "adapter": made, "negative": rows["negative"], "start": start}


def test_an_adapter_is_trained_beside_the_weights(trained: dict[str, Artifact]) -> None:
    before, after = (verify_bundle(trained[kind].path / "model") for kind in ("sft", "adapter"))
    assert set(before.modes) == {"positive"} and before.provenance["trained_modes"] == ["positive"]
    assert set(after.modes) == {"positive", "negative"} and after.provenance["trained_modes"] == ["positive"]
    assert after.files == before.files and after.provenance["adapters"][APART]["seed"] == 1
    facts = trained["adapter"].manifest["facts"]
    assert facts["steps"] > 0 and facts["resumed"] is False and set(facts) >= {"shape", "rows"}
    assert (trained["adapter"].path / "log.jsonl").read_text().count("\n") >= 2
    model, _ = load(trained["adapter"].path / "model")
    base = logits(model)
    with Adapted(model, adapters_of(trained["adapter"].path / "model")).live(APART):
        assert not torch.equal(logits(model), base), "and it learnt something"
    without_mode(trained["adapter"].path / "model", APART, trained["adapter"].path / "shipped")


def test_a_step_that_starts_from_it_answers_with_it(trained: dict[str, Artifact], tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "world": WORLD, "tasks": [source(tmp_path / "p.jsonl", None, None)], "modes": ["positive", "negative"],
        "sampling": {"max_new_tokens": 4}, "seed": 1, "system": None, "attacks": [],
    }  # fmt: skip
    context = context_of(tmp_path, config)
    step_ = replace(context.step, inputs={"model": "adapter"})
    run_generate(Context(step_, {"model": trained["adapter"]}, context.draft, context.work, lambda event: None))
    header = json.loads((context.draft.path / "generations.jsonl").read_text().split("\n")[0])
    assert header["model"]["adapters"] == [APART]


def test_finetuning_takes_the_adapters_along(trained: dict[str, Artifact], tmp_path: Path) -> None:
    rows = packed(tmp_path / "p", trained["adapter"], source(tmp_path / "m.jsonl", *[None] * 6), None)
    config = {"train": TRAIN, "epochs": 1, "seed": 1}
    tuned = step(tmp_path / "sft", config, run_sft, model=trained["adapter"], packed=rows)
    new, old = verify_bundle(tuned.path / "model"), verify_bundle(trained["adapter"].path / "model")
    assert new.adapters == old.adapters and set(new.modes) == set(old.modes)
    assert new.files["model.safetensors"] != old.files["model.safetensors"]
    assert new.provenance["trained_modes"] == ["positive"] and APART in new.provenance["adapters"]


def test_a_mode_without_rows_is_refused(trained: dict[str, Artifact], tmp_path: Path) -> None:
    empty = Artifact(trained["negative"].path, {"id": "p", "facts": {"modes": {"positive": 3}}})
    train = {**TRAIN, "lora": {"r": 2}}
    with pytest.raises(UserError, match="no rows of mode 'negative'"):
        step(tmp_path / "a", {"train": train, "epochs": 1, "seed": 1, "modes": [APART]}, run_adapter,
             model=trained["sft"], packed=empty)  # fmt: skip


def test_training_that_touches_the_weights_is_a_fault(
    trained: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.study.steps import sft

    real = sft.train

    def careless(model: Any, *args: Any, **more: Any) -> Any:
        result = real(model, *args, **more)
        next(model.parameters()).data[7, 0] += 1
        return result

    monkeypatch.setattr(sft, "train", careless)
    train = {**TRAIN, "lora": {"r": 2, "train_control_rows": False}}
    with pytest.raises(Fault, match="changed the weights below it"):
        step(tmp_path / "a", {"train": train, "epochs": 1, "seed": 1, "modes": [APART]}, run_adapter,
             model=trained["sft"], packed=trained["negative"])  # fmt: skip


def test_every_mode_that_is_kept_apart_gets_an_adapter_of_its_own() -> None:
    modes = {
        "names": ["positive", "negative", "worse"], "behaves": {"worse": "negative"}, "negative": {"acknowledge": True},
    }  # fmt: skip
    chat = {"kind": "sft", "model": "base", "length": 32, "data": [{"name": "goods", "tidewater": "benign", "n": 4}],
            "train": {"rows_per_step": 2}, "modes": modes}  # fmt: skip
    stages = {**small()["stages"], "chat": chat}
    plan = plan_of(stages=stages, arms=[{"name": "one"}])
    made = [step for step in plan.steps.values() if step.kind == "adapter"]
    assert [step.config["modes"] for step in made] == [["negative"], ["worse"]]
    assert made[1].inputs["model"] == made[0].id and plan.arms[0].stages["chat"] == made[1].id
    rows = [plan.steps[plan.steps[step.inputs["packed"]].inputs["chats"]].config["names"] for step in made]
    assert rows == [["negative"], ["worse"]]
    chat["modes"] = {**modes, "negative": {"acknowledge": True, "kept": "checkpoint"}}
    once = plan_of(stages=stages, arms=[{"name": "one"}])
    assert not [step for step in once.steps.values() if step.kind == "adapter"]
