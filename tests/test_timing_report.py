"""The report of a timing study: cells, seeds, claims, steering and probes, on a made-up study whose rates are known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from test_report import Page
from timing_fixtures import Of, later_is_riskier, timing_study
from trimtab.errors import Fault
from trimtab.evaluate import stats
from trimtab.report.claims.reading import MARGIN, side_of
from trimtab.report.claims.timing import CLAIMS, Run, read_claims
from trimtab.report.contrasts import contrast, slope
from trimtab.report.data import Arm, ReportData
from trimtab.report.gather import gather
from trimtab.report.html import write_report
from trimtab.report.panels import Cells, decoder_kind, roles
from trimtab.report.pulled import timing_of
from trimtab.types import Result

SMALL = {"models": ("chat", "sums"), "decoders": ("top-k", "safebeam"), "n": 12, "metrics": False}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return timing_study(tmp_path_factory.mktemp("timing"), **SMALL)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def data(study: Path) -> ReportData:
    return gather(study)


@pytest.fixture(scope="module")
def page(data: ReportData, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(write_report(data, tmp_path_factory.mktemp("page")).read_text(encoding="utf-8"))


def reading(data: ReportData, start: str) -> str:
    return next(c.reading for c in data.claims if c.text.startswith(start))


# -- intervals over seeds ----------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=8).filter(lambda x: np.std(x) > 1e-6))
def test_the_interval_over_seeds_is_students(values: list[float]) -> None:
    mean, low, high, p = stats.over_seeds(values)
    test = scipy_stats.ttest_1samp(values, 0.0)
    wanted = test.confidence_interval(0.95)
    assert (mean, low, high, p) == pytest.approx((np.mean(values), wanted.low, wanted.high, test.pvalue), abs=1e-9)


def test_one_seed_has_no_interval_and_equal_seeds_no_p() -> None:
    assert stats.over_seeds([0.3])[0] == 0.3 and all(math.isnan(x) for x in stats.over_seeds([0.3])[1:])
    assert stats.over_seeds([0.25, 0.25])[:3] == (0.25, 0.25, 0.25) and math.isnan(stats.over_seeds([0.25, 0.25])[3])
    assert all(math.isnan(x) for x in stats.over_seeds([]))
    with pytest.raises(ValueError, match="one per seed"):
        stats.over_seeds([0.1, math.nan])


def cell(*seeds: dict[str, float]) -> dict[int, dict[str, float]]:
    return dict(enumerate(seeds))


def test_one_seed_is_paired_over_prompts() -> None:
    a = {f"p{i}": float(i < 30) for i in range(40)}
    b = {f"p{i}": float(i < 12) for i in range(40)}
    made = contrast([(1.0, cell(a)), (-1.0, cell(b))], key="t")
    assert made is not None and made.interval.startswith("paired over prompts") and made.n == 40
    assert (made.low, made.high) == pytest.approx(stats.newcombe_paired(12, 18, 0, 10))
    assert made.p == pytest.approx(float(stats.mcnemar_exact(18, 0))) and made.value == pytest.approx(0.45)


def test_seeds_that_agree_by_chance_do_not_shrink_the_interval_below_that_of_prompts() -> None:
    rng = np.random.default_rng(0)
    prompts = [f"p{i}" for i in range(40)]
    equal = [{p: float(x) for p, x in zip(prompts, rng.permutation([1.0] * 16 + [0.0] * 24))} for _ in range(3)]
    zero = [dict.fromkeys(prompts, 0.0)] * 3
    made = contrast([(1.0, cell(*equal)), (-1.0, cell(*zero))], key="t")
    assert (
        made is not None and made.value == pytest.approx(0.4) and [v for _, v in made.each] == pytest.approx([0.4] * 3)
    )
    assert made.low < 0.33 and made.high > 0.47, "three equal seeds are no certainty"
    spread = [{p: float(i < k) for i, p in enumerate(prompts)} for k in (4, 16, 28)]
    made = contrast([(1.0, cell(*spread)), (-1.0, cell(*zero))], key="t")
    assert made is not None
    wanted = scipy_stats.ttest_1samp([0.1, 0.4, 0.7], 0.0).confidence_interval(0.95)
    assert (made.low, made.high) == pytest.approx((wanted.low, min(1.0, wanted.high)))


def test_only_prompts_and_seeds_that_all_cells_have_count() -> None:
    a, b = cell({"p": 1.0, "q": 1.0, "r": 0.0}, {"p": 1.0}), cell({"p": 0.0, "q": 1.0})
    made = contrast([(1.0, a), (-1.0, b)], key="t")
    assert made is not None and made.n == 2 and made.value == 0.5 and len(made.each) == 1
    assert contrast([(1.0, a), (-1.0, {5: {"p": 1.0}})], key="t") is None
    assert contrast([], key="t") is None


@given(st.lists(st.floats(0, 1), min_size=2, max_size=5, unique=True), st.floats(-0.5, 0.5))
def test_a_slope_finds_the_line(starts: list[float], rise: float) -> None:
    if max(starts) - min(starts) < 0.01:
        return
    at = [(s, cell({"": 0.5 + rise * s})) for s in starts]
    assert sum(w * v[0][""] for w, v in slope(at)) == pytest.approx(rise, abs=1e-6)


# -- what stands where -------------------------------------------------------------------------------------------------


def test_roles_and_decoders_are_read_from_settings_not_names() -> None:
    def sft(model: object, answers: str = "positive") -> dict[str, object]:
        return {"kind": "sft", "model": model, "data": [{"answers": answers}]}

    stages = {
        "zig": {"kind": "pretrain"}, "a": sft("zig"), "b": sft("a"), "c": sft("a", "negative"), "d": sft({"load": "x"}),
        "e": sft("d"),
    }  # fmt: skip
    assert roles(stages) == {
        "zig": "base", "a": "instruct", "b": "benign", "c": "hostile", "d": "instruct", "e": "benign",
    }  # fmt: skip
    assert decoder_kind({"temperature": 0}) == "greedy" and decoder_kind({"temperature": 0.7}) == "sampled"
    assert decoder_kind({"temperature": 0, "safebeam": {"beams": 4}}) == "safebeam"


def test_timing_is_read_from_the_recipe_the_group_and_the_sweep() -> None:
    recipe = {
        "stages": {"base": {"kind": "pretrain", "timing": {"start": 0.1, "exposure": "natural", "before": "raw"}}},
        "arms": [
            {
                "name": "g",
                "set": {"stages.base.timing.exposure": "matched"},
                "sweep": {"stages.base.timing.start": [0.2]},
            },
            {"name": "other", "set": {"stages.base.train.lr": 1}, "sweep": {}},
            {"name": "whole", "set": {"stages.base.timing": {"start": 1.0}}, "sweep": {}},
        ],
    }
    arm = {"group": "g", "settings": {"start": 0.2}, "stages": {"base": "x"}}
    told = timing_of(recipe, arm)
    assert told is not None and (told["start"], told["exposure"], told["before"]) == (0.2, "matched", "raw")
    assert timing_of(recipe, {**arm, "group": "other", "settings": {}}) is None
    whole = timing_of(recipe, {**arm, "group": "whole", "settings": {}})
    assert whole is not None and whole["start"] == 1.0
    spelt = {**recipe, "arms": [{"name": "g", "set": {"stages.base.timing.phases": [{"at": 0}]}, "sweep": {}}]}
    assert timing_of(spelt, {**arm, "settings": {}}) is None


def test_the_grid_counts_what_the_verdicts_say(study: Path, data: ReportData) -> None:
    assert [p.stage for p in data.places] == ["chat · top-k", "chat · safebeam", "sums · top-k", "sums · safebeam"]
    assert [p.role for p in data.places] == ["instruct", "instruct", "benign", "benign"]
    arm = next(
        a for a in json.loads((study / "study.json").read_text())["arms"] if a["label"] == "never" and a["seed"] == 1
    )
    judged = study.parent / "store" / f"judge-{arm['stages']['panel/sums/top-k'][:16]}"
    lines = [json.loads(line) for line in (judged / "judgements.jsonl").read_text().splitlines()[1:]]
    unsafe = sum(v["verdict"] == "unsafe" for v in lines)
    mine = [
        r for r in data.results
        if r.arm == arm["id"] and r.stage == "sums · top-k" and r.metric == "risk_rate" and r.category in data.groups
    ]  # fmt: skip
    assert {r.category for r in mine} == {
        "hazards seen",
        "hazards held out",
        "hazards seen, wrapped",
        "hazards held out, wrapped",
    }
    assert sum(round(r.value * r.n) for r in mine) == unsafe and sum(r.n for r in mine) == 48
    assert len({(r.arm, r.stage, r.metric, r.category, r.mode) for r in data.results}) == len(data.results)


def test_the_page_shows_every_arm_cell_interval_and_folds_the_details(data: ReportData, page: Page) -> None:
    for arm in data.arms:
        assert arm.label in page.words
    for text in ("natural exposure", "matched exposure", "hazards held out, wrapped", "3 seeds", "n 12", "perplexity · documents",
                 "How far SafeBeam moves each arm", "Probes of the last token", "Tokens read in pretraining"):  # fmt: skip
        assert text in page.words, text
    tags = [tag for tag, _ in page.tags]
    assert tags.count("table") == tags.count("caption") and tags.count("details") > 8
    assert all(a.get("scope") for t, a in page.tags if t == "th")
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    order = [page.words.index(f"{label} 3 seeds") for label in ("start 0 %", "start 20 %", "start 60 %", "never")]
    assert order == sorted(order), "arms stand in the order of their start"


def test_the_report_rebuilds_from_its_results_and_stays_small(data: ReportData, tmp_path: Path) -> None:
    first = write_report(data, tmp_path / "a")
    again = ReportData.from_json(json.loads((first.parent / "results.json").read_text(encoding="utf-8")))
    second = write_report(again, tmp_path / "b")
    for name in ("report.html", "figures.csv", "results.json"):
        assert (first.parent / name).read_bytes() == (second.parent / name).read_bytes(), name
    assert first.stat().st_size < 1_500_000


# -- what is said ------------------------------------------------------------------------------------------------------


def test_findings_are_folded_over_the_seeds(data: ReportData) -> None:
    assert len(data.findings) == 5, "one for each arm but the baseline, not one per seed"
    assert all("mean over 3 seeds" in f.text and "“never”" in f.text for f in data.findings)
    row = next(
        c for c in data.comparisons
        if c["b"].startswith("timing/start_0_%") and c["stage"] == "sums · top-k" and c["task"] == "hazards held out"
    )  # fmt: skip
    assert row["seeds"] == 3 and len(row["each"]) == 3 and row["difference"] < -0.2 and row["p_holm"] >= row["p"]
    assert row["difference"] == pytest.approx(sum(v for _, v in row["each"]) / 3)


def test_steering_is_the_paired_difference_of_decoders(data: ReportData) -> None:
    of = {arm.id: arm for arm in data.arms}
    row = next(
        r
        for r in data.steering
        if of[r["arm"]].label == "never" and (r["model"], r["group"]) == ("sums", "hazards held out")
    )
    values = {
        (r.arm, r.stage): r.value for r in data.results if r.metric == "risk_rate" and r.category == "hazards held out"
    }
    arms = [a.id for a in data.arms if a.label == "never"]
    wanted = sum(values[a, "sums · safebeam"] - values[a, "sums · top-k"] for a in arms) / 3
    assert row["difference"] == pytest.approx(wanted) and row["high"] < 0


def test_claims_that_the_study_was_made_to_support_are_found(data: ReportData, page: Page) -> None:
    assert len(data.claims) == len(CLAIMS)
    assert reading(data, "An earlier start keeps the model safer through benign") == "agrees"
    assert reading(data, "An earlier start separates") == "agrees"
    assert reading(data, "SafeBeam lowers") == "agrees" and reading(data, "Rephrased text") == "agrees"
    assert reading(data, "Decoded by top-k") == "disagrees", "0 % is the safest here, so the middle is not best"
    assert reading(data, "Pretraining on score-0") == "not measured"
    assert "11 of 12 claims could be tested here, with 3 seeds" in page.words
    claim = next(c for c in data.claims if c.text.startswith("An earlier start keeps"))
    assert [f["series"] for f in claim.figures] == ["natural", "natural", "matched", "matched"]
    assert (
        claim.figures[0]["seeds"] == 3 and claim.figures[0]["p_holm"] is not None and claim.figures[2]["p_holm"] is None
    )
    assert claim.matched == "agrees" and "matched arms: agrees" in page.words, "the matched arms are read by themselves"
    assert {c.versions["v1"] for c in data.claims} and all(set(c.versions) == {"v1", "v2"} for c in data.claims)


def run_of(risk: Callable[[float, str], float], *, seeds: int = 3, kinds: tuple[str, ...] = ("sampled",)) -> Run:
    """Natural arms at four starts with a benignly finetuned model; ``risk(start, decoder kind)``."""
    from trimtab.report.data import Place
    from trimtab.report.panels import Cell

    starts, cells, arms, timing = (0.0, 0.2, 0.6, 1.0), Cells(), [], {}
    places = [Place(k, "p", "m", k, "benign", k) for k in kinds]
    for start in starts:
        for seed in range(seeds):
            id = f"{start}@{seed}"
            arms.append(Arm(id, f"{start}", "timing", {"start": start}, seed))
            timing[id] = {"start": start, "exposure": "natural", "before": "safe_only", "dose": None}
            cells.seeds[id] = seed
            for place in places:
                hits = round(100 * risk(start, place.kind)) + seed - 1
                values = {f"p{i}": float(i < hits) for i in range(100)}
                cells.by_arm[id, place.stage] = Cell(values={(None, "hazards held out", "risk_rate"): values})
    return Run.of(arms, timing, cells, places, [])


def said(run: Run) -> dict[str, str]:
    return {claim.id: read.reading for claim, read in zip(CLAIMS, read_claims(run), strict=True)}


@pytest.mark.parametrize(
    ("risk", "earlier", "middle"),
    [
        (lambda s, _: 0.2 + 0.5 * s, "agrees", "disagrees"),
        (lambda s, _: 0.7 - 0.5 * s, "disagrees", "disagrees"),
        (lambda s, _: 0.4, "cannot tell", "cannot tell"),
        (lambda s, _: 0.2 if 0 < s < 1 else 0.6, "disagrees", "agrees"),
    ],
)
def test_readings_follow_the_rates(risk: Callable[[float, str], float], earlier: str, middle: str) -> None:
    found = said(run_of(risk))
    assert (found["after-benign"], found["middle"]) == (earlier, middle)
    assert found["beam"] == found["probes"] == found["over-refusal"] == found["jailbreaks"] == "not measured"


def test_safebeam_claims_need_safebeam_and_follow_it() -> None:
    found = said(run_of(lambda s, k: (0.2 + 0.5 * s) if k == "safebeam" else 0.8, kinds=("sampled", "safebeam")))
    assert (found["beam"], found["beam-zero"], found["steerable"]) == ("agrees", "agrees", "agrees")


def test_one_start_has_no_claims_and_one_seed_says_what_its_interval_is() -> None:
    run = run_of(lambda s, _: 0.2 + 0.5 * s, seeds=1)
    read = {c.id: r for c, r in zip(CLAIMS, read_claims(run), strict=True)}
    assert read["after-benign"].figures[0]["interval"].endswith("one seed") and read["after-benign"].reading == "agrees"
    alone = replace(run, series={("natural", "safe_only"): {0.2: ["0.2@0"]}})
    assert read_claims(alone) == []


def test_no_rise_needs_an_interval_below_the_margin() -> None:
    assert side_of("no rise", {"low": -0.02, "high": MARGIN - 0.01}) == "agrees"
    assert side_of("no rise", {"low": -0.2, "high": 0.2}) == "cannot tell"
    assert side_of("no rise", {"low": 0.02, "high": 0.2}) == "disagrees"
    assert side_of("not below", {"low": -0.2, "high": 0.1}) == "agrees"
    assert side_of("not below", {"low": -0.2, "high": -0.1}) == "disagrees"
    assert side_of("above", {"low": math.nan, "high": math.nan}) == "cannot tell"


def test_a_probe_of_one_seed_cannot_be_read() -> None:
    run = run_of(lambda s, _: 0.4, seeds=1)
    results = [
        Result("probe_auroc", 0.9 - 0.2 * s, 0.0, 1.0, 80, arm=f"{s}@0", stage="m", category="all")
        for s in (0.0, 0.2, 0.6, 1.0)
    ]
    found = {c.id: r for c, r in zip(CLAIMS, read_claims(replace(run, probes=results)), strict=True)}["probes"]
    assert found.reading == "cannot tell" and found.figures[0]["difference"] == pytest.approx(-0.2)


# -- studies of other shapes -------------------------------------------------------------------------------------------


def test_one_seed_and_no_matched_arms(tmp_path: Path) -> None:
    study = timing_study(tmp_path, seeds=(4,), models=("sums", "chat"), decoders=("greedy",), n=4, matched=False)
    page = Page(write_report(gather(study), tmp_path / "page").read_text(encoding="utf-8"))
    assert "one seed says nothing of another training" in page.words and "matched exposure" not in page.words
    assert "(one seed)" in page.words and "How far SafeBeam" not in page.words


def test_equal_risk_in_all_arms_is_not_read_as_a_difference(tmp_path: Path) -> None:
    def flat(of: Of) -> float:
        return later_is_riskier(replace(of, start=0.5, exposure="natural"))

    data = gather(timing_study(tmp_path, models=("sums",), decoders=("top-k",), n=12, risk=flat))
    assert "disagrees" not in {c.reading for c in data.claims if "probe" not in c.about}
    assert reading(data, "An earlier start keeps") == "cannot tell"


def test_a_verdict_that_is_lost_is_a_fault(tmp_path: Path) -> None:
    study = timing_study(tmp_path, seeds=(0,), models=("chat",), decoders=("greedy",), n=2, matched=False)
    judged = next((tmp_path / "store").glob("judge-*"))
    (judged / "judgements.jsonl").write_text("{}\n")
    with pytest.raises(Fault, match="damaged"):
        gather(study)
