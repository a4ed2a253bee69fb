"""How a report writes numbers and strange characters."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.report import format as fmt


def plain(text: str) -> str:
    return text.replace(fmt.NBSP, " ")


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0"),
        (1, "1" + "00"),
        (0.42, "42"),
        (0.0362, "3.6"),
        (0.05, "5"),
        (0.0002, "< 0.1"),
        (0.9999, "> 99.9"),
        (0.9365, "93.7"),
        (-0.04, "−4"),
        (0.0996, "10"),
        (math.nan, "–"),
    ],
)
def test_percent(share: float, text: str) -> None:
    assert plain(fmt.percent(share)) == text


@given(st.floats(0, 1))
def test_percent_never_rounds_to_an_end_it_does_not_reach(share: float) -> None:
    text = fmt.percent(share)
    assert (text == "0") == (share < 5e-12)
    assert (text == "100") == (share > 1 - 5e-12)


def test_estimates_and_differences() -> None:
    assert plain(fmt.estimate(0, 0, 0.0362, True)) == "0 % [0, 3.6]"
    assert plain(fmt.estimate(3.214, 3.1, 3.352, False)) == "3.21 [3.10, 3.35]"
    assert fmt.estimate(math.nan, math.nan, math.nan, True) == "not scored"
    assert plain(fmt.difference(-0.12, -0.2, -0.04, True)) == "−12 points [−20, −4]"
    assert plain(fmt.difference(0.5, -0.1, 1.1, False)) == "+0.500 [−0.100, 1.10]"


def test_quantities() -> None:
    assert plain(fmt.si(8_000_000)) == "8 M" and plain(fmt.si(1_234_567)) == "1.23 M" and fmt.si(12) == "12"
    assert plain(fmt.si(3.05e13, "FLOP")) == "30.5 TFLOP"
    assert [plain(fmt.seconds(s)) for s in (0.4, 12, 59.7, 192, 7500)] == [
        "0.4 s",
        "12 s",
        "1 min 00 s",
        "3 min 12 s",
        "2 h 05 min",
    ]
    assert fmt.p_value(None) == "–" and plain(fmt.p_value(0.0001)) == "< 0.001" and fmt.p_value(0.03) == "0.030"
    assert plain(fmt.memory(812_000_000)) == "0.81 GB" and fmt.memory(None) == "–"
    assert [fmt.setting(v) for v in (True, None, 0.2, 1.0, "a")] == ["true", "none", "0.2", "1", "a"]
    assert fmt.number(math.inf) == "∞" and fmt.number(1e-9) == "1.00e−09"


@given(st.text(st.characters(codec=None)))
def test_visible_text_has_no_hidden_characters_and_can_be_written(text: str) -> None:
    shown = fmt.visible(text)
    shown.encode("utf-8")
    assert not any(c in shown for c in "\x00\x1b\r\u200b\u202e\u2066\ufeff")
    assert fmt.visible(shown) == shown


def test_visible_keeps_ordinary_text() -> None:
    text = "Tab\tline\nnaïve 日本語 👩\u200d🔬 € $x$ <b>"
    assert fmt.visible(text) == text
    assert fmt.visible("a\r\nb\u202ec") == "a\nb⟨U+202E⟩c"
    assert fmt.one_line("a\n  b " + "x" * 50, 10) == "a b xxxxx…"
