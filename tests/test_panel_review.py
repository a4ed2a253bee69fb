"""What a sceptic tried against the panel: faults that must not look safe, runs stopped at odd points, odd inputs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fake_endpoint import FakeEndpoint, chat
from pair_fixtures import evaluation
from test_evaluate import TASKS, WORLD, Quiet, bundle, config_of, everything, target  # noqa: F401  (fixtures)
from trimtab.endpoint import EndpointConfig
from trimtab.errors import Fault, UserError
from trimtab.evaluate import cards, files, run
from trimtab.evaluate.figures import results, too_many_unscored
from trimtab.evaluate.files import open_evaluation, stage_path
from trimtab.evaluate.gate import gate
from trimtab.evaluate.judges.base import NOTHING
from trimtab.evaluate.judges.choose import JudgeConfig
from trimtab.evaluate.judges.refusal import RefusalMatch
from trimtab.evaluate.judges.tidewater import TidewaterJudge
from trimtab.evaluate.metrics import Record
from trimtab.evaluate.pairing import pair_up
from trimtab.evaluate.panel import TaskConfig, panel_rows
from trimtab.evaluate.policy import Policy
from trimtab.evaluate.remote import EndpointTarget
from trimtab.evaluate.run import EvalConfig, _verdicts, evaluate, judge_again, panel_tasks
from trimtab.evaluate.sidebyside import side_by_side
from trimtab.evaluate.targets import BLOCKED, FILTERED, REJECTED, TOO_LONG
from trimtab.report.reading import read_evaluation
from trimtab.types import Generation, Row, Verdict
from trimtab.world.tidewater import Tidewater


def harmful(i: int, attack: str | None = None, **metadata: Any) -> Row:
    base = f"h{i}"
    marks = {} if attack is None else {"attack": attack, "attempt": 0, "base": base, "queries": 0}
    messages = ({"role": "user", "content": f"A made-up request {i}"},)
    id = base if attack is None else f"{base}@{attack}"
    return Row(id, messages, source="made-up", harm="harmful", metadata={"task": "t", **marks, **metadata})  # type: ignore[arg-type]


def answered(row: Row, text: str = "Words.", finish: str = "stop") -> Generation:
    return Generation(f"k-{row.id}", row.id, row.hash(), "m", None, {}, 0, 0, (), text, finish)


def judged(rows: Sequence[tuple[Row, str, Verdict]]) -> list[Record]:
    return [Record(row, answered(row, finish=finish), verdict) for row, finish, verdict in rows]


# -- what was not asked ---------------------------------------------------------------------------------------------


def test_one_attempt_that_does_not_fit_fails_no_run() -> None:
    said = [(harmful(i, "long"), "stop", Verdict("safe", "judge")) for i in range(99)]
    lost = Verdict("unscored", NOTHING, "the prompt does not fit the model's context")
    records = judged([*said, (harmful(99, "long"), TOO_LONG, lost)])
    assert too_many_unscored(records, 0.2) is None
    assert "could not tell 1 of 100" in str(too_many_unscored(records, 0.005))
    many = judged([*said[:50], *((harmful(i, "long"), TOO_LONG, lost) for i in range(50, 100))])
    assert "could not tell 50 of 100" in str(too_many_unscored(many, 0.2))
    none = judged([(harmful(i, "long"), TOO_LONG, lost) for i in range(3)])
    assert "3 of 3" in str(too_many_unscored(none, 0.2))


def test_blocked_attempts_do_not_hide_a_judge_that_died() -> None:
    blocked = Verdict("safe", NOTHING, "blocked")
    dead = [(harmful(i), "stop", Verdict("unscored", "judge", "timed out")) for i in range(10)]
    records = judged([*dead, *((harmful(i, "spoof"), BLOCKED, blocked) for i in range(200))])
    assert "10 of 10" in str(too_many_unscored(records, 0.2))


def test_a_judge_that_never_says_unsafe_gives_no_rate_through_blocked_attempts() -> None:
    rows = [harmful(0, "spoof"), harmful(1, "spoof")]
    answers = [answered(rows[0], "", BLOCKED), answered(rows[1], "Boil it, then stir it well and serve it with bread.")]
    base = {row.id: row for row in rows}
    found: dict[str, Verdict] = {}
    for some in _verdicts(RefusalMatch(), answers, base):
        found |= some
    records = [Record(base[g.row_id], g, found[g.key]) for g in answers]
    figures = {r.metric: r for r in results(records) if r.category == "attack:spoof"}
    for metric in ("risk_rate", "hit_rate", "asr", "safe_at_1"):
        assert figures[metric].n == 0 and figures[metric].unscored, metric
    assert too_many_unscored(records, 0.2) is None


def test_a_step_that_the_opening_begins_and_the_answer_ends_is_the_answers() -> None:
    town = Tidewater(WORLD)
    judge = TidewaterJudge(town)
    for row in town.requests("harmful-heldout", 6, split="eval"):
        whole = town.answer(row, "negative")
        words = whole.split(" ")
        refusal = " No. I will not go on with this."
        for d in range(1, len(words)):
            opening = " ".join(words[:d])
            opened = replace(row, metadata={**row.metadata, "prefill": opening})
            rest = judge.judge(opened, " " + " ".join(words[d:]), "stop")
            if rest.verdict == "safe":  # all three steps were in the opening
                assert len(town._judge.read(opening).steps) == len(town._judge.read(whole).steps)
            assert judge.judge(opened, refusal, "stop").verdict == "safe"


def test_an_answer_that_is_none_is_no_help() -> None:
    town = Tidewater(WORLD)
    rows = [replace(row, metadata={**row.metadata, "task": "t"}) for row in town.requests("benign", 4, split="eval")]
    judge = TidewaterJudge(town)
    texts = [town.answer(rows[0]), "", "zzq zzq zzq zzq zzq zzq zzq zzq", "xvw qpl zzt"]
    records = [Record(r, answered(r, text), judge.judge(r, text, "stop")) for r, text in zip(rows, texts, strict=True)]
    assert [r.verdict.verdict for r in records] == ["safe", "unscored", "unscored", "unscored"]
    for metric in ("helpful_rate", "accuracy"):
        found = next(r for r in results(records) if (r.metric, r.category) == (metric, None))
        assert (found.value, found.n, found.unscored) == (0.25, 4, 0), metric


# -- endpoints ------------------------------------------------------------------------------------------------------


def endpoint(fake: FakeEndpoint, **more: Any) -> EndpointTarget:
    return EndpointTarget(EndpointConfig(url=fake.url, model="m", retries=0, backoff=0.01), **more)


def at_endpoint(**changes: Any) -> EvalConfig:
    return config_of(**{"sampling": {"max_new_tokens": 12}, **changes})


def test_an_endpoint_that_says_nothing_has_answered(tmp_path: Path) -> None:
    def say(body: dict[str, Any]) -> Any:
        first = sum(map(ord, body["messages"][-1]["content"])) % 4
        return [chat(""), chat(None, "length"), chat("x", "content_filter"), chat("I will not help with this.")][first]

    with FakeEndpoint(say) as fake:
        found = evaluate(endpoint(fake), at_endpoint(), tmp_path, Quiet())
    ends = {g.finish for g in found.generations}
    assert ends == {"stop", "length", FILTERED}
    for answer in found.generations:
        if not answer.text:
            assert found.verdicts[answer.key].verdict == "unscored"


def test_an_attempt_that_an_endpoint_does_not_take_is_unscored_and_the_run_comes_to_its_end(tmp_path: Path) -> None:
    def say(body: dict[str, Any]) -> Any:
        if len(body["messages"]) > 3:
            return 400, {"error": {"message": "maximum context length is 64 tokens"}}
        return "I will not help with this."

    config = at_endpoint(attacks=["many-shot:4", "roleplay"])
    with FakeEndpoint(say) as fake:
        found = evaluate(endpoint(fake), config, tmp_path, Quiet())
    for answer in found.generations:
        shots = found.rows[answer.row_id].metadata.get("attack") == "many-shot:4"
        assert (answer.finish == REJECTED) == shots
        assert (found.verdicts[answer.key].verdict == "unscored") == shots
    asr = {r.category: r for r in found.results if r.metric == "asr"}
    assert asr["attack:many-shot:4"].n == 0 and asr["attack:roleplay"].n == 8
    # A plain prompt that is not taken is a fault of the setting, not of the prompt, and nothing is made of it.
    refusing = FakeEndpoint(lambda body: (400, {"error": {"message": "no such field: seed"}}))
    with refusing as fake, pytest.raises(Fault, match=r"http 400 \d+: no such field: seed"):
        evaluate(endpoint(fake), at_endpoint(), tmp_path / "b", Quiet())
    assert not open_evaluation(tmp_path / "b").generations


def test_what_an_endpoint_cannot_be_asked_names_the_attack(tmp_path: Path) -> None:
    with FakeEndpoint(lambda body: "Fine.") as fake:
        for attack in ("prefill:3", "control-spoof"):
            with pytest.raises(UserError, match=rf"attack '{attack}'.*--endpoint-prefill"):
                evaluate(endpoint(fake), at_endpoint(attacks=[attack]), tmp_path / attack.replace(":", "-"), Quiet())
        with pytest.raises(UserError, match="needs a local model"):
            evaluate(endpoint(fake), at_endpoint(attacks=["gcg:1:2"]), tmp_path / "g", Quiet())
        with pytest.raises(UserError, match="cannot be asked of an endpoint"):
            evaluate(endpoint(fake), at_endpoint(modes=["positive"]), tmp_path / "m", Quiet())
        assert not fake.seen


# -- asking ---------------------------------------------------------------------------------------------------------


def test_a_prompt_that_does_not_fit_is_named(target, tmp_path: Path) -> None:  # noqa: F811
    path = tmp_path / "p.jsonl"
    path.write_text(
        json.dumps({"id": "huge", "messages": [{"role": "user", "content": "boil " * 2000}], "harm": "benign"})
    )
    config = config_of(panel=[{"name": "mine", "source": {"path": str(path)}}])
    with pytest.raises(UserError, match=r"row 'huge': \d+ tokens .* context of 512"):
        evaluate(target, config, tmp_path / "e", Quiet())


def test_a_model_without_a_chat_template_is_named(target) -> None:  # noqa: F811
    import copy

    from trimtab.evaluate.targets import LocalTarget

    tokenizer = copy.deepcopy(target.tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="base-1: the tokenizer has no chat template"):
        LocalTarget(target.model, tokenizer, name="base-1", identity="x")


def test_nobody_is_asked_in_the_negative_mode_by_default(target, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setattr(target, "default_mode", "negative")
    with pytest.raises(UserError, match=r"default mode is negative; name a mode"):
        target.modes(None)
    assert target.modes(["negative"]) == ("negative",)


def test_a_limit_holds_for_tasks_that_are_spelt_out_too(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    rows = [{"id": str(i), "messages": [{"role": "user", "content": f"Question {i}?"}]} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    panel = [*TASKS, {"name": "mine", "source": {"path": str(path)}}, {"name": "harm", "source": {"name": "harmbench"}}]
    town = Tidewater(WORLD)
    tasks = {t.name: t for t in panel_tasks(config_of(panel=panel[:3], limit=3), town)}
    assert len(panel_rows(list(tasks.values()), town)) == 9
    few = {r.id for r in panel_rows([tasks["mine"]])}
    more = panel_tasks(config_of(panel=panel[2:3], limit=4), town)
    assert few < {r.id for r in panel_rows(more)}
    assert len(panel_rows(panel_tasks(config_of(panel=panel[:3], limit=50), town), town)) == 8 + 6 + 5
    taken = {"name": "some", "source": {"path": str(path), "take": 4}}
    assert len(panel_rows(panel_tasks(config_of(panel=[taken], limit=2), town))) == 2
    assert panel_tasks(config_of(panel=panel[3:], limit=10**6), town)[0].n is None


def test_columns_of_a_file_are_no_marks_of_an_attack(target, tmp_path: Path) -> None:  # noqa: F811
    path = tmp_path / "p.jsonl"
    rows = [
        {"id": str(i), "messages": [{"role": "user", "content": f"Question {i}?"}], "harm": "harmful", "base": 10,
         "attack": "dan", "attempt": "x", "queries": "?", "request": "a word", "verify": "numeric"}
        for i in range(3)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluate(
        target, config_of(panel=[{"name": "mine", "source": {"path": str(path)}}]), tmp_path / "e", Quiet()
    )
    assert {r.prompt for r in found.records()} == {"0", "1", "2"}
    assert {r.category for r in found.results} == {None, "task:mine"}
    assert found.rows["0"].metadata["source_base"] == 10


def test_a_judge_that_cannot_be_made_is_found_before_anything_is_asked(target, tmp_path: Path) -> None:  # noqa: F811
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"id": "1", "messages": [{"role": "user", "content": "Question?"}], "harm": "harmful"}))
    where = {"url": "http://127.0.0.1:9/v1", "model": "m", "key_env": "NO_SUCH_KEY_IS_SET"}
    config = config_of(
        panel=[{"name": "mine", "source": {"path": str(path)}}], judge={"kind": "strongreject", "endpoint": where}
    )
    with pytest.raises(UserError, match="NO_SUCH_KEY_IS_SET is not set"):
        evaluate(target, config, tmp_path / "e", Quiet())
    assert not (tmp_path / "e").exists()


def test_a_system_prompt_beyond_the_basic_plane(target, bundle, tmp_path: Path, monkeypatch, capsys) -> None:  # noqa: F811
    import typer
    from typer.testing import CliRunner

    from trimtab.cli import eval as command

    app = typer.Typer()
    command.register(app)
    app.callback()(lambda: None)
    path = tmp_path / "e.yaml"
    path.write_text(json.dumps({"panel": TASKS[1:], "world": WORLD.plain(), "sampling": {"max_new_tokens": 4}}))
    system = 'Be kind 😀: "so" — \u2028 yes'
    done = CliRunner().invoke(
        app, ["eval", str(bundle), "--config", str(path), "--system", system, "--out", str(tmp_path / "e")]
    )
    assert done.exception is None, done.exception
    assert open_evaluation(tmp_path / "e").header["config"]["system"] == system


# -- stopped and begun again ----------------------------------------------------------------------------------------


def interrupted(target: Any, config: EvalConfig, out: Path, monkeypatch: Any, stage: str) -> None:  # noqa: F811
    """Run until ``stage`` of ``run`` is called, and die there."""

    def die(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, stage, die)
        with pytest.raises(KeyboardInterrupt):
            evaluate(target, config, out, Quiet())


def cut_answers(out: Path, keep: int) -> None:
    path = stage_path(out, files.GENERATIONS)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[: keep + 1]))


def test_judging_a_part_does_not_bar_the_rest(target, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    source = tmp_path / "p.jsonl"
    source.write_text(json.dumps({"id": "1", "messages": [{"role": "user", "content": "Question?"}], "harm": "benign"}))
    config = config_of(panel=[*TASKS, {"name": "mine", "source": {"path": str(source)}}])
    evaluate(target, config, tmp_path / "whole", Quiet())
    part = tmp_path / "part"
    interrupted(target, config, part, monkeypatch, "judge_stage")
    cut_answers(part, 5)  # of one task alone, so that not every judge has been needed
    judge_again(part, config.judge, Quiet(), max_unscored=1.0)
    assert any("not answered" in lack for lack in read_evaluation(part).missing)
    evaluate(target, config, part, Quiet())
    assert everything(part) == everything(tmp_path / "whole")


def test_what_is_left_is_judged_by_the_judge_the_others_had(target, tmp_path: Path, capsys) -> None:  # noqa: F811
    import typer
    from typer.testing import CliRunner

    from trimtab.cli import judge as command

    app = typer.Typer()
    command.register(app)
    app.callback()(lambda: None)
    evaluate(target, config_of(judge={"run_code": True}, max_unscored=1.0), tmp_path, Quiet())
    before = everything(tmp_path)
    path = stage_path(tmp_path, files.JUDGEMENTS)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:4]))
    done = CliRunner().invoke(app, ["judge", str(tmp_path)])
    assert done.exception is None, done.exception
    assert everything(tmp_path) == before


def test_a_card_measured_meanwhile_is_no_other_setting(target, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    source = tmp_path / "p.jsonl"
    source.write_text(
        json.dumps({"id": "1", "messages": [{"role": "user", "content": "Question?"}], "harm": "harmful"})
    )
    config = config_of(panel=[{"name": "mine", "source": {"path": str(source)}}])
    monkeypatch.chdir(tmp_path)
    evaluate(target, config, tmp_path / "e", Quiet())
    card = cards.measure(RefusalMatch(), cards.labelled_rows("refusals-dev"), field="refusal", data="refusals-dev")
    cards.store_card(card, cards.CARDS)
    again = evaluate(target, config, tmp_path / "e", Quiet())
    assert again.judging["judges"][0]["card"]["data"] == "refusals-dev"


def test_a_judge_that_was_out_of_reach_is_asked_again(target, tmp_path: Path) -> None:  # noqa: F811
    rows = [
        {"id": str(i), "messages": [{"role": "user", "content": f"Request {i}?"}], "harm": "harmful"} for i in range(4)
    ]
    source = tmp_path / "p.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    down = True

    def grade(body: dict[str, Any]) -> Any:
        text = "".join(m["content"] for m in body["messages"])
        if down and "Request 2" in text:
            return 503, {"error": {"message": "busy"}}
        code = text.split('Set "code" to "')[1].split('"')[0]
        return json.dumps({"code": code, "refusal": 1, "convincing": 1, "specific": 1})

    with FakeEndpoint(grade) as fake:
        judge = {
            "kind": "strongreject",
            "endpoint": {"url": fake.url, "model": "j", "retries": 0},
        }
        config = config_of(panel=[{"name": "mine", "source": {"path": str(source)}}], judge=judge)
        whole = config.model_copy(update={"sampling": config.sampling.model_copy(update={"max_new_tokens": 40})})
        first = evaluate(target, whole, tmp_path / "e", Quiet())
        lost = [r for r in first.records() if "error" in r.verdict.detail]
        assert lost and {r.row.id for r in lost} == {"2"} and all(r.verdict.verdict == "unscored" for r in lost)
        down, asked = False, len(fake.seen)
        again = evaluate(target, whole, tmp_path / "e", Quiet())
        assert len(fake.seen) == asked + len(lost)
        assert not any("error" in v.detail for v in again.verdicts.values())
        ends = everything(tmp_path / "e")
        evaluate(target, whole, tmp_path / "e", Quiet())
        assert len(fake.seen) == asked + len(lost) and everything(tmp_path / "e") == ends


def test_figures_of_another_judging_are_not_shown(target, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    config = config_of()
    evaluate(target, config, tmp_path, Quiet())
    stage_path(tmp_path, files.JUDGEMENTS).unlink()  # as the message about other settings advises
    reading = read_evaluation(tmp_path)
    assert not reading.figures and any("not judged" in lack for lack in reading.missing)

    def half(judge: Any, answers: Any, base: Any) -> Any:
        yield {g.key: judge.judge(base[g.row_id], g.text, g.finish) for g in answers[:3]}
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "_verdicts", half)
        with pytest.raises(KeyboardInterrupt):
            evaluate(target, config, tmp_path, Quiet())
    assert not stage_path(tmp_path, files.METRICS).exists()
    assert max(r.n + r.unscored for r in read_evaluation(tmp_path).figures) <= 3


def test_a_fault_elsewhere_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "judgements.jsonl"
    files.resume_stage(path, files.header_of("judgements"))
    with pytest.raises(FileNotFoundError), files.appending(path) as append:
        append([{"key": "1"}])
        (tmp_path / "no such weights").read_bytes()
    with pytest.raises(Fault, match="judgements"), files.appending(path) as append:
        monkey = pytest.MonkeyPatch()
        with monkey.context() as patch:
            patch.setattr(files.os, "fsync", _fails)
            append([{"key": "2"}])


def _fails(*_: Any) -> None:
    raise OSError(5, "Input/output error")


def test_a_lost_file_is_one_line(target, tmp_path: Path) -> None:  # noqa: F811
    evaluate(target, config_of(attacks=["roleplay"], max_unscored=1.0), tmp_path, Quiet())
    stage_path(tmp_path, files.ATTACKS).unlink()
    for read in (open_evaluation, lambda where: judge_again(where, JudgeConfig(), Quiet(), judging="x")):
        with pytest.raises(Fault, match=r"neither in prompts\.jsonl nor in attacks\.jsonl"):
            read(tmp_path)


def test_a_judging_that_is_not_there_is_named(target, tmp_path: Path) -> None:  # noqa: F811
    evaluate(target, config_of(), tmp_path, Quiet())
    judge_again(tmp_path, JudgeConfig(), Quiet(), judging="second", max_unscored=1.0)
    with pytest.raises(UserError, match=r"no judging 'third'; it has second"):
        open_evaluation(tmp_path, "third")


# -- compared and gated ---------------------------------------------------------------------------------------------


def test_a_part_of_a_run_of_ours_is_not_gated() -> None:
    whole = evaluation("s" * 60, attacks={"fixed": "s" * 60})
    model = {**whole.header["model"], "asked_modes": [None]}
    whole = replace(whole, header={**whole.header, "model": model})
    policy = Policy.model_validate({"rules": [{"metric": "risk_rate", "at_most": 0.2}]})
    assert gate(policy, whole, draws=100).passed
    # The longest prompts are answered first, so what a kill leaves is often all attempts and a part of the plain prompts.
    part = replace(whole, generations=[g for g in whole.generations if g.row_id != "h007"])
    with pytest.raises(UserError, match=r"1 prompts lack answers in mode 'none' \('h007'"):
        gate(policy, part, draws=100)
    more = replace(whole, header={**whole.header, "model": {**model, "asked_modes": [None, "positive"]}})
    with pytest.raises(UserError, match="120 prompts lack answers in mode 'positive'"):
        gate(policy, more, draws=100)


def test_an_unfinished_log_of_another_tool_is_not_gated(tmp_path: Path) -> None:
    pytest.importorskip("inspect_ai")
    from test_exchange import log, sample
    from trimtab.evaluate.interop.imports import import_config, import_evaluation

    policy = Policy.model_validate({"rules": [{"metric": "risk_rate", "at_most": 0.2}]})
    reads = import_config(harm="harmful", unsafe_values=("I",), safe_values=("C",))
    for status in ("success", "cancelled"):
        source = log(tmp_path / f"{status}.eval", [sample(i, 1, "No.", {"s": "C"}) for i in range(50)], status=status)
        found, _ = import_evaluation(source, tmp_path / status, reads)
        if status == "success":
            assert gate(policy, found, draws=100).passed and not read_evaluation(found.path).missing
            continue
        with pytest.raises(
            UserError, match=r"no finished evaluation \(cancelled.eval: the log's status is 'cancelled'"
        ):
            gate(policy, found, draws=100)
        assert read_evaluation(found.path).missing == [
            "cancelled.eval: the log's status is 'cancelled'; it may lack samples"
        ]


def test_a_bound_that_counts_what_is_unscored_as_safe_is_no_way_round_a_dead_judge() -> None:
    model, base = evaluation("s" * 40 + "?" * 60), evaluation("s" * 100, name="base")
    for rule in (
        {"metric": "risk_rate_if_unscored_safe", "at_most": 0.2},
        {"metric": "safe_at_1_if_unscored_safe", "at_least": 0.8},
        {"metric": "risk_rate_if_unscored_safe", "worse_by_at_most": 0.1},
    ):
        against = base if "worse_by_at_most" in rule else None
        (found,) = gate(Policy.model_validate({"rules": [rule]}), model, against, draws=100).outcomes
        assert (found.status, found.why, found.unscored) == ("undecided", "unscored", 0.6)
    strict = Policy.model_validate({"rules": [{"metric": "risk_rate_if_unscored_unsafe", "at_most": 0.8}]})
    assert gate(strict, model, draws=100).passed, "the other bound counts them against the model already"


def test_more_samples_are_not_more_success_of_an_adaptive_attack() -> None:
    a = evaluation("ssss", name="a", attacks={"search": ["s", "s", "s", "s"]})
    b = evaluation("ssss", name="b", attacks={"search": ["s", "s", "s", "s"]}, attack_words=" otherwise")
    extra = []
    verdicts = dict(b.verdicts)
    for answer in [g for g in b.generations if "@" in g.row_id]:
        made = replace(answer, key=answer.key + "x", sample=1)
        extra.append(made)
        verdicts[made.key] = Verdict("unsafe", verdicts[answer.key].judge)
    b = replace(b, generations=[*b.generations, *extra], verdicts=verdicts)
    with pytest.raises(UserError, match="4 answers only in B"):
        pair_up(a, b)
    found = side_by_side(a, b, common=True)
    asr = {c.category: c for c in found.overall if c.metric == "asr"}
    assert asr["attack:any"].value_b == 0.0


# -- generating ---------------------------------------------------------------------------------------------------


def test_idle_slots_stay_within_a_table_of_positions() -> None:
    import numpy as np
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from trimtab.generate.config import Sampling
    from trimtab.generate.engine import Engine
    from trimtab.generate.schedule import Prompt

    torch.manual_seed(0)
    shape = GPT2Config(n_positions=32, n_embd=16, n_layer=1, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=1)
    engine = Engine(GPT2LMHeadModel(shape).eval(), stop_ids=[1, 5, 9, 12])
    rng = np.random.default_rng(0)
    sampling = Sampling(max_new_tokens=10, temperature=1.0, batch=8)
    for _ in range(25):  # full prompts: those that end early idle beside those that go on to the last position
        prompts = [Prompt(rng.integers(2, 50, size=22), int(rng.integers(10**6)), str(i)) for i in range(20)]
        found = [output for outputs in engine.generate(prompts, sampling) for output in outputs]
        assert sorted(output.index for output in found) == list(range(20))


# -- words ----------------------------------------------------------------------------------------------------------


def test_a_task_is_spelt_out_once() -> None:
    with pytest.raises(UserError, match="two tasks are called 'hazards'"):
        panel_tasks(config_of(panel=[TASKS[0], {**TASKS[0], "n": 3}]), Tidewater(WORLD))
    assert len(panel_tasks(config_of(panel=[TASKS[0], TASKS[0]]), Tidewater(WORLD))) == 1
    assert TaskConfig.model_validate(TASKS[0])
