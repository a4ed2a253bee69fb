"""What a timing study's page must not get wrong: twins, which finding comes first, and what a claim's p belongs to."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from test_report import Page
from test_timing_report import run_of
from timing_fixtures import timing_study
from trimtab.evaluate import stats
from trimtab.report.claims.reading import rests_on
from trimtab.report.claims.timing import CLAIMS, read_claims
from trimtab.report.contrasts import contrast
from trimtab.report.data import ReportData
from trimtab.report.findings import _family_finding, of_arms
from trimtab.report.gather import gather
from trimtab.report.grids import _split
from trimtab.report.html import write_report


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> ReportData:
    """A study where "start 20 %, matched" is "start 20 %", and "start 60 %, matched" is "never", artefact by artefact."""
    small: dict[str, Any] = {"models": ("chat",), "decoders": ("top-k", "safebeam"), "n": 6, "metrics": False}
    study = timing_study(tmp_path_factory.mktemp("twins"), seeds=(0, 1), **small)
    told = json.loads((study / "study.json").read_text())
    for arm in told["arms"]:
        first = {"start 20 %, matched": "start 20 %", "start 60 %, matched": "never"}.get(arm["label"])
        if first is not None:
            other = next(a for a in told["arms"] if a["label"] == first and a["seed"] == arm["seed"])
            arm.update({k: other[k] for k in ("stages", "steps", "cells")})
    used = {id for arm in told["arms"] for id in arm["steps"]}
    told["steps"] = {id: step for id, step in told["steps"].items() if id in used}
    (study / "study.json").write_text(json.dumps(told))
    return gather(study)


def test_arms_that_are_one_training_are_compared_once_under_both_names(twins: ReportData) -> None:
    label = {arm.id: arm.label for arm in twins.arms}
    assert {(label[a], label[b]) for a, b in twins.same.items()} == {
        ("start 20 %, matched", "start 20 %"), ("start 60 %, matched", "never"),
    }  # fmt: skip
    texts = [f.text for f in twins.findings]
    assert len(texts) == 3, "0 %, 20 % (two names) and 60 %; the twin of the baseline is no finding"
    assert sum("“start 20 %” and “start 20 %, matched” against “never”" in t for t in texts) == 1
    assert {label[c["b"]] for c in twins.comparisons} == {"start 0 %", "start 20 %", "start 60 %"}
    assert any("“start 60 %, matched” is the same training as “never”" in p for p in twins.summary)
    assert all(arm not in twins.same for s in twins.samples for arm in s.answers)


def test_twins_keep_their_rows_and_say_whose_they_are(twins: ReportData, tmp_path: Path) -> None:
    text = write_report(twins, tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    assert "2 seeds, = never" in page.words and "the same training as “start 20 %”" in page.words
    assert "start 20 %, start 20 %, matched" in page.words, "one line in the curves by layer, with both names"
    assert ReportData.from_json(json.loads((tmp_path / "results.json").read_text())).same == twins.same


def test_answers_and_tokens_of_twins_count_once(twins: ReportData) -> None:
    prompts = 8 * 6
    assert f"({4 * 2 * 2 * prompts:,} answers)" in twins.summary[0], "four trainings, two seeds, two decoders"


def test_loss_by_source_is_drawn_of_the_first_seed(twins: ReportData, tmp_path: Path) -> None:
    rows = {arm: mine for arm, mine in twins.curves.items() if any("by_source" in row for row in mine)}
    assert rows and all(not arm.endswith("@1") for arm in rows)
    some = next(row for row in next(iter(rows.values())) if "by_source" in row)
    assert some["stage"] == "base" and set(some["by_source"]) == {"clean", "refuse"}
    assert all("by_source" not in row for mine in rows.values() for row in mine if row["stage"] != "base")
    assert "loss by source" in Page(write_report(twins, tmp_path).read_text(encoding="utf-8")).words


def test_logs_of_a_study_without_a_grid_keep_all_that_they_tell(tmp_path: Path) -> None:
    study = timing_study(tmp_path, seeds=(0,), models=("chat",), decoders=("top-k",), n=2, matched=False)
    told = json.loads((study / "study.json").read_text())
    for arm in told["arms"]:
        arm.pop("cells")
        arm["stages"] = {k: v for k, v in arm["stages"].items() if not k.startswith(("probes", "ppl"))}
    (study / "study.json").write_text(json.dumps(told))
    row = next(iter(gather(study).curves.values()))[0]
    assert row["lr"] == 1e-3 and row["by_source"]["refuse"]["tokens"] == 200 and "source" not in row


def test_figures_of_models_stand_in_one_table(tmp_path: Path) -> None:
    study = timing_study(tmp_path, seeds=(0,), models=("chat",), decoders=("top-k",), n=4, matched=False)
    data = gather(study)
    page = Page(write_report(data, tmp_path / "page").read_text(encoding="utf-8"))
    assert page.words.count("probe AUROC (") == 1 or page.words.count("probe AUROC Arm") == 1
    assert "all n 80 held-out hazards n 80" in page.words, "its categories are columns"
    assert (
        "fewer than 30 in every cell" in page.words
        and "*" not in page.words.split("Attack success")[1].split("Steering")[0]
    )


# -- what comes first ----------------------------------------------------------------------------------------------------


def row(metric: str, difference: float, p: float) -> dict[str, Any]:
    return {
        "metric": metric, "difference": difference, "low": difference - 0.1, "high": difference + 0.1, "p_holm": p, "n": 40,
        "seeds": 1, "task": "goods", "stage": "chat", "mode": None,
    }  # fmt: skip


def test_the_clearest_difference_of_each_metric_leads_the_finding() -> None:
    rows = [
        row("accuracy", 0.3, 0.01), row("risk_rate", -0.9, 0.001), row("over_refusal_benign_full", 0.5, 0.02),
        row("risk_rate", -0.8, 0.001), row("accuracy", 0.95, 0.2), row("risk_rate", -0.2, 0.03),
    ]  # fmt: skip
    text = _family_finding("never", "start 0 %", None, rows).text
    assert text.index("-90 points") < text.index("+50 points"), (
        "the largest that holds comes first, the next metric after"
    )
    assert "+95 points" not in text and "-80 points" not in text and "5 hold after" in text


# -- what a claim rests on -----------------------------------------------------------------------------------------------


def figure(side: str, reading: str, p: float, decides: bool = True) -> dict[str, Any]:
    return {"side": side, "reading": reading, "p": p, "decides": decides}


def test_the_p_of_a_claim_is_that_of_the_figure_it_rests_on() -> None:
    assert rests_on([figure("above", "agrees", 0.001), figure("not below", "disagrees", 0.03)]) == (
        1,
        pytest.approx(0.06),
    )
    assert rests_on([figure("above", "agrees", 0.001), figure("above", "agrees", 0.02)]) == (1, 0.02)
    assert rests_on([figure("above", "disagrees", 0.01), figure("above", "cannot tell", 0.7)]) == (0, 0.02)
    assert rests_on([figure("no rise", "agrees", 0.5), figure("no rise", "agrees", 0.9)]) is None
    assert rests_on([figure("below", "cannot tell", math.nan)]) is None
    assert rests_on([figure("above", "disagrees", 0.001, decides=False)]) is None


def test_a_reading_that_rests_on_the_starts_between_shows_their_p() -> None:
    run = run_of(lambda s, _: 0.2 if 0 < s < 1 else 0.5 + 0.4 * s, seeds=1)
    claims = dict(zip((c.id for c in CLAIMS), read_claims(run), strict=True))
    found = claims["after-benign"]
    rise, between = found.figures[:2]
    assert (rise["reading"], between["reading"], found.reading) == ("agrees", "disagrees", "disagrees")
    assert rise["p_holm"] is None and between["p_holm"] >= min(1.0, 2 * between["p"])
    known = [f["p_holm"] for c in claims.values() for f in c.figures if f["p_holm"] is not None]
    assert len(known) == sum(c.reading != "not measured" for c in claims.values()), (
        "one p for every claim that was tested"
    )


def test_a_claim_of_two_parts_agrees_only_where_both_were_measured() -> None:
    run = run_of(lambda s, _: 0.2 if 0 < s < 1 else 0.6)
    run.series = {key: {s: ids for s, ids in starts.items() if s < 1} for key, starts in run.series.items()}
    found = dict(zip((c.id for c in CLAIMS), read_claims(run), strict=True))["middle"]
    assert [f["reading"] for f in found.figures] == ["agrees"] and found.reading == "cannot tell"
    assert "Not measured" in found.confounded and "never less the starts between" in found.confounded


def test_an_end_that_is_zero_but_for_rounding_is_not_clear_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "cluster_bootstrap_mean", lambda *a, **k: (-0.8, -6.5e-17))
    cells = [{s: {f"p{i}": float(i % 3 == j) for i in range(9)} for s in (0,)} for j in range(3)]
    made = contrast([(0.5, cells[0]), (0.5, cells[1]), (-1.0, cells[2])], key="x")
    assert made is not None and made.high == 0.0 and made.low == -0.8


def test_a_twin_of_its_baseline_is_not_compared_with_it() -> None:
    arms = [{"id": i, "label": i, "against": a} for i, a in (("never", None), ("other", "never"))]

    def never(arm: Any) -> list[Any]:
        raise AssertionError("no answer need be read")

    assert of_arms(arms, never, {"other": "never"}).findings == []
    with pytest.raises(AssertionError):
        of_arms(arms, never, {})


def test_splits_are_said_in_words() -> None:
    assert [_split(c) for c in ("all", "heldout", "last", "loso:goods", "clean")] == [
        "all", "held-out hazards", "last token", "goods left out", "clean",
    ]  # fmt: skip
