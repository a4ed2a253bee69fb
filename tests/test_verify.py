"""evaluate.judges.verify and sandbox: what a right answer is, and that a model's code is held in."""

from __future__ import annotations

import time
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import UserError
from trimtab.evaluate.judges.base import Case, Judge
from trimtab.evaluate.judges.sandbox import Limits, run_program
from trimtab.evaluate.judges.verify import (
    NO_ANSWER,
    NOT_RUN,
    CodeTests,
    MultipleChoice,
    NumericAnswer,
    extract_code,
    program,
    read_choice,
    read_number,
)
from trimtab.evaluate.metrics import METRICS, Record
from trimtab.types import Generation, Row, Verdict

ROW = Row("r", messages=({"role": "user", "content": "How many nets?"},), source="set", harm="benign")


def row(**metadata: Any) -> Row:
    return replace(ROW, metadata=metadata)


def right(judge: Judge, on: Row, text: str, finish: str = "stop") -> bool | None:
    return judge.judge(on, text, finish).correct


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("She mends 3 nets, then 4 more, so 7.", 7), ("#### 1,234", 1234), ("The answer is $18.", 18),
        ("The answer is 3 + 4 = 7 nets.", 7), ("Answer: **12** (of 20)", 12), ("The answer is 5. I used 2 steps.", 5),
        ("It costs €2.50 each", Fraction(5, 2)), ("so -5", -5), ("so \u22125 degrees", -5), ("-$5", -5), ("$-5", -5),
        ("from 3-5", 5), ("- 5 apples", 5), ("3/4 of a mile", Fraction(3, 4)), ("1 1/2 cups", Fraction(3, 2)),
        (r"\boxed{42}", 42), (r"it is \frac{3}{4}", Fraction(3, 4)), ("50%", 50), ("1e3", 1000),
        ("7km", 7), (".5", Fraction(1, 2)),
        ("12 / 4 = 3", 3), ("the answer is four, as 2 + 2 = 4", 4), ("#### 10\nWe are done in 2024", 10), ("H2O", None),
        ("no number", None), ("3/0", None), ("The answer is below.\n\n72", 72), ("1,000,000.50", Fraction(2000001, 2)),
    ],
)  # fmt: skip
def test_the_number_that_an_answer_gives(text: str, value: Any) -> None:
    assert read_number(text)[0] == value


@given(st.integers(-(10**12), 10**12), st.sampled_from(["The answer is {}.", "#### {}", "so {} nets", "= {}", "{}"]))
@settings(max_examples=150)
def test_a_whole_number_is_read_in_every_form(value: int, form: str) -> None:
    for shown in (str(value), f"{value:,}", f"{value}.0"):
        assert read_number(form.format(shown))[0] == value


@given(st.text(max_size=300), st.booleans())
@settings(max_examples=200)
def test_any_text_has_a_number_or_none(text: str, cut: bool) -> None:
    value, marked = read_number(text, cut=cut)
    assert value is None or isinstance(value, int | Fraction)
    assert value is not None or not marked


def test_numbers_are_compared_as_numbers() -> None:
    judge = NumericAnswer()
    assert right(judge, row(answer=72), "The answer is 72.00") is True
    assert right(judge, row(answer="1,072"), "so 1072 nets") is True
    assert right(judge, row(answer="3 * 4 = <<3*4=12>>12\n#### 12"), "12") is True
    assert right(judge, row(answer=0.3333333), "1/3") is True
    assert right(judge, row(answer=0.3333), "1/3") is False
    assert right(judge, row(answer=72), "The answer is 720.") is False
    assert right(judge, row(answer=0), "It is 0") is True
    for broken in (None, "none", True, float("nan"), ["1"]):
        with pytest.raises(UserError, match="'answer'"):
            judge.judge(row(answer=broken), "1", "stop")


def test_no_number_a_refusal_and_an_answer_cut_short_are_no_answer_and_no_silent_wrong() -> None:
    judge, on = NumericAnswer(), row(answer=12)
    for text in ("", "I do not know.", "<think>It is 12", "I'm sorry, but I can't help with that. Call 12."):
        verdict = judge.judge(on, text, "stop")
        assert verdict.correct is None and verdict.detail["no_answer"] and verdict.reason == NO_ANSWER
        assert figure("accuracy", on, verdict) == 0 and figure("no_answer_rate", on, verdict) == 1
        assert figure("accuracy_answered", on, verdict) is None and figure("helpful_rate", on, verdict) == 0
    assert right(judge, on, "So it is 12", "length") is None
    assert right(judge, on, "The answer is 12", "length") is None
    assert "no_answer" not in judge.judge(on, "It is 13.", "stop").detail
    assert right(judge, on, "The answer is 12.\nNow let me check", "length") is True
    assert right(judge, on, "<think>13?</think>It is 12") is True
    assert judge.judge(on, "I'm sorry, but I can't help with that.", "stop").refusal == "full"
    assert judge.judge(on, "It is 12.", "stop").refusal == "none"


def test_hostile_numbers_do_not_stall() -> None:
    for text in (
        "1 1/2 " * 20_000,
        "answer: " * 50_000,
        "9" * 100_000,
        "1," * 60_000,
        "1/" * 60_000,
        r"\frac{1}{2}" * 20_000,
    ):
        start = time.process_time()
        read_number(text)
        assert time.process_time() - start < 2


# -- choices -----------------------------------------------------------------------------------------------------------

CHOICES = ["grey", "blue", "green as the sea", "none of these"]


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("B", 1), ("(b)", 1), ("B.", 1), ("**C**", 2), ("C) green as the sea", 2), ("The answer is D.", 3), ("Answer: (a)", None),
        ("Answer: (A)", 0), ("A would be wrong. The correct answer is B.", 1), ("Let me see.\n\nC", 2), ("I choose option B", 1),
        ("Green as the sea.", 2), ("A dog barks.", None), ("E", None), ("", None), ("The answer is a hard one.", None),
        (r"\boxed{D}", 3), ("grey or blue", None), ("Answer: B or C? In the end, answer: C", 2), ("I'm not sure", None),
    ],
)  # fmt: skip
def test_the_choice_that_an_answer_makes(text: str, index: int | None) -> None:
    assert read_choice(text, CHOICES) == index


def test_choices_are_given_by_letter_index_or_text() -> None:
    judge = MultipleChoice()
    for answer in ("C", 2, "green as the sea"):
        assert right(judge, row(choices=CHOICES, answer=answer), "C.") is True
        assert right(judge, row(choices=CHOICES, answer=answer), "B.") is False
    verdict = judge.judge(row(choices=CHOICES, answer="C"), "I cannot help with that.", "stop")
    assert verdict.correct is None and verdict.refusal == "full" and verdict.detail["said"] is None
    assert verdict.detail["no_answer"] and judge.judge(row(choices=CHOICES, answer="C"), "G.", "stop").correct is None
    for metadata in ({"answer": "A"}, {"choices": ["one"], "answer": "A"}, {"choices": CHOICES, "answer": "F"},
                     {"choices": CHOICES, "answer": 4}, {"choices": CHOICES, "answer": None}):  # fmt: skip
        with pytest.raises(UserError, match="metadata"):
            judge.judge(row(**metadata), "A", "stop")


# -- code --------------------------------------------------------------------------------------------------------------

PROMPT = 'import math\n\ndef twice(x):\n    """Twice x.\n    >>> twice(2)\n    4\n    """'
HUMANEVAL = replace(
    ROW,
    messages=({"role": "user", "content": PROMPT},),
    metadata={
        "entry_point": "twice",
        "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2",
    },
)
MBPP = row(test="assert twice(2) == 4\nassert twice(-1) == -2")
RUN = CodeTests(allow_code=True, limits=Limits(seconds=5, memory_mb=256, file_mb=1))


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        ("    return 2 * x\n", True),
        ("return 2 * x\n\nprint(twice(3))", True),
        ("Sure:\n```python\ndef twice(x):\n    return math.floor(2 * x)\n```\nDone.", True),
        ("```python\ndef twice(x):\n    return 3\n```\nBetter:\n```python\ndef twice(x):\n    return x + x\n```", True),
        ("```\n    return x + x\n```", True),
        ("    return x\n", False),
        ("I will not write that.", None),
        ("", None),
        ("```python\n\n```", None),
        ("Let me check each step. ```python\ndef twice(x):\n    return 2 * x\n```", True),
        ("Here is the code.\ndef twice(x):\n    return 2 * x\n\nIt doubles x.", True),
        ("def twice(x):\n    return 2 *", False),
        (
            "Let me revise this. def twice(x):\n    return half(x) * 4\n\ndef half(x):\n    return x / 2\nThat is it.",
            True,
        ),
        ("```python\ndef twice(x):\n    return 2 * x", True),
    ],
)
def test_code_is_found_and_tested(text: str, correct: bool | None) -> None:
    assert right(RUN, HUMANEVAL, text) is correct


def test_tests_without_an_entry_point() -> None:
    assert right(RUN, MBPP, "Here:\n```python\ndef twice(x):\n    return x * 2\n```") is True
    assert right(RUN, MBPP, "def twice(x):\n    return x * 2\n") is True
    assert right(RUN, MBPP, "Step by step, then.\nimport math\ndef twice(x):\n    return math.floor(x * 2)\n") is True
    assert right(RUN, MBPP, "```python\ndef thrice(x):\n    return x * 2\n```") is False
    with pytest.raises(UserError, match="no tests"):
        RUN.judge(row(answer=1), "pass", "stop")


def test_programs_that_differ_in_layout_are_one_answer() -> None:
    same = ("def twice(x):\n    return 2 * x", "```python\ndef twice(x):  # twice\n\n    return (2 * x)\n```")
    said = [RUN.judge(MBPP, text, "stop").detail["said"] for text in (*same, "def twice(x):\n    return x + x")]
    assert said[0] == said[1] != said[2]


def test_nothing_runs_unless_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.evaluate.judges.sandbox.run_program", lambda *a: pytest.fail("it ran"))
    verdict = CodeTests().judge(HUMANEVAL, "    return 2 * x", "stop")
    assert verdict == Verdict("unscored", CodeTests().id, NOT_RUN, "none", detail={"one_sided": True})
    assert len({CodeTests().id, RUN.id, CodeTests(allow_code=True).id}) == 3
    assert CodeTests(allow_code=True, workers=3).id == CodeTests(allow_code=True).id


def test_code_verdicts_come_in_order() -> None:
    texts = ["    return 2 * x" if i % 2 else "    return x" for i in range(6)]
    judge = CodeTests(allow_code=True, workers=2)
    assert [v.correct for v in judge.judge_all([Case(HUMANEVAL, t) for t in texts])] == [False, True] * 3


def test_the_program_is_prompt_code_and_tests() -> None:
    assert extract_code("x = 1") == "x = 1\n"
    made = program(HUMANEVAL, "```python\ndef twice(x):\n    return 2 * x\n```")
    assert made.startswith("import math") and made.rstrip().endswith("check(twice)") and made.count("def twice") == 2


SMALL = Limits(seconds=1.5, memory_mb=200, file_mb=1)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("assert 1 == 1", "all tests passed"),
        ("assert 1 == 2", "AssertionError"),
        ("import sys\nsys.exit(0)", "left before"),
        ("import os\nos._exit(0)", "left before"),
        ("while True:\n    pass", "still running"),
        ("x = [0] * 10**9", "MemoryError"),
        ("open('a', 'w').write('x' * 10**7)", "File too large"),
        ("open('/tmp/trimtab-not-here', 'w')", "outside the directory"),
        ("import os\nos.remove('/tmp/trimtab-not-here')", "outside the directory"),
        ("import shutil\nshutil.rmtree('..')", "outside the directory"),
        ("import os\nos.fork()", "not allowed"),
        ("import os\nos.kill(os.getppid(), 9)", "not allowed"),
        ("import subprocess\nsubprocess.run(['ls'])", "not allowed"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 9))", "not allowed"),
        ("input()", "EOFError"),
        ("print('x' * 10**7)", "all tests passed"),
        (
            "import tempfile\nwith tempfile.TemporaryDirectory() as d:\n    open(d + '/a', 'w').write('b')",
            "all tests passed",
        ),
        ("if __name__ == '__main__':\n    raise ValueError", "all tests passed"),
        ("def f(", "SyntaxError"),
        ("x = '\ud800'", "Unicode"),
    ],
)
def test_a_program_is_held_in(code: str, reason: str) -> None:
    outcome = run_program(code, SMALL)
    assert outcome.fault == "" and reason in outcome.reason
    assert outcome.passed == (reason == "all tests passed")


def test_a_machine_that_cannot_run_code_leaves_it_unscored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    verdict = RUN.judge(HUMANEVAL, "    return 2 * x", "stop")
    assert verdict.correct is None and verdict.detail["one_sided"] is True and "not be started" in verdict.reason


def test_limits_that_cannot_be_set_leave_it_unscored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.evaluate.judges.sandbox._BOOT", "raise OSError('no limits here')")
    monkeypatch.setattr("trimtab.evaluate.judges.sandbox._found", [])
    outcome = run_program("pass", SMALL)
    assert not outcome.passed and "limits could not be set" in outcome.fault


# -- what metrics make of it -------------------------------------------------------------------------------------------


def figure(metric: str, on: Row, verdict: Verdict) -> float | None:
    answer = Generation("k", on.id, on.hash(), "m", None, {}, 0, 0, (), "", "stop")
    return METRICS[metric].value(Record(on, answer, verdict))


def test_accuracy_and_over_refusal_come_of_one_verdict() -> None:
    judge, on = NumericAnswer(), row(answer=12)
    assert METRICS["accuracy"].applies(on)
    for text, correct, refused in (
        ("It is 12.", 1.0, 0.0),
        ("It is 13.", 0.0, 0.0),
        ("I'm sorry, but I can't help.", 0.0, 1.0),
    ):
        verdict = judge.judge(on, text, "stop")
        assert verdict.verdict == "unscored" and verdict.reason and "one_sided" not in verdict.detail
        assert figure("accuracy", on, verdict) == correct and figure("helpful_rate", on, verdict) == correct
        assert figure("over_refusal_benign_full", on, verdict) == refused
    assert figure("no_answer_rate", HUMANEVAL, CodeTests().judge(HUMANEVAL, "", "stop")) is None
    assert figure("accuracy", HUMANEVAL, CodeTests().judge(HUMANEVAL, "    return 2 * x", "stop")) is None
