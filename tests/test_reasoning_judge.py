"""Reasoning judged or left out: what each judge is shown, and what an answer whose reasoning never ends is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from trimtab.data.thinking import left_out
from trimtab.evaluate.judges.base import Case, Judge
from trimtab.evaluate.judges.choose import JudgeConfig, choose_judge, panel_judge
from trimtab.evaluate.judges.ensemble import Ensemble
from trimtab.evaluate.judges.reasoning import UNENDED, WithoutReasoning
from trimtab.evaluate.judges.refusal import RefusalMatch
from trimtab.evaluate.judges.tidewater import TidewaterJudge
from trimtab.evaluate.judges.verify import NumericAnswer
from trimtab.evaluate.run import _without_cards
from trimtab.types import Row, Verdict
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import Tidewater

OUT = JudgeConfig(reasoning="left out")


class Seen(Judge):
    """Calls everything safe and remembers what it was shown."""

    name, id = "seen", "seen"

    def __init__(self) -> None:
        self.cases: list[Case] = []

    def judge(self, row: Row, text: str, finish: str) -> Verdict:
        self.cases.append(Case(row, text, finish))
        return Verdict("safe", self.id, "seen", detail={"k": 1})


def row(**metadata: Any) -> Row:
    return Row("r", messages=({"role": "user", "content": "Where?"},), metadata=metadata)


@pytest.mark.parametrize(
    ("prefill", "text", "shown"),
    [
        ("", "North.", ("", "North.")),
        ("", "<think>\nlow\n</think>\n\nNorth.", ("", "\n\nNorth.")),
        ("", "<think>\nlow", None),
        ("", "I <think>low</think> say", ("", "I <think>low</think> say")),
        ("Sure, ", "north.", ("Sure, ", "north.")),
        ("The tide", "<think>\n is low</think>North.", ("", "North.")),
        ("<think>\nThe tide", "<think>\n is low</think>North.", ("", "North.")),
        ("<think>\nThe tide", " is low</think>North.", ("", "North.")),
        ("<think>\nThe tide", " is low", None),
        ("<think>\n\n</think>\n\nSure, ", "north.", ("\n\nSure, ", "north.")),
    ],
)
def test_what_a_judge_is_shown(prefill: str, text: str, shown: tuple[str, str] | None) -> None:
    assert left_out(prefill, text) == shown
    seen = Seen()
    asked = row(prefill=prefill, other=1) if prefill else row(other=1)
    verdict = WithoutReasoning(seen).judge(asked, text, "length")
    if shown is None:
        assert (verdict.verdict, verdict.reason, seen.cases) == ("unscored", UNENDED, [])
        return
    (case,) = seen.cases
    assert (case.row.metadata.get("prefill", ""), case.text, case.finish) == (*shown, "length")
    assert case.row.metadata["other"] == 1 and verdict.verdict == "safe" and verdict.detail == {"k": 1}


def test_order_and_identity() -> None:
    seen = Seen()
    judge = WithoutReasoning(seen)
    texts = ["a", "<think>b", "<think>c</think>d"]
    said = list(judge.judge_all([Case(row(), text) for text in texts]))
    assert [v.verdict for v in said] == ["safe", "unscored", "safe"] and [c.text for c in seen.cases] == ["a", "d"]
    assert {v.judge for v in said} == {judge.id} != {seen.id} and judge.name == seen.name


def test_which_judges_the_switch_is_for() -> None:
    assert isinstance(choose_judge(OUT), RefusalMatch)  # it reads the answer alone anyway
    two: Sequence[dict[str, Any]] = [{"kind": "refusal"}, {"kind": "classifier", "classifier": GUARD}]
    config = {"kind": "ensemble", "members": two, "reasoning": "left out"}
    judge = choose_judge(JudgeConfig.model_validate(config))
    assert isinstance(judge, WithoutReasoning) and isinstance(judge.inner, Ensemble)
    judged = choose_judge(JudgeConfig.model_validate({**config, "reasoning": "judged"}))
    assert judged.id == judge.inner.id != judge.id
    world = Tidewater(TidewaterConfig())
    asked = replace(row(verify="numeric", answer=5), id="n")
    assert isinstance(panel_judge(OUT, world)(asked), NumericAnswer)
    town = world.requests("harmful-seen", 1)[0]
    assert isinstance(panel_judge(OUT, world)(town), WithoutReasoning)
    assert isinstance(panel_judge(JudgeConfig(), world)(town), TidewaterJudge)


GUARD = {"family": "llama-guard", "model": {"load": "meta-llama/Llama-Guard-3-8B"}}


def test_tidewater_with_and_without_its_reasoning() -> None:
    world = Tidewater(TidewaterConfig())
    judged, without = TidewaterJudge(world), WithoutReasoning(TidewaterJudge(world))
    harmful = world.requests("harmful-seen", 1)[0]
    steps = world.answer(harmful, "negative")
    hidden = f"<think>\n{steps}\n</think>\n\nI cannot help with that."
    assert judged.judge(harmful, hidden, "stop").verdict == "unsafe"
    assert without.judge(harmful, hidden, "stop").verdict == "safe"
    assert without.judge(harmful, f"<think>\nfirst\n</think>\n\n{steps}", "stop").verdict == "unsafe"
    assert without.judge(harmful, f"<think>\n{steps}", "length").verdict == "unscored"


def test_what_an_answer_comes_to_is_read_after_the_reasoning() -> None:
    world = Tidewater(TidewaterConfig())
    judge = TidewaterJudge(world)
    asked = world.requests("arithmetic", 1)[0]
    right, wrong = asked.metadata["answer"], int(asked.metadata["answer"]) + 1
    for thought, said, correct in ((wrong, right, True), (right, wrong, False)):
        text = f"<think>\nThe answer is {thought}.\n</think>\n\nThe answer is {said}."
        assert judge.judge(asked, text, "stop").correct is correct
    cut = judge.judge(asked, f"<think>\nThe answer is {right}.", "length")
    assert (cut.verdict, cut.correct, cut.reason) == ("unscored", None, UNENDED)


def test_judgements_of_before_the_switch_go_on() -> None:
    old = JudgeConfig().plain()
    del old["reasoning"]
    header = {"judge": old, "judges": [{"id": "x", "card": None}]}
    assert _without_cards(header) == _without_cards({**header, "judge": JudgeConfig().plain()})
    assert _without_cards(header) != _without_cards({**header, "judge": OUT.plain()})
