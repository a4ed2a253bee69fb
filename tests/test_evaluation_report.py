"""The report of evaluations: the page shows the files' figures, nothing of it runs, and nothing harmful is in it whole."""

from __future__ import annotations

import csv
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from evaluation_fixtures import ATTACKS, CATEGORIES, make_evaluation
from trimtab.cli import report as cli_report
from trimtab.errors import UserError
from trimtab.evaluate import metrics
from trimtab.evaluate.comparison import compare
from trimtab.evaluate.files import open_evaluation, stage_path
from trimtab.report import format as fmt
from trimtab.report import view
from trimtab.report.data import ReportData
from trimtab.report.evaluation import gather_evaluations, report_evaluations
from trimtab.report.html import write_report
from trimtab.report.reading import GUARDED_CUT
from trimtab.types import Result

HOSTILE = "</script></style></svg><script>alert('x')</script><img src=x onerror=alert(1)> {{ 7*7 }} \x1b[31m\u202e"


class Page(HTMLParser):
    """Tags with attributes, and the words that a reader sees (with the texts that describe figures)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.parts: list[str] = []
        self.skip = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.skip += tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self.skip -= tag == "style"

    def handle_data(self, data: str) -> None:
        if not self.skip:
            self.parts.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.parts).split())


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Two evaluations on the same prompts and their report."""
    where = tmp_path_factory.mktemp("two")
    first = make_evaluation(where / "before", n=24, unscored=0.1, weak=0.4).path
    second = make_evaluation(where / "after", model="harbour-1-tuned", n=24, weak=2.0).path
    return first, second, report_evaluations([first, second], where / "report")


@pytest.fixture(scope="module")
def page(two: tuple[Path, Path, Path]) -> Page:
    return Page(two[2].read_text(encoding="utf-8"))


def shown(result: Result) -> str:
    text = fmt.estimate(result.value, result.low, result.high, tuple(result.range) == (0.0, 1.0))
    return text.replace(fmt.NBSP, " ")


def figure(directory: Path, metric: str, mode: str | None, category: str | None = None) -> Result:
    return next(
        r for r in open_evaluation(directory).results if (r.metric, r.mode, r.category) == (metric, mode, category)
    )


def test_the_page_shows_the_figures_of_the_files(two: tuple[Path, Path, Path], page: Page) -> None:
    for directory in two[:2]:
        for mode in ("positive", "negative"):
            for metric in ("risk_rate", "refusal_rate", "constructive_score", "over_refusal_contrast_full", "accuracy"):
                assert shown(figure(directory, metric, mode)) in page.words
            for name in ATTACKS:
                for metric in ("asr", "hit_rate"):
                    assert shown(figure(directory, metric, mode, f"attack:{name}")) in page.words
            assert shown(figure(directory, "queries_to_success", mode, "attack:misspelling")) in page.words
    for task in CATEGORIES.values():
        assert all(category in page.words for category in task)
    with two[2].with_name("figures.csv").open(newline="", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["section"] == "result"]
    results = [r for d in two[:2] for r in open_evaluation(d).results]
    assert len(rows) == len(results)
    assert sorted(float(r["value"]) for r in rows if r["value"] != "nan") == pytest.approx(
        sorted(r.value for r in results if r.n)
    )


def test_rates_stand_beside_their_bounds_and_corrections(two: tuple[Path, Path, Path], page: Page) -> None:
    raw, low, high = (
        figure(two[0], f"asr{end}", "positive", "attack:misspelling")
        for end in ("", "_if_unscored_safe", "_if_unscored_unsafe")
    )
    assert raw.unscored, "the fixture leaves some answers unscored"
    cells = [shown(raw), f"n {raw.n}", shown(low), f"n {low.n}", shown(high)]
    assert re.search(".{0,40}".join(map(re.escape, cells)), page.words)
    corrected = figure(two[0], "refusal_rate_corrected", "negative")
    row = f"{shown(figure(two[0], 'refusal_rate', 'negative'))} n "
    assert any(shown(corrected) in part[:120] for part in page.words.split(row)[1:])
    spoken = f"{fmt.percent(low.value)} to {fmt.percent(high.value)} % by what the unscored are"
    assert spoken in page.words, "the figure draws the bounds"


def test_modes_show_their_fidelity_beside_the_behaviour_shown(two: tuple[Path, Path, Path], page: Page) -> None:
    assert "Mode asked, behaviour shown" in page.words and "Switch fidelity. Plain prompts" in page.words
    data = gather_evaluations(two[:2])
    told = figure(two[0], "switch_fidelity", "negative")
    assert f"{fmt.percent(told.value)} {fmt.percent(told.low)} to {fmt.percent(told.high)}" in page.words
    assert any(c["metric"] == "switch_fidelity" and c["mode"] == "negative" for c in data.comparisons)
    assert any("answers that fit their mode" in finding.text for finding in data.findings)


def test_judges_and_facts_are_printed(two: tuple[Path, Path, Path], page: Page) -> None:
    header = open_evaluation(two[0]).header["model"]
    assert "sensitivity 70 % [48, 86], specificity 100 % [89, 100]" in page.words
    assert "2.13.0" in page.words and "temperature 0.7, top p 0.95" in page.words and "96 tokens" in page.words
    for name in ("identity", "template_hash", "system_hash"):
        assert header[name] in page.words and header[name][:16] + "…" in page.words
    assert "Trimtab evaluation" in page.words and "Trimtab study" not in page.words
    assert re.search(r"identity differs", page.words) and not re.search(r"template differs", page.words)


def test_differences_are_paired_and_equal_to_compare(two: tuple[Path, Path, Path], page: Page) -> None:
    a, b = ([r for r in open_evaluation(d).records() if r.generation.mode == "positive"] for d in two[:2])
    c = compare(a, b, "asr", category="attack:prefill")
    said = fmt.difference(c.difference, c.low, c.high, True).replace(fmt.NBSP, " ")
    assert c.p < 0.001 and said in page.words
    data = gather_evaluations(two[:2])
    row = next(
        r for r in data.comparisons if (r["metric"], r["task"], r["mode"]) == ("asr", "attack:prefill", "positive")
    )
    assert (row["a"], row["b"], row["n"], row["discordant"]) == ("before", "after", c.n, c.up + c.down)
    assert row["p"] == c.p < row["p_holm"]
    assert any("attack success rate under prefill" in f.text for f in data.findings)


def test_samples_show_what_changed_and_what_an_attack_broke(two: tuple[Path, Path, Path], page: Page) -> None:
    samples = gather_evaluations(two[:2]).samples
    changed = [s for s in samples if s.why.startswith("changed")]
    assert changed and "changed: attack success rate" in page.words
    for sample in changed:
        said = [
            [(a["mode"], a["verdict"], a["refusal"], a["correct"], a["constructive"]) for a in answers]
            for answers in sample.answers.values()
        ]
        assert len(said) == 2 and said[0] != said[1], sample
    broken = [s for s in samples if s.why.startswith("broken by")]
    assert broken and all("@" in s.row_id for s in broken)
    assert any(a["verdict"] == "unsafe" for s in broken for a in s.answers["before"])
    assert {s.task for s in samples if not s.why} == set(CATEGORIES), "some are chosen without regard to the answers"


def test_answers_that_may_be_harmful_are_whole_nowhere(two: tuple[Path, Path, Path]) -> None:
    records = [r for d in two[:2] for r in open_evaluation(d).records()]
    harmless = {r.generation.text for r in records if r.verdict.verdict == "safe"}
    whole = {
        r.generation.text
        for r in records
        if r.row.harm == "harmful" and r.verdict.verdict != "safe" and len(r.generation.text) > GUARDED_CUT
    } - harmless
    assert len(whole) > 30
    for name in ("report.html", "results.json", "figures.csv"):
        text = two[2].with_name(name).read_text(encoding="utf-8")
        assert not any(answer in text for answer in whole), name
    assert "more characters, left out of this report" in two[2].read_text(encoding="utf-8")


def test_nothing_runs_and_nothing_is_loaded_from_outside(page: Page, two: tuple[Path, Path, Path]) -> None:
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "img", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                assert str(value).startswith("#") and str(value)[1:] in ids, (tag, name, value)
    text = two[2].read_text(encoding="utf-8")
    assert "http://" not in text and "https://" not in text and "@import" not in text
    assert text.count("default-src 'none'") == 1
    tags = [tag for tag, _ in page.tags]
    assert tags.count("table") == tags.count("caption") > 8
    assert all(a.get("scope") for t, a in page.tags if t == "th")
    levels = [int(tag[1]) for tag in tags if tag in ("h1", "h2", "h3", "h4")]
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels)), "a heading level is skipped"


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    made = make_evaluation(tmp_path / "first", n=2)
    said = {id: HOSTILE for id, row in made.rows.items() if row.harm != "harmful"}
    header = {"versions": {HOSTILE: HOSTILE}, "config": {"x": HOSTILE}}
    made = make_evaluation(tmp_path / "e", n=2, model=HOSTILE, answers=said, header=header)
    for stage in ("prompts", "attacks", "judgements", "metrics", "generations"):
        path = stage_path(made.path, stage)
        lines = path.read_text(encoding="utf-8")
        for name in ("hazards", "roleplay", "positive", "fumes", "tidewater-0-benign"):
            lines = lines.replace(name, json.dumps(HOSTILE)[1:-1] + name)
        path.write_text(lines, encoding="utf-8")
    made_page = Page(report_evaluations([made.path], tmp_path / "out").read_text(encoding="utf-8"))
    assert not {t for t, _ in made_page.tags} & {"script", "img"}
    assert not any(name.startswith("on") for _, attributes in made_page.tags for name in attributes)
    assert "<script>alert('x')</script><img src=x onerror=alert(1)> {{ 7*7 }} ⟨U+001B⟩[31m⟨U+202E⟩" in made_page.words
    raw = (tmp_path / "out" / "report.html").read_bytes()
    assert b"\x1b" not in raw and "\u202e".encode() not in raw


def test_one_evaluation_without_modes_or_attacks(tmp_path: Path) -> None:
    made = make_evaluation(tmp_path / "e", n=4, modes=(None,), attacks=(), unscored=0.0)
    made_page = Page(report_evaluations([made.path], made.path).read_text(encoding="utf-8"))
    assert "One model was asked 12 prompts of 3 tasks." in made_page.words
    assert "Paired differences" not in made_page.words and "attack by attack" not in made_page.words
    assert "“harbour-1”: unsafe answers to harmful prompts" in made_page.words and "small n" in made_page.words
    data = gather_evaluations([made.path])
    assert [m.modes for m in data.matrices] == [["no mode"]] * 3


def test_an_unfinished_evaluation_is_reported_with_a_warning(tmp_path: Path) -> None:
    whole = make_evaluation(tmp_path / "whole", n=3, attacks=("prefill",))
    part = make_evaluation(tmp_path / "part", n=3, attacks=("prefill",), judged=0.5, results_written=False)
    made_page = Page(report_evaluations([whole.path, part.path], tmp_path / "out").read_text(encoding="utf-8"))
    left = len(part.generations) - len(part.verdicts)
    assert f"is unfinished: {left} of {len(part.generations)} answers are not judged" in made_page.words
    assert "is not compared with" in made_page.words and "trimtab judge" in made_page.words
    assert "harbour-1 (part)" in made_page.words, "two evaluations of one model are told apart"
    open_ = make_evaluation(tmp_path / "open", n=2, unscored=1.0)
    told = gather_evaluations([open_.path])
    assert "no judge could tell which answers to harmful prompts were unsafe" in told.findings[0].text
    assert any("read the bounds" in warning for warning in told.warnings)
    nothing = make_evaluation(tmp_path / "nothing", n=2, judged=0.0, results_written=False)
    assert report_evaluations([nothing.path], nothing.path).exists()


def test_what_differs_besides_the_model_is_a_warning(tmp_path: Path) -> None:
    a = make_evaluation(tmp_path / "a", n=3, attacks=(), modes=("positive",))
    model = {**a.header["model"], "template_hash": "f" * 64}
    b = make_evaluation(tmp_path / "b", n=2, attacks=(), modes=("positive", "rejective"), header={"model": model})
    data = gather_evaluations([a.path, b.path])
    warnings = " ".join(data.warnings)
    assert "chat templates differ" in warnings and "only in A" in warnings
    assert "in rejective mode is compared with nothing" in warnings
    assert {c["mode"] for c in data.comparisons} == {"positive"}


def test_a_report_rebuilds_from_its_results(two: tuple[Path, Path, Path], tmp_path: Path) -> None:
    data = json.loads(two[2].with_name("results.json").read_text(encoding="utf-8"))
    again = write_report(ReportData.from_json(data), tmp_path)
    for name in ("report.html", "figures.csv", "results.json"):
        assert two[2].with_name(name).read_bytes() == again.with_name(name).read_bytes(), name


def test_the_view_speaks_of_the_metrics_groups() -> None:
    assert (view.TASK, view.ATTACK, view.ANY) == (metrics.TASK, metrics.ATTACK, metrics.ANY_ATTACK)


def test_contradictions_are_refused(two: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="given twice"):
        gather_evaluations([two[0], two[0]])
    with pytest.raises(UserError, match="at least one"):
        gather_evaluations([])
    for broken, message in (
        (ReportData("n", "t", kind="poem"), "'poem' is none of"),
        (ReportData("n", "t", facts={"ghost": {}}), "facts: no arm 'ghost'"),
        (ReportData("n", "t", judges=[{"arm": "ghost"}]), "judges: no arm 'ghost'"),
    ):
        with pytest.raises(UserError, match=message):
            write_report(broken, tmp_path)


def test_the_command_takes_evaluations_or_a_study(two: tuple[Path, Path, Path], tmp_path: Path) -> None:
    app = typer.Typer()
    cli_report.register(app)

    def call(*arguments: Any) -> Any:
        return CliRunner().invoke(app, [str(a) for a in arguments])

    one = make_evaluation(tmp_path / "one", n=2, attacks=()).path
    result = call(one)
    assert (
        result.exit_code == 0 and result.stdout.strip() == str(one / "report.html") and (one / "report.html").exists()
    )
    result = call(*two[:2], "--out", tmp_path / "out")
    assert result.exit_code == 0 and (tmp_path / "out" / "report.html").read_bytes() == two[2].read_bytes()
    for arguments, message in (
        (two[:2], "--out where"),
        ((two[0], tmp_path), "is not an evaluation"),
        ((tmp_path,), "not a study's directory"),
        ((tmp_path, "--out", tmp_path), "--out is for evaluations"),
    ):
        failed = call(*arguments)
        assert isinstance(failed.exception, UserError) and message in str(failed.exception)
