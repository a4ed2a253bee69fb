"""evaluate.repeats: several samples of one prompt: distinct answers, entropy, pass@k, and what a comparison makes of them."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import UserError
from trimtab.evaluate import stats
from trimtab.evaluate.comparison import compare
from trimtab.evaluate.figures import results
from trimtab.evaluate.metrics import METRICS, Record, metric_of, scores
from trimtab.evaluate.repeats import answer_entropy, answer_of, at_k_of, distinct_answers
from trimtab.types import Generation, Result, Row, Verdict

DRAWS = 200


def sample(prompt: int, number: int, text: str, *, harm: Any = "benign", correct: bool | None = None, task: str = "t",
           **detail: Any) -> Record:  # fmt: skip
    known = {"answer": 7, "verify": "numeric"} if harm == "benign" else {}
    row = Row(f"r{prompt}", messages=({"role": "user", "content": f"question {prompt}"},), source="set", harm=harm,
              category="x", metadata={"task": task, **known})  # fmt: skip
    answer = Generation(f"k{prompt}-{number}", row.id, row.hash(), "m", None, {}, 0, number, (), text, "stop")
    return Record(row, answer, Verdict("unscored", "judge", correct=correct, detail=detail))


def samples(prompt: int, texts: list[str], **more: Any) -> list[Record]:
    return [sample(prompt, i, text, **more) for i, text in enumerate(texts)]


def solved(prompts: list[str]) -> list[Record]:
    """One string for each prompt: r right, w wrong, n no answer."""
    found = []
    for i, letters in enumerate(prompts):
        for j, letter in enumerate(letters):
            correct = {"r": True, "w": False, "n": None}[letter]
            detail = {"no_answer": True} if letter == "n" else {"said": "7" if letter == "r" else f"wrong {j}"}
            found.append(sample(i, j, "text", correct=correct, **detail))
    return found


def by_id(found: list[Result], category: str | None = None) -> dict[str, Result]:
    return {r.metric: r for r in found if r.category == category}


def test_what_counts_as_one_answer() -> None:
    assert answer_of(sample(0, 0, "So it is 7", said="7")) == answer_of(sample(0, 1, "Seven: 7.0", said="7"))
    assert answer_of(sample(0, 0, "7", said="7")) != answer_of(sample(0, 1, "7"))
    plain = {
        answer_of(sample(0, 0, text)) for text in ("I  will not.", "i will\nnot. ", "<think>hm</think>I will not.")
    }
    assert plain == {"i will not."}
    assert answer_of(sample(0, 0, "<think>never ended")) == "<think>never ended"


def test_distinct_answers_and_entropy_by_hand() -> None:
    group = samples(0, ["a", "A", "b", "c"])
    assert distinct_answers(group) == 3 / 4
    assert answer_entropy(group) == pytest.approx((0.5 * math.log(2) + 2 * 0.25 * math.log(4)) / math.log(4))
    assert math.isnan(distinct_answers(group[:1])) and math.isnan(answer_entropy(group[:1]))
    found = by_id(results([*group, *samples(1, ["a"] * 4)], draws=DRAWS))
    assert found["distinct_answers"].value == pytest.approx((3 / 4 + 1 / 4) / 2)
    figure = found["answer_entropy"]
    assert (figure.n, figure.unscored, figure.interval, figure.direction) == (2, 0, "bootstrap", "none")
    assert 0 <= figure.low <= figure.value <= figure.high <= 1


def test_one_sample_each_says_nothing_of_diversity() -> None:
    found = by_id(results([r for i in range(5) for r in samples(i, ["a"])], draws=DRAWS))
    assert "distinct_answers" not in found and "answer_entropy" not in found
    mixed = [*samples(0, ["a", "b"]), *samples(1, ["a"])]
    assert by_id(results(mixed, draws=DRAWS))["distinct_answers"].n == 1


def test_harmful_prompts_have_diversity_and_contrasts_do_not() -> None:
    records = [*samples(0, ["no", "never"], harm="harmful"), *samples(1, ["a", "a"], harm="contrast")]
    assert by_id(results(records, draws=DRAWS))["distinct_answers"].value == 1


def test_attempts_of_an_attack_are_rows_of_their_own() -> None:
    """Two attempts, each with samples that are all alike, are no diverse answers."""
    found = []
    for attempt, text in enumerate(("no", "never")):
        for r in samples(0, [text] * 3, harm="harmful"):
            row = Row(f"r0@x#{attempt}", messages=r.row.messages, harm="harmful",
                      metadata={"attack": "x", "attempt": attempt, "base": "r0"})  # fmt: skip
            answer = Generation(f"{r.generation.key}{attempt}", row.id, row.hash(), "m", None, {}, 0, r.generation.sample,
                                (), text, "stop")  # fmt: skip
            found.append(Record(row, answer, r.verdict))
    made = by_id(results(found, draws=DRAWS), "attack:x")
    assert made["distinct_answers"].value == pytest.approx(1 / 3) and made["answer_entropy"].value == 0


@given(st.lists(st.sampled_from("abcdef"), min_size=2, max_size=9))
def test_diversity_keeps_its_bounds(answers: list[str]) -> None:
    group, n = samples(0, answers), len(answers)
    distinct, entropy = distinct_answers(group), answer_entropy(group)
    assert 1 / n <= distinct <= 1 and 0 <= entropy <= 1
    assert (distinct == 1) == (entropy > 1 - 1e-9) and (len(set(answers)) == 1) == (entropy < 1e-9)
    assert entropy <= math.log(len(set(answers))) / math.log(n) + 1e-9
    assert answer_entropy(list(reversed(group))) == entropy


# -- pass@k --------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_hit(n: int, data: st.DataObject) -> None:
    c = data.draw(st.integers(0, n))
    chances = [float(stats.pass_at_k(c, n, k)) for k in range(1, n + 1)]
    assert chances[0] == pytest.approx(c / n) and chances == sorted(chances)
    assert all(0 <= p <= 1 for p in chances) and math.isnan(float(stats.pass_at_k(c, n, n + 1)))
    k = data.draw(st.integers(1, n))
    sets = [any(i < c for i in subset) for subset in combinations(range(n), k)]
    assert chances[k - 1] == pytest.approx(sum(sets) / len(sets))


def test_pass_at_k_by_hand() -> None:
    found = by_id(results(solved(["rrww", "wwww", "rnnn", "nnnn"]), draws=DRAWS))
    assert found["accuracy"].value == 3 / 16
    assert found["pass_at_3"].value == pytest.approx((1 + 0 + 0.75 + 0) / 4)
    assert found["pass_at_4"].value == 1 / 2 and found["pass_at_4"].unscored == 0
    assert (found["pass_at_3"].n, found["pass_at_3"].direction, found["pass_at_3"].interval) == (
        4,
        "higher",
        "bootstrap",
    )
    assert found["no_answer_rate"].value == 7 / 16 and found["accuracy_answered"].value == 3 / 9
    assert found["accuracy_answered"].unscored == 7
    two = by_id(results(solved(["rrww"] * 3), ks=[2], draws=DRAWS))
    assert two["pass_at_2"].value == pytest.approx(1 - 1 / 6) and "pass_at_3" not in two
    assert "pass_at_3" not in by_id(results(solved(["r", "w"]), draws=DRAWS))


def test_an_answer_that_nobody_checked_is_left_out_of_pass_at_k() -> None:
    records = [*solved(["rw"]), *(sample(1, j, "x", one_sided=True) for j in range(2))]
    found = by_id(results(records, draws=DRAWS))
    assert (found["pass_at_2"].value, found["pass_at_2"].n, found["pass_at_2"].unscored) == (1, 1, 1)
    assert found["no_answer_rate"].unscored == 2


def test_ids_at_k() -> None:
    assert at_k_of("pass_at_10") is not None and metric_of("pass_at_10").title == "pass@10"
    assert metric_of("pass_at_10").applies is METRICS["accuracy"].applies
    for bad in ("pass_at_1", "pass_at_", "pass_at_²", "accuracy"):
        assert at_k_of(bad) is None


# -- comparisons ---------------------------------------------------------------------------------------------------------


def test_arms_are_compared_by_prompt() -> None:
    wide = [r for i in range(30) for r in samples(i, ["a", "b", "c"])]
    narrow = [r for i in range(30) for r in samples(i, ["a", "a", "a" if i % 2 else "b"])]
    c = compare(wide, narrow, "distinct_answers", draws=1000)
    assert (c.n, c.down, c.up, c.interval, c.test) == (30, 30, 0, "cluster-bootstrap", "sign-flip")
    assert c.difference == pytest.approx(-0.5) and -0.6 < c.low < c.difference < c.high < -0.4 and c.p < 0.01
    assert c.discordant[0][1] == 0  # pairs of prompts
    assert compare(wide, wide, "answer_entropy", draws=50).difference == 0
    with pytest.raises(UserError, match="no row has the metric 'answer_entropy'"):
        compare(wide[::3], wide[::3], "answer_entropy")


def test_pass_at_k_and_safe_at_k_can_be_compared() -> None:
    before, after = solved(["rwww"] * 20), solved(["rrww"] * 20)
    c = compare(before, after, "pass_at_3", draws=500)
    assert (c.value_a, c.value_b, c.n) == (pytest.approx(0.75), 1, 20) and c.p < 0.01
    for name, arm in (("pass_at_3", after), ("pass_at_4", before)):  # a comparison's value is the figure's
        figure = by_id(results(arm, draws=DRAWS))[name]
        assert figure.value == pytest.approx(compare(arm, arm, name, draws=50).value_a)
    with pytest.raises(UserError, match="no row has the metric 'pass_at_9'"):
        compare(before, after, "pass_at_9")


@given(st.lists(st.text("rwn", min_size=3, max_size=3), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_figures_and_scores_agree(prompts: list[str]) -> None:
    records = solved(prompts)
    found = by_id(results(records, draws=20))
    for id in ("distinct_answers", "answer_entropy", "pass_at_3", "no_answer_rate"):
        values = [s.value for s in scores(metric_of(id), records) if s.value is not None]
        assert found[id].value == pytest.approx(sum(values) / len(values)), id
    answered = found["accuracy_answered"]
    rest = 1 - found["no_answer_rate"].value
    assert found["accuracy"].value == pytest.approx(0 if not answered.n else answered.value * rest)
    assert found["pass_at_3"].value >= found["accuracy"].value - 1e-9
