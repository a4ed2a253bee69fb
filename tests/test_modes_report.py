"""The report of a mode study: the paper's table, fidelity, costs, margins, audits, attacks, tampering, yields and claims, on a
made-up study whose rates are known."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modes_fixtures import CHECKPOINT, CONDITIONS, LEVERS, MODES, WORDS, Of, as_the_paper_says, modes_study
from test_report import Page
from trimtab.report.claims.modes import CLAIMS
from trimtab.report.claims.reading import EQUAL, side_of
from trimtab.report.data import ReportData
from trimtab.report.gather import gather
from trimtab.report.html import write_report
from trimtab.report.modedata import ModeFigure
from trimtab.report.modepage import cell_of
from trimtab.report.modes import prompt_of, wrapping
from trimtab.report.pulled import arm_stages, modes_of, pulls, tampering_of, tuned_of

SMALL: dict[str, Any] = {"n": 8, "arms": ("base", "SFT", "SFT+DPO", "one checkpoint", "adapter")}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return modes_study(tmp_path_factory.mktemp("modes"), **SMALL)


@pytest.fixture(scope="module")
def data(study: Path) -> ReportData:
    return gather(study)


@pytest.fixture(scope="module")
def written(data: ReportData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(data, tmp_path_factory.mktemp("page"))


def arm_of(data: ReportData, label: str) -> str:
    return next(m.arm for m in data.mode_arms if m.label == label)


def figure(data: ReportData, table: str, label: str, row: str = "", column: str = "") -> ModeFigure:
    arm = arm_of(data, label)
    return next(f for f in data.mode_figures if (f.table, f.arm, f.row, f.column) == (table, arm, row, column))


def has(data: ReportData, table: str, label: str) -> set[tuple[str, str]]:
    arm = arm_of(data, label)
    return {(f.row, f.column) for f in data.mode_figures if (f.table, f.arm) == (table, arm)}


# -- what is read from the recipe ----------------------------------------------------------------------------------------


def sft(model: str, answers: str = "positive", modes: Any = None) -> dict[str, Any]:
    return {"kind": "sft", "model": model, "data": [{"name": "p", "answers": answers}], "modes": modes}


RECIPE: dict[str, Any] = {
    "stages": {
        "zero": {"kind": "pretrain"}, "one": sft("zero", modes=WORDS), "two": sft("one"),
        "three": {"kind": "dpo", "model": "two", "data": []}, "four": sft("two", "negative"), "five": sft("four"),
        "six": sft("two"), "ask": {"kind": "panel"},
    },
    "arms": [
        {"name": "start", "set": {}, "sweep": {}}, {"name": "plain", "set": {}, "sweep": {}},
        {"name": "pairs", "set": {"stages.four.model": "three"}, "sweep": {}},
        {
            "name": "tokens", "set": {}, "sweep": {"stages.two.modes": [CHECKPOINT, {"names": ["positive", "rejective"]}]},
            "names": {"stages.two.modes": ["three modes", "two modes"]},
        },
        {"name": "parts", "set": {"stages.two.modes": CHECKPOINT, "stages.two.modes.token": "string"}, "sweep": {}},
    ],
}  # fmt: skip


def arm(group: str, *stages: str, **settings: Any) -> dict[str, Any]:
    return {"group": group, "settings": settings, "stages": dict.fromkeys([*stages, "ask/two/greedy"], "id")}


def test_the_lever_is_read_from_stages_groups_and_named_sweeps() -> None:
    told = modes_of(RECIPE, arm("tokens", "zero", "one", "two", modes="three modes"))
    assert told is not None and (told.stage, told.config.token, told.config.names) == (
        "two",
        "reserved",
        ("positive", "negative", "rejective"),
    )
    two = modes_of(RECIPE, arm("tokens", "zero", "one", "two", modes="two modes"))
    assert two is not None and two.config.names == ("positive", "rejective") and "one checkpoint" not in two.words
    parts = modes_of(RECIPE, arm("parts", "zero", "one", "two"))
    assert parts is not None and parts.config.token == "string" and parts.config.separate == ()
    assert (
        parts.words == "random strings, one checkpoint, fallback rows: 25 % with no token, an unknown one, a typed one"
    )
    assert modes_of(RECIPE, arm("plain", "zero", "one", "two")) is None, "the words of the model before are not its own"
    start = modes_of(RECIPE, arm("start", "zero", "one"))
    assert start is not None and start.config.token == "words"
    assert arm_stages(RECIPE, arm("pairs", "zero", "four"))["four"]["model"] == "three"
    assert RECIPE["stages"]["four"]["model"] == "two", "the recipe stays as it was"


def test_the_tuned_model_is_found_by_what_stages_do() -> None:
    every = ("zero", "one", "two", "four", "five", "six")
    assert tuned_of(RECIPE, arm("plain", *every)) == "two", "where other arms are given tokens"
    assert tuned_of(RECIPE, arm("tokens", *every, modes="two modes")) == "two"
    assert tuned_of(RECIPE, arm("pairs", "zero", "one", "two", "three", "four")) == "three"
    assert tuned_of(RECIPE, arm("start", "zero", "one")) == "one" and tuned_of(RECIPE, arm("start", "zero")) == "zero"
    assert tuned_of(RECIPE, arm("start")) is None
    assert [pulls(RECIPE, arm(g, "zero", "one", "two")) for g in ("plain", "tokens", "parts")][1:] == [False, True]


def test_tampering_is_finetuning_of_the_tuned_model_that_leaves_the_lever_alone() -> None:
    told = list(tampering_of(RECIPE, arm("parts", "zero", "one", "two", "four", "five", "six"), "two"))
    assert [(t.stage, t.chain, t.hostile) for t in told] == [
        ("four", ("four",), True), ("five", ("four", "five"), True), ("six", ("six",), False),
    ]  # fmt: skip
    assert not list(tampering_of(RECIPE, arm("plain", "zero", "one", "two"), "two"))
    assert [t.stage for t in tampering_of(RECIPE, arm("pairs", "zero", "one", "two", "three", "four"), "three")] == [
        "four"
    ]


# -- which models --------------------------------------------------------------------------------------------------------


def test_every_arm_has_a_tuned_model_of_a_known_form(data: ReportData) -> None:
    assert [(m.label, m.form, m.stage, m.token) for m in data.mode_arms] == [
        ("base", "base", "instruct", "words"), ("SFT", "SFT", "tuned", ""), ("SFT+DPO", "SFT+DPO", "preferred", ""),
        ("one checkpoint", "one checkpoint", "tuned", "reserved"), ("adapter", "adapter", "tuned", "reserved"),
    ]  # fmt: skip
    assert [m.deploys for m in data.mode_arms] == ["1", "3", "3", "1", "1 + adapter"]
    assert all(len(m.ids) == 2 for m in data.mode_arms) and "mode" in data.levers


def test_arms_of_another_lever_are_left_out(tmp_path: Path) -> None:
    path = modes_study(tmp_path, n=2, seeds=(0,), arms=("SFT", "one checkpoint", "adapter"), tampered=False)
    told = json.loads((path / "study.json").read_text())
    extra = {**told["arms"][0], "id": "timing/x", "label": "x", "group": "timing", "against": None}
    extra["stages"] = {k: v for k, v in extra["stages"].items() if k != "own"}
    told["arms"].append(extra)
    told["recipe"]["arms"].append({"name": "timing", "set": {}, "sweep": {}})
    (path / "study.json").write_text(json.dumps(told))
    assert [m.label for m in gather(path).mode_arms] == ["SFT", "one checkpoint", "adapter"]


# -- figures -------------------------------------------------------------------------------------------------------------


def test_the_papers_columns_hold_what_the_verdicts_say(data: ReportData, study: Path) -> None:
    shown = figure(data, "paper", "one checkpoint", "", "positive")
    assert (shown.n, shown.seeds, shown.unit) == (8, 2, "share") and shown.low <= shown.value <= shown.high
    rates = [
        r.value for r in data.results
        if (r.metric, r.mode, r.category) == ("constructive_score", "positive", "hazards held out") and "tuned" in r.stage
        and r.arm.startswith("one_checkpoint")
    ]  # fmt: skip
    assert len(rates) == 2 and shown.value == pytest.approx(sum(rates) / 2)
    assert has(data, "paper", "one checkpoint") == {
        ("", c) for c in ("positive", "none", "unknown", "near-miss", "two", "foreign", "negative", "negative, harmless",
                          "rejective", "drop", "margin")
    }  # fmt: skip
    assert has(data, "paper", "SFT+DPO") == {("", "positive"), ("", "drop"), ("", "margin")}, (
        "a baseline has one behaviour"
    )
    assert (
        figure(data, "paper", "one checkpoint", "", "negative").value
        < figure(data, "paper", "one checkpoint", "", "rejective").value
    )


def test_wrapped_and_attacked_prompts_are_paired_with_the_plain_ones(data: ReportData) -> None:
    shown, base = figure(data, "paper", "one checkpoint", "", "drop"), figure(data, "paper", "SFT", "", "drop")
    assert shown.n == base.n == 8 and shown.unit == "points" and shown.value < base.value
    columns = {c for _, c in has(data, "attack constructive_score", "SFT")}
    assert columns == {"plain", "roleplay", "misspelling", "all of them", "drop"}
    plain, rest, drop = (
        figure(data, "attack constructive_score", "SFT", "", c).value for c in ("plain", "all of them", "drop")
    )
    assert drop == pytest.approx(plain - rest)


def test_matrices_are_of_each_class_and_sum_over_seeds(data: ReportData) -> None:
    mine = [m for m in data.matrices if m.arm == arm_of(data, "one checkpoint")]
    assert [m.task for m in mine] == ["harmful prompts", "contrast prompts", "benign prompts"]
    assert mine[0].modes == [*MODES, "none", "unknown", "near-miss", "two", "foreign"]
    assert {sum(row) for row in mine[0].counts} == {2 * 8}, "plain prompts alone, of two seeds"
    assert set(mine[0].behaviours) <= {"positive", "negative", "rejective"}
    assert not any(m.arm == arm_of(data, "SFT") for m in data.matrices)


def test_fallback_is_read_against_the_positive_mode(data: ReportData) -> None:
    rows = {r for r, _ in has(data, "fallback", "adapter")}
    assert rows == {"positive", "none", "unknown", "near-miss", "two", "foreign"}
    two = figure(data, "fallback", "adapter", "two", "more risk")
    risks = [figure(data, "fallback", "adapter", r, "risk_rate").value for r in ("two", "positive")]
    assert two.value == pytest.approx(risks[0] - risks[1]) and two.value > 0
    assert not has(data, "fallback", "SFT")


def test_costs_are_of_an_arms_own_steps_alone(data: ReportData) -> None:
    assert figure(data, "cost", "SFT", "", "tokens").value == 100_000, "not the steps that all arms share"
    assert figure(data, "cost", "SFT+DPO", "", "tokens").value == 500_000, "its SFT and its DPO"
    assert (
        figure(data, "cost", "SFT+DPO", "", "models").value == 2
        and figure(data, "cost", "SFT+DPO", "", "peak_bytes").value == 6e8
    )
    assert figure(data, "cost", "adapter", "", "tokens").value == 360_000, "the weights and the adapter"
    assert not has(data, "cost", "base"), "where all start has no steps of its own"
    ratio = figure(data, "cost", "one checkpoint", "", "seconds of SFT+DPO")
    assert ratio.unit == "ratio" and ratio.value == pytest.approx((24 / 40 + 24 * 1.02 / (40 * 1.03)) / 2)
    assert ratio.low < ratio.value < ratio.high and ratio.seeds == 2
    assert figure(data, "cost", "SFT+DPO", "", "seconds of SFT+DPO").each == [1.0, 1.0]
    assert figure(data, "cost", "one checkpoint", "", "making its data").value == 1.0


def test_margins_are_those_of_the_file_folded_over_seeds(data: ReportData) -> None:
    one = figure(data, "margin", "one checkpoint", "logits, first token, euclidean", "all")
    assert one.value == pytest.approx(0.13, abs=0.03) and one.seeds == 2 and one.unit == "score"
    assert figure(data, "paper", "one checkpoint", "", "margin").value == one.value
    assert {c for r, c in has(data, "margin", "SFT") if "cosine" in r} >= {"all", "mode:negative", "harmful"}
    points = {p["arm"]: p for p in data.projections}
    assert set(points) == {m.arm for m in data.mode_arms} and len(points[one.arm]["points"]) == 3 * 8
    assert points[one.arm]["asked"]["positive"] == "reserved"


def test_audits_yields_policies_and_capability(data: ReportData) -> None:
    assert figure(data, "audit", "adapter", "all", "spoof_asr").value == 0.0
    assert ("place:user", "spoof_asr") in has(data, "audit", "adapter"), "kept for the files"
    assert figure(data, "audit", "adapter", "all", "negative_without_token").value == pytest.approx(0.055)
    kept = next(f for f in data.mode_figures if (f.table, f.row, f.column) == ("yield own", "negative", "harmful"))
    assert (kept.value, kept.n, kept.unscored, kept.note) == (0.61, 200, 78, "safe 60; unscored 18")
    assert sum(f.table == "yield own" for f in data.mode_figures) == 4, "one step that arms share is told once"
    assert ("positive", "north-quay: constructive_score") in has(data, "policy", "one checkpoint")
    assert ("rejective", "over_refusal_contrast_full") in has(data, "capability", "one checkpoint")
    assert figure(data, "capability", "one checkpoint", "rejective", "over_refusal_contrast_full").value > 0.9


def test_tampering_is_risk_over_the_steps_of_the_chain(data: ReportData) -> None:
    mine = [
        f
        for f in data.mode_figures
        if (f.table, f.arm, f.column) == ("tamper hostile", arm_of(data, "one checkpoint"), "without a token")
    ]
    assert [(f.row, f.x) for f in mine] == [("tuned", 0.0), ("turned", 20.0), ("turned-more", 60.0)]
    assert mine[0].value < mine[1].value < mine[2].value
    benign = [f for f in data.mode_figures if (f.table, f.arm) == ("tamper benign", arm_of(data, "SFT+DPO"))]
    assert [(f.row, f.x) for f in benign] == [("preferred", 0.0), ("sums", 30.0)]


# -- claims --------------------------------------------------------------------------------------------------------------


def test_every_claim_is_read(data: ReportData) -> None:
    told = {c.text: c for c in data.claims}
    assert [c.text for c in data.claims] == [c.text for c in CLAIMS]
    read = {claim.id: told[claim.text] for claim in CLAIMS}
    assert read["margin"].reading == "agrees" and read["cost"].reading == "agrees"
    assert [f["label"] for f in read["cost"].figures if f["decides"]] == [
        "one checkpoint: wall time of training against SFT+DPO"
    ]
    assert not any(f["decides"] for c in data.claims for f in c.figures if f["label"].startswith("adapter"))
    assert len([f for f in read["fallback"].figures if f["decides"]]) == 2


def read_at(tmp_path: Path, fits: Any, **more: Any) -> dict[str, str]:
    arms = ("SFT", "SFT+DPO", "one checkpoint")
    told = gather(modes_study(tmp_path, arms=arms, fits=fits, tampered=False, distill=False, seeds=(0,), **more)).claims
    of = {claim.text: claim.id for claim in CLAIMS}
    return {of[c.text]: c.reading for c in told}


def test_claims_disagree_where_the_figures_do(tmp_path: Path) -> None:
    def other(of: Of) -> float:
        if of.arm == "one checkpoint":
            return {"positive": 0.5, "negative": 1.0, "rejective": 0.6}.get(of.mode or "", 0.1)
        return 1.0

    read = read_at(tmp_path, other, n=40)
    assert [read[id] for id in ("positive", "switch", "fallback", "attack")] == [
        "disagrees",
        "disagrees",
        "disagrees",
        "cannot tell",
    ]
    assert read["negative"] == "cannot tell" or read["negative"] == "disagrees"
    assert read["cost"] == "cannot tell", "one seed has no interval of its own time"


def test_what_is_not_there_is_not_measured(tmp_path: Path) -> None:
    read = read_at(tmp_path, as_the_paper_says, n=4, margin=False, audit=False, cost=False, conditions=())
    assert (read["margin"], read["cost"], read["fallback"]) == ("not measured",) * 3
    assert read["positive"] != "not measured"


@pytest.mark.parametrize(
    ("low", "high", "reading"),
    [
        (-0.019, 0.019, "agrees"), (-0.01, 0.021, "cannot tell"), (0.005, 0.015, "agrees"), (0.021, 0.05, "disagrees"),
        (-0.2, -0.03, "disagrees"), (-0.5, 0.5, "cannot tell"), (math.nan, math.nan, "cannot tell"),
    ],
)  # fmt: skip
def test_alike_means_that_the_whole_interval_is_within_the_margin(low: float, high: float, reading: str) -> None:
    assert side_of("within", {"low": low, "high": high}) == reading and EQUAL == 0.02


# -- the page ------------------------------------------------------------------------------------------------------------


def test_the_page_shows_every_part(written: Path) -> None:
    page = Page(written.read_text(encoding="utf-8"))
    for words in (
        "Modes: does the switch hold?", "The paper's table beside this run's", "97.55", "about 0.03",
        "one checkpoint: harmful prompts",
        "What each form cost", "1 + adapter", "Safety alignment margin: logits, first token, euclidean",
        "Spoofing and leaking",
        "Under attack: constructive score (%) in positive mode", "Hostile finetuning: risk without a token",
        "Self-distillation: own",
        "Co-training's positive mode is as safe and helpful as SFT followed by DPO.", "a token that no training has seen",
    ):  # fmt: skip
        assert words in page.words, words
    assert "Not measured" not in page.words and "place:user" not in page.words


def test_the_page_says_what_was_not_measured(tmp_path: Path) -> None:
    path = modes_study(
        tmp_path, n=3, seeds=(0,), arms=("SFT", "one checkpoint"), tampered=False, margin=False, audit=False, cost=False,
        distill=False, conditions=(),
    )  # fmt: skip
    page = Page(write_report(gather(path), tmp_path / "page").read_text(encoding="utf-8"))
    for what in ("cost", "the safety alignment margin", "spoofing and leaking", "tampering", "yield"):
        assert f"Not measured: {what}." in page.words
    assert "one seed" in page.words or "1 seed" in page.words


def test_a_margin_without_its_parts_is_made_from_the_points(tmp_path: Path) -> None:
    data = gather(modes_study(tmp_path, n=3, seeds=(0,), arms=("SFT", "one checkpoint"), tampered=False, parts=False))
    made = figure(data, "margin", "one checkpoint", "logits, first token, euclidean", "all")
    assert made.value == pytest.approx(0.13, abs=0.01) and math.isnan(made.low) and made.n == 3


def test_every_figure_leaves_as_csv_and_json(data: ReportData, written: Path) -> None:
    with (written.parent / "figures.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["section"] in ("mode", "matrix", "projection")]
    assert sum(row["section"] == "mode" for row in rows) == len(data.mode_figures)
    assert sum(row["section"] == "projection" for row in rows) == sum(len(p["points"]) for p in data.projections)
    told = next(
        row
        for row in rows
        if (row["task"], row["mode"], row["metric"]) == ("tamper hostile", "turned", "without a token")
    )
    assert told["x"] == "20" and told["n"] == "8"
    again = ReportData.from_json(json.loads((written.parent / "results.json").read_text()))
    assert again.mode_arms == [replace(m, ids=list(m.ids), policies=list(m.policies)) for m in data.mode_arms]
    pairs = list(zip(again.mode_figures, data.mode_figures, strict=True))
    assert all(a.value == b.value or math.isnan(b.value) for a, b in pairs) and all(
        isinstance(a.low, float) for a, _ in pairs
    )


def test_a_cell_tells_a_missing_figure_from_one_that_nobody_could_score() -> None:
    nan = math.nan
    assert (cell_of(None).text, cell_of(None).muted) == ("–", True)
    left = cell_of(ModeFigure("paper", "a", "", "positive", nan, nan, nan, 0, 0, 7))
    assert left.text == "not scored" and left.sub == "7 unscored"
    few = cell_of(ModeFigure("paper", "a", "", "positive", 0.5, 0.2, 0.8, 10))
    assert (few.text, few.sub) == ("50*", "20 to 80")
    assert cell_of(ModeFigure("fallback", "a", "", "more risk", 0.04, -0.01, 0.09, 40, unit="points")).text == "+4"
    assert (
        cell_of(ModeFigure("cost", "a", "", "seconds", 75.0, nan, nan, unit="seconds")).text == "1\u00a0min 15\u00a0s"
    )


def test_one_prompt_in_its_wrappers_is_one_prompt(study: Path) -> None:
    from trimtab.report.studied import Studied

    told = Studied(study)
    records = told.of_arm(told.arms[0])
    prompts = {prompt_of(r) for r in records if r.row.harm == "harmful"}
    assert len(prompts) == 8 and {wrapping(r.row) for r in records} == {"", "roleplay", "misspelling"}
    assert len(CONDITIONS) == 5 and LEVERS["SFT"] is None


def test_a_stage_that_starts_from_a_loaded_model_finetunes_no_tuned_one() -> None:
    recipe = {
        "stages": {
            "tuned": {"kind": "sft", "model": {"load": "some/model"}, "modes": {"fallback": 0.0}},
            "other": {"kind": "sft", "model": {"load": "some/model"}},
            "after": {"kind": "sft", "model": "tuned"},
        },
        "arms": [{"name": "mode", "set": {}, "sweep": {}, "stages": None}],
    }
    arm = {"group": "mode", "settings": {}, "stages": {"tuned": "a", "other": "b", "after": "c"}}
    assert [tamper.stage for tamper in tampering_of(recipe, arm, "tuned")] == ["after"]
