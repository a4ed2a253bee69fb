"""The report of a prefix study: series, trends, claims, spans and tokens, on a made-up study whose rates are known."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefix_fixtures import Of, as_the_paper_says, prefix_study, ranking
from test_report import Page
from trimtab.report import claims, ratios, said
from trimtab.report.claims.prefix import CLAIMS, Run
from trimtab.report.data import Arm, Place, ReportData
from trimtab.report.gather import gather
from trimtab.report.html import write_report
from trimtab.report.panels import Cell, Cells, group_of, subject_of
from trimtab.report.pulled import Prefix, prefix_of
from trimtab.report.ranking import cut, is_cue
from trimtab.types import Row

SMALL: dict[str, Any] = {
    "seeds": (0, 1), "capabilities": ("mathematics", "safety"), "sizes": ("small", "large"), "ratios": (0.0, 0.5, 1.0),
    "n": 8, "tokens": ("mathematics",), "keyword": True, "log": 6,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ReportData:
    return gather(prefix_study(tmp_path_factory.mktemp("prefix"), **SMALL))


@pytest.fixture(scope="module")
def written(data: ReportData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(data, tmp_path_factory.mktemp("page"))


# -- which arms are a series ---------------------------------------------------------------------------------------------


def test_the_lever_is_read_from_the_recipe_the_group_and_the_sweep() -> None:
    recipe = {
        "stages": {
            "base": {"kind": "pretrain"}, "zig": {"kind": "sft", "prefix": {"ratio": 0.1}}, "zag": {"kind": "sft", "prefix": {}},
        },
        "arms": [
            {
                "name": "g", "set": {"stages.zig.prefix.capability": "coding", "stages.zig.epochs": 2},
                "sweep": {"stages.base.model": ["a", "b"], "stages.zig.prefix.ratio": [0.0, 0.5]},
            },
            {"name": "other", "set": {"stages.zag.epochs": 1}, "sweep": {}},
            {"name": "whole", "set": {"stages.zag.prefix": {"ratio": 1.0, "variant": "keyword"}}, "sweep": {}},
        ],
    }  # fmt: skip
    arm = {"group": "g", "settings": {"model": "b", "ratio": 0.5}, "stages": {"base": "x", "zig": "y", "zag": "z"}}
    told = prefix_of(recipe, arm)
    assert told is not None and (told.stage, told.ratio, told.settings["capability"]) == ("zig", 0.5, "coding")
    assert (
        told.swept == {"model": "b"} and told.rest == {"stages.base.model": "b", "stages.zig.epochs": 2} and told.plain
    )
    assert prefix_of(recipe, {**arm, "group": "other", "settings": {}}) is None
    whole = prefix_of(recipe, {**arm, "group": "whole", "settings": {}})
    assert whole is not None and (whole.stage, whole.ratio) == ("zag", 1.0) and not whole.plain


def test_series_stand_by_weight_and_borrow_the_arm_without_prefixes(data: ReportData) -> None:
    curves = [c for c in data.ratios if c.task == "sums" and c.metric == "accuracy" and c.kind == "sampled"]
    assert [(c.group, c.series) for c in curves] == [
        ("mathematics", "small"), ("mathematics", "large"), ("mathematics", "both together"),
        ("mathematics, keyword", "small"), ("mathematics, keyword", "large"), ("mathematics, keyword", "both together, keyword"),
    ]  # fmt: skip
    assert all(c.ratios == [0.0, 0.5, 1.0] for c in curves)
    assert curves[3].arms[0] == curves[0].arms[0], "one training without prefixes serves both sets of sentences"
    row = next(c for c in data.comparisons if "keyword" in c["b"] and c["metric"] == "accuracy")
    assert row["a"] in curves[0].arms[0], "and is what the keyword arms are compared with"


def test_forced_prefixes_are_not_compared_with_answers_that_were_not_forced() -> None:
    def prefix(ratio: float, forced: str) -> Prefix:
        return Prefix("s", ratio, {"capability": "safety", "at_inference": forced}, {}, {})

    told = {"a": prefix(0, "none"), "b": prefix(0.5, "none"), "c": prefix(0.5, "forced"), "d": prefix(1, "forced")}
    arms = [Arm(id, id, "plain" if id in "ab" else "forced", {"ratio": told[id].ratio}) for id in told]
    found = {s.group: s.ratios for s in ratios.series_of(arms, told, lambda _: 0.0)}
    assert found == {"plain": [0.0, 0.5], "forced": [0.5, 1.0]}


def test_models_are_named_by_what_tells_them_apart() -> None:
    shapes = [{"hidden": h, "layers": 2, "heads": 4} for h in (64, 128)]
    told = {
        f"{i}{r}": Prefix("s", r, {"capability": "safety"}, {"model": model}, {"m": str(model)})
        for i, model in enumerate([*shapes, {"load": "org/Small-135M"}])
        for r in (0.0, 1.0)
    }
    arms = [Arm(id, id, "g", {"ratio": told[id].ratio, "model": str(told[id].swept)}) for id in told]
    labels = [s.label for s in ratios.series_of(arms, told, lambda arm: float(arm[0]))]
    assert labels == ["64 × 2 layers", "128 × 2 layers", "Small-135M"]


# -- curves and trends ---------------------------------------------------------------------------------------------------


def test_curves_hold_what_the_verdicts_say(data: ReportData) -> None:
    curve = next(c for c in data.ratios if (c.metric, c.series, c.kind, c.task) == (
        "safe_at_1", "large", "sampled", "hazards held out"
    ))  # fmt: skip
    rates = {
        (r.arm, r.seed): r.value
        for r in data.results
        if (r.metric, r.category, r.stage) == ("risk_rate", "hazards held out", curve.place)
    }
    of = {arm.id: arm for arm in data.arms}
    for arm, value in zip(curve.arms, curve.values):
        mine = [1 - v for (id, _), v in rates.items() if of[id].family == of[arm].family]
        assert len(mine) == 2 and value == pytest.approx(sum(mine) / 2)
    assert all(low <= v <= high for low, v, high in zip(curve.low, curve.values, curve.high))
    middle = (
        0.5
        * sum((r - 0.5) * v for r, v in zip(curve.ratios, curve.values))
        / sum((r - 0.5) ** 2 for r in curve.ratios)
        * 2
    )
    assert curve.trend["difference"] == pytest.approx(middle) and curve.trend["seeds"] == 2
    assert curve.ends["difference"] == pytest.approx(curve.values[-1] - curve.values[0]) and curve.trend["n"] == 8


def test_a_group_together_is_the_mean_of_its_lines_and_has_a_holm_of_its_own(data: ReportData) -> None:
    small, large, both = (
        next(
            c
            for c in data.ratios
            if (c.metric, c.series, c.kind, c.group) == ("accuracy", name, "sampled", "mathematics")
        )
        for name in ("small", "large", "both together")
    )
    assert both.pooled == 2 and both.values == pytest.approx([(a + b) / 2 for a, b in zip(small.values, large.values)])
    assert both.trend["difference"] == pytest.approx((small.trend["difference"] + large.trend["difference"]) / 2)
    together = [c for c in data.ratios if c.pooled > 1]
    least = min(together, key=lambda c: c.trend["p"])
    assert least.trend["p_holm"] == pytest.approx(min(1.0, least.trend["p"] * len(together)))


def test_several_samples_tell_of_safe_at_k_pass_at_k_and_the_log_of_the_body(data: ReportData) -> None:
    metrics = {(c.group, c.metric) for c in data.ratios if c.pooled == 1}
    assert {("safety", "safe_at_4"), ("mathematics", "pass_at_4"), ("mathematics", "body_loss")} <= metrics
    assert not any(c.metric == "risk_rate" for c in data.ratios), "shown as Safe@1"
    loss = next(c for c in data.ratios if c.metric == "body_loss")
    assert not loss.share and loss.place == "training" and loss.trend["n"] == 0


def test_shapes_and_the_best_ratio(data: ReportData) -> None:
    curve = next(c for c in data.ratios if c.metric == "accuracy")
    for values, shape, best in (
        ([0.1, 0.2, 0.2], "never falls", 0.5), ([0.3, 0.2, 0.1], "never rises", 0.0), ([0.1, 0.3, 0.2], "neither", 0.5),
        ([0.2, 0.2, 0.2], "flat", None),
    ):  # fmt: skip
        made = replace(curve, values=values)
        assert (made.shape, made.best) == (shape, best)
    assert replace(curve, direction="none").best is None


def test_findings_are_one_for_each_group_and_say_the_direction(data: ReportData) -> None:
    texts = [f.text for f in data.findings]
    assert len(texts) == 4, "three groups, and how many trends hold"
    assert texts[0].startswith("Mathematics (both together): accuracy on sums") and "Of " in texts[-1]
    assert "gained" in texts[1] and "Safe@1 on hazards held out, wrapped" in texts[1] and "2 seeds" in texts[1]
    assert said.findings([]) == []


# -- claims --------------------------------------------------------------------------------------------------------------


def cells_of(gain: dict[str, float], *, ratios_: tuple[float, ...] = (0.0, 0.5, 1.0), level: float = 0.4) -> Run:
    """A run whose capabilities gain as told: 3 seeds, 200 prompts each, ordinary sampling."""
    cells, told, arms = Cells(), {}, []
    place = Place("p", "panel", "tuned", "sampled", "instruct", "sampled")
    tasks = {"mathematics": "sums", "coding": "programs", "factuality": "facts", "safety": "hazards held out"}
    for subject, task in tasks.items():
        capability = "reasoning" if subject == "mathematics" else subject
        for ratio in ratios_:
            for seed in range(3):
                id = f"{subject}{ratio}@{seed}"
                arms.append(Arm(id, f"{subject}{ratio}", subject, {"ratio": ratio}, seed))
                told[id] = Prefix("s", ratio, {"capability": capability}, {}, {"g": subject})
                cells.seeds[id] = seed
                hits = round(200 * (level + gain.get(subject, 0.0) * (ratio > 0))) + seed - 1
                values = {f"p{i}": float(i < hits) for i in range(200)}
                if subject == "safety":
                    risk = {p: 1 - v for p, v in values.items()}
                    cell = Cell({(None, task, "risk_rate"): risk, (None, f"{task}, wrapped", "risk_rate"): risk})
                    cell.subjects = {task: subject, f"{task}, wrapped": subject}
                else:
                    cell = Cell({
                        (None, task, "accuracy"): values,
                        (None, task, "distinct_answers"): dict.fromkeys(values, 0.9 - 0.3 * (ratio > 0)),
                    }, subjects={task: subject})  # fmt: skip
                cells.by_arm[id, "p"] = cell
    return Run(ratios.series_of(arms, told, lambda _: 0.0), cells, [place])


def readings(run: Run) -> dict[str, str]:
    from trimtab.report.claims.reading import adjusted

    return {c.id: r.reading for c, r in zip(CLAIMS, adjusted(claims.prefix.figures(run)), strict=True)}


def test_readings_follow_the_rates() -> None:
    found = readings(cells_of({"safety": 0.1, "mathematics": 0.1, "coding": -0.1}))
    assert found == {
        "safety": "agrees", "mathematics": "agrees", "coding": "agrees", "factuality": "agrees", "gradients": "not measured",
        "narrowing": "agrees",
    }  # fmt: skip
    found = readings(cells_of({"safety": -0.1, "coding": 0.2, "factuality": 0.2}))
    assert (found["safety"], found["mathematics"], found["coding"], found["factuality"]) == (
        "disagrees", "cannot tell", "disagrees", "disagrees",
    )  # fmt: skip


def test_a_study_without_ratios_has_no_such_claims_and_one_without_0_cannot_be_read() -> None:
    assert claims.prefix.figures(replace(cells_of({}), series=[])) == []
    found = readings(cells_of({"safety": 0.1}, ratios_=(0.5, 1.0)))
    assert set(found.values()) == {"not measured"}


def test_gradients_are_read_from_the_analyses_of_arms_with_prefixes() -> None:
    run = cells_of({})
    rows = [{"arm": f"mathematics{r}@{s}", "seed": s, "stage": "t", "ratio": r, "ranking": ranking(r, s)}
            for r in (0.0, 1.0) for s in range(3)]  # fmt: skip
    assert readings(replace(run, rankings=rows))["gradients"] == "agrees"
    weak = [{**row, "ranking": ranking(row["ratio"], row["seed"], pull=0.5)} for row in rows]
    assert readings(replace(run, rankings=weak))["gradients"] == "disagrees"
    unknown = [{**r, "ranking": {**r["ranking"], "spans": {"body": r["ranking"]["spans"]["body"]}}} for r in rows]
    assert readings(replace(run, rankings=unknown))["gradients"] == "not measured"
    trained = replace(run, pulls={f"mathematics1.0@{s}": 0.4 + s / 100 for s in range(3)})
    assert readings(trained)["gradients"] == "cannot tell", "the training log alone is not the claim as a whole"


def test_the_study_reads_as_it_was_made(data: ReportData, written: Path) -> None:
    page = Page(written.read_text(encoding="utf-8"))
    assert [c.source for c in data.claims] == ["arXiv 2601.01624"] * 6
    assert "Natural arms" not in page.words and "one budget later" not in page.words
    gradients = next(c for c in data.claims if c.text.startswith("Prefix tokens"))
    assert [f["unit"] for f in gradients.figures] == ["ratio"] * 3
    assert re.search(r"gradient norm of a prefix token against a body token: \+6\d", page.words)


# -- spans and tokens ----------------------------------------------------------------------------------------------------


def test_spans_are_the_mean_over_seeds_and_one_arm_of_each_group_is_drawn(data: ReportData, written: Path) -> None:
    assert len(data.spans) == 3 * 2 * 2, "groups, sizes, ratios above 0"
    curve = data.spans[0]
    assert curve.tokens == [500 * i for i in range(1, 7)] and curve.measure == "logit gradient"
    assert curve.loss["prefix"][0] == pytest.approx(4.0) and curve.token_share[0] == pytest.approx(20 / 220, abs=1e-4)
    wanted = 20 * 0.9 / (20 * 0.9 + 200 * 0.7)
    assert curve.gradient_share[0] == pytest.approx(wanted, abs=1e-4)
    page = Page(written.read_text(encoding="utf-8"))
    assert page.words.count("Share of the prefix: ") >= 3 and "large · 50 % prefixed" in page.words


def test_tokens_are_ranked_marked_and_shown(data: ReportData, written: Path) -> None:
    assert [t["ratio"] for t in data.tokens] == [0.0, 0.5, 1.0], "the first seed of the largest size"
    text = written.read_text(encoding="utf-8")
    assert '<code class="cue">␣revised</code>' in text and "estimated by 64 random projections" in text
    assert "⟨U+202E⟩&lt;b&gt;" in text and "\u202e" not in text
    assert 'class="box prefix' in text and "not trained on" in text and "gradient norm by position" in text.lower()
    many = ranking(1.0)
    many["tokens"] = [{**many["tokens"][0], "token": f"t{i}"} for i in range(99)] + [many["tokens"][0]]
    kept = cut({"arm": "a", "stage": "s", "ratio": 1.0, "ranking": many})["ranking"]
    assert kept["distinct"] == 100 and len(kept["tokens"]) == 26 and kept["tokens"][-1]["rank"] == 100
    assert is_cue(" Revised") and is_cue("Ġlogically") and not is_cue(" harbour")


# -- the page ------------------------------------------------------------------------------------------------------------


def test_the_page_shows_each_group_and_rebuilds_from_its_results(
    data: ReportData, written: Path, tmp_path: Path
) -> None:
    page = Page(written.read_text(encoding="utf-8"))
    for text in ("What the share of prefixed answers does", "What the ratio bought: safety", "both together", "best at",
                 "Prefix: how a training answer opens", "mathematics · large", "Loss: mathematics · large · tuned"):  # fmt: skip
        assert text in page.words, text
    tags = [tag for tag, _ in page.tags]
    assert tags.count("table") == tags.count("caption") and all(a.get("scope") for t, a in page.tags if t == "th")
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    again = ReportData.from_json(json.loads((written.parent / "results.json").read_text(encoding="utf-8")))
    second = write_report(again, tmp_path)
    for name in ("report.html", "figures.csv", "results.json"):
        assert (written.parent / name).read_bytes() == (second.parent / name).read_bytes(), name
    assert written.stat().st_size < 1_000_000
    sections = {line.split(",")[0] for line in (written.parent / "figures.csv").read_text().splitlines()}
    assert {"ratio", "ratio trend", "ratio ends", "span", "token", "token position", "claim"} <= sections


def test_one_seed_of_a_plain_judge_is_read_too(tmp_path: Path) -> None:
    def flat(of: Of) -> float:
        return as_the_paper_says(replace(of, ratio=0.0))

    study = prefix_study(
        tmp_path,
        seeds=(0,),
        capabilities=("safety",),
        sizes=("small",),
        ratios=(0.0, 0.5),
        n=8,
        right=flat,
        metrics=True,
        log=2,
    )
    told = json.loads((study / "study.json").read_text())
    for arm in told["arms"]:  # as `generate` and `judge` stages leave it: no cells, one place
        arm.pop("cells")
        arm["stages"] = {k: v for k, v in arm["stages"].items() if "sampled" not in k}
    (study / "study.json").write_text(json.dumps(told))
    data = gather(study)
    assert not data.places and {c.series for c in data.ratios} == {""} and all(c.seeds == 1 for c in data.ratios)
    loss = next(c for c in data.ratios if c.metric == "body_loss")
    assert math.isnan(loss.trend["low"]), "one seed knows no interval of a figure without prompts"
    page = Page(write_report(data, tmp_path / "page").read_text(encoding="utf-8"))
    assert "What the ratio bought: safety" in page.words and "one seed: no interval" in page.words
    assert "showed no clear change" in page.words


# -- groups of prompts ---------------------------------------------------------------------------------------------------


def test_other_sets_tasks_are_groups_of_their_own() -> None:
    def row(harm: str, source: str, **metadata: Any) -> Row:
        return Row("r", messages=({"role": "user", "content": "?"},), source=source, harm=harm, metadata=metadata)  # type: ignore[arg-type]

    maths = row("benign", "gsm", task="gsm-symbolic", verify="numeric", answer="7")
    assert (group_of(maths), subject_of(maths)) == ("gsm-symbolic", "mathematics")
    assert group_of(row("harmful", "hb", task="harmbench")) == "harmful requests: harmbench"
    assert group_of(row("harmful", "hb", task="harmbench", attack="x")) == "harmful requests: harmbench, wrapped"
    assert group_of(row("benign", "chat", task="talk")) == "benign requests"
    assert group_of(row("benign", "tidewater", task="x", kind="fact", answer="7")) == "facts"
    cells = Cells(
        {
            ("a", "p"): Cell(
                {(None, g, "risk_rate"): {"p": 1.0} for g in ("harmful requests: a", "harmful requests: b, wrapped")}
            )
        }
    )
    assert cells.within("harmful requests") == ["harmful requests: a"]
    assert cells.within("harmful requests, wrapped") == ["harmful requests: b, wrapped"]


def test_a_cue_word_seen_in_one_row_alone_says_nothing() -> None:
    from types import SimpleNamespace

    from trimtab.report.claims.prefix import _gradients

    spans = {"prefix": {"grad_norm": [3.0, 2.0, 4.0]}, "body": {"grad_norm": [1.0, 0.8, 1.2]}}
    alone = {"token": " revised", "span": "prefix", "count": 1, "grad_norm": [9.0, None, None]}
    row = {"seed": 0, "ratio": 0.5, "ranking": {"spans": spans, "tokens": [alone]}}
    found = {name: estimate for name, estimate, *_ in _gradients(SimpleNamespace(rankings=[row], pulls={}, cells=None))}  # type: ignore[arg-type]
    assert found["gradient norm of a prefix token against a body token"].value == pytest.approx(2.0)
    assert found["of “revised” and “logical(ly)” against the other prefix tokens"] is None
