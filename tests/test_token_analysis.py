"""Token analysis from rows to files: the table, the ranking, the heat-map, the command and the stage."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from typer.testing import CliRunner

from test_run import TINY
from test_steps import SHAPE, context_of
from trimtab.analyze.config import TokenConfig
from trimtab.analyze.heatmap import heatmap
from trimtab.analyze.token_report import ranking, results
from trimtab.analyze.tokens import TokenTable, analyze_tokens, token_strings
from trimtab.cli import analyze, app
from trimtab.data.render import Renderer
from trimtab.errors import Fault, UserError
from trimtab.evaluate.files import read_stage
from trimtab.levers.prefix import PrefixConfig, apply_prefix
from trimtab.models.build import build_model, train_tokenizer
from trimtab.models.bundle import BundleManifest, save_bundle
from trimtab.progress import JsonReporter
from trimtab.recipe.load import load_recipe
from trimtab.recipe.stages import TokenAnalysisStage
from trimtab.study.execute import execute
from trimtab.study.plan import make_plan
from trimtab.study.steps.tokens import run_token_analysis
from trimtab.types import SPAN_ID, SPANS, Row
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import Tidewater

torch.set_num_threads(1)
WORLD: dict[str, Any] = {"seed": 3, "goods": 8, "hazards": 8}
QUICK = TokenConfig(projections=4, bootstrap=50, sequences=3)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("analysed")
    town = Tidewater(TidewaterConfig.model_validate(WORLD))
    texts = [m["content"] for row in town.chats("benign", 60) for m in row.messages or ()]
    tokenizer = train_tokenizer(texts, 400, reserved=4)
    save_bundle(where / "model", build_model(SHAPE, tokenizer, seed=3), tokenizer, BundleManifest())
    return where


@pytest.fixture(scope="module")
def model(model_dir: Path) -> tuple[Any, Renderer]:
    from trimtab.models.load import load

    loaded, tokenizer = load(model_dir / "model")
    return loaded, Renderer(tokenizer)


def chat(id: str, answer: str, question: str = "Where is the rope?", prefix: str | None = None) -> Row:
    text = f"{prefix} {answer}" if prefix else answer
    return Row(
        id=id, prefix=prefix, messages=({"role": "user", "content": question}, {"role": "assistant", "content": text})
    )


ROWS = [
    chat("a", "It is in the shed.", prefix="Let me think."),
    chat("b", "By the quay, under the crate."),
    chat("c", "Ask Anna.", prefix="Let me think."),
]


@pytest.fixture(scope="module")
def table(model: tuple[Any, Renderer]) -> TokenTable:
    return analyze_tokens(*model, ROWS, QUICK, 0)


# --- the table -----------------------------------------------------------------------------------------------------------


def test_every_token_has_a_line_and_every_trained_one_its_values(
    model: tuple[Any, Renderer], table: TokenTable
) -> None:
    rendered = [model[1].row(row) for row in ROWS]
    assert table.rows == ("a", "b", "c") and len(table.token_id) == sum(len(r.ids) for r in rendered)
    np.testing.assert_array_equal(table.token_id[table.row == 1], rendered[1].ids)
    for name in ("loss", "logit_grad", "head_grad", "grad_norm"):
        np.testing.assert_array_equal(np.isnan(table.values[name]), ~table.trained)
    assert table.offset[(table.row == 0) & (table.span == SPAN_ID["prefix"])].tolist()[:3] == [0, 1, 2]
    assert "".join(table.text[i] for i in table.token_id[(table.row == 0) & table.trained]).startswith(
        "Let me think. It is"
    )
    assert table.method["projections"] == 4 and table.method["tied_output"] is True


def test_parquet_round_trip(table: TokenTable, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    table.write(tmp_path / "tokens.parquet")
    frame = pq.read_table(tmp_path / "tokens.parquet")
    expected = ["row_id", "position", "token_id", "token", "span", "offset", "trained"]
    assert frame.column_names == [*expected, "loss", "logit_grad", "head_grad", "grad_norm", "grad_se"]
    assert frame["loss"].null_count == int((~table.trained).sum()) and set(frame["span"].to_pylist()) <= set(SPANS)
    again = TokenTable.read(tmp_path / "tokens.parquet")
    for name in ("row", "position", "offset", "token_id", "span", "trained"):
        np.testing.assert_array_equal(getattr(again, name), getattr(table, name))
    np.testing.assert_allclose(again.values["grad_norm"], table.values["grad_norm"], rtol=1e-6)
    assert again.rows == table.rows and again.text == table.text and again.method == table.method
    with pytest.raises(UserError, match="no such file"):
        TokenTable.read(tmp_path / "none.parquet")
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(Fault, match="damaged"):
        TokenTable.read(tmp_path / "bad.parquet")


def test_rows_that_cannot_be_measured_are_counted_or_named(model: tuple[Any, Renderer]) -> None:
    asked = Row(id="asked", messages=({"role": "user", "content": "Where?"},))
    long = chat("long", "rope " * 200)
    quick = TokenConfig(measures=("loss",))
    found = analyze_tokens(*model, [asked, long, ROWS[1]], quick, 0)
    assert found.rows == ("b",) and found.left_out == {"nothing trained": 1, "too long": 1}
    assert list(found.values) == ["loss"] and found.grad_se is None and found.method["projections"] is None
    with pytest.raises(UserError, match=r"none can be measured \(1 nothing trained, 1 too long\)"):
        analyze_tokens(*model, [asked, long], quick, 0)
    with pytest.raises(UserError, match="the set is empty"):
        analyze_tokens(*model, [], quick, 0)
    with pytest.raises(UserError, match="'b': the id is given to several rows"):
        analyze_tokens(*model, [ROWS[1], ROWS[1]], quick, 0)


def test_settings() -> None:
    with pytest.raises(ValidationError):
        TokenConfig(projections=0)
    with pytest.raises(ValidationError, match="twice"):
        TokenConfig(measures=("loss", "loss"))
    assert TokenConfig(measures=("grad_norm", "loss")).measures == ("loss", "grad_norm")


def test_token_strings_can_be_read() -> None:
    class Spelling:
        spelt: ClassVar = {0: "Ġrevised", 1: "Ċ", 2: "Ã", 3: "▁the", 4: "</s>"}
        text: ClassVar = {0: " revised", 1: "\n", 2: "\N{REPLACEMENT CHARACTER}", 3: "the", 4: "</s>"}

        def convert_ids_to_tokens(self, id: int) -> str:
            return self.spelt[id]

        def decode(self, ids: list[int], **options: Any) -> str:
            return self.text[ids[0]]

    assert token_strings(Spelling(), range(5)) == {0: " revised", 1: "\\n", 2: "<Ã>", 3: " the", 4: "</s>"}


# --- the ranking ---------------------------------------------------------------------------------------------------------


def test_ranking_by_hand(table: TokenTable) -> None:
    read = ranking(table, 0, draws=200, sequences=2)
    json.dumps(read, allow_nan=False)
    assert (
        read["format"] == 1
        and read["rows"] == 3
        and read["measures"] == ["loss", "logit_grad", "head_grad", "grad_norm"]
    )
    prefix = (table.span == SPAN_ID["prefix"]) & table.trained
    body = (table.span == SPAN_ID["body"]) & table.trained
    for name in read["measures"]:
        mean, low, high = read["spans"]["prefix"][name]
        assert mean == pytest.approx(table.values[name][prefix].mean()) and low <= mean <= high
    entry = next(e for e in read["tokens"] if e["span"] == "prefix" and e["token"].strip() in "Let me think.")
    mine = prefix & (table.token_id == entry["token_id"])
    assert entry["count"] == mine.sum() and entry["loss"][0] == pytest.approx(table.values["loss"][mine].mean())
    assert entry["ratio"]["loss"] == pytest.approx(entry["loss"][0] / table.values["loss"][body].mean())
    norms = [e["grad_norm"][0] for e in read["tokens"]]
    assert norms == sorted(norms, reverse=True) and len(read["tokens"]) == len(
        {(e["token_id"], e["span"]) for e in read["tokens"]}
    )
    first = next(e for e in read["positions"] if e["span"] == "prefix" and e["position"] == 0)
    assert first["count"] == 2 and first["loss"][0] == pytest.approx(
        table.values["loss"][prefix & (table.offset == 0)].mean()
    )
    once = next(e for e in read["tokens"] if e["count"] == 1)
    assert once["loss"][1:] == [None, None]  # one row says nothing of the spread
    assert [s["row_id"] for s in read["sequences"]] == ["a", "b"]
    shown = read["sequences"][0]
    assert len(shown["tokens"]) == len(shown["spans"]) == len(shown["trained"]) == len(shown["values"]["loss"])
    assert [v is not None for v in shown["values"]["loss"]] == shown["trained"]


def test_results_are_prefix_body_and_their_ratio(table: TokenTable) -> None:
    found = {(r.metric, r.category): r for r in results(table, 0, draws=200)}
    assert set(found) == {
        (f"token_{name}{end}", category)
        for name in ("loss", "grad_norm")
        for end, category in (("", "prefix"), ("", "body"), ("_ratio", "prefix / body"))
    }
    ratio = found["token_loss_ratio", "prefix / body"]
    assert ratio.value == pytest.approx(found["token_loss", "prefix"].value / found["token_loss", "body"].value)
    assert (
        ratio.low <= ratio.value <= ratio.high
        and found["token_loss", "prefix"].n == 2
        and found["token_loss", "body"].n == 3
    )


def test_rows_without_a_prefix_have_no_ratio(model: tuple[Any, Renderer]) -> None:
    plain = analyze_tokens(*model, [ROWS[1]], TokenConfig(measures=("loss",)), 0)
    only = [r for r in results(plain, 0) if r.category == "body"]
    assert [r.metric for r in results(plain, 0)] == ["token_loss"] and (only[0].low, only[0].high) == (
        0.0,
        float("inf"),
    )
    text = analyze_tokens(*model, [Row(id="t", text="The quay is old.")], TokenConfig(measures=("loss",)), 0)
    assert results(text, 0) == [] and ranking(text, 0, draws=50)["tokens"][0]["ratio"] == {"loss": None}


# --- the heat-map --------------------------------------------------------------------------------------------------------


class Boxes(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.titles: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.titles += [value or "" for name, value in attrs if name == "title"]
        assert not any(name.startswith("on") for name, _ in attrs)


def test_hostile_strings_stay_text(table: TokenTable) -> None:
    read = ranking(table, 0, draws=50)
    hostile = [
        "<script>alert(1)</script>",
        '" onmouseover="alert(1)',
        " <img src=x onerror=alert(1)>",
        "&lt;",
        "</style>",
    ]
    one = read["sequences"][0]
    one["tokens"][: len(hostile)] = hostile
    one["row_id"] = "<svg onload=alert(1)>"
    page = heatmap(read, "<b>title</b>")
    boxes = Boxes()
    boxes.feed(page)
    assert {"script", "img", "svg", "b"}.isdisjoint(boxes.tags) and boxes.tags.count("style") == 1
    assert "&amp;lt;" in page and "␣&lt;img" in page and "http" not in page
    shown = sum(len(s["tokens"]) for s in read["sequences"])
    assert len(boxes.titles) == shown * len(read["measures"]) and any(t.startswith("prefix: ") for t in boxes.titles)
    assert "prompt, not trained" in boxes.titles


def test_a_page_without_rows(table: TokenTable) -> None:
    assert "No rows were kept" in heatmap(ranking(table, 0, draws=50, sequences=0), "none")


# --- the command and the stage -------------------------------------------------------------------------------------------


def command() -> Any:
    if not any(group.name == "analyze" for group in app.registered_groups):
        analyze.register(app)
    return app


def test_the_command_end_to_end(model_dir: Path, tmp_path: Path) -> None:
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps({"id": r.id, "messages": list(r.messages or ())}) + "\n" for r in ROWS))
    out = tmp_path / "out"
    words = ["analyze", "tokens", str(model_dir / "model"), "--data", str(data), "--data", "tidewater:benign"]
    words += ["--prefix", "safety", "--limit", "3", "-k", "2", "--out", str(out)]
    done = CliRunner().invoke(command(), words)
    assert done.exit_code == 0, done.output
    assert sorted(file.name for file in out.iterdir()) == ["heatmap.html", "ranking.json", "tokens.parquet"]
    read = json.loads((out / "ranking.json").read_text())
    assert read["rows"] + read["left_out"].get("too long", 0) == 6 and read["spans"]["prefix"]["count"] > 0
    assert "grad_norm / body" in done.output and "prefix" in done.output
    again = CliRunner().invoke(command(), words)
    assert isinstance(again.exception, UserError) and "name a new directory" in str(again.exception)
    for wrong, said in (
        (["--data", "nowhere"], "neither a file"),
        (["--data", "tidewater:x"], "no kind of trained chats"),
    ):
        failed = CliRunner().invoke(command(), [*words[:3], *wrong, "--out", str(tmp_path / "new")])
        assert isinstance(failed.exception, UserError) and said in str(failed.exception)
    wrong_measure = CliRunner().invoke(command(), [*words[:-1], str(tmp_path / "new"), "--measures", "weight"])
    assert isinstance(wrong_measure.exception, UserError) and "measures" in str(wrong_measure.exception)


DATA = [{"name": "goods", "tidewater": "benign", "n": 8}]


@pytest.mark.parametrize("loss_on_prefix", [True, False])
def test_the_step_leaves_its_four_files(tmp_path: Path, model_dir: Path, loss_on_prefix: bool) -> None:
    events: list[Any] = []
    prefix = PrefixConfig(ratio=0.5, loss_on_prefix=loss_on_prefix)
    config = QUICK.plain() | {"data": DATA, "prefix": prefix.plain(), "world": WORLD, "seed": 1}
    context = context_of(tmp_path, config, events.append, model=model_dir)
    run_token_analysis(replace(context, step=replace(context.step, inputs={"model": "m" * 64})))
    made = {file.name for file in context.draft.path.iterdir()}
    assert made == {"tokens.parquet", "ranking.json", "heatmap.html", "metrics.jsonl"}
    table = TokenTable.read(context.draft.path / "tokens.parquet")
    town = Tidewater(TidewaterConfig.model_validate(WORLD))
    opened = {r.id for r in apply_prefix(town.chats("benign", 8), prefix, 1) if r.prefix}
    assert {table.rows[i] for i in table.row[table.span == SPAN_ID["prefix"]]} == opened
    assert table.trained[table.span == SPAN_ID["prefix"]].any() == loss_on_prefix
    header, rows = read_stage(context.draft.path / "metrics.jsonl")
    assert (
        set(header["metrics"]) == {r["metric"] for r in rows}
        and ("token_loss_ratio" in header["metrics"]) == loss_on_prefix
    )
    assert events[-1]["step"] == events[-1]["total"] and context.draft.facts and context.draft.facts["rows"] == 8


def test_a_stage_in_a_recipe_is_run_once(tmp_path: Path) -> None:
    raw = json.loads(json.dumps(TINY))
    raw["stages"] = {name: raw["stages"][name] for name in ("corpus", "base")} | {
        "anchors": {
            "kind": "token_analysis", "models": ["base"], "data": DATA, "prefix": {"ratio": 0.5}, "projections": 2,
            "bootstrap": 50,
        },
    }  # fmt: skip
    raw["stages"]["base"]["budget"] = 64 * 8 * 3
    raw["arms"] = [{"name": "timing"}]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    out = tmp_path / "runs" / "tiny"
    plan = make_plan(*load_recipe(tmp_path / "tiny.yaml"))
    step = next(step for step in plan.steps.values() if step.kind == "token_analysis")
    assert step.name == "anchors/base" and plan.arms[0].cells["anchors/base"].model == "base"
    assert execute(plan, out, JsonReporter()) == len(plan.steps)
    assert (out.parent / "store" / step.short / "ranking.json").is_file()
    assert execute(make_plan(*load_recipe(tmp_path / "tiny.yaml")), out, JsonReporter()) == 0


def test_negative_answers_are_not_shown() -> None:
    with pytest.raises(ValidationError, match="negative ones are not measured"):
        TokenAnalysisStage.model_validate({
            "kind": "token_analysis", "models": ["m"],
            "data": [{"name": "x", "tidewater": "harmful-seen", "n": 2, "answers": "negative"}],
        })  # fmt: skip
