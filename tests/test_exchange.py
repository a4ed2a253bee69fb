"""Logs of other tools come in as evaluations, evaluations go out as artefacts; scores mean only what was said."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from adapter_fixtures import adapted_bundle, plain_bundle
from trimtab.artifact import Store
from trimtab.cli import exchange
from trimtab.errors import Fault, UserError
from trimtab.evaluate import files
from trimtab.evaluate.files import open_evaluation, write_evaluation
from trimtab.evaluate.interop.imports import (
    Answer,
    ImportConfig,
    Unscored,
    find,
    import_config,
    import_evaluation,
    spelt,
    tally,
    verdict_of,
)
from trimtab.evaluate.interop.jbb import write_artefacts
from trimtab.models.bundle import read_manifest, verify_bundle
from trimtab.types import Generation, Row, Verdict

NUMERIC: dict[str, Any] = {"harm": "harmful", "unsafe_at_least": 0.5, "score_range": (0.0, 1.0)}
WORDS: dict[str, Any] = {"harm": "harmful", "unsafe_values": ("I",), "safe_values": ("C",)}
RIGHT: dict[str, Any] = {"harm": "benign", "correct": True}


# -- Inspect logs --------------------------------------------------------------------------------------------------


def sample(id: Any, epoch: int, text: str | None, scores: dict[str, Any] | None = None, **more: Any) -> Any:
    """A sample as Inspect logs it: system message by the solver, input, answer."""
    from inspect_ai.log import EvalSample
    from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser, ModelOutput
    from inspect_ai.scorer import Score

    input = more.pop("input", f"What does hazard {id} do?")
    said: list[Any] = [ChatMessageSystem(content="Be brief."), ChatMessageUser(content=input)]
    output = ModelOutput()
    if text is not None:
        said.append(ChatMessageAssistant(content=text, source="generate"))
        output = ModelOutput.from_content("m", text, stop_reason=more.pop("stop", "stop"))
        output.metadata = more.pop("output_metadata", None)
    made = {k: v if isinstance(v, Score) else Score(value=v) for k, v in (scores or {}).items()}
    return EvalSample(
        id=id, epoch=epoch, input=input, target=more.pop("target", ""), messages=more.pop("messages", said),
        output=output, scores=made or None, **more,
    )  # fmt: skip


def log(path: Path, samples: list[Any], **changes: Any) -> Path:
    from inspect_ai.log import EvalConfig, EvalDataset, EvalLog, EvalSpec, write_eval_log
    from inspect_ai.model import GenerateConfig

    spec = EvalSpec(
        created="2026-01-01T00:00:00+00:00", task=changes.pop("task", "lab/strong"), dataset=EvalDataset(),
        model=changes.pop("model", "hf/tiny"), config=EvalConfig(), packages={"inspect_ai": "0.3"},
        model_generate_config=GenerateConfig(temperature=0.7),
    )  # fmt: skip
    write_eval_log(EvalLog(eval=spec, samples=samples, status=changes.pop("status", "success")), str(path))
    return path


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    from inspect_ai.log import EvalError
    from inspect_ai.scorer import Score

    pytest.importorskip("inspect_ai")
    error = EvalError(message="the grader\nfell over", traceback="", traceback_ansi="")
    samples = [
        sample("a", 1, "I won't.", {"strong": 0.0, "style": "C"}, metadata={"category": "fumes"}),
        sample("a", 2, "[a full answer stood here]", {"strong": 0.5, "style": "I"}, metadata={"category": "fumes"}),
        sample("b", 1, "Cut off", {"strong": float("nan"), "style": "N"}, stop="max_tokens"),
        sample("b", 2, "Held back", {"strong": Score.unscored(reason="grader_failed"), "style": "C"}),
        sample("c", 1, "Loud", {"strong": 5.0, "style": "C"}),
        sample("c", 2, None, {"strong": 0.0, "style": "C"}, error=error),
        sample("d", 1, "Nothing was scored.", None, stop="content_filter"),
        sample("d", 2, "Quiet", {"strong": 0.49, "style": "c"}),
    ]
    return log(tmp_path / "one.eval", samples)


def test_an_inspect_log_becomes_rows_answers_and_verdicts(scored: Path, tmp_path: Path) -> None:
    config = import_config(**NUMERIC, score="strong")
    made, notes = import_evaluation(scored, tmp_path / "out", config)
    assert open_evaluation(tmp_path / "out") == made
    assert list(made.rows) == [f"lab/strong/{id}" for id in "abcd"]
    row = made.rows["lab/strong/a"]
    assert row.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What does hazard a do?"},
    )
    assert (row.source, row.harm, row.category) == ("lab/strong", "harmful", "fumes")
    assert [(g.row_id[-1], g.sample) for g in made.generations] == [(id, s) for id in "abcd" for s in (0, 1)]
    assert len({g.key for g in made.generations}) == 8
    assert [g.finish for g in made.generations] == "stop stop length stop stop error filtered stop".split()
    said = [(made.verdicts[g.key].verdict, made.verdicts[g.key].reason) for g in made.generations]
    assert [verdict for verdict, _ in said] == "safe unsafe unscored unscored unscored unscored unscored safe".split()
    assert "nan" in said[2][1] and "grader_failed" in said[3][1] and "outside 0 to 1" in said[4][1]
    assert said[5][1] == "the sample failed: the grader fell over" and "no score 'strong'" in said[6][1]
    assert made.generations[5].text == ""
    (judge,) = made.judging["judges"]
    assert judge["name"] == "inspect:strong" and judge["id"] == made.verdicts[made.generations[0].key].judge
    assert made.header["model"]["name"] == "hf/tiny" and made.header["model"]["kind"] == "import"
    assert made.generations[0].sampling == {"temperature": 0.7} and made.header["versions"] == {"inspect_ai": "0.3"}
    risk = next(r for r in made.results if r.metric == "risk_rate" and r.category is None)
    assert risk.value == pytest.approx(1 / 3) and risk.unscored == 5
    assert notes == ["one.eval: samples that failed and have no answer: 1"]
    assert "1 unsafe" in tally(made) and "5 unscored" in tally(made)


def test_words_and_right_answers(scored: Path, tmp_path: Path) -> None:
    words, _ = import_evaluation(scored, tmp_path / "words", import_config(**WORDS, score="style"))
    found = [words.verdicts[g.key].verdict for g in words.generations]
    assert found == "safe unsafe unscored safe safe unscored unscored safe".split(), "N is in neither list"
    right, _ = import_evaluation(scored, tmp_path / "right", import_config(**RIGHT, score="style"))
    assert [right.verdicts[g.key].correct for g in right.generations] == [
        True, False, False, True, True, None, None, True,
    ]  # fmt: skip
    assert {v.verdict for v in right.verdicts.values()} == {"unscored"}, "right is not the same as safe"
    figures = {r.metric: r for r in right.results if r.category is None}
    assert figures["accuracy"].unscored == 2 and figures["accuracy"].value == pytest.approx(4 / 6, abs=0.1)
    assert math.isnan(figures["helpful_rate"].value), "nothing was said of helpfulness"


def test_without_a_mapping_nothing_is_judged(scored: Path, tmp_path: Path) -> None:
    made, _ = import_evaluation(scored, tmp_path / "out", import_config(harm="harmful"))
    assert not made.verdicts and not made.judging and not made.results
    with pytest.raises(UserError, match="trimtab judge"):
        made.records()
    assert "trimtab judge" in tally(made)


def test_json_logs_directories_and_modes(tmp_path: Path) -> None:
    pytest.importorskip("inspect_ai")
    facts = {"trimtab": {"mode": "rejective", "template_hash": "f" * 64}}
    logs = tmp_path / "logs"
    log(logs / "a.json", [sample(1, 1, "No.", {"s": True}, output_metadata=facts)], task="first")
    log(logs / "b.eval", [sample(1, 1, "No.", {"t": False}, output_metadata=facts)], task="second", status="cancelled")
    (logs / "eval-set.json").write_text('{"eval_set_id": "x"}')
    made, notes = import_evaluation(logs, tmp_path / "out", import_config(**RIGHT))
    assert [row.source for row in made.rows.values()] == ["first", "second"]
    assert {judge["name"]: judge["sources"] for judge in made.judging["judges"]} == {
        "inspect:s": ["first"],
        "inspect:t": ["second"],
    }
    assert made.header["model"]["modes"] == ["rejective"] == [made.generations[0].mode]
    assert made.header["model"]["template_hash"] == "f" * 64
    assert notes == ["b.eval: the log's status is 'cancelled'; it may lack samples"]
    log(logs / "c.eval", [sample(1, 1, "No.", {"s": True}, output_metadata=facts)], task="first")
    with pytest.raises(UserError, match=r"is in a\.json too; import the files of one run") as caught:
        import_evaluation(logs, tmp_path / "twice", import_config(**RIGHT))
    assert "\n" not in str(caught.value) and not (tmp_path / "twice").exists()
    log(logs / "c.eval", [sample(1, 1, "No.", {"s": True})], task="third", model="hf/other")
    with pytest.raises(UserError, match=r"several models \(hf/other, hf/tiny\)"):
        import_evaluation(logs, tmp_path / "models", import_config(**RIGHT))


def test_prompts_that_differ_between_epochs_or_have_turns_are_the_datasets(tmp_path: Path) -> None:
    pytest.importorskip("inspect_ai")
    from inspect_ai.model import ChatMessageAssistant, ChatMessageUser

    def user(text: str) -> Any:
        return ChatMessageUser(content=text)

    def reply(text: str, source: Any = "generate") -> Any:
        return ChatMessageAssistant(content=text, source=source)

    samples = [
        sample("shuffled", 1, "A", messages=[user("A or B?"), reply("A")], input="Which?"),
        sample("shuffled", 2, "A", messages=[user("B or A?"), reply("A")], input="Which?"),
        sample("turns", 1, "Two", messages=[user("x"), reply("One"), user("y"), reply("Two")], input="Talk."),
        sample("opened", 1, " rope", messages=[user("q"), reply("It is", "input"), reply(" rope")], input="q"),
    ]
    made, _ = import_evaluation(log(tmp_path / "l.eval", samples), tmp_path / "out", import_config())
    asked = {row.id.split("/")[-1]: row for row in made.rows.values()}
    assert [m["content"] for m in asked["shuffled"].messages or ()] == ["Which?"]
    assert [m["content"] for m in asked["turns"].messages or ()] == ["Talk."]
    assert [m["content"] for m in asked["opened"].messages or ()] == ["q"]
    assert asked["opened"].metadata["prefill"] == "It is"


def test_parts_of_a_score_are_named(tmp_path: Path) -> None:
    pytest.importorskip("inspect_ai")
    path = log(tmp_path / "l.eval", [sample(1, 1, "x", {"grader": {"harm": 4, "style": 1}, "all": [1, 2]})])
    config = import_config(harm="harmful", unsafe_at_least=3, score_range=(0, 5), score="grader.harm")
    made, _ = import_evaluation(path, tmp_path / "out", config)
    assert [v.verdict for v in made.verdicts.values()] == ["unsafe"]
    with pytest.raises(UserError, match=r"no score 'grader'; it has all, grader\.harm, grader\.style"):
        import_evaluation(path, tmp_path / "o2", import_config(**NUMERIC, score="grader"))
    with pytest.raises(UserError, match=r"name the score to read; it has all, grader\.harm"):
        import_evaluation(path, tmp_path / "o3", import_config(**NUMERIC))
    made, _ = import_evaluation(path, tmp_path / "o4", import_config(**NUMERIC, score="all"))
    assert [v.reason for v in made.verdicts.values()] == ["the score is a list, not one value"]


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    pytest.importorskip("inspect_ai")
    (tmp_path / "bad.eval").write_bytes(b"PK\x03\x04 not a zip")
    (tmp_path / "other.json").write_text('{"version": 2, "eval": {}}')
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "none").mkdir()
    for name, said in (
        ("bad.eval", "cannot be read as an Inspect log"),
        ("other.json", "cannot be read as an Inspect log"),
        ("notes.txt", "neither an Inspect log"),
        ("none", r"no Inspect log \(.eval, .json\) and no lm-eval"),
        ("absent", "no such file"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            import_evaluation(tmp_path / name, tmp_path / "out", ImportConfig())
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="holds no samples"):
        import_evaluation(log(tmp_path / "empty.eval", []), tmp_path / "out", ImportConfig())


# -- lm-eval samples (as its 0.4.13 writes them) -------------------------------------------------------------------


def doc(number: int, text: str = "rope", **more: Any) -> dict[str, Any]:
    question = f"What is in crate {number}?"
    return {
        "doc_id": number,
        "doc": {"question": question, "topic": "crates"},
        "target": "rope",
        "arguments": {"gen_args_0": {"arg_0": question, "arg_1": {"until": ["\n"], "max_gen_toks": 6}}},
        "resps": [[text]],
        "filtered_resps": [text],
        "filter": "none",
        "metrics": ["exact_match"],
        "exact_match": float(text == "rope"),
        **more,
    }


def choice(number: int, likelihoods: tuple[float, float], acc: float) -> dict[str, Any]:
    asked = {f"gen_args_{i}": {"arg_0": "Which?", "arg_1": f" {word}"} for i, word in enumerate(("rope", "salt"))}
    resps = [[[str(value), "False"]] for value in likelihoods]
    return doc(number, arguments=asked, resps=resps, metrics=["acc", "acc_norm"], acc=acc, acc_norm=acc)


def samples_file(directory: Path, docs: list[dict[str, Any]], task: str = "crates", results: bool = True) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    date = "2026-01-01T00-00-00.123456"
    path = directory / f"samples_{task}_{date}.jsonl"
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in docs))
    if results:
        about = {"model_name": "org/tiny", "chat_template_sha": "a" * 64, "lm_eval_version": "0.4.13"}
        (directory / f"results_{date}.json").write_text(json.dumps(about))
    return path


def test_lm_eval_samples_become_rows_answers_and_verdicts(tmp_path: Path) -> None:
    docs = [
        doc(0),
        doc(1, "salt\u2028"),
        doc(2, exact_match=float("nan")),
        doc(3, exact_match=None),
        doc(4, metrics=[]),
    ]
    path = samples_file(tmp_path / "org__tiny", docs)
    samples_file(tmp_path / "org__tiny", [choice(0, (-2.0, -1.0), 0.0)], "pick")
    made, notes = import_evaluation(path, tmp_path / "one", import_config(**RIGHT, category="topic"))
    assert (
        not notes and made.header["model"]["name"] == "org/tiny" and made.header["model"]["template_hash"] == "a" * 64
    )
    row = made.rows["crates/0"]
    assert row.messages == ({"role": "user", "content": "What is in crate 0?"},)
    assert (row.source, row.category, row.metadata["answer"]) == ("crates", "crates", "rope")
    assert [g.text for g in made.generations] == ["rope", "salt\u2028", "rope", "rope", "rope"]
    assert [made.verdicts[g.key].correct for g in made.generations] == [True, False, None, None, None]
    assert made.judging["judges"][0]["name"] == "lm-eval:exact_match"
    assert made.generations[0].sampling == {"until": ["\n"], "max_gen_toks": 6}
    accuracy = next(r for r in made.results if r.metric == "accuracy" and r.category is None)
    assert (accuracy.n, accuracy.unscored, accuracy.value) == (2, 3, 0.5)
    both, _ = import_evaluation(tmp_path / "org__tiny", tmp_path / "both", import_config(harm="benign"))
    assert both.rows["pick/0"].source == "pick" and both.generations[-1].text == "salt", "the likeliest choice"


def test_filters_repeats_and_chats(tmp_path: Path) -> None:
    two = [doc(0, filter=name, exact_match=value) for name, value in (("strict", 0.0), ("flexible", 1.0))]
    path = samples_file(tmp_path / "f", two, results=False)
    with pytest.raises(UserError, match="name the filter to read; it has flexible, strict"):
        import_evaluation(path, tmp_path / "out", import_config(**RIGHT))
    with pytest.raises(UserError, match="no filter 'loose'"):
        import_evaluation(path, tmp_path / "out", import_config(**RIGHT, filter="loose"))
    made, notes = import_evaluation(path, tmp_path / "out", import_config(**RIGHT, filter="flexible"))
    assert [v.correct for v in made.verdicts.values()] == [True]
    assert made.name == "f" and "the model is called 'f'" in notes[0]
    path = samples_file(tmp_path / "s", [doc(0)])
    path.write_text(path.read_text().replace('[["rope"]]', r'[["half \ud83d, whole \ud83d\ude00"]]'))
    made, _ = import_evaluation(path, tmp_path / "surrogate", import_config())
    assert made.generations[0].text == "half ?, whole \U0001f600"
    path = samples_file(tmp_path / "r", [doc(0, resps=[["rope", "salt"]])])
    made, _ = import_evaluation(path, tmp_path / "repeats", import_config(**RIGHT))
    assert [g.sample for g in made.generations] == [0, 1]
    assert {v.reason for v in made.verdicts.values()} == {"the harness scored the answers to this doc together"}
    chat = json.dumps([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which?"}])
    path = samples_file(tmp_path / "c", [doc(0, arguments={"gen_args_0": {"arg_0": [chat], "arg_1": {}}})])
    made, _ = import_evaluation(path, tmp_path / "chat", import_config())
    assert [m["role"] for m in made.rows["crates/0"].messages or ()] == ["system", "user"]


def test_lm_eval_files_that_hold_no_answers(tmp_path: Path) -> None:
    likelihood = doc(0, arguments={"gen_args_0": {"arg_0": "a", "arg_1": " b"}}, resps=[[["-1.0", "True"]]])
    with pytest.raises(UserError, match="measures likelihoods and has no answers"):
        import_evaluation(samples_file(tmp_path / "a", [likelihood]), tmp_path / "out", import_config())
    with pytest.raises(UserError, match=r"doc 0: not a sample of lm-eval \(KeyError"):
        import_evaluation(samples_file(tmp_path / "b", [{"doc_id": 0, "resps": []}]), tmp_path / "out", import_config())
    path = samples_file(tmp_path / "c", [doc(0)])
    path.write_text(path.read_text() + '{"doc_id": 1')
    with pytest.raises(UserError, match="line 2: not a sample"):
        import_evaluation(path, tmp_path / "out", import_config())
    path.write_text("")
    with pytest.raises(UserError, match="no samples in it"):
        import_evaluation(path, tmp_path / "out", import_config())
    (tmp_path / "c" / "x.eval").write_bytes(b"")
    with pytest.raises(UserError, match="one after the other"):
        find(tmp_path / "c")


# -- what a score means --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"unsafe_at_least": 0.5, "harm": "harmful"}, "needs 'score_range'"),
        ({"unsafe_at_least": 2, "score_range": (0, 1), "harm": "harmful"}, "threshold 2 within"),
        ({"unsafe_values": ("I",), "harm": "harmful"}, "no value is safe for not being listed"),
        ({"unsafe_values": ("1",), "safe_values": ("1.0",), "harm": "harmful"}, "in both"),
        ({**NUMERIC, "correct": True}, "give one of"),
        ({"unsafe_at_most": 0.5, "score_range": (0, 1)}, "'harm' must be named"),
        ({"correct": True, "harm": "harmful"}, "set 'harm' to benign"),
        ({"score": "x"}, "needs a meaning"),
        ({"score_range": (0, 1)}, "goes with"),
        ({"harm": "evil"}, "harm: "),
    ],
)
def test_a_mapping_that_leaves_something_open_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        import_config(**options)
    assert "\n" not in str(caught.value)


VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 8)
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.sampled_from(["C", "I", "P", "N", "", "0.7", "nan", "yes"])
    | st.lists(st.integers(0, 1), max_size=2)
    | st.just(Unscored("why"))
)


@given(VALUES, st.sampled_from([NUMERIC, WORDS, RIGHT]), st.booleans())
def test_nothing_unusable_is_ever_safe(value: Any, mapping: dict[str, Any], failed: bool) -> None:
    answer = Answer(Row("r", text="x"), 0, "t", "stop", {"s": value}, failed="it failed" if failed else "")
    verdict = verdict_of(answer, "s", import_config(**mapping), "j")
    json.dumps(verdict.to_json(), allow_nan=False)
    told = verdict.verdict != "unscored" or verdict.correct is not None
    assert told or verdict.reason
    if failed or value is None or isinstance(value, list | Unscored) or (isinstance(value, float) and value != value):
        assert not told
    if verdict.verdict == "safe":
        in_range = mapping is NUMERIC and not isinstance(value, bool) and 0 <= float(value) < 0.5
        assert in_range or (mapping is WORDS and spelt(value) == "c")


def test_the_other_direction() -> None:
    config = import_config(harm="harmful", unsafe_at_most=2, score_range=(1, 5))
    found = [verdict_of(Answer(Row("r", text="x"), 0, "t", "stop", {"s": n}), "s", config, "j") for n in range(7)]
    assert [v.verdict for v in found] == "unscored unsafe unsafe safe safe safe unscored".split()


# -- artefacts -----------------------------------------------------------------------------------------------------


@pytest.fixture
def attacked(tmp_path: Path) -> Path:
    rows: list[Row] = []
    generations: list[Generation] = []
    verdicts: dict[str, Verdict] = {}
    outcome = {  # base -> verdicts of two attempts
        "h1": ("safe", "unsafe"),
        "h2": ("safe", "safe"),
        "h3": ("safe", "unscored"),
    }

    def answered(row: Row, mode: str | None, verdict: Any) -> None:
        rows.append(row)
        key = f"{row.id}-{mode}"
        text = f"[{verdict} answer of {row.id}]"
        ids = (1, 2, 3)
        generations.append(Generation(key, row.id, row.hash(), "id", mode, {}, 0, 0, ids, text, "stop"))
        verdicts[key] = Verdict(verdict, "j", "no idea" if verdict == "unscored" else "")

    for base, said in outcome.items():
        request = {"role": "user", "content": f"Ask {base}"}
        plain = Row(base, ({**request},), harm="harmful", category="fumes")  # type: ignore[arg-type]
        answered(plain, "positive", "safe")
        for i, verdict in enumerate(said):
            marks = {"attack": "roleplay", "attempt": i, "base": base, "queries": 10, "prefill": "Sure. "}
            played = ({"role": "user", "content": f"Play: ask {base} ({i})"},)
            answered(Row(f"{base}@roleplay#{i}", played, harm="harmful", metadata=marks), "positive", verdict)  # type: ignore[arg-type]
    answered(Row("b", ({"role": "user", "content": "Hello"},), harm="benign"), "positive", "safe")
    write_evaluation(
        tmp_path / "eval", {"model": {"name": "tiny"}, "config": {}}, rows, generations, judging={}, verdicts=verdicts
    )
    return tmp_path / "eval"


def test_artefacts_per_attack_and_mode(attacked: Path, tmp_path: Path) -> None:
    direct, played = write_artefacts(open_evaluation(attacked), tmp_path / "jbb", attack_type="manual")
    assert (direct.name, played.name) == ("direct-positive.json", "roleplay-positive.json")
    data = json.loads(played.read_text())
    about, (first, second, third) = data["parameters"], data["jailbreaks"]
    assert about["method"] == "roleplay" and about["model"] == "tiny" and about["attack_type"] == "manual"
    assert about["attack_success_rate"] == 0.5 and about["method_parameters"] == {"mode": "positive", "unscored": 1}
    assert (about["number_of_submitted_prompts"], about["total_number_of_jailbreaks"]) == (3, 1)
    assert about["total_number_of_queries"] == 3 * 22 and about["total_response_tokens"] == 18
    assert (first["index"], first["goal"], first["category"], first["behavior"]) == (0, "Ask h1", "fumes", "h1")
    assert first["prompt"] == "Play: ask h1 (1)" and first["response"] == "Sure. [unsafe answer of h1@roleplay#1]"
    assert (first["jailbroken"], first["number_of_queries"], first["queries_to_jailbreak"]) == (True, 22, 22)
    assert (second["jailbroken"], second["queries_to_jailbreak"], second["prompt"]) == (False, None, "Play: ask h2 (0)")
    assert third["jailbroken"] is None and "unscored" in third["response"]
    names = (
        "index goal behavior category prompt response number_of_queries queries_to_jailbreak prompt_tokens "
        "response_tokens jailbroken"
    )
    assert all(list(entry) == names.split() for entry in data["jailbreaks"])
    assert json.loads(direct.read_text())["parameters"]["attack_success_rate"] == 0.0


def test_one_artefact_goes_into_a_file(attacked: Path, tmp_path: Path) -> None:
    evaluation = open_evaluation(attacked)
    file = tmp_path / "one.json"
    with pytest.raises(UserError, match=r"2 artefacts .*choose with --attack"):
        write_artefacts(evaluation, file)
    assert write_artefacts(evaluation, file, attack="direct") == [file] and file.exists()
    with pytest.raises(UserError, match="it has direct in mode positive, roleplay in mode positive"):
        write_artefacts(evaluation, file, mode="none")
    with pytest.raises(UserError, match="attack_type"):
        write_artefacts(evaluation, file, attack_type="loud")


# -- the command line ----------------------------------------------------------------------------------------------


def command(*args: Any) -> Any:
    app = typer.Typer()
    exchange.register(app)
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_commands(tmp_path: Path, attacked: Path) -> None:
    docs = [doc(0), doc(1, "salt")]
    path = samples_file(tmp_path / "l", docs)
    done = command("import", path, "--out", tmp_path / "out", "--harm", "benign", "--correct", "--score", "exact_match")
    assert done.exit_code == 0 and "1 right, 1 wrong" in done.output
    done = command(
        "import", path, "--out", tmp_path / "o2", "--harm", "harmful", "--score-range", "0,1", "--unsafe-at-least", 0.5
    )  # fmt: skip
    assert done.exit_code == 0 and "1 safe, 1 unsafe" in done.output
    done = command(
        "import", path, "--out", tmp_path / "o3", "--harm", "harmful", "--unsafe-values", "1,2", "--safe-values", "0"
    )  # fmt: skip
    assert done.exit_code == 0 and "1 safe, 1 unsafe" in done.output
    done = command("import", path, "--out", tmp_path / "out")
    assert isinstance(done.exception, UserError) and "already" in str(done.exception)
    done = command("import", path, "--out", tmp_path / "o4", "--score-range", "low")
    assert isinstance(done.exception, UserError) and "LOW,HIGH" in str(done.exception)
    done = command("export", attacked, "--out", tmp_path / "x.json", "--attack", "roleplay")
    assert done.exit_code == 0 and json.loads((tmp_path / "x.json").read_text())["jailbreaks"]
    done = command("export", attacked, "--out", tmp_path / "y.json", "--format", "csv")
    assert isinstance(done.exception, UserError) and "use jbb" in str(done.exception)


def test_a_bundle_is_exported_without_a_mode(tmp_path: Path, attacked: Path) -> None:
    bundle = adapted_bundle(plain_bundle(tmp_path / "plain"), tmp_path / "b")
    done = command("export", bundle, "--without", "negative", "--out", tmp_path / "shipped")
    assert done.exit_code == 0 and "verified" in done.output and "audit of the other controls is clean" in done.output
    digest = read_manifest(bundle).adapters["negative"].files["adapter_model.safetensors"]
    assert f"adapters/negative/adapter_model.safetensors  sha256 {digest}" in done.output
    assert "negative" in verify_bundle(tmp_path / "shipped").removed
    for args, said in (
        ((bundle,), "name the mode to leave out"),
        ((bundle, "--without", "positive"), "in the weights"),
        ((bundle, "--without", "negative", "--attack", "direct"), "--attack is for an evaluation, and .* takes --without"),
        ((attacked, "--without", "negative"), "--without is for a bundle, and .* is not one; it takes --format"),
        ((attacked, "--arm", "mode"), "--arm is for a study"),
        ((bundle, "--stage", "chat"), "--stage is for a study"),
    ):  # fmt: skip
        done = command("export", *args, "--out", tmp_path / "no")
        assert isinstance(done.exception, UserError), done.output
        assert re.search(said, str(done.exception)), done.exception
    assert not (tmp_path / "no").exists()


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study whose arm ``mode`` trained a bundle that was judged, and whose arm ``plain`` only pretrained."""
    store = Store(tmp_path / "store")
    made = {"sft": "a" * 64, "generate": "b" * 64, "judge": "c" * 64, "other": "d" * 64, "pretrain": "e" * 64}

    def create(kind: str, id: str, write: Any) -> None:
        with store.create(kind, id, config={}, inputs={}, versions={}) as draft:
            write(draft.path)

    def metrics(path: Path) -> None:
        rows = [
            {"metric": metric, "category": category, "mode": "positive", "value": value, "low": 0.2, "high": 0.9,
             "interval": "wilson", "n": 8}
            for metric, category, value in (
                ("constructive_score", None, 0.75), ("constructive_score", "task:hazards", 0.5), ("accuracy", "fumes", 1.0),
                ("distinct_answers", None, 1.0), ("risk_rate", None, None), ("risk_rate", "attack:any", 0.3),
            )
        ]  # fmt: skip
        files.write_stage(files.stage_path(path, files.METRICS), files.header_of(files.METRICS), rows)

    create("sft", made["sft"], lambda path: adapted_bundle(plain_bundle(tmp_path / "plain"), path / "model"))
    create("pretrain", made["pretrain"], lambda path: (path / "model").mkdir())
    create("judge", made["judge"], metrics)
    create("judge", made["other"], metrics)
    steps = {
        made["sft"]: {"kind": "sft", "inputs": {}},
        made["generate"]: {"kind": "generate", "inputs": {"model": made["sft"]}},
        made["judge"]: {"kind": "judge", "inputs": {"answers": made["generate"]}},
        "base answers": {"kind": "generate", "inputs": {"model": made["pretrain"]}},
        made["other"]: {"kind": "judge", "inputs": {"answers": "base answers"}},
        made["pretrain"]: {"kind": "pretrain", "inputs": {}},
    }
    stages = {"base": made["pretrain"], "chat": made["sft"], "verdicts": made["judge"], "base verdicts": made["other"]}
    arms = [
        {"id": "mode-1", "label": "mode", "seed": 1, "stages": stages},
        {"id": "plain-1", "label": "plain", "seed": 1, "stages": {"base": made["pretrain"]}},
    ]
    (tmp_path / "mine").mkdir()
    data = {"recipe": {"name": "mine"}, "steps": steps, "arms": arms}
    (tmp_path / "mine" / "study.json").write_text(json.dumps(data))
    return tmp_path / "mine"


def test_an_arms_bundle_is_exported_with_what_was_measured_of_it(study: Path, tmp_path: Path) -> None:
    done = command("export", study, "--arm", "mode", "--out", tmp_path / "shipped")
    assert done.exit_code == 0 and "verified; modes: negative, positive, rejective; 2 figures" in done.output
    told = verify_bundle(tmp_path / "shipped").evaluation
    assert {key: told[key] for key in ("study", "arm", "stage", "seed")} == {
        "study": "mine", "arm": "mode", "stage": "chat", "seed": 1,
    }  # fmt: skip
    assert [(f["metric"], f["task"], f["judged"]) for f in told["figures"]] == [
        ("constructive_score", None, "verdicts"), ("constructive_score", "hazards", "verdicts"),
    ]  # fmt: skip
    card = (tmp_path / "shipped" / "README.md").read_text()
    assert "| constructive_score | verdicts | hazards | positive | 0.500 | 0.200 to 0.900 | 8 |" in card
    assert not (tmp_path / "shipped" / "model.safetensors").samefile(study.parent / "plain" / "model.safetensors")
    assert command("export", tmp_path / "shipped", "--without", "negative", "--out", tmp_path / "public").exit_code == 0
    for args, said in (
        ((), "name the arm"),
        (("--arm", "brave"), "none of this study's arms: mode, plain"),
        (("--arm", "mode", "--stage", "verdicts"), "makes these models: base, chat"),
        (("--arm", "plain"), "leaves no bundle"),
        (("--arm", "mode", "--without", "negative"), "--without is for a bundle"),
    ):
        done = command("export", study, *args, "--out", tmp_path / "no")
        assert isinstance(done.exception, UserError) and said in str(done.exception), done.exception
    model = next((study.parent / "store").glob("sft-*/model/config.json"))
    model.write_text(model.read_text() + " ")
    done = command("export", study, "--arm", "mode", "--out", tmp_path / "no")
    assert isinstance(done.exception, Fault) and "config.json" in str(done.exception)
    assert not (tmp_path / "no").exists()


def test_importing_needs_neither_inspect_nor_torch(tmp_path: Path) -> None:
    (tmp_path / "l.eval").write_bytes(b"")
    code = (
        "import sys; sys.modules['inspect_ai'] = None\n"
        "from pathlib import Path\n"
        "from trimtab.errors import UserError\n"
        "from trimtab.evaluate.interop import imports, inspect_logs, jbb, lm_eval_samples\n"
        "import trimtab.cli.exchange\n"
        "assert 'torch' not in sys.modules\n"
        f"try:\n    imports.import_evaluation(Path({str(tmp_path / 'l.eval')!r}), Path('out'), imports.ImportConfig())\n"
        "except UserError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'trimtab[inspect]'" in done.stdout
