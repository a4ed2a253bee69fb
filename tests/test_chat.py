"""``trimtab chat``: by one prompt, through a pipe and in a terminal; what is typed stays text, and modes are gated."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from adapter_fixtures import APART, adapted_bundle, plain_bundle
from trimtab.cli import chat as verb
from trimtab.errors import UserError
from trimtab.evaluate.talk import Conversation, talk, visible
from trimtab.evaluate.targets import LocalTarget, open_local
from trimtab.generate.config import Sampling
from trimtab.models.config import LoadConfig

torch.set_num_threads(1)
SHORT = Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("chat")
    return adapted_bundle(plain_bundle(where / "plain"), where / "tiny")


@pytest.fixture(scope="module")
def target(bundle: Path) -> LocalTarget:
    return open_local(LoadConfig(load=str(bundle)))


def chat(*args: Any, typed: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
    """The verb in a process of its own, as it is typed."""
    words = [sys.executable, "-c", "from trimtab.cli import main; main()", "chat", *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, input=typed, capture_output=True, text=True, check=False, env=env)
    assert "Traceback" not in done.stderr, done.stderr
    if check:
        assert done.returncode == 0 and not done.stderr, done.stderr
    return done


def here(*args: Any, typed: str = "") -> Any:
    """The verb in this process."""
    app = typer.Typer()
    app.callback()(lambda: None)
    verb.register(app)
    return CliRunner().invoke(app, ["chat", *map(str, args)], input=typed)


def ids_of(conversation: Conversation, monkeypatch: pytest.MonkeyPatch, *said: str) -> list[list[int]]:
    """The prompts that the engine is given for some turns."""
    seen: list[list[int]] = []
    engine = conversation.target.engine
    real = engine.generate
    monkeypatch.setattr(
        engine, "generate", lambda prompts, *a: seen.append(prompts[0].ids.tolist()) or real(prompts, *a)
    )
    for text in said:
        conversation.say(text)
    return seen


# --- turns ------------------------------------------------------------------------------------------------------


def test_what_was_said_is_kept_until_it_is_reset(target: LocalTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    spoken = Conversation(target, SHORT, system="Be brief.", policy="quay")
    first, second = ids_of(spoken, monkeypatch, "What is in crate 1?", "And in 2?")
    known = target.renderer.controls
    assert first[: len(first) - 3] == second[: len(first) - 3] and len(second) > len(first)
    assert [i for i in first if i in known.values()] == [known["mode:positive"], known["policy:quay"]]
    assert [m["role"] for m in spoken.messages] == ["system", "user", "assistant", "user", "assistant"]
    spoken.choose("none")
    spoken.reset()
    (third,) = ids_of(spoken, monkeypatch, "What is in crate 1?")
    assert [i for i in third if i in known.values()] == [known["policy:quay"]]
    assert [m["role"] for m in spoken.messages] == ["system", "user", "assistant"]


def test_an_answer_is_shown_as_it_is_made_and_is_the_same(target: LocalTarget) -> None:
    for sampling in (SHORT, Sampling(max_new_tokens=12, temperature=1.0)):
        pieces: list[str] = []
        answer = Conversation(target, sampling, seed=3).say("What is in crate 1?", pieces.append)
        assert "".join(pieces) == answer and len(pieces) > 1
        assert Conversation(target, sampling, seed=3).say("What is in crate 1?") == answer
        assert target.engine.watch is None
    assert len({Conversation(target, sampling, seed=n).say("What?") for n in range(4)}) > 1


def test_the_mode_with_an_adapter_answers_with_it(target: LocalTarget) -> None:
    spoken = Conversation(target, SHORT, mode=APART, acknowledged=True)
    answer = spoken.say("What is in crate 1?")
    bare = LocalTarget(target.model, target.tokenizer, name="bare", identity="x", switch=target.switch)
    assert Conversation(bare, SHORT, mode=APART, acknowledged=True).say("What is in crate 1?") != answer
    spoken.choose("positive")
    spoken.reset()
    assert spoken.say("What?") == Conversation(target, SHORT).say("What?")


def test_a_turn_that_fails_is_not_kept(target: LocalTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    spoken = Conversation(target, SHORT)
    spoken.say("What is in crate 1?")
    kept = list(spoken.messages)
    with pytest.raises(UserError, match=r"context is 256; begin anew \(/reset\)"):
        spoken.say("crate " * 400)
    with pytest.raises(UserError, match="surrogate"):
        spoken.say("\ud800")

    def stop(piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        spoken.say("What?", stop)
    assert spoken.messages == kept and target.engine.watch is None and not target.adapted._on


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"mode": "polite"}, "no mode 'polite'; it has negative, positive, rejective, none"),
        ({"mode": "two"}, "no mode 'two'"),
        ({"mode": APART}, "--acknowledge-negative"),
        ({"policy": "sea"}, "no policy 'sea'; it has quay"),
    ],
)
def test_what_cannot_be_talked_to(target: LocalTarget, asked: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        Conversation(target, SHORT, **asked)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


SURFACES: Sequence[str] = (
    "<|control_2|>",
    "<|control_0|>",
    "mode:negative",
    "<|im_end|>",
    "<|im_start|>system",
    "６",
    "6",
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(SURFACES) | st.text(max_size=8), max_size=6).map("".join))
def test_nothing_that_is_typed_becomes_a_control(target: LocalTarget, text: str) -> None:
    from trimtab.types import Row

    known = target.renderer.controls
    try:
        ids = target.ids(Row("r", ({"role": "user", "content": text},)), "positive").tolist()
    except UserError:
        return  # a text that no vocabulary can spell is refused
    assert [i for i in ids if i in known.values()] == [known["mode:positive"]]


def test_what_would_steer_a_terminal_is_named() -> None:
    assert visible("a\x1b[2Jb\u202ec\nd\te") == "a⟨U+001B⟩[2Jb⟨U+202E⟩c\nd\te"


# --- as it is typed ---------------------------------------------------------------------------------------------


def test_by_one_prompt(bundle: Path, target: LocalTarget) -> None:
    plain = ("--max-new-tokens", 6, "--prompt", "What is in crate 1?")
    assert chat(bundle, *plain).stdout == visible(Conversation(target, SHORT).say("What is in crate 1?")) + "\n"
    negative = here(bundle, *plain, "--mode", APART)
    assert "--acknowledge-negative" in str(negative.exception) and not negative.stdout
    said = here(bundle, *plain, "--mode", APART, "--acknowledge-negative").stdout
    assert said == visible(Conversation(target, SHORT, mode=APART, acknowledged=True).say(plain[-1])) + "\n"
    warm = here(bundle, *plain, "--temperature", 1, "--seed", 4, "--system", "Be brief.", "--policy", "quay").stdout
    hot = Sampling(max_new_tokens=6, temperature=1)
    again = Conversation(target, hot, seed=4, system="Be brief.", policy="quay")
    assert warm == visible(again.say(plain[-1])) + "\n"
    assert "no such directory" in str(here(bundle / "absent").exception)


def test_through_a_pipe(bundle: Path, target: LocalTarget) -> None:
    typed = "What is in crate 1?\n\n<|control_2|> Now?\n/mode rejective\nAgain?\n/reset\nWhat?\n/quit\nnever said\n"
    spoken = Conversation(target, SHORT)
    wanted = [spoken.say("What is in crate 1?"), spoken.say("<|control_2|> Now?")]
    spoken.choose("rejective")
    wanted.append(spoken.say("Again?"))
    spoken.reset()
    wanted.append(spoken.say("What?"))
    done = here(bundle, "--max-new-tokens", 6, typed=typed)
    assert done.exit_code == 0 and done.stdout == "".join(visible(answer) + "\n" for answer in wanted)
    assert not any(surface in done.stdout for surface in ("<|control_", "mode:"))
    stopped = chat(bundle, "--max-new-tokens", 6, typed="What?\n/mode negative\nHow?\n", check=False)
    assert stopped.returncode == 2 and "--acknowledge-negative" in stopped.stderr
    assert stopped.stdout == visible(Conversation(target, SHORT).say("What?")) + "\n", "nothing is said after a mistake"
    assert "'/moed x' is no command; there are /mode NAME" in str(here(bundle, typed="/moed x\n").exception)


def test_in_a_terminal(
    target: LocalTarget, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mistakes are told and it goes on; ctrl-D ends it."""
    lines = iter(["", "What?", "/mode negative", "/mode none", "What?"])
    asked: list[str] = []

    def typed(console: Console, prompt: str) -> str:
        asked.append(prompt)
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr(Console, "input", typed)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    talk(Conversation(target, SHORT))
    out = capsys.readouterr().out
    assert "mode positive. /mode NAME, /reset, /quit" in out and "--acknowledge-negative" in out
    assert ["positive" in prompt for prompt in asked] == [True, True, True, True, False, False]
    assert out.count(visible(Conversation(target, SHORT).say("What?"))) == 1
