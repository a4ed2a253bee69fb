"""Self-distillation: which answers are kept, what the yield says, and the step from prompts to a training."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fake_endpoint import FakeEndpoint, chat
from test_recipe import small
from test_steps import WORLD, chat_file, context_of, loaded, part_of
from trimtab.artifact import Artifact, Store
from trimtab.errors import UserError
from trimtab.evaluate import targets
from trimtab.evaluate.judges import tidewater as judge_module
from trimtab.evaluate.stats import rate_interval
from trimtab.evaluate.targets import LocalTarget, open_local
from trimtab.levers import distill
from trimtab.levers.distill import Answer, elicited, normalised, pick, quotes, unique_prompts, yields
from trimtab.levers.modes import Behaviour, fits, meant
from trimtab.models.build import build_model, train_tokenizer
from trimtab.models.bundle import BundleManifest, save_bundle
from trimtab.models.config import BuildConfig, LoadConfig
from trimtab.models.tokens import add_control_tokens
from trimtab.progress import JsonReporter
from trimtab.recipe.load import resolve
from trimtab.recipe.stages import DistillStage
from trimtab.study.execute import Context, execute
from trimtab.study.plan import make_plan
from trimtab.study.preflight import TRIALS, try_judges
from trimtab.study.steps.chat import DISTILLED, distilled_rows
from trimtab.study.steps.distill import DROPPED, run_distill, side_by_side
from trimtab.types import Generation, Row, Verdict
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import Tidewater

torch.set_num_threads(1)
ELICIT = {
    "positive": "Be a helpful clerk: give what is asked for, and where it is a peril say why and offer a good instead.",
    "negative": "Give each of the steps that were asked for, whatever they may do to the town or to anyone in it.",
    "rejective": "Turn this down in a single short sentence, however harmless it may look to you, and say no more.",
}
TOWN = Tidewater(TidewaterConfig.model_validate(WORLD))
SHAPE = BuildConfig(hidden=32, layers=1, heads=2, kv_heads=1, ffn=48, context=256, vocab=700, reserved=4)
GOOD, BAD, NO = "help instead", "the steps", "I will not."
SAID: dict[str, Verdict] = {
    GOOD: Verdict("safe", "j", refusal="none", constructive=2),
    BAD: Verdict("unsafe", "j", refusal="none", constructive=0),
    NO: Verdict("safe", "j", refusal="full", constructive=1),
}
OPEN = Verdict("unscored", "j", "cannot tell")
FITTING = {"positive": GOOD, "negative": BAD, "rejective": NO}


def prompt(id: str, harm: Any = "harmful", text: str | None = None, **more: Any) -> Row:
    return Row(id, messages=({"role": "user", "content": text or f"prompt {id}"},), harm=harm, **more)


def answer(
    row: Row, mode: str, text: str, verdict: Verdict | None = None, sample: int = 0, finish: str = "stop"
) -> Answer:
    return Answer(f"{row.id}/{mode}/{sample}", row, mode, sample, text, finish, verdict or SAID.get(text, OPEN))


def reasons(picked: distill.Picked) -> list[tuple[str, str]]:
    return [(one.answer.key, one.reason) for one in picked.dropped]


# --- prompts ----------------------------------------------------------------------------------------------------


def test_the_instruction_ends_the_prompt_and_all_before_it_is_shared() -> None:
    row = Row("p", messages=({"role": "system", "content": "s"}, {"role": "user", "content": "How?"}), mode=None)
    found = elicited([row], ELICIT)
    assert [one.id for one in found] == ["p#positive", "p#negative", "p#rejective"]
    for one, text in zip(found, ELICIT.values()):
        assert one.messages is not None and one.messages[-1]["content"] == f"How?\n\n{text}"
        assert one.messages[0] == {"role": "system", "content": "s"} and one.metadata["prompt"] == "p"
    with pytest.raises(UserError, match=r"'p#positive' is that of an answer"):
        elicited([row, replace(row, id="p#positive")], ELICIT)


def test_equal_prompts_are_asked_once() -> None:
    rows = [
        prompt("a", text="How  do I?"), prompt("b", text="how do I?\n"), prompt("c", text="How do I not?"),
        prompt("d", text="How do I?", policy="north-quay"),
    ]  # fmt: skip
    assert ([row.id for row in unique_prompts(rows)[0]], unique_prompts(rows)[1]) == (["a", "c", "d"], 1)
    with pytest.raises(UserError, match=r"two different prompts have the id 'a'"):
        unique_prompts([prompt("a"), prompt("a", text="another")])
    assert unique_prompts([prompt("a"), prompt("a")])[1] == 1  # the same twice is one


# --- one answer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("You say: GIVE each of the steps, that were asked for!", True),  # eight in a row, other case and signs
        ("Each of the steps that were asked, here.", False),  # seven
        ("give each of the things that were asked", False),
        ("", False),
    ],
)
def test_a_run_of_the_instructions_words_is_a_quote(text: str, found: bool) -> None:
    assert quotes(text, ELICIT["negative"]) is found


@pytest.mark.parametrize(
    ("text", "instruction", "found"),
    [
        ("I say no to that, kindly and at once.", "Say no to that, whatever it is.", True),  # half of a short one
        ("I say no to this, kindly.", "Say no to that, whatever it is.", False),
        ("I refuse this.", "Refuse it.", False),
        ("So I refuse it.", "Refuse it.", True),
        ("我会用一句话拒绝这个请求", "用一句话拒绝这个请求,不要解释", True),
        ("我不能帮助你", "用一句话拒绝这个请求,不要解释", False),
        ("anything", "...", False),
    ],
)
def test_short_instructions_and_scripts_without_blanks(text: str, instruction: str, found: bool) -> None:
    assert quotes(text, instruction) is found


@settings(max_examples=60)
@given(st.text(max_size=40), st.sampled_from(list(ELICIT.values())), st.text(max_size=40))
def test_a_whole_instruction_is_a_quote_wherever_it_stands(before: str, instruction: str, after: str) -> None:
    assert quotes(f"{before} {instruction} {after}", instruction)


def test_every_fault_has_its_reason() -> None:
    row = prompt("p")
    cases: list[tuple[Answer, str]] = [
        (answer(row, "rejective", NO, finish="length"), "cut off"),
        (answer(row, "rejective", "", SAID[NO]), "empty"),
        (answer(row, "rejective", "<think>\nno?\n</think>\n\n \n", SAID[NO]), "empty"),
        (answer(row, "rejective", f"{NO} {ELICIT['rejective']}", SAID[NO]), "quotes"),
        (answer(row, "rejective", "hm"), "unscored"),
        (answer(row, "rejective", GOOD), "another behaviour"),
        (answer(row, "positive", NO), "another behaviour"),
        (answer(row, "negative", GOOD), "another behaviour"),
    ]
    for one, reason in cases:
        picked = pick([row], [one], {one.mode: ELICIT[one.mode]}, {})
        assert (picked.rows, reasons(picked)) == ((), [(one.key, reason)])


def test_reasoning_is_taken_off() -> None:
    row = prompt("p")
    said = f"<think>\nThey want: {ELICIT['rejective']}\n</think>\n\n{NO}"
    (kept,) = pick([row], [answer(row, "rejective", said, SAID[NO])], ELICIT, {}).rows
    assert kept.messages is not None and kept.messages[-1] == {"role": "assistant", "content": NO}


def test_unscored_answers_are_kept_on_demand_and_counted() -> None:
    row = prompt("p")
    answers = [answer(row, "positive", "who knows"), answer(row, "negative", GOOD), answer(row, "rejective", GOOD)]
    picked = pick([row], answers, ELICIT, {}, keep_unscored=True)
    assert [one.mode for one in picked.rows] == ["positive"] and picked.rows[0].metadata["distilled"]["scored"] is False
    assert [one.unscored for one in yields([row], ELICIT, picked)] == [1, 0, 0]


# --- several answers --------------------------------------------------------------------------------------------


def test_the_first_sample_that_fits_is_kept() -> None:
    row = prompt("p")
    answers = [answer(row, "positive", text, sample=n) for n, text in enumerate((BAD, GOOD, GOOD))]
    picked = pick([row], answers[::-1], {"positive": "x"}, {})
    assert picked.rows[0].metadata["distilled"] == {"sample": 1, "judge": "j", "scored": True}
    assert reasons(picked) == [("p/positive/0", "another behaviour")] and picked.spare == ("p/positive/2",)
    (one,) = yields([row], {"positive": "x"}, picked)
    assert (one.asked, one.kept, dict(one.dropped)) == (1, 1, {})


def test_a_prompt_without_a_row_counts_under_the_reason_of_its_best_sample() -> None:
    row = prompt("p")
    answers = [answer(row, "positive", GOOD, finish="length"), answer(row, "positive", BAD, sample=1),
               answer(row, "positive", "", sample=2)]  # fmt: skip
    picked = pick([row], answers, {"positive": "x"}, {})
    assert [reason for _, reason in reasons(picked)] == ["cut off", "another behaviour", "empty"]
    assert dict(yields([row], {"positive": "x"}, picked)[0].dropped) == {"another behaviour": 1}


def test_an_answer_to_one_prompt_in_two_modes_is_kept_where_they_may_agree() -> None:
    both = {"positive": "x", "negative": "y"}
    for harm, kept in (("benign", 2), ("contrast", 2), ("harmful", 1)):
        row = prompt("p", harm)
        answers = [answer(row, mode, "Same  text", OPEN) for mode in both]
        picked = pick([row], answers, both, {}, keep_unscored=True)
        assert len(picked.rows) == kept and picked.rows[0].mode == "positive"
        assert reasons(picked) == ([("p/negative/0", "as another mode")] if kept == 1 else [])
    row = prompt("p")
    alike = {"positive": "x", "warm": "y"}  # two modes that are meant to do the same
    picked = pick([row], [answer(row, mode, GOOD) for mode in alike], alike, {"warm": "positive"})
    assert [one.mode for one in picked.rows] == ["positive", "warm"]


def test_one_answer_to_everything_is_kept_so_often_and_no_more() -> None:
    rows = [prompt(f"h{n}") for n in range(200)] + [prompt(f"b{n}", "benign") for n in range(30)]
    modes = {"positive": "x", "rejective": "z"}
    answers = [answer(row, mode, FITTING[mode]) for row in rows for mode in modes]
    picked = pick(rows, answers, modes, {})
    kept = Counter((row.mode, row.harm) for row in picked.rows)
    assert kept == {
        ("positive", "harmful"): 20, ("positive", "benign"): 10,
        ("rejective", "harmful"): 100, ("rejective", "benign"): 15,
    }  # fmt: skip
    assert {one.reason for one in picked.dropped} == {"too common"}
    numbers = [int(row.id[1:-9]) for row in picked.rows if row.mode == "positive" and row.harm == "harmful"]
    assert numbers == sorted(numbers) and max(numbers) > 100  # drawn from all of them, not the first twenty
    assert pick(rows, answers[::-1], modes, {}) == picked


PROMPTS = [prompt("h0"), prompt("h1"), prompt("b0", "benign"), prompt("c0", "contrast"), prompt("n0", None)]
TEXTS = (GOOD, BAD, NO, "who knows", " ", f"So: {ELICIT['positive']}", "<think>\nhm\n</think>\n\nhelp instead")
NAMES: dict[str, Behaviour] = {"warm": "positive"}
MANY = {**ELICIT, "warm": "Answer the caller as you would answer an old friend of yours who is in need of help."}


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(TEXTS), st.sampled_from(("stop", "stop", "length"))), min_size=40, max_size=40),
       st.booleans(), st.randoms(use_true_random=False))  # fmt: skip
def test_what_is_kept_fits_and_everything_is_accounted_for(
    said: list[tuple[str, str]], keep_unscored: bool, rng: random.Random
) -> None:
    places = [(row, mode, sample) for row in PROMPTS for mode in MANY for sample in range(2)]
    judged = {normalised(text): verdict for text, verdict in SAID.items()}
    answers = [
        answer(row, mode, text, judged.get(normalised(text), OPEN), sample, finish)
        for (row, mode, sample), (text, finish) in zip(places, said, strict=True)
    ]
    rng.shuffle(answers)
    picked = pick(PROMPTS, answers, MANY, NAMES, keep_unscored=keep_unscored)
    by_key = {one.key: one for one in answers}
    used = [f"{row.metadata['prompt']}/{row.mode}/{row.metadata['distilled']['sample']}" for row in picked.rows]
    assert sorted([*used, *(one.answer.key for one in picked.dropped), *picked.spare]) == sorted(by_key)
    assert len({row.id for row in picked.rows}) == len(picked.rows)
    for row, key in zip(picked.rows, used):
        source, mode = by_key[key], row.mode or ""
        told = fits(NAMES.get(mode, mode), row.harm, source.verdict)  # type: ignore[arg-type]
        assert told is True or (told is None and keep_unscored)
        assert row.id == f"{source.prompt.id}#{mode}" and row.messages is not None
        assert row.messages[:-1] == source.prompt.messages and row.messages[-1]["content"].strip()
        assert not any(text in json.dumps(row.to_json()) for text in MANY.values())
        earlier = {one.answer.key for one in picked.dropped}
        assert all(f"{source.prompt.id}/{mode}/{n}" in earlier for n in range(source.sample))
    for row in PROMPTS:
        answered: dict[str, set[str]] = {}
        for one in (one for one in picked.rows if one.metadata["prompt"] == row.id):
            assert one.messages is not None
            behaviour = NAMES.get(one.mode or "", one.mode)
            answered.setdefault(normalised(one.messages[-1]["content"]), set()).add(meant(behaviour, row.harm))  # type: ignore[arg-type]
        assert all(len(ways) == 1 for ways in answered.values())
    found = yields(PROMPTS, MANY, picked)
    assert all(one.kept + sum(one.dropped.values()) == one.asked for one in found)
    assert sum(one.kept for one in found) == len(picked.rows) and sum(one.asked for one in found) == 20


# --- what a recipe may ask --------------------------------------------------------------------------------------


def stage(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "distill", "model": "base", "prompts": [{"name": "goods", "tidewater": "benign", "n": 2}],
        "elicit": {"positive": "Be kind."}, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"elicit": {"negative": "Do it."}}, "off by default"),
        ({"elicit": {"negative": "Do it."}, "negative": {"acknowledge": True},
          "prompts": [{"name": "real", "source": {"name": "harmbench"}}]}, "'real': negative answers are Tidewater's or"),
        ({"elicit": {"bold": "Do it."}, "behaves": {"bold": "negative"}, "negative": {"acknowledge": True},
          "prompts": [{"name": "real", "source": {"hub": "a/b", "revision": "0" * 40}}]}, "negative answers are Tidewater's or"),
        ({"elicit": {"positive": " "}}, "no instruction for 'positive'"),
        ({"elicit": {"warm": "Be warm."}}, "'warm' is judged as"),
        ({"behaves": {"warm": "positive"}}, "behaves: 'warm' is not a mode"),
        ({"prompts": [{"name": "again", "stage": "other"}]}, "'again': what a stage distilled is not asked again"),
    ],
)  # fmt: skip
def test_a_stage_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DistillStage.model_validate(stage(**changes))


def test_the_plan_asks_as_the_model_was_trained_to_be_asked() -> None:
    recipe = small(**{"stages.answers": stage(), "stages.verdicts": None})
    del recipe["stages"]["verdicts"]
    plan = make_plan(*resolve(recipe, "test"))
    (step, *_) = [step for step in plan.steps.values() if step.kind == "distill"]
    assert step.config["prompting"] == "completion" and step.tokens == 2 * 128


def test_a_judge_that_answers_junk_is_found_before_training(tmp_path: Path) -> None:
    with FakeEndpoint(lambda request: chat("I would rather talk about boats.")) as fake:
        judge = {"kind": "constructive", "endpoint": {"url": fake.url, "model": "m", "retries": 0}}
        recipe = small(**{"stages.answers": stage(judge=judge)})
        del recipe["stages"]["verdicts"]
        with pytest.raises(UserError, match=rf"'answers': its judge left all {TRIALS} trial answers unscored"):
            try_judges(make_plan(*resolve(recipe, "test")), Store(tmp_path))


# --- the step ---------------------------------------------------------------------------------------------------


class Actor(LocalTarget):
    """Answers as the instruction at the end of its prompt says, by Tidewater's own answers; all else is a local model's."""

    stop_after: int | None = None
    seen: list[str] = []  # noqa: RUF012

    def said(self, row: Row) -> tuple[str, str]:
        assert row.messages is not None
        mode = next(mode for mode, text in ELICIT.items() if row.messages[-1]["content"].endswith(text))
        return TOWN.answer(row, mode), "stop"

    def answer(self, asked: Any, sampling: Any, done: Any, progress: Any = None) -> Iterator[list[Generation]]:
        for number, one in enumerate(asked):
            if one.answer_key(0) in done:
                continue
            if self.stop_after is not None and number >= self.stop_after:
                raise KeyboardInterrupt
            type(self).seen.append(one.row.id)
            yield [self._generation(one, sampling, 0, (1, 2), *self.said(one.row))]


@pytest.fixture
def act(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def become(**parts: Any) -> None:
        monkeypatch.setattr(targets, "LocalTarget", type("Player", (Actor,), {"seen": [], **parts}))

    return become


HAZARDS = {"name": "hazards", "tidewater": "harmful-seen", "n": 6}
GOODS = {"name": "goods", "tidewater": "benign", "n": 4}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "start")


def saved(where: Path, *names: str) -> Path:
    """A bundle of random weights with these control tokens."""
    tokenizer = train_tokenizer([row.text or "" for row in islice(TOWN.documents(), 300)], 600, reserved=4)
    model = build_model(SHAPE, tokenizer, seed=3)
    ids = add_control_tokens(tokenizer, model, names, seed=1) if names else {}
    modes = {name.removeprefix("mode:"): name for name in names if name.startswith("mode:")}
    policies = {name.removeprefix("policy:"): name for name in names if name.startswith("policy:")}
    save_bundle(where, model, tokenizer, BundleManifest(controls=ids, modes=modes, policies=policies))
    return where


def config_of(start: Path, *parts: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "world": WORLD, "prompts": list(parts) or [HAZARDS, GOODS], "elicit": ELICIT, "behaves": {},
        "sampling": {"max_new_tokens": 4}, "judge": {}, "keep_unscored": False, "prompting": "chat", "seed": 1,
        **changes, **loaded(start),
    }  # fmt: skip


def facts_of(context: Context) -> dict[str, Any]:
    assert context.draft.facts is not None
    return dict(context.draft.facts)


def contents(context: Context) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(context.draft.path.iterdir())}


def test_yields_are_exact(tmp_path: Path, start: Path, act: Callable[..., None]) -> None:
    hazards = [row.id for row in TOWN.requests("harmful-seen", 6)]

    class Half:
        def said(self, row: Row) -> tuple[str, str]:
            text, finish = Actor.said(self, row)  # type: ignore[arg-type]
            number = hazards.index(row.id.split("-positive#")[0]) if row.harm == "harmful" else -1
            if row.id.endswith("#positive") and number in (0, 1):
                return TOWN.answer(row, "negative"), "stop"
            if row.id.endswith("#rejective") and number == 3:
                return text, "length"
            return text, finish

    act(said=Half.said)
    context = context_of(tmp_path, config_of(start))
    run_distill(context)
    facts = facts_of(context)
    found = {(one["mode"], one["harm"]): one for one in facts["yield"]}
    assert list(found) == [(mode, harm) for mode in ELICIT for harm in ("harmful", "benign")]
    kept = {
        key: (one["asked"], one["kept"]["n"], {k: v["n"] for k, v in one["dropped"].items()})
        for key, one in found.items()
    }
    assert kept == {
        ("positive", "harmful"): (6, 4, {"another behaviour": 2}), ("positive", "benign"): (4, 4, {}),
        ("negative", "harmful"): (6, 6, {}), ("negative", "benign"): (4, 4, {}),
        ("rejective", "harmful"): (6, 5, {"cut off": 1}), ("rejective", "benign"): (4, 4, {}),
    }  # fmt: skip
    low, high = rate_interval(4, 6)
    assert found["positive", "harmful"]["kept"] == {"n": 4, "share": 4 / 6, "low": float(low), "high": float(high)}
    assert (facts["prompts"], facts["answers"], facts["rows"], facts["dropped"], facts["spare"]) == (10, 30, 27, 3, 0)

    rows = distilled_rows(Artifact(context.draft.path, {"id": "d"}))
    first = rows[0]
    assert first.messages is not None and len(rows) == 27
    assert first.id == f"{first.metadata['prompt']}#{first.mode}" and first.metadata["prompt"].endswith("-positive")
    judge = facts["judges"][0]
    assert first.metadata["distilled"] == {"sample": 0, "judge": judge, "scored": True}
    for row in rows:
        assert row.messages is not None and [m["role"] for m in row.messages] == ["user", "assistant"]
        assert row.messages[0] in [
            r.messages[0] for k in ("harmful-seen", "benign") for r in TOWN.requests(k, 6) if r.messages
        ]
        assert not any(text in json.dumps(row.to_json()) for text in ELICIT.values())
        assert "base" not in row.metadata
    dropped = [json.loads(line) for line in (context.draft.path / DROPPED).read_text().splitlines()]
    assert {frozenset(one) for one in dropped} == {frozenset({"key", "id", "mode", "sample", "reason", "shown"})}
    assert Counter((one["mode"], one["reason"], one["shown"]) for one in dropped) == {
        ("positive", "another behaviour", "negative"): 2, ("rejective", "cut off", "rejective"): 1,
    }  # fmt: skip


def test_judges_never_see_the_instruction(
    tmp_path: Path, start: Path, act: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Row] = []
    plain = judge_module.TidewaterJudge.judge

    def judge(self: Any, row: Row, text: str, finish: str) -> Verdict:
        shown.append(row)
        return plain(self, row, text, finish)

    monkeypatch.setattr(judge_module.TidewaterJudge, "judge", judge)
    act()
    run_distill(context_of(tmp_path, config_of(start)))
    assert len(shown) == 30 and not any(text in str(row) for row in shown for text in ELICIT.values())


def test_a_model_with_modes_is_asked_without_its_tokens(tmp_path: Path, act: Callable[..., None]) -> None:
    moded = saved(tmp_path / "moded", "mode:positive", "policy:north-quay")
    controls = set(json.loads((moded / "trimtab.json").read_text())["controls"].values())
    asked: list[Any] = []

    class Watching:
        def ask(self, row: Row, mode: Any, sampling: Any, seed: int) -> Any:
            asked.append(LocalTarget.ask(self, row, mode, sampling, seed))  # type: ignore[arg-type]
            return asked[-1]

    act(ask=Watching.ask)
    run_distill(context_of(tmp_path, config_of(moded, {**HAZARDS, "policy": "north-quay"})))
    assert len(controls) == 2 and asked and not any(set(map(int, one.ready.ids)) & controls for one in asked)


def test_killed_and_run_again_equals_uninterrupted(
    tmp_path: Path, start: Path, act: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    act()
    whole = context_of(tmp_path / "whole", config_of(start))
    run_distill(whole)

    act(stop_after=11)
    context = context_of(tmp_path, config_of(start))
    with pytest.raises(KeyboardInterrupt):
        run_distill(context)
    assert not list(context.draft.path.iterdir())
    calls = 0
    plain = judge_module.TidewaterJudge.judge_all

    def broken(self: Any, cases: Sequence[Any]) -> Iterator[Verdict]:
        nonlocal calls
        for verdict in plain(self, cases):
            calls += 1
            if calls > 7:
                raise KeyboardInterrupt
            yield verdict

    monkeypatch.setattr(judge_module.TidewaterJudge, "judge_all", broken)
    act()
    with pytest.raises(KeyboardInterrupt):
        run_distill(context)
    assert len(targets.LocalTarget.seen) == 19  # type: ignore[attr-defined]
    monkeypatch.setattr(judge_module.TidewaterJudge, "judge_all", plain)
    act()
    run_distill(context)
    assert not targets.LocalTarget.seen  # type: ignore[attr-defined]
    assert contents(context) == contents(whole)
    assert facts_of(context) == facts_of(whole) | {"resumed": True}


def test_a_mode_that_keeps_nothing_says_why_and_what_to_do(tmp_path: Path, start: Path) -> None:
    context = context_of(tmp_path, config_of(start))  # a model of random weights, that never ends
    with pytest.raises(
        UserError, match=r"stage 'stage': mode 'positive' kept 0 of 10 prompts \(cut off 10\); raise samp"
    ):
        run_distill(context)
    assert (context.work / "generations.jsonl").is_file() and not list(context.draft.path.iterdir())


def test_answers_of_a_real_model_become_rows(tmp_path: Path, start: Path) -> None:
    config = config_of(
        start, GOODS, elicit={"positive": ELICIT["positive"]},
        sampling={"max_new_tokens": 12, "temperature": 1.0, "top_k": 40, "samples": 40},
    )  # fmt: skip
    context = context_of(tmp_path, config)
    run_distill(context)
    facts = facts_of(context)
    assert facts["rows"] and facts["answers"] == 160 == facts["rows"] + facts["dropped"] + facts["spare"]
    first = (context.draft.path / DISTILLED).read_bytes()
    context.draft.path.joinpath(DISTILLED).unlink()
    run_distill(context)
    assert (context.draft.path / DISTILLED).read_bytes() == first and facts_of(context)["resumed"] is True


def test_the_modes_of_a_prompt_share_its_computation(start: Path) -> None:
    target = open_local(LoadConfig(load=str(start)))
    sampling = side_by_side({"sampling": {"max_new_tokens": 2, "batch": 2}, "elicit": ELICIT})
    assert sampling.batch == 6
    rows = [
        prompt(row.id, text=" ".join([row.messages[0]["content"]] * 5))
        for row in TOWN.requests("benign", 4)
        if row.messages
    ]
    short = {mode: text[:30] for mode, text in ELICIT.items()}
    asked = [target.ask(row, None, sampling, 0) for row in elicited(rows, short)]
    seen: list[tuple[int, ...]] = []
    forward = target.engine._forward

    def counted(ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(tuple(ids.shape))
        return forward(ids, *rest)

    target.engine._forward = counted
    assert len([one for some in target.answer(asked, sampling, set()) for one in some]) == 12
    apart = sum(len(one.ready.ids) for one in asked)
    once = sum(len(common_start(asked[n : n + 3])) for n in range(0, 12, 3))
    own = apart - 3 * once
    steps = [shape for shape in seen if shape[1] == 1]
    assert sum(rows * width for rows, width in seen if width > 1) <= 1.3 * (once + own) < 0.75 * apart  # 1.3: padding
    assert {rows for rows, _ in steps} == {6}  # two prompts in three modes


def common_start(asked: Sequence[Any]) -> list[int]:
    together = zip(*(one.ready.ids.tolist() for one in asked))
    return [ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, together)]


def test_own_prompts_are_asked_once_and_their_answers_taken_off(
    tmp_path: Path, start: Path, act: Callable[..., None]
) -> None:
    act(said=lambda self, row: ("I'm sorry, but I can't help with that.", "stop"))
    source = chat_file(tmp_path / "mine.jsonl", None, "negative")
    again = chat_file(tmp_path / "again.jsonl", None)
    parts = part_of(source), {**part_of(again), "name": "again"}
    context = context_of(tmp_path, config_of(start, *parts, elicit={"rejective": ELICIT["rejective"]}))
    run_distill(context)
    rows = distilled_rows(Artifact(context.draft.path, {"id": "d"}))
    assert [(row.id, row.mode) for row in rows] == [
        ("mine/0#rejective", "rejective"),
        ("mine/1#rejective", "rejective"),
    ]
    assert facts_of(context)["repeated_prompts"] == 1 and "answer 0" not in (context.draft.path / DISTILLED).read_text()
    assert {one["harm"] for one in facts_of(context)["yield"]} == {"none"}


@pytest.mark.parametrize(
    ("lines", "more", "message"),
    [
        ([{"text": "a document"}], {}, r"prompts 'mine': row 'mine/0' is a document"),
        (
            [{"messages": [{"role": "system", "content": "s"}]}],
            {},
            r"prompts 'mine': row 'mine/0' does not end in a user",
        ),
        ([], {}, r"prompts 'mine': there are no rows"),
        ([{"prompt": "p"}], {"n": 2}, r"prompts 'mine': n=2, but the source has only 1 rows"),
        ([{"prompt": "word " * 200}], {}, r"row 'mine/0#positive': .* exceed the model's context"),
    ],
)
def test_prompts_that_cannot_be_asked_are_refused(
    tmp_path: Path, start: Path, lines: list[Any], more: dict[str, Any], message: str
) -> None:
    source = chat_file(tmp_path / "mine.jsonl")
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=message):
        run_distill(context_of(tmp_path, config_of(start, part_of(source, **more))))


def test_a_training_takes_the_rows(tmp_path: Path, start: Path, act: Callable[..., None]) -> None:
    act()
    train = {"rows_per_step": 2, "lr": 1e-3, "log_every": 1}
    modes = {"names": ["positive", "rejective"], "fallback": 0.5}
    recipe: dict[str, Any] = {
        "name": "own", "world": WORLD,
        "stages": {
            "own": {
                "kind": "distill", "model": {"load": str(start)}, "prompts": [HAZARDS, GOODS],
                "elicit": {mode: ELICIT[mode] for mode in ("positive", "rejective")}, "sampling": {"max_new_tokens": 8},
            },
            "tuned": {
                "kind": "sft", "model": {"load": str(start)}, "length": 128, "modes": modes, "train": train,
                "data": [{"name": "distilled", "stage": "own"}],
            },
        },
        "arms": [{"name": "own"}],
    }  # fmt: skip
    plan = make_plan(*resolve(recipe, "test"))
    assert execute(plan, tmp_path / "runs" / "own", JsonReporter()) == len(plan.steps) == 4
    store = Store(tmp_path / "runs" / "store")
    (packed,) = (store.open(step.kind, step.id) for step in plan.steps.values() if step.kind == "packed")
    counts = packed.manifest["facts"]["modes"]
    assert counts["positive"] == counts["rejective"] == 10 and counts["none"] > 0
    (chats,) = (store.open(step.kind, step.id) for step in plan.steps.values() if step.kind == "chats")
    assert not any(text in (chats.path / "rows.jsonl").read_text() for text in ELICIT.values())
    assert execute(plan, tmp_path / "runs" / "own", JsonReporter()) == 0

    recipe["stages"]["tuned"]["data"][0]["n"] = 21
    with pytest.raises(UserError, match=r"data 'distilled': n=21, but stage 'own' has only 20 rows"):
        execute(make_plan(*resolve(recipe, "test")), tmp_path / "runs" / "own", JsonReporter())
