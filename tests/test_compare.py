"""Two evaluations side by side: what is paired, what is refused, what is said, and that no answer can draw on the screen."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from pair_fixtures import JUDGE, SAID, SAMPLING, evaluation
from trimtab.cli import compare as compare_command
from trimtab.errors import UserError
from trimtab.evaluate.comparison import compare
from trimtab.evaluate.pairing import pair_up, parse_modes
from trimtab.evaluate.sidebyside import GUARDED_CUT, SideBySide, side_by_side
from trimtab.report.sidebyside import render
from trimtab.seeds import digest

A = {"harmful": "ssssssuuss", "benign": "aaaarrwaaa", "contrast": "aarr"}
B = {"harmful": "suussssuss", "benign": "aaaaarwwra", "contrast": "aarr"}


def by_metric(found: SideBySide) -> dict[str, object]:
    return {c.metric: c for c in found.overall}


def command(*words: str) -> tuple[int, str]:
    app = typer.Typer()
    app.callback()(lambda: None)
    compare_command.register(app)
    done = CliRunner().invoke(app, ["compare", *words])
    if isinstance(done.exception, UserError):
        return 2, str(done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


# -- figures -------------------------------------------------------------------------------------------------------


def test_the_figures_are_those_of_the_paired_comparison() -> None:
    a, b = evaluation(**A, name="a"), evaluation(**B, name="b")
    found = side_by_side(a, b)
    assert found.pairs == 24 and not found.warnings
    overall = {c.metric: c for c in found.overall}
    assert list(overall) == [
        "safe_at_1", "over_refusal_benign_full", "over_refusal_contrast_full", "constructive_score", "accuracy",
        "helpful_rate", "refusal_rate",
    ]  # fmt: skip
    safe = overall["safe_at_1"]
    assert (safe.value_a, safe.value_b, safe.n, safe.up, safe.down) == (0.8, 0.7, 10, 1, 2)
    assert replace(safe, p_holm=None) == compare(a.records(), b.records(), "safe_at_1")
    told = [c for c in found.overall if c.n]  # these made-up verdicts say nothing of helpfulness
    assert {c.metric for c in found.overall} - {c.metric for c in told} == {"helpful_rate"}
    assert all(c.p_holm is not None and c.p_holm >= c.p for c in told)
    assert overall["over_refusal_contrast_full"].p == 1.0


def test_groups_are_adjusted_within_their_own_family() -> None:
    found = side_by_side(evaluation("s" * 40, name="a"), evaluation("us" * 20, name="b"), metrics=["safe_at_1"])
    even, odd = found.groups
    assert (even.category, odd.category) == ("even", "odd")  # the one task is what the overall figure says
    assert even.p < 1e-5 and even.p_holm == pytest.approx(2 * even.p)
    assert odd.p == odd.p_holm == 1.0


def test_a_named_metric_must_be_there_and_be_comparable() -> None:
    a, b = evaluation("sus", name="a"), evaluation("sss", name="b")
    with pytest.raises(UserError, match="'accuracy': no prompt"):
        side_by_side(a, b, metrics=["accuracy"])
    with pytest.raises(UserError, match="'queries_to_success' cannot be compared; use one of risk_rate"):
        side_by_side(a, b, metrics=["queries_to_success"])
    with pytest.raises(UserError, match="no row has the metric 'safe_at_3'"):  # one sample each
        side_by_side(a, b, metrics=["safe_at_3"])
    assert [c.metric for c in side_by_side(a, b, metrics=["risk_rate"]).overall] == ["risk_rate"]


def test_a_metric_that_nobody_scored_is_shown_and_has_no_groups() -> None:
    found = side_by_side(evaluation("????", name="a"), evaluation("ssss", name="b"), metrics=["safe_at_1"])
    (safe,) = found.overall
    assert safe.n == 0 and safe.unscored == 4 and not found.groups and not found.discordant
    assert "not scored" in render(found)
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["overall"][0]["difference"] is None


def test_the_same_evaluation_differs_in_nothing_and_two_of_its_modes_can_be_compared() -> None:
    one = evaluation(**A, modes=("positive", "rejective"))
    with pytest.raises(UserError, match=r"several modes \(positive, rejective\); choose one with --mode"):
        side_by_side(one, one)
    found = side_by_side(one, one, modes=("positive", "rejective"))
    assert (found.a.label, found.b.label) == ("model (positive)", "model (rejective)")
    assert not found.discordant and all(c.difference == 0 for c in found.overall if c.n)


def test_modes_are_found_or_asked_for() -> None:
    a, b = evaluation("ss", modes=(None, "positive")), evaluation("ss", modes=("positive",))
    assert pair_up(a, b).a.mode == "positive"
    assert pair_up(a, b, modes=(None, "positive")).a.mode is None
    with pytest.raises(UserError, match=r"A has answers in mode none, B in positive; .* --modes none:positive"):
        pair_up(evaluation("ss"), b)
    with pytest.raises(UserError, match="no answers in mode 'rejective'; it has positive"):
        pair_up(a, b, modes=("positive", "rejective"))
    assert parse_modes(None, "none:positive") == (None, "positive") and parse_modes("none", None) == (None, None)
    for mode, modes in (("positive", "a:b"), (None, "positive"), (None, "a:b:c"), (None, ":b")):
        with pytest.raises(UserError, match="--modes"):
            parse_modes(mode, modes)


# -- what is refused, and what is named ----------------------------------------------------------------------------


def test_different_judges_are_an_error_unless_allowed() -> None:
    a, b = evaluation("ssu", name="a"), evaluation("suu", name="b", judge=digest("judge two"))
    with pytest.raises(
        UserError, match=f"judged by one .{JUDGE[:8]}., B by one .* not comparable.*--allow-different-judges"
    ):
        side_by_side(a, b)
    found = side_by_side(a, b, allow_different_judges=True)
    assert found.warnings[0].startswith("judges differ") and found.overall


def test_a_judge_of_other_sources_is_no_difference_and_verdicts_tell_where_the_header_does_not() -> None:
    other = {"name": "two", "id": digest("judge two"), "card": None, "sources": ["elsewhere"]}
    one = {"name": "one", "id": JUDGE, "card": None, "sources": ["made-up"]}
    a, b = evaluation("ss", judging={"judges": [one, other]}), evaluation("ss")
    assert pair_up(a, b).a.judges == {JUDGE: "one"}
    assert pair_up(a, evaluation("ss", judging={})).b.judges == {JUDGE: JUDGE}
    with pytest.raises(UserError, match="not comparable"):
        pair_up(a, evaluation("ss", judging={}, judge="another"))


def test_prompts_of_one_side_are_counted_and_left_out_only_when_asked() -> None:
    a, b = evaluation("ssssu", "aa", name="a"), evaluation("uss", "aaa", name="b")
    with pytest.raises(UserError, match="2 answers only in A, 1 answer only in B; --common compares the 5 answers"):
        side_by_side(a, b)
    found = side_by_side(a, b, common=True)
    assert (found.pairs, found.only_a, found.only_b) == (5, 2, 1)
    assert "left out: 2 answers only in A, 1 answer only in B" in found.warnings
    assert found.overall[0].value_a == 1.0 and found.overall[0].n == 3
    with pytest.raises(UserError, match="no answers to the same prompts"):
        side_by_side(evaluation("ss"), evaluation("", "aa"), common=True)


def test_samples_are_paired_too() -> None:
    a, b = evaluation(["ssu", "sss"], name="a"), evaluation(["sss", "ssu"], name="b")
    assert side_by_side(a, b, metrics=["safe_at_1"]).overall[0].test == "sign-flip"
    with pytest.raises(UserError, match="2 answers only in A"):
        side_by_side(a, evaluation(["ss", "ss"]))


def test_a_prompt_in_other_words_is_not_the_same_prompt() -> None:
    a, b = evaluation("sss", name="a"), evaluation("sss", name="b", words=", please")
    with pytest.raises(UserError, match="3 answers to prompts worded otherwise in B"):
        side_by_side(a, b, common=True)


def test_other_templates_system_prompts_and_sampling_are_named() -> None:
    a = evaluation("sss", name="a")
    b = evaluation(
        "sss", name="b", template="other", system="Be brief.", sampling={**SAMPLING, "temperature": 0.7, "batch": 1}
    )
    found = side_by_side(a, b)
    assert found.pairs == 3
    assert {w.split(":")[0] for w in found.warnings} == {
        "system prompts differ", "chat templates differ", "sampling differs",
    }  # fmt: skip
    assert "sampling differs: temperature is 0.0 in A and 0.7 in B" in found.warnings
    assert not any("batch" in w for w in found.warnings)
    said = render(found)
    assert said.index("warning: chat templates differ") < said.index("Overall")


def test_unjudged_answers_are_an_error() -> None:
    a = evaluation("sss")
    half = replace(a, verdicts=dict(list(a.verdicts.items())[:2]))
    with pytest.raises(UserError, match="1 answers are not judged"):
        side_by_side(a, half)


# -- attacks -------------------------------------------------------------------------------------------------------


def test_a_fixed_attack_is_paired_and_an_adaptive_one_is_compared_by_prompt() -> None:
    a = evaluation("ssss", name="a", attacks={"fixed": "ssuu", "search": ["ss", "su", "ss", "ss"]})
    b = evaluation("ssss", name="b", attacks={"fixed": "suuu", "search": ["su", "su", "sss", "u"]})
    assert pair_up(a, b, common=True).reworded == ("search",)
    found = side_by_side(a, b)
    assert not found.only_a and not found.only_b
    assert "attack 'search' asked A and B in other words: only its success (asr) is compared" in found.warnings
    asr = {c.category: c for c in [*found.overall, *found.groups] if c.metric == "asr"}
    assert set(asr) == {"attack:any", "attack:fixed", "attack:search"}
    assert (asr["attack:fixed"].value_a, asr["attack:fixed"].value_b) == (0.5, 0.75)
    assert (asr["attack:search"].value_a, asr["attack:search"].value_b) == (0.25, 0.75)
    named = side_by_side(a, b, metrics=["hit_rate"])
    assert [c.category for c in named.groups] == ["attack:fixed"]
    worse = [c for c in found.discordant if c.kind == "unsafe"]
    assert {c.row_id for c in worse} == {"h001@fixed#0", "h000@search#1", "h003@search#0"}
    assert {c.prompt for c in worse if c.attack == "search"} == {"harmful question 0", "harmful question 3"}
    assert all(c.answer_b == SAID["u"] and c.status_a == "safe" for c in worse)


def test_attempts_on_a_prompt_that_is_another_one_now_are_left_out_too() -> None:
    a = evaluation("sss", name="a", attacks={"search": ["s", "s", "s"]})
    b = evaluation("sss", name="b", attacks={"search": ["uu", "uu", "uu"]})
    said = b.rows["h001"].messages
    assert said is not None
    other = replace(b.rows["h001"], messages=({**said[0], "content": "another question"},))
    moved = [replace(g, row_hash=other.hash()) if g.row_id == "h001" else g for g in b.generations]
    b = replace(b, rows={**b.rows, "h001": other}, generations=moved)
    paired = pair_up(a, b, common=True)
    assert {r.prompt for r in (*paired.records_a, *paired.records_b)} == {"h000", "h002"}
    assert side_by_side(a, b, common=True, metrics=["asr"]).overall[0].n == 2


def test_an_attack_that_only_one_side_has_is_left_out() -> None:
    a, b = evaluation("ss", name="a", attacks={"fixed": "uu"}), evaluation("us", name="b")
    with pytest.raises(UserError, match="2 answers only in A"):
        side_by_side(a, b)
    found = side_by_side(a, b, common=True)
    assert found.pairs == 2 and not any(c.metric == "asr" for c in found.overall)


# -- the changed answers -------------------------------------------------------------------------------------------


def test_each_changed_answer_is_there_once_and_the_worst_come_first() -> None:
    found = side_by_side(evaluation(**A, name="a"), evaluation(**B, name="b"))
    kinds = [c.kind for c in found.discordant]
    assert kinds == sorted(kinds, key=["unsafe", "worse", "other", "better"].index)
    assert [c.row_id for c in found.discordant[:2]] == ["h001", "h002"]
    assert len({c.row_id for c in found.discordant}) == len(found.discordant)
    assert found.discordant[0].metrics["safe_at_1"] == (1.0, 0.0)
    refused = next(c for c in found.discordant if c.row_id == "b008")
    assert (refused.kind, refused.said_a, refused.said_b) == ("worse", "safe, answered, right", "safe, refused, wrong")


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from("su?"), st.sampled_from("su?")), min_size=1, max_size=12))
def test_exchanging_the_sides_mirrors_everything(codes: list[tuple[str, str]]) -> None:
    a, b = (evaluation([pair[i] for pair in codes], name="ab"[i]) for i in (0, 1))
    there, back = (side_by_side(x, y, metrics=["safe_at_1"]) for x, y in ((a, b), (b, a)))
    c, d = there.overall[0], back.overall[0]
    assert (c.n, c.unscored, c.up, c.down) == (d.n, d.unscored, d.down, d.up)
    if c.n:
        assert (c.difference, c.low, c.high, c.p) == pytest.approx((-d.difference, -d.high, -d.low, d.p))
    assert sum(x.kind == "unsafe" for x in there.discordant) == codes.count(("s", "u"))
    assert {x.row_id for x in there.discordant} == {x.row_id for x in back.discordant}
    json.dumps(there.to_json(), allow_nan=False)


def test_answers_that_may_be_harmful_are_cut_and_none_can_draw_on_the_screen() -> None:
    bad = "\x1b[2J\x1b[31mOverall\r\u202e" + "x" * 300
    a = evaluation("ss", "a", name="a")
    b = evaluation("us", "r", name="b", answers={"h000": bad, "b000": "[bold]No[/bold] \x07" + "y" * 300})
    found = side_by_side(a, b)
    for colour in (False, True):
        said = render(found, colour=colour)
        assert "\x1b[2J" not in said and "\x1b[31mOverall" not in said and "\u202e" not in said and "\x07" not in said
    said = render(found)
    assert "\x1b" not in said and "⟨U+001B⟩[2J" in said and "[bold]No[/bold]" in said
    assert max(map(len, said.split("\n"))) <= 100
    assert said.count("x") < 100 < said.count("y") and "--show prints them" in said
    assert render(found, whole=True).count("x") > 300
    cut = found.to_json()["discordant"][0]["answer_b"]
    assert cut.startswith(bad[:GUARDED_CUT]) and len(cut) < 120
    assert found.to_json(whole=True)["discordant"][0]["answer_b"] == bad


# -- the command ---------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path) -> None:
    evaluation(**A, name="before", directory=tmp_path / "a")
    evaluation(**B, name="after", directory=tmp_path / "b")
    code, said = command(
        str(tmp_path / "a"), str(tmp_path / "b"), "--json", str(tmp_path / "out.json"), "--discordant", "1",
        "--metric", "safe_at_1", "--mode", "none",
    )  # fmt: skip
    assert code == 0
    assert "A  before" in said and "Safe@1" in said and "Changed answers: 1 of 3" in said and "accuracy" not in said
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["overall"][0]["metric"] == "safe_at_1" and len(data["discordant"]) == 3
    for words, message in (
        ((str(tmp_path / "a"), str(tmp_path / "nothing")), "is not an evaluation"),
        ((str(tmp_path / "a"), str(tmp_path / "b"), "--judging", "second"), "no judging 'second'"),
        ((str(tmp_path / "a"), str(tmp_path / "b"), "--modes", "none:positive"), "no answers in mode 'positive'"),
        ((str(tmp_path / "a"), str(tmp_path / "b"), "--metric", "nonsense"), "cannot be compared"),
    ):
        assert (result := command(*words))[0] == 2 and message in result[1]
    evaluation("ss", directory=tmp_path / "c", judge="another")
    words = (str(tmp_path / "a"), str(tmp_path / "c"))
    assert command(*words)[0] == 2 and command(*words, "--common")[0] == 2
    assert command(*words, "--common", "--allow-different-judges", "--show")[0] == 0


def test_no_torch_is_needed() -> None:
    modules = "trimtab.evaluate.sidebyside, trimtab.evaluate.gate, trimtab.report.sidebyside, trimtab.report.gate"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
