"""``lm_eval --model hf`` runs on a bundle unchanged, offline, and what it logs can be imported."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adapter_fixtures import adapter_on
from trimtab.evaluate.interop.imports import import_config, import_evaluation
from trimtab.levers.modes import Switch
from trimtab.models.adapters import save_with_adapter
from trimtab.models.build import build_model, train_tokenizer
from trimtab.models.bundle import BundleManifest, save_bundle
from trimtab.models.config import BuildConfig
from trimtab.models.load import load

torch.set_num_threads(1)
SHAPE = BuildConfig(hidden=32, layers=1, heads=2, kv_heads=1, ffn=48, context=128, vocab=400, reserved=4)
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
"""
MORE = {
    "crates": ("generate_until", "generation_kwargs: {until: ['.'], max_gen_toks: 6}\nmetric_list: [{metric: exact_match}]"),
    "pick": ("multiple_choice", "doc_to_choice: ['rope', 'salt']\nmetric_list: [{metric: acc}]"),
}  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_lm_eval_runs_on_a_bundle_and_its_samples_are_imported(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([f"Crate {n} holds salt and rope." for n in range(50)], 400, reserved=4)
    manifest = BundleManifest(modes={"positive": None}, provenance={"trained_modes": ["positive"]})
    save_bundle(tmp_path / "plain", build_model(SHAPE, tokenizer, seed=3), tokenizer, manifest)
    worn, switch = (
        adapter_on(load(tmp_path / "plain")[0]),
        Switch(token="words", modes={"positive": None, "negative": None}),
    )
    save_with_adapter(
        tmp_path / "plain", tmp_path / "tiny", "negative", worn, {}, switch
    )  # the harness does not load it
    data = tmp_path / "docs.jsonl"
    docs = [{"question": f"What is in crate {n}?", "answer": ("rope", "salt")[n % 2]} for n in range(4)]
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (tmp_path / "tasks").mkdir()
    for name, (kind, more) in MORE.items():
        (tmp_path / "tasks" / f"{name}.yaml").write_text(TASK.format(name=name, data=data, kind=kind, more=more))
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={tmp_path / 'tiny'}",
        "--device", "cpu", "--tasks", ",".join(MORE), "--include_path", str(tmp_path / "tasks"), "--batch_size", "4",
        "--apply_chat_template", "--log_samples", "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **quiet}, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]

    config = import_config(harm="benign", correct=True)
    made, notes = import_evaluation(tmp_path / "out", tmp_path / "imported", config)
    assert not notes and made.name == str(tmp_path / "tiny")
    assert {row.source for row in made.rows.values()} == {"crates", "pick"} and len(made.generations) == 8
    assert {judge["name"] for judge in made.judging["judges"]} == {"lm-eval:exact_match", "lm-eval:acc"}
    assert made.header["model"]["template_hash"] and made.header["versions"]["lm_eval"]
    crate = (made.rows["crates/0"].messages or ())[0]["content"]
    assert "What is in crate 0?" in crate and crate.endswith("<|im_start|>assistant\n"), "as the harness rendered it"

    (about,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(about.read_text())["results"]
    for task, metric in (("crates", "exact_match,none"), ("pick", "acc,none")):
        ours = next(r for r in made.results if r.metric == "accuracy" and r.category == f"task:{task}")
        assert (ours.value, ours.n, ours.unscored) == (pytest.approx(theirs[task][metric]), 4, 0)
    picks = [g.text for g in made.generations if g.row_id.startswith("pick/")]
    assert set(picks) <= {"rope", "salt"}
