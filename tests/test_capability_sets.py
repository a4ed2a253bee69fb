"""The capability sets: answers that are right, tests that run, no task in training and evaluation, the same rows every time."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.data import hubsets, symbolic
from trimtab.data.ownsets import worked
from trimtab.data.programs import FAMILIES, chosen
from trimtab.data.promptsets import SETS, read_set
from trimtab.data.sources import SourceConfig, rows, source_identity
from trimtab.errors import UserError
from trimtab.evaluate.judges.base import Case
from trimtab.evaluate.judges.sandbox import Limits
from trimtab.evaluate.judges.verify import CodeTests, NumericAnswer, extract_code, program
from trimtab.evaluate.panel import panel_rows
from trimtab.evaluate.tasks import resolve_panel
from trimtab.seeds import digest
from trimtab.types import Row

SYMBOLIC = ("gsm-symbolic", "gsm-symbolic-train")
PAIRS = [("arithmetic", "arithmetic-train"), ("programs", "programs-train"), SYMBOLIC]


def need(*names: str) -> None:
    if set(names) & set(SYMBOLIC):
        pytest.importorskip("reasoning_gym")


def asked(row: Row) -> str:
    assert row.messages is not None
    return row.messages[0]["content"]


def answer(row: Row) -> str:
    assert row.messages is not None and [m["role"] for m in row.messages] == ["user", "assistant"]
    return row.messages[1]["content"]


@pytest.mark.parametrize(("evaluated", "trained"), PAIRS)
def test_training_and_evaluation_share_no_task(evaluated: str, trained: str) -> None:
    need(evaluated)
    one, other = (list(read_set(SETS[name])) for name in (evaluated, trained))
    questions = [[asked(row).split("\n\n")[0] for row in part] for part in (one, other)]
    assert not set(questions[0]) & set(questions[1])
    assert all(len(set(part)) == len(part) for part in questions)
    assert not {row.id for row in one} & {row.id for row in other}
    assert {row.category for row in one} == {row.category for row in other}
    assert all(len(row.messages or ()) == 1 for row in one) and all(answer(row) for row in other)
    if evaluated == "arithmetic":
        assert not {row.metadata["sum"] for row in one} & {row.metadata["sum"] for row in other}


@pytest.mark.parametrize("name", ["arithmetic-train", "gsm-symbolic-train"])
def test_worked_answers_end_in_the_right_number(name: str) -> None:
    need(name)
    judge = NumericAnswer()
    for row in read_set(SETS[name]):
        said = answer(row)
        assert re.search(r"The answer is -?[\d.]+\.$", said), said
        assert judge.judge(row, said, "stop").correct, said


def test_a_sum_is_worked_out_one_operation_at_a_time() -> None:
    assert worked("12 + 30") == "12 + 30 = 42"
    assert worked("(4 + 8) / 3") == "(4 + 8) / 3 = 12 / 3 = 4"
    assert worked("9 * 3 + (9 - 4) * 2") == "9 * 3 + (9 - 4) * 2 = 27 + (9 - 4) * 2 = 27 + 5 * 2 = 27 + 10 = 37"


@given(st.recursive(st.integers(0, 99).map(str), lambda part: st.tuples(part, st.sampled_from("+-*"), part).map(
    lambda p: f"({p[0]} {p[1]} {p[2]})"), max_leaves=6))  # fmt: skip
def test_every_line_of_a_sum_is_equal(sum_: str) -> None:
    assert len({eval(step) for step in worked(sum_).split(" = ")}) == 1


def test_rows_are_the_same_in_another_process() -> None:
    names = [name for pair in PAIRS for name in pair if name not in SYMBOLIC or symbolic_there()]
    code = (
        "import sys\nfrom trimtab.data.promptsets import SETS, read_set\nfrom trimtab.seeds import digest\n"
        "for name in sys.argv[1:]: print(digest([row.to_json() for row in read_set(SETS[name])]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONHASHSEED": "7"})  # fmt: skip
    assert done.stdout.split() == [digest([row.to_json() for row in read_set(SETS[name])]) for name in names]


def symbolic_there() -> bool:
    try:
        return bool(importlib.metadata.version("reasoning-gym"))
    except importlib.metadata.PackageNotFoundError:
        return False


# -- gsm-symbolic --------------------------------------------------------------------------------------------------------


def test_gsm_symbolic_is_a_task_and_training_data() -> None:
    need("gsm-symbolic")
    panel = panel_rows(resolve_panel(["gsm-symbolic"], 20))
    assert len(panel) == 20 and all(r.metadata["verify"] == "numeric" and r.harm == "benign" for r in panel)
    chats = list(rows(SourceConfig(name="gsm-symbolic-train", take=200)))
    assert len(chats) == 200 and all(answer(row) for row in chats)
    assert {r.id for r in rows(SourceConfig(name="gsm-symbolic-train", take=50))} <= {r.id for r in chats}
    assert source_identity(SourceConfig(name="gsm-symbolic")) != source_identity(
        SourceConfig(name="gsm-symbolic-train")
    )


def test_the_version_is_part_of_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for version in ("0.1.25", "0.1.26"):
        monkeypatch.setattr(symbolic, "version", lambda name, version=version: version)
        assert f"reasoning-gym=={version}" in SETS["gsm-symbolic"].pins.values()
        found.append(source_identity(SourceConfig(name="gsm-symbolic")))
    assert found[0] != found[1]


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(symbolic, "version", absent)
    source = SourceConfig(name="gsm-symbolic-train", take=5)
    for use in (lambda: list(rows(source)), lambda: source_identity(source)):
        with pytest.raises(
            UserError, match=r"'gsm-symbolic-train' needs the package reasoning-gym: pip install 'trimtab\["
        ):
            use()
    assert SETS["gsm-symbolic"].revision and SETS["gsm-symbolic"].rows == 500  # the card can be read without it


@pytest.mark.parametrize(
    ("truth", "said"),
    [
        (-3, "So he is -3 years old.\nThe answer is -3."),
        (1687.5, "The answer is 1687.5."),
        (1687.5, "The answer is $1,687.50."),
        (10**15 + 1, f"The answer is {10**15 + 1:,}."),
        (0.25, "The answer is 1/4."),
        (-1250, "The answer is \u22121,250."),
    ],
)
def test_large_negative_and_decimal_answers(truth: Any, said: str) -> None:
    row = Row("r", messages=({"role": "user", "content": "?"},), harm="benign", metadata={"answer": truth})
    assert NumericAnswer().judge(row, said, "stop").correct is True
    assert NumericAnswer().judge(row, f"The answer is {float(truth) + 1:.2f}.", "stop").correct is (truth > 10**9)


def test_a_gold_answer_without_a_number_names_its_row() -> None:
    with pytest.raises(UserError, match=r"row 'gsm8k/4'.*not in #### and a number"):
        hubsets.HUB_CARDS["gsm8k"].to_row(4, {"question": "How many?", "answer": "I do not know"})


# -- programs ------------------------------------------------------------------------------------------------------------


def test_every_training_solution_passes_its_tests_and_is_short() -> None:
    trained = list(read_set(SETS["programs-train"]))
    judge = CodeTests(allow_code=True, limits=Limits(seconds=20, memory_mb=512), workers=1)
    # Families are run whole, a program each: 600 starts of an interpreter would take minutes.
    for family in dict.fromkeys(row.category for row in trained):
        mine = [row for row in trained if row.category == family]
        whole = "\n".join(program(row, answer(row)) for row in mine)
        test = Row(family or "", messages=mine[0].messages, harm="benign", metadata={"test": "pass"})
        verdict = judge.judge(test, f"```python\n{whole}\n```", "stop")
        assert verdict.correct, (family, verdict.detail)
    for row in trained:
        assert len(re.findall(r"\w+|[^\w\s]", extract_code(answer(row), asked(row), row.metadata["entry_point"]))) <= 32


def test_tests_of_programs_reject_another_number() -> None:
    """Each family's tests fail the solution of its neighbour, and a function that gives nothing."""
    for family in FAMILIES:
        k, other = chosen(family, "eval")[:2]
        expected = [family.solve(k, case) for case in family.cases(k)]
        assert expected != [family.solve(other, case) for case in family.cases(k)], family.name
        assert any(value is not None for value in expected) and len({repr(value) for value in expected}) > 1, (
            family.name
        )


def test_programs_are_judged_as_a_task() -> None:
    judge = CodeTests(allow_code=True, limits=Limits(seconds=10, memory_mb=512), workers=1)
    panel = panel_rows(resolve_panel(["programs"], 2))
    assert all(row.metadata["verify"] == "code" for row in panel)
    row = panel[0]
    entry = row.metadata["entry_point"]
    wrong = f"Here it is. ```python\ndef {entry}(x):\n    return 'nothing of the kind'\n```"
    said = [v.correct for v in judge.judge_all([Case(row, wrong), Case(row, "I do not know how.")])]
    assert said == [False, None]


def test_programs_are_even_over_twenty_families() -> None:
    assert len(FAMILIES) == 20
    for name, each in (("programs", 15), ("programs-train", 30)):
        assert set(Counter(row.category for row in read_set(SETS[name])).values()) == {each}
    assert all(len(family.pool) >= 45 and len(set(family.pool)) == len(family.pool) for family in FAMILIES)
