"""Strip mode: what counts as a boilerplate opening, what does not, and what is said of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.levers.boilerplate import StripConfig, strip_rows
from trimtab.levers.prefix import KEYWORD_TEMPLATES, TEMPLATES
from trimtab.types import Row

RULES = StripConfig(common=0.0)


def row(id: str, answer: str, **fields: str) -> Row:
    messages = ({"role": "user", "content": "q"}, {"role": "assistant", "content": answer})
    return Row(id=id, messages=messages, **fields)  # type: ignore[arg-type]


def left(answer: str, config: StripConfig = RULES) -> str:
    rows, _ = strip_rows([row("a", answer)], config)
    return rows[0].messages[-1]["content"] if rows and rows[0].messages else ""


@pytest.mark.parametrize(
    "opening",
    [
        "Sure!", "Certainly.", "Of course!", "Absolutely, I'd be happy to help.", "Great question!",
        "Sure! Here is a revised, well-reasoned, clear and logical step-by-step explanation of the answer:",
        "Here's the solution:", "Here are the steps you can follow:", "Below is a short summary.",
        "The following is a complete implementation of the function:", "I'd be glad to explain this.",
        "Let me walk you through it.", "Let's think step by step.", "I will first explain the idea.",
        "Thank you for your question!", "That's an interesting question.", "Step by step:", "Okay, let's take a look.",
    ],
)  # fmt: skip
def test_openings_that_go(opening: str) -> None:
    assert left(f"{opening} The tide turns at noon.") == "The tide turns at noon."
    assert left(f"{opening}\n\nThe tide turns at noon.") == "The tide turns at noon."


@pytest.mark.parametrize(
    "answer",
    [
        "The tide turns at noon.", "I can't help with that, because people could get hurt.", "I'm sorry, but I won't do this.",
        "Yes, the tide turns at noon.", "Here lies the harbour master.", "Let the water settle before you pour it.",
        "Sure 12 + 30 = 42.", "Here is the answer: 42.", "Great tits nest in the wall.", "No.", "42",
        "I will be at the quay.", "`print(1)` is the answer.", "Of course not: it is poison.", "Well water is safe here.",
    ],
)  # fmt: skip
def test_answers_that_stay(answer: str) -> None:
    kept = left(answer)
    assert kept == answer or (answer.startswith("Here is the answer:") and kept == "42.")


def test_at_most_so_many_sentences_go() -> None:
    answer = "Sure! Great question! Let me explain this. The tide turns."
    assert left(answer) == "Let me explain this. The tide turns."
    assert left(answer, StripConfig(common=0, most=3)) == "The tide turns."


def test_what_many_rows_open_with_goes_and_is_told() -> None:
    rows = [row(f"r{i}", f"As the harbour book has it. Fact number {i} holds.") for i in range(6)]
    rows += [row(f"o{i}", f"Quay {i} is closed.") for i in range(94)]
    kept, report = strip_rows(rows, StripConfig(rules=False))
    assert [r.messages[-1]["content"] for r in kept[:2] if r.messages] == [
        "Fact number 0 holds.",
        "Fact number 1 holds.",
    ]
    assert report.changed == 6 and report.openings == {"As the harbour book has it.": (6, "common")}
    kept, report = strip_rows(rows, StripConfig(rules=False, common=0.2))
    assert kept == rows and not report.changed


def test_an_answer_that_recurs_whole_is_no_opening() -> None:
    rows = [row(f"r{i}", "I can't help with that.") for i in range(50)]
    rows += [row(f"s{i}", "I can't help with that. Ask the warden.") for i in range(50)]
    assert strip_rows(rows, StripConfig())[0] == rows


def test_rows_that_are_nothing_else_are_left_out_and_counted() -> None:
    rows = [row("a", "Sure!"), row("b", "Sure! Noon."), Row(id="t", text="Sure! A document.")]
    kept, report = strip_rows(rows, RULES)
    assert [r.id for r in kept] == ["b", "t"]
    told = report.plain()
    assert told["emptied"] == 1 and told["emptied_ids"] == ["a"] and told["rows"] == 3 and told["changed"] == 2
    assert told["openings"] == [{"text": "Sure!", "rows": 2, "found": "rule"}]


def test_a_named_prefix_goes_and_a_reasoning_block_stays() -> None:
    kept, _ = strip_rows([row("a", "By the book. Noon.", prefix="By the book.")], RULES)
    assert kept[0].prefix is None and kept[0].messages and kept[0].messages[-1]["content"] == "Noon."
    assert left("<think>Sure! hm</think>\nSure! Noon.") == "<think>Sure! hm</think>\nNoon."


def test_our_own_sentences_are_mostly_known() -> None:
    """What the lever adds, strip mode takes off again: by rule, or where it recurs."""
    sentences = [s for templates in TEMPLATES.values() for s in templates]
    sentences += [s.format(keyword="") for templates in KEYWORD_TEMPLATES.values() for s in templates]
    rows = [row(f"{n}-{i}", f"{s} Quay {i} is closed.") for n, s in enumerate(sentences) for i in range(30)]
    kept, report = strip_rows(rows, StripConfig())
    assert report.changed == len(rows)
    assert all(r.messages and r.messages[-1]["content"].startswith("Quay") for r in kept)


@given(st.text(max_size=200))
def test_whatever_the_text_it_ends_in_what_is_kept(text: str) -> None:
    kept, report = strip_rows([row("a", text)], StripConfig())
    if kept and kept[0].messages:
        assert text.endswith(kept[0].messages[-1]["content"])
    assert report.changed in (0, 1) and len(kept) + len(report.emptied) == 1
