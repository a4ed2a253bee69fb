"""Bundles: plain Hub directories with a verified manifest."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab.errors import Fault, UserError
from trimtab.models.build import build_model, train_tokenizer
from trimtab.models.bundle import BundleManifest, open_bundle, read_manifest, save_bundle, verify_bundle
from trimtab.models.config import BuildConfig, control_token
from trimtab.models.load import load

torch.set_num_threads(1)
CONFIG = BuildConfig(hidden=32, layers=1, heads=2, kv_heads=1, ffn=48, context=64, vocab=400, reserved=4)


@pytest.fixture(scope="module")
def parts():
    tokenizer = train_tokenizer([f"Crate {n} holds salt and rope." for n in range(50)], 400, reserved=4)
    return build_model(CONFIG, tokenizer, seed=3), tokenizer


def manifest_for(tokenizer, **changes):
    names = [control_token(0), control_token(1)]
    values = {
        "controls": {name: tokenizer.convert_tokens_to_ids(name) for name in names},
        "modes": {"positive": names[0], "rejective": names[1], "plain": None},
        "default_mode": "positive",
        "evaluation": {"refusal": 0.97},
        "provenance": {"seed": 3},
    }
    return BundleManifest.model_validate({**values, **changes})


@pytest.fixture
def bundle(parts, tmp_path):
    model, tokenizer = parts
    save_bundle(tmp_path / "b", model, tokenizer, manifest_for(tokenizer))
    return tmp_path / "b"


def test_round_trip(bundle, parts):
    model, tokenizer = parts
    opened = open_bundle(bundle)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), opened.model.parameters(), strict=True))
    assert opened.manifest.modes["rejective"] == control_token(1) and opened.manifest.default_mode == "positive"
    assert opened.tokenizer.chat_template == tokenizer.chat_template
    card = (bundle / "README.md").read_text()
    assert control_token(1) in card and "refusal" in card and "positive (default)" in card


def test_plain_transformers_opens_it(bundle, parts):
    model, tokenizer = parts
    plain = AutoModelForCausalLM.from_pretrained(bundle)
    again = AutoTokenizer.from_pretrained(bundle)
    ids = again("Crate 7 holds rope.", return_tensors="pt").input_ids
    assert torch.equal(plain(ids).logits, model(ids).logits)
    assert again.chat_template == tokenizer.chat_template and plain.generation_config.eos_token_id is not None


def test_equal_weights_give_equal_bytes_wherever_they_come_from(bundle, parts, tmp_path):
    _, tokenizer = parts
    model, loaded = load(bundle)
    save_bundle(tmp_path / "again", model, loaded, manifest_for(tokenizer))
    for path in sorted(bundle.iterdir()):
        if path.name != "README.md":  # the card's title is the directory's name
            assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "chat_template.jinja", "config.json"])
def test_a_flipped_byte_is_found(bundle, name):
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(Fault, match=name):
        open_bundle(bundle)


def edit(bundle, **changes):
    data = json.loads((bundle / "trimtab.json").read_text())
    (bundle / "trimtab.json").write_text(json.dumps({**data, **changes}))


def test_template_and_controls_are_verified(bundle):
    edit(bundle, template_hash="0" * 64)
    with pytest.raises(Fault, match="chat template"):
        verify_bundle(bundle)


@pytest.mark.parametrize(
    ("controls", "word"),
    [
        ({"ordinary": 390}, "not an added token"),
        ({"tag": 1, "start": 1}, "share an id"),
        ({control_token(0): 5}, "id 5"),
        ({}, "not among the controls"),
    ],
)
def test_wrong_controls_are_faults(bundle, controls, word):
    edit(bundle, controls=controls)
    with pytest.raises(Fault, match=word):
        open_bundle(bundle)


def test_manifest_errors_are_one_line(bundle, tmp_path):
    edit(bundle, surprise=1)
    with pytest.raises(Fault, match="surprise") as caught:
        read_manifest(bundle)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"trimtab\.json is missing"):
        open_bundle(tmp_path)


def test_a_bundle_that_cannot_be_right_is_not_written(parts, tmp_path):
    model, tokenizer = parts
    with pytest.raises(UserError, match="default_mode"):
        save_bundle(tmp_path / "x", model, tokenizer, manifest_for(tokenizer, default_mode="negative"))
    with pytest.raises(UserError, match="id 40, which is not an added token"):
        save_bundle(tmp_path / "x", model, tokenizer, manifest_for(tokenizer, controls={"a": 40}, modes={}))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        save_bundle(tmp_path / "full", model, tokenizer, manifest_for(tokenizer))
    assert (tmp_path / "full" / "note").read_text() == "mine"


def test_a_padded_vocabulary_is_fine_but_a_short_one_is_not(parts, tmp_path):
    model, tokenizer = parts
    saved = save_bundle(tmp_path / "b", model, tokenizer, manifest_for(tokenizer))
    assert saved.template_hash and "model.safetensors" in saved.files
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    config["vocab_size"] = 3
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    files = {**saved.files}
    del files["config.json"]
    edit(tmp_path / "b", files=files)
    with pytest.raises(Fault, match="3 embedding rows"):
        verify_bundle(tmp_path / "b")


def test_names_given_by_the_control_lifecycle_are_checked(parts, tmp_path):
    from trimtab.models.tokens import add_control_tokens

    tokenizer = train_tokenizer([f"Crate {n} holds salt and rope." for n in range(50)], 400, reserved=4)
    model = build_model(CONFIG, tokenizer, seed=3)
    controls = add_control_tokens(tokenizer, model, ["positive", "rejective"])
    manifest = BundleManifest.model_validate({"controls": controls, "modes": {"positive": "positive"}})
    save_bundle(tmp_path / "b", model, tokenizer, manifest)
    assert open_bundle(tmp_path / "b").manifest.controls == controls
    swapped = {"positive": controls["rejective"], "rejective": controls["positive"]}
    edit(tmp_path / "b", controls=swapped)
    with pytest.raises(Fault, match="the tokenizer gives it id"):
        verify_bundle(tmp_path / "b")
