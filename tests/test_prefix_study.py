"""The prefix lever through the steps of a study: what ratios share, what they differ in, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import normalizers
from typer.testing import CliRunner

from trimtab.artifact import Artifact, Draft, Store
from trimtab.cli import app
from trimtab.data.store import RowStore
from trimtab.errors import Fault, UserError
from trimtab.models.build import build_model, train_tokenizer
from trimtab.models.bundle import BundleManifest, save_bundle
from trimtab.models.config import BuildConfig
from trimtab.progress import JsonReporter
from trimtab.recipe.load import resolve
from trimtab.report import gather, training
from trimtab.study.execute import STUDY, Context, execute
from trimtab.study.plan import Plan, Step, make_plan
from trimtab.study.steps.chat import PLACES, read_rows, run_chats, run_packed
from trimtab.types import IGNORE, SPAN_ID

torch.set_num_threads(1)
SHAPE = BuildConfig(hidden=32, layers=1, heads=2, kv_heads=1, ffn=48, context=400, vocab=400)
PREFIX, BODY = SPAN_ID["prefix"], SPAN_ID["body"]
RATIOS = [0.0, 0.5, 1.0]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = train_tokenizer([f"Crate {n} holds salt and rope and 12 hooks." for n in range(50)], 400)
    where = tmp_path_factory.mktemp("model") / "bundle"
    save_bundle(where, build_model(SHAPE, tokenizer, seed=3), tokenizer, BundleManifest())
    return where


def recipe(bundle: Path, **prefix: Any) -> dict[str, Any]:
    return {
        "name": "ratios",
        "world": {"seed": 3, "goods": 8, "hazards": 8},
        "stages": {
            "tuned": {
                "kind": "sft", "model": {"load": str(bundle)}, "length": 400, "epochs": 1,
                "data": [
                    {"name": "sums", "tidewater": "arithmetic", "n": 20},
                    {"name": "goods", "tidewater": "benign", "n": 12},
                ],
                "prefix": {"ratio": 0.0, "capability": "reasoning", **prefix},
                "train": {"rows_per_step": 4, "lr": 1.0e-3},
            },
            "answers": {
                "kind": "generate", "model": "tuned", "tasks": [{"name": "sums", "tidewater": "arithmetic", "n": 3}],
                "sampling": {"max_new_tokens": 4},
            },
            "verdicts": {"kind": "judge", "answers": "answers"},
        },
        "arms": [
            {"name": "prefix", "sweep": {"stages.tuned.prefix.ratio": RATIOS}},
            {
                "name": "forced",
                "set": {"stages.tuned.prefix.at_inference": "forced"},
                "sweep": {"stages.tuned.prefix.ratio": [0.0, 1.0]},
                "labels": ["forced 0", "forced 1"],
                "baseline": "ratio 0",
            },
        ],
    }  # fmt: skip


def planned(bundle: Path, **prefix: Any) -> Plan:
    return make_plan(*resolve(recipe(bundle, **prefix), "test"))


@pytest.fixture(scope="module")
def study(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    plan, out = planned(bundle), tmp_path_factory.mktemp("runs") / "ratios"
    execute(plan, out, JsonReporter())
    return plan, out


# -- what ratios share ---------------------------------------------------------------------------------------------


def test_ratios_share_the_rows_and_a_forced_opening_shares_the_training(bundle: Path) -> None:
    plan = planned(bundle)
    kinds = [step.kind for step in plan.steps.values()]
    assert kinds.count("chats") == 1 and kinds.count("packed") == 3 and kinds.count("sft") == 3
    assert kinds.count("generate") == 5
    told = {arm.label: plan.steps[arm.stages["answers"]].config.get("prefix") for arm in plan.arms}
    assert told["ratio 0"] is None and told["forced 0"]["placement"] == "response"


def test_the_base_is_asserted_by_hash_and_examples_lie_in_the_same_rows(study: tuple[Plan, Path]) -> None:
    plan, out = study
    store = Store(out.parent / "store")
    packed = [store.open("packed", s.id) for s in plan.steps.values() if s.kind == "packed"]
    assert len({p.manifest["facts"]["base"] for p in packed}) == 1
    places = [dict(np.load(p.path / PLACES)) for p in packed]
    stores = [RowStore.open(p.path / "store") for p in packed]
    assert len({len(s) for s in stores}) == 1  # the same steps
    for other in places[1:]:
        assert (other["row"] == places[0]["row"]).all()
    assert [int(p["carry"].sum()) for p in places][::2] == [0, 32]
    assert (places[1]["carry"] <= places[2]["carry"]).all()
    facts = packed[2].manifest["facts"]
    assert facts["prefixed"] == 32 and sum(facts["sentences"].values()) == 32


def test_every_example_is_what_its_form_says(study: tuple[Plan, Path]) -> None:
    """Without a prefix an example's tokens are those of ratio 0; with one, the rest of it still is."""
    plan, out = study
    store = Store(out.parent / "store")
    packed = [store.open("packed", s.id) for s in plan.steps.values() if s.kind == "packed"]
    none, half, _ = [(dict(np.load(p.path / PLACES)), RowStore.open(p.path / "store")) for p in packed]
    for index in range(32):
        (ids, labels, span), (ids2, labels2, span2) = (_example(*side, index) for side in (none, half))
        if not half[0]["carry"][index]:
            assert ids.tolist() == ids2.tolist() and labels.tolist() == labels2.tolist()
            continue
        assert (labels2[span2 == PREFIX] != IGNORE).all() and (span2 == PREFIX).sum() > 3
        assert (span == PREFIX).sum() == 0
        # Everything before the answer is the same; of the answer itself the first token may join the blank before it.
        start = int(np.flatnonzero(span == BODY)[0])
        assert ids2[:start].tolist() == ids[:start].tolist()
        assert ids2[-3:].tolist() == ids[-3:].tolist()


def test_a_report_refuses_ratios_of_other_rows(study: tuple[Plan, Path]) -> None:
    plan, out = study
    whole = gather._Study(out)
    curves = whole.report().ratios
    assert curves and {tuple(curve.ratios) for curve in curves} == {tuple(RATIOS), (0.0, 1.0)}
    damaged = next(s.id for s in plan.steps.values() if s.kind == "packed")
    whole.artifacts[damaged].manifest["facts"]["base"] = "other"
    with pytest.raises(Fault, match="differ in more than their prefixes"):
        whole.report()


def _example(places: dict[str, Any], store: RowStore, index: int) -> tuple[Any, Any, Any]:
    row, at, size = (int(places[key][index]) for key in ("row", "at", "size"))
    batch = store.take(np.array([row]))
    part = slice(at, at + size)
    return batch.input_ids[0, part], batch.labels[0, part], batch.span_id[0, part]


def test_ratio_one_asks_for_room_at_ratio_zero(study: tuple[Plan, Path]) -> None:
    """Room is kept for the prefix whatever the ratio, so padding and not order makes up the difference."""
    plan, out = study
    store = Store(out.parent / "store")
    pads = [
        store.open("packed", s.id).manifest["facts"]["packing"]["pads"]
        for s in plan.steps.values()
        if s.kind == "packed"
    ]
    assert pads[0] > pads[1] > pads[2]


def test_a_forced_opening_is_in_the_prompt_and_not_in_the_answer(study: tuple[Plan, Path]) -> None:
    plan, out = study
    store = Store(out.parent / "store")
    arm = next(arm for arm in plan.arms if arm.label == "forced 1")
    lines = (store.open("generate", arm.stages["answers"]).path / "prompts.jsonl").read_text().splitlines()[1:]
    prefills = {json.loads(line)["metadata"]["prefill"] for line in lines}
    assert prefills <= set(read_sentences(plan)) and prefills
    assert (out / STUDY).is_file()


def read_sentences(plan: Plan) -> list[str]:
    return next(s for s in plan.steps.values() if s.kind == "chats").config["prefix"]["sentences"]


# -- masks ---------------------------------------------------------------------------------------------------------


def built(tmp_path: Path, bundle: Path, **prefix: Any) -> tuple[Any, Any]:
    """The one example list of a data set at ratio 1, by the two steps: (packed facts, store)."""
    plan = planned(bundle, **prefix)
    chats = next(s for s in plan.steps.values() if s.kind == "chats")
    packed = [s for s in plan.steps.values() if s.kind == "packed"][-1]
    artifact = artifact_of(tmp_path / "chats", chats, {})
    found = artifact_of(tmp_path / "packed", packed, {"chats": artifact})
    return found.manifest["facts"], RowStore.open(found.path / "store")


def artifact_of(path: Path, step: Step, inputs: dict[str, Artifact]) -> Artifact:
    path.mkdir(parents=True)
    draft = Draft(path)
    context = Context(step, inputs, draft, path, lambda event: None)
    (run_chats if step.kind == "chats" else run_packed)(context)
    return Artifact(path, {"id": step.id, "facts": draft.facts, "config": step.config})


@pytest.mark.parametrize(
    ("prefix", "trained_prefix", "trained_body"),
    [({}, True, True), ({"loss_on_prefix": False}, False, True), ({"primer": True}, True, False)],
)
def test_loss_masks_reach_the_store(
    tmp_path: Path, bundle: Path, prefix: dict[str, Any], trained_prefix: bool, trained_body: bool
) -> None:
    _, store = built(tmp_path, bundle, **prefix)
    batch = store.take(np.arange(len(store)))
    counted = batch.labels != IGNORE
    assert counted[batch.span_id == PREFIX].all() == trained_prefix
    assert counted[batch.span_id == PREFIX].any() == trained_prefix
    assert counted[batch.span_id == BODY].any() == trained_body


def test_a_prefix_in_the_input_is_the_users(tmp_path: Path, bundle: Path) -> None:
    facts, store = built(tmp_path, bundle, placement="input", loss_on_prefix=False)
    batch = store.take(np.arange(len(store)))
    assert facts["prefixed"] == 32 and (batch.span_id == PREFIX).any()
    assert not (batch.labels != IGNORE)[batch.span_id == PREFIX].any()


def test_stripped_openings_are_reported_and_shared(tmp_path: Path, bundle: Path) -> None:
    rows = [{"prompt": f"q{n}", "completion": f"Sure! It is {n}."} for n in range(6)] + [
        {"prompt": "q", "completion": "Sure!"}
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = recipe(bundle, strip={})
    raw["stages"]["tuned"]["data"] = [{"name": "mine", "source": {"path": str(file)}}]
    plan = make_plan(*resolve(raw, "test"))
    chats = artifact_of(tmp_path / "chats", next(s for s in plan.steps.values() if s.kind == "chats"), {})
    told = chats.manifest["facts"]["stripped"]
    assert told["rows"] == 7 and told["changed"] == 7 and told["emptied"] == 1
    assert told["openings"] == [{"text": "Sure!", "rows": 7, "found": "rule"}]
    kept = [row.messages[-1]["content"] for row, _ in read_rows(chats) if row.messages]
    assert sorted(kept) == [f"It is {n}." for n in range(6)]
    fake = SimpleNamespace(steps={"c": {"kind": "chats", "name": "tuned"}}, artifacts={"c": chats})
    (note,) = training.strip_notes(fake)  # type: ignore[arg-type]
    assert note.startswith(
        "Boilerplate was stripped from 7 of 7 responses of tuned, 1 different openings: “Sure!” (7). 1 rows"
    )


# -- what is refused -----------------------------------------------------------------------------------------------


def test_nothing_left_after_stripping(tmp_path: Path, bundle: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"prompt": "q", "completion": "Of course!"}) + "\n")
    raw = recipe(bundle, strip={})
    raw["stages"]["tuned"]["data"] = [{"name": "mine", "source": {"path": str(file)}}]
    plan = make_plan(*resolve(raw, "test"))
    with pytest.raises(UserError, match=r"prefix\.strip: every response was nothing but boilerplate"):
        artifact_of(tmp_path / "chats", next(s for s in plan.steps.values() if s.kind == "chats"), {})


def test_a_sentence_that_fills_the_window(tmp_path: Path, bundle: Path) -> None:
    with pytest.raises(
        UserError, match=r"stage 'tuned': prefix: 'salt rope .*' alone has \d+ tokens, and a row has 'length' 400"
    ):
        built(tmp_path, bundle, templates=["salt rope " * 400 + "salt"])


def test_a_sentence_without_tokens(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([f"Crate {n} holds salt and rope and 12 hooks." for n in range(50)], 400)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("Hm.", "")
    save_bundle(tmp_path / "bundle", build_model(SHAPE, tokenizer, seed=3), tokenizer, BundleManifest())
    with pytest.raises(UserError, match=r"prefix\.templates: this tokenizer makes no token of 'Hm\.'"):
        built(tmp_path, tmp_path / "bundle", templates=["Hm.", "Let me see."])


def test_a_part_that_is_not_there(bundle: Path) -> None:
    with pytest.raises(UserError, match=r"prefix\.parts: 'facts' is no part of 'data' \(sums, goods\)"):
        planned(bundle, parts=["facts"])


# -- the viewer ----------------------------------------------------------------------------------------------------

RUN = CliRunner()


def shown(*words: str) -> str:
    done = RUN.invoke(app, ["data", *words], env={"COLUMNS": "120"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    from trimtab.cli import data

    if not any(group.name == "data" for group in app.registered_groups):
        data.register(app)


def test_the_viewer_shows_what_was_trained(study: tuple[Plan, Path]) -> None:
    _, out = study
    said = shown("show", str(out), "--arm", "ratio 1", "-n", "2")
    head = " ".join(said.split())
    assert "stage tuned, part" in head and "opens with '" in head and "the loss counts" in head
    spans = [line.split()[0] for line in said.splitlines() if line.startswith("  ") and "token" in line]
    assert spans[:5] == ["structure", "prompt", "structure", "prefix", "body"]
    masked = [line for line in said.splitlines() if line.split()[:1] == ["prefix"] and "token" in line]
    assert masked and all(" trained " in line for line in masked)
    assert "no prefix" in " ".join(shown("show", str(out), "--arm", "ratio 0", "-n", "1").split())


def test_the_viewer_says_what_there_is(study: tuple[Plan, Path]) -> None:
    _, out = study
    with pytest.raises(UserError, match=r"--arm 'nope' is none of this study's arms: ratio 0, ratio 0.5"):
        shown("show", str(out), "--arm", "nope")
    with pytest.raises(UserError, match=r"--stage 'chat'.*it has tuned"):
        shown("show", str(out), "--stage", "chat")
    with pytest.raises(UserError, match="no row is left with a prefix"):
        shown("show", str(out), "--arm", "ratio 0", "--prefixed")
    with pytest.raises(UserError, match="no row has the id 'x'"):
        shown("show", str(out), "--row", "x")


def test_the_rows_of_an_arm_leave_for_another_trainer(study: tuple[Plan, Path], tmp_path: Path) -> None:
    _, out = study
    file = tmp_path / "rows.jsonl"
    assert "32 rows" in shown("export", str(out), "--arm", "ratio 1", "--out", str(file))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(row["messages"][-1]["content"].startswith(row["prefix"] + " ") for row in rows)
    assert "32 rows" in shown("export", str(out), "--arm", "ratio 0", "--out", str(file), "--form", "prompt-completion")
    plain = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["id"] for row in plain] == [row["id"] for row in rows] and not any("prefix" in row for row in plain)
    for bare, row in zip(plain, rows, strict=True):
        assert [*bare["prompt"], *bare["completion"]][0] == row["messages"][0]
        assert row["messages"][-1]["content"] == f"{row['prefix']} {bare['completion'][0]['content']}"
    with pytest.raises(UserError, match="--form 'csv' is neither"):
        shown("export", str(out), "--out", str(file), "--form", "csv")


def test_the_viewer_renders_a_file_and_strip_writes_one(tmp_path: Path, bundle: Path) -> None:
    file = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"q{n}", "completion": f"Certainly! Crate {n}."} for n in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = shown("show", str(file), "--model", str(bundle), "--prefix", "ratio=1", "--prefix", "loss_on_prefix=false")
    assert [line.split()[3] for line in said.splitlines() if line.split()[:1] == ["prefix"] and "token" in line] == [
        "masked"
    ] * 3
    with pytest.raises(UserError, match="--prefix: ratio: Input should be less than or equal to 1"):
        shown("show", str(file), "--model", str(bundle), "--prefix", "ratio=2")
    out = tmp_path / "bare.jsonl"
    said = shown("strip", str(file), "--out", str(out))
    assert "Certainly!" in said and "3 of 3 rows lost an opening" in said
    kept = [json.loads(line)["messages"][-1]["content"] for line in out.read_text().splitlines()]
    assert kept == ["Crate 0.", "Crate 1.", "Crate 2."]
    assert json.loads((tmp_path / "bare.jsonl.report.json").read_text())["changed"] == 3
    with pytest.raises(UserError, match=r"give a name that ends in \.jsonl"):
        shown("strip", str(file), "--out", str(tmp_path / "bare.csv"))
