"""The terminal viewer: the figures of the files, samples in order, text made safe, unsafe answers cut."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from typer.testing import CliRunner

from evaluation_fixtures import ATTACKS, CARD, make_evaluation
from trimtab.cli import view as cli_view
from trimtab.errors import Fault, UserError
from trimtab.evaluate.figures import results
from trimtab.evaluate.files import open_evaluation, stage_path, write_evaluation
from trimtab.evaluate.judges.refusal import RefusalMatch
from trimtab.evaluate.metrics import Record
from trimtab.report import browse
from trimtab.report.browse import Filters, as_json, choose, print_figures, render, safe, value_text
from trimtab.report.evaluation import report_evaluations
from trimtab.report.reading import GUARDED_CUT, STATUSES, Reading, card_text, read_evaluation
from trimtab.types import Generation, Result, Row

HOSTILE = "Steady.\n[1/9] safe · fine\n\x1b[2J\x1b]0;title\x07\u202egnp.\x9b31m Ahoy" + " and on" * 60 + " THE-END"


@pytest.fixture(scope="module")
def reading(tmp_path_factory: pytest.TempPathFactory) -> Reading:
    directory = tmp_path_factory.mktemp("evaluation")
    return read_evaluation(make_evaluation(directory, n=16, unscored=0.12).path)


def call(*arguments: Any) -> Any:
    app = typer.Typer()
    cli_view.register(app)
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=True)


def row_of(page: str, *cells: str) -> str:
    """The line of a table that starts with these cells."""
    pattern = r"\s+".join(re.escape(c) for c in cells)
    found = [line for line in page.splitlines() if re.match(pattern + r"(\s|$)", line)]
    assert found, f"no line {cells}"
    return found[0]


def plain(result: Result | None) -> str:
    return safe(value_text(result))


def test_the_page_shows_the_figures_of_the_files(reading: Reading) -> None:
    page = render(reading, Filters(), limit=0, width=100)
    for mode in ("positive", "negative"):
        for metric, title in (("risk_rate", "risk rate"), ("accuracy", "accuracy")):
            result = reading.figure(metric, mode, None)
            assert result is not None
            line = row_of(page, title, mode)
            assert plain(result) in line and f" {result.n}*" in line, "16 prompts are few: the n has a star"
    unscored = reading.figure("risk_rate", "positive", None)
    assert unscored is not None and unscored.unscored, "the fixture leaves some answers unscored"
    assert plain(reading.figure("risk_rate_if_unscored_unsafe", "positive", None)) in row_of(
        page, "  if every unscored were unsafe"
    )
    assert plain(reading.figure("refusal_rate_corrected", "positive", None)) in row_of(
        page, "  corrected (judge's errors)"
    )
    assert "small n: fewer than 30" in page


def test_attacks_tell_success_rate_hit_rate_queries_and_budget_apart(reading: Reading) -> None:
    page = render(reading, Filters(mode="positive"), limit=0)
    for name, (budget, _) in ATTACKS.items():
        line = row_of(page, name)
        asr, hit = (reading.figure(m, "positive", f"attack:{name}") for m in ("asr", "hit_rate"))
        assert plain(asr) in line and plain(hit) in line and line.endswith(f" {budget}")
    queries = reading.figure("queries_to_success", "positive", "attack:misspelling")
    assert queries is not None and plain(queries) in row_of(page, "misspelling")
    assert plain(reading.figure("risk_rate", "positive", None)) in row_of(page, "plain prompt")
    assert plain(reading.figure("asr", "positive", "attack:any")) in row_of(page, "any of them, or plain")


def test_the_head_names_model_judge_and_how_it_was_asked(reading: Reading) -> None:
    page = render(reading, Filters(), limit=0)
    header = reading.evaluation.header["model"]
    flat = " ".join(page.split())
    for said in (
        "harbour-1",
        header["template_hash"][:12],
        header["system_hash"][:12],
        "temperature 0.7, top p 0.95",
        "96 tokens",
    ):
        assert said in flat
    assert "sensitivity 70 % [48, 86], specificity 100 % [89, 100]" in flat and "n 50 labelled answers" in flat
    counts = {
        s: sum(v.verdict == s for v in reading.evaluation.verdicts.values()) for s in ("unsafe", "unscored", "safe")
    }
    assert f"({counts['unsafe']} unsafe, {counts['unscored']} unscored, {counts['safe']} safe)" in flat


def test_categories_of_all_tasks_are_listed(reading: Reading) -> None:
    page = render(reading, Filters(), limit=0)
    risk = page[page.index("By category: risk rate") : page.index("By category: switch fidelity")]
    for category in ("fumes", "felts", "smuggling"):
        assert plain(reading.figure("risk_rate", "negative", category)) in row_of(risk, category)
    assert "lamps" not in risk, "a category without harmful prompts has no risk rate"


@pytest.mark.parametrize("width", [40, 80, 100, 200])
def test_no_line_is_wider_than_the_page(reading: Reading, width: int) -> None:
    page = render(reading, Filters(), limit=30, width=width)
    assert max(map(cell_len, page.splitlines())) <= max(80, min(width, 100))
    assert "\x1b" not in page


def test_unsafe_first_then_unscored_then_the_rest(reading: Reading) -> None:
    statuses = [s.status for s in choose(reading, Filters())]
    assert statuses == sorted(statuses, key=STATUSES.index) and len(statuses) == len(reading.evaluation.generations)
    assert {"unsafe", "unscored", "safe"} == set(statuses)


def test_filters_narrow_samples_and_tables(reading: Reading) -> None:
    wanted = Filters(mode="positive", attack="prefill", category="fumes", verdict="unsafe")
    found = choose(reading, wanted)
    assert found and all(
        s.status == "unsafe"
        and (s.generation.mode, s.row.metadata["attack"], s.row.category) == ("positive", "prefill", "fumes")
        for s in found
    )
    assert all("attack" not in s.row.metadata for s in choose(reading, Filters(attack="none")))
    page = render(reading, Filters(task="goods", mode="negative"), limit=0)
    assert "Headline of task goods" in page and plain(reading.figure("accuracy", "negative", "task:goods")) in page
    assert "risk rate" not in page.split("Attacks")[0]
    for filters, there in (
        (Filters(mode="rejective"), "positive, negative"),
        (Filters(task="x"), "hazards, contrasts, goods"),
        (Filters(attack="gcg"), "none, roleplay"),
        (Filters(verdict="bad"), "unsafe, unscored"),
    ):
        with pytest.raises(UserError, match=there):
            choose(reading, filters)


def test_answers_that_may_be_harmful_are_cut_unless_asked_for(reading: Reading) -> None:
    unsafe = next(s for s in choose(reading, Filters(verdict="unsafe")) if len(s.generation.text) > GUARDED_CUT + 20)
    tail = unsafe.generation.text[-15:]
    filters = Filters(verdict="unsafe", mode="negative", attack="none")
    short = " ".join(render(reading, filters, limit=500).replace("\n", " ").replace("| ", "").split())
    whole = " ".join(render(reading, filters, limit=500, whole=True).replace("\n", " ").replace("| ", "").split())
    assert tail not in short and "--show prints them" in short
    assert tail in whole and "more characters)" not in whole
    data = as_json(reading, filters, 500, whole=False)
    cut = next(s for s in data["samples"] if s["answer_cut"])
    assert len(cut["answer"]) == GUARDED_CUT
    assert not any(s["answer_cut"] for s in as_json(reading, filters, 500, whole=True)["samples"])


def test_an_unjudged_or_unscored_answer_to_a_harmful_request_is_cut_too(tmp_path: Path) -> None:
    reading = read_evaluation(make_evaluation(tmp_path / "e", n=8, unscored=1.0, judged=0.5, attacks=()).path)
    for sample in choose(reading, Filters()):
        assert sample.status in ("unscored", "not judged")
        assert sample.guarded == (sample.row.harm == "harmful")


def test_hostile_text_can_neither_steer_the_terminal_nor_pass_for_the_viewer(tmp_path: Path) -> None:
    made = make_evaluation(tmp_path / "first", n=2)
    harmless = next(id for id, row in made.rows.items() if row.harm == "benign")
    evil = "evil\x1b[31m\u202e"
    made = make_evaluation(
        tmp_path / "e", n=2, model=evil, answers={harmless: HOSTILE}, header={"versions": {evil: "1\n2"}}
    )
    reading = read_evaluation(made.path)
    for whole in (False, True):
        page = render(reading, Filters(task="goods"), limit=50, whole=whole)
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", page)
        assert "⟨U+001B⟩" in page and "⟨U+202E⟩" in page
        assert not any(line.startswith("[1/9]") for line in page.splitlines()), "an answer passed for a heading"
        assert "| [1/9] safe" in page
    assert "THE-END" in render(reading, Filters(task="goods"), limit=50, whole=True)
    result = call(made.path, "--task", "goods", "--json", "--limit", 50)
    assert result.exit_code == 0 and "\x1b" not in result.stdout and "\u202e" not in result.stdout
    answers = [s["answer"] for s in json.loads(result.stdout)["samples"]]
    assert HOSTILE in answers, "JSON keeps the text as it was"


@given(st.text())
def test_safe_text_has_nothing_that_a_terminal_obeys(text: str) -> None:
    one = safe(text)
    assert "\n" not in one and not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", one)
    assert safe(one) == one


def test_the_judges_own_words_and_reasons_are_shown(reading: Reading) -> None:
    page = render(reading, Filters(verdict="unscored", task="goods"), limit=3)
    assert "the judge's answer could not be read" in page
    assert "Score: about ⟨U+001B⟩[31mtwo⟨U+001B⟩[0m, I think." in page


def test_an_unfinished_run_is_shown_as_far_as_it_goes(tmp_path: Path) -> None:
    made = make_evaluation(tmp_path / "e", n=4, judged=0.6, results_written=False)
    path = stage_path(made.path, "generations")
    with path.open("ab") as file:
        file.write(b'{"key": "torn')
    reading = read_evaluation(made.path)
    assert reading.figures and len(reading.records) < len(made.generations)
    page = " ".join(render(reading, Filters(), limit=3).split())
    left = len(made.generations) - len(reading.records)
    assert f"Unfinished: {left} of {len(made.generations)} answers are not judged" in page
    assert "the metrics are not written" in page
    stage_path(made.path, "judgements").unlink()
    page = render(read_evaluation(made.path), Filters(), limit=1)
    assert "Headline" not in page and "not judged" in page
    path.write_text(path.read_text(encoding="utf-8").split("\n")[0] + "\n", encoding="utf-8")
    page = render(read_evaluation(made.path), Filters())
    assert "no answer is written yet" in page and "Samples: 0 of 0" in page


def test_a_run_that_failed_says_so_and_a_lost_prompt_is_a_fault(tmp_path: Path) -> None:
    made = make_evaluation(tmp_path / "e", n=2)
    path = stage_path(made.path, "metrics")
    header, rest = path.read_text(encoding="utf-8").split("\n", 1)
    path.write_text(
        json.dumps({**json.loads(header), "failed": "judge x left all open"}) + "\n" + rest, encoding="utf-8"
    )
    page = " ".join(render(read_evaluation(made.path), Filters()).split())
    assert "nothing can be said of this run's safety: judge x left all open" in page
    stage_path(made.path, "attacks").unlink()
    with pytest.raises(Fault, match=r"neither in prompts\.jsonl nor in attacks\.jsonl"):
        read_evaluation(made.path)
    with pytest.raises(UserError, match="not an evaluation"):
        read_evaluation(tmp_path)


def test_a_second_judging_is_read_by_its_name(tmp_path: Path) -> None:
    made = make_evaluation(tmp_path / "e", n=2, attacks=())
    for stage in ("judgements", "metrics"):
        path = stage_path(made.path, stage)
        text = path.read_text(encoding="utf-8").replace('"tidewater"', '"another"')
        stage_path(made.path, stage, "again").write_text(text, encoding="utf-8")
    result = call(made.path, "--judging", "again", "--limit", 0)
    assert result.exit_code == 0 and re.search(r"judge\s+another", result.stdout)
    assert isinstance(call(made.path, "--judging", "never").exception, UserError)


def test_the_command_prints_plain_text_and_the_chosen_number_of_samples(reading: Reading) -> None:
    result = call(reading.evaluation.path, "--limit", 2, "--verdict", "unsafe")
    assert result.exit_code == 0 and "[2/2] unsafe" in result.stdout and "[3/" not in result.stdout
    assert "\x1b" not in result.stdout and not re.search("[─│┃━╭]", result.stdout)
    data = json.loads(call(reading.evaluation.path, "--json", "--limit", 1, "--mode", "negative").stdout)
    assert {f["mode"] for f in data["figures"]} == {"negative"} and len(data["samples"]) == 1
    assert sum(data["matching"].values()) == len(reading.evaluation.generations) // 2


def test_colours_only_for_a_terminal_and_long_text_goes_through_less(
    reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "\x1b[" in render(reading, Filters(), limit=1, colour=True)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    seen: list[tuple[list[str], bytes]] = []
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(browse.shutil, "which", lambda name: "/bin/less")
    monkeypatch.setattr(browse.subprocess, "run", lambda command, input, check: seen.append((command, input)))
    monkeypatch.setattr(browse.shutil, "get_terminal_size", lambda: os.terminal_size((90, 20)))
    browse.show("short")
    assert not seen
    browse.show("long\n" * 30)
    assert seen == [(["/bin/less", "-RFX"], b"long\n" * 30)]


def test_print_figures_shows_judge_and_headline(reading: Reading, capsys: pytest.CaptureFixture[str]) -> None:
    print_figures(open_evaluation(reading.evaluation.path))
    page = capsys.readouterr().out
    assert plain(reading.figure("risk_rate", "negative", None)) in row_of(page, "risk rate", "negative")
    assert "sensitivity 70 %" in page and "Samples" not in page


def test_a_judge_without_a_card_is_said_to_be_unmeasured() -> None:
    assert "not measured" in card_text({"name": "rubric", "card": None})
    assert "exact" in card_text({"name": "tidewater", "card": None})
    one_sided = {**CARD, "specificity": None, "kappa": None, "data": "my-labels"}
    text = card_text({"name": "rubric", "card": one_sided})
    assert "specificity not measured" in text and "kappa" not in text and "(my-labels)" in text


def test_without_a_judge_of_safety_attacks_show_what_is_still_refused(tmp_path: Path) -> None:
    judge = RefusalMatch()
    rows, answers, verdicts = [], [], {}
    for i in range(8):
        plain_row = Row(f"r{i}", messages=({"role": "user", "content": f"Request {i}"},), source="mine", harm="harmful")
        marks = {"attack": "roleplay", "attempt": 0, "base": plain_row.id, "queries": 0}
        attempt = replace(plain_row, id=f"r{i}@roleplay", metadata=marks)
        for row, refuses in ((plain_row, i < 6), (attempt, i < 2)):
            text = (
                "I'm sorry, but I can't help with that."
                if refuses
                else "Here is a long and plain answer about the weather."
            )
            rows.append(row)
            answers.append(Generation(f"k{row.id}", row.id, row.hash(), "m", None, {}, 0, 0, (), text, "stop"))
            verdicts[f"k{row.id}"] = judge.judge(row, text, "stop")
    records = [Record(row, answer, verdicts[answer.key]) for row, answer in zip(rows, answers, strict=True)]
    made = write_evaluation(
        tmp_path / "e", {"config": {}, "model": {"name": "m"}}, rows, answers, verdicts=verdicts, results=results(records),
        judging={"judges": [{"name": judge.name, "id": judge.id, "card": None, "sources": ["mine"]}]},
    )  # fmt: skip
    page = render(read_evaluation(made.path), Filters(), limit=0, width=100)
    assert "ASR" not in page and "Attacks: answers refused outright" in page
    assert "75 %" in row_of(page, "plain prompt") and "25 %" in row_of(page, "roleplay")
    html = report_evaluations([made.path], tmp_path / "out").read_text(encoding="utf-8")
    assert "refusal rate on harmful prompts · m" in html, "the figure of attacks falls back to refusals"
