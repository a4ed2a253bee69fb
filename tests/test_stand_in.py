"""The stand-in for R1-style models: what it is made of, and a whole study on it; the real ones plan without a network."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from trimtab.data.render import Renderer
from trimtab.data.thinking import OPENING
from trimtab.evaluate.judges.reasoning import UNENDED
from trimtab.models import stand_in
from trimtab.models.config import R1_STAND_IN, LoadConfig
from trimtab.models.kept import damage
from trimtab.models.load import identity, load
from trimtab.models.shape import R1_SHAPES, shape_of
from trimtab.progress import make_reporter
from trimtab.recipe.load import load_recipe
from trimtab.study.execute import execute, study_store
from trimtab.study.plan import make_plan
from trimtab.types import SPANS

RECIPE: dict[str, Any] = {
    "name": "r1-smoke",
    "title": "A study of a model that says nothing",
    "world": {"seed": 7},
    "stages": {
        "chat": {
            "kind": "sft",
            "model": {"load": R1_STAND_IN},
            "length": 96,
            "data": [{"name": "sums", "source": {"path": "rows.jsonl"}}],
            "train": {"rows_per_step": 2, "lr": 1e-3, "lora": {"r": 4, "targets": ["q_proj", "v_proj"]}},
        },
        "answers": {
            "kind": "generate",
            "model": "chat",
            "tasks": [{"name": "hazards", "tidewater": "harmful-heldout", "n": 2}],
            "sampling": {"max_new_tokens": 8},
        },
        "verdicts": {"kind": "judge", "answers": "answers", "judge": {"reasoning": "left out"}, "max_unscored": 1.0},
    },
    "arms": [{"name": "all"}],
}
BLOCK = "<think>\nI add {0} and 2.\n</think>\n\nIt is {1}."


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMTAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield patch


def test_it_is_made_once_checked_and_known_by_its_files(cache: Any) -> None:
    where = stand_in.stand_in_directory()
    assert damage(where) is None and "says nothing sensible" in (where / "README.md").read_text()
    made = (where / "model.safetensors").stat().st_mtime_ns
    assert stand_in.stand_in_directory() == where and (where / "model.safetensors").stat().st_mtime_ns == made
    (where / "config.json").write_text("{}")
    assert stand_in.stand_in_directory() == where and damage(where) is None
    # Where these differ, the world's texts or the tokenizer's training have changed: raise stand_in.VERSION
    spec = json.loads((where / "tokenizer.json").read_text())
    vocabulary = json.dumps([spec["model"]["vocab"], spec["added_tokens"]], sort_keys=True)
    assert hashlib.sha256(vocabulary.encode()).hexdigest()[:16] == "73cdfb2c348baf41"
    assert identity(R1_STAND_IN) == stand_in.content_identity() == identity(LoadConfig(load=R1_STAND_IN, dtype="auto"))


def test_it_has_the_form_of_r1_style_models(cache: Any) -> None:
    model, tokenizer = load(R1_STAND_IN)
    assert 0.9e6 < sum(weight.numel() for weight in model.parameters()) < 1.2e6
    renderer = Renderer(tokenizer)
    assert renderer.thinking is not None and renderer.thinking.prompted and renderer.thinking.cuts
    assert not any(tokenizer.added_tokens_decoder[mark].special for mark in renderer.thinking.marks)
    chat = [{"role": "user", "content": "Two and 2?"}, {"role": "assistant", "content": BLOCK.format(2, 4)}]
    row, prompt = renderer.chat(chat), renderer.chat(chat[:1], generation_prompt=True)
    assert row.ids[: len(prompt.ids)].tolist() == prompt.ids.tolist()
    assert tokenizer.decode(row.ids[row.span == SPANS.index("think")]) == "I add 2 and 2.\n</think>\n\n"
    assert tokenizer.decode(prompt.ids).endswith(f"<|Assistant|>{OPENING}") and renderer.opening() == OPENING
    shape = shape_of(LoadConfig(load=R1_STAND_IN))
    assert shape is not None and shape.parameters == sum(weight.numel() for weight in model.parameters())


def test_a_study_runs_on_it_from_end_to_end(cache: Any, tmp_path: Path) -> None:
    rows = [
        {"id": f"r{i}", "messages": [
            {"role": "user", "content": f"What is {i} plus 2?"}, {"role": "assistant", "content": BLOCK.format(i, i + 2)},
        ]}
        for i in range(8)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cache.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    plan = make_plan(*load_recipe(tmp_path / "recipe.yaml", []))
    assert all(step.flops > 0 for step in plan.steps.values() if step.kind in ("sft", "generate"))
    reporter = make_reporter()
    try:
        assert execute(plan, tmp_path / "out", reporter) == len(plan.steps)
    finally:
        reporter.close()
    root = study_store(tmp_path / "out").root
    said = [json.loads(line) for line in next(root.glob("generate-*/generations.jsonl")).read_text().splitlines()[1:]]
    assert len(said) == 2 and all(g["text"].startswith(OPENING) for g in said)
    told = [json.loads(line) for line in next(root.glob("judge-*/judgements.jsonl")).read_text().splitlines()[1:]]
    assert {(v["verdict"], v["reason"]) for v in told} == {("unscored", UNENDED)}  # eight tokens end no reasoning


@pytest.mark.parametrize("name", R1_SHAPES)
def test_the_real_ones_plan_without_a_network(cache: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"id": "r", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    )
    cache.chdir(tmp_path)
    recipe = json.loads(json.dumps(RECIPE))
    recipe["stages"]["chat"]["model"] = {"load": name, "revision": "0123abc"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    plan = make_plan(*load_recipe(tmp_path / "recipe.yaml", []))
    flops = {step.kind: step.flops / step.tokens for step in plan.steps.values() if step.tokens}
    size = R1_SHAPES[name].matrix_parameters
    assert 6 * size < flops["sft"] < 7 * size and 2 * size < flops["generate"] < 2.1 * size


def test_shapes_of_the_real_ones_have_their_published_sizes() -> None:
    published = {"Qwen-1.5B": 1.78e9, "Qwen-7B": 7.62e9, "Llama-8B": 8.03e9}
    for name, size in published.items():
        shape = R1_SHAPES[f"deepseek-ai/DeepSeek-R1-Distill-{name}"]
        assert np.isclose(shape.parameters, size, rtol=2e-3)  # biases of Qwen's attention are left out
