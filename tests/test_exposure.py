"""What a curriculum reads of each source: counted as the mixture reads it, printed, and refused where text runs dry."""

from __future__ import annotations

import io
import time
from itertools import pairwise
from typing import Any

import pytest
from rich.console import Console

from trimtab.data.mixture import Mixture, Phase
from trimtab.errors import UserError
from trimtab.levers.timing import TimingConfig, phases
from trimtab.study.exposure import check_exposure, estimate_sizes, exposure, print_exposure
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import Tidewater

SIZES = {"clean": 200_000, "unsafe": 110_000, "rephrase": 94_000, "refuse": 25_000, "moral": 25_600}
ROWS, LENGTH = 6250, 128


def timing(**fields: Any) -> TimingConfig:
    return TimingConfig.model_validate(fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"start": 0.2, "ramp": 0.1, "exposure": "matched"},
        {"start": 0.6, "before": "raw"},
        {
            "phases": [
                {"at": 0, "weights": {"clean": 1}},
                {"at": 0.5, "weights": {"clean": 1, "moral": 1}, "ramp": 0.25},
            ]
        },
    ],
)
def test_rows_are_those_that_the_mixture_reads(fields: dict[str, Any]) -> None:
    config = timing(**fields)
    parts = exposure(config, ROWS, LENGTH, SIZES)
    plan = phases(config, ROWS)
    mixture = Mixture(dict.fromkeys(SIZES, 100), [Phase(row, weights) for row, weights in plan], seed=5)
    stretches = sorted({(part.first, part.last) for part in parts})
    assert stretches[0][0] == 0 and stretches[-1][1] == ROWS
    assert all(a[1] == b[0] for a, b in pairwise(stretches))
    for part in parts:
        assert part.rows == mixture.counts(part.first, part.last)[part.source]
        assert part.tokens == part.rows * LENGTH
        assert abs(part.rows - part.weight * (part.last - part.first)) < 2
    assert sum(part.tokens for part in parts) == ROWS * LENGTH
    for first, _ in stretches:
        assert sum(part.weight for part in parts if part.first == first) == pytest.approx(1)


def test_a_ramp_is_one_stretch_with_its_mean_weight() -> None:
    parts = exposure(timing(start=0.2, ramp=0.1), ROWS, LENGTH)
    assert [(p.first, p.last, p.ramp) for p in parts if p.source == "clean"] == [
        (0, 1250, False),
        (1250, 1875, True),
        (1875, 6250, False),
    ]
    (ramp,) = (p for p in parts if p.ramp and p.source == "refuse")
    assert ramp.weight == pytest.approx(0.06) and ramp.passes is None and ramp.repeats is None


def test_passes_add_up_over_phases_and_count_whole_rows() -> None:
    parts = exposure(timing(start=0.5, repeats={"clean": 4}), 1000, 100, {**SIZES, "clean": 24_950})
    before, after = (p for p in parts if p.source == "clean")
    assert before.passes == 500 / 250 and after.passes == 850 / 250  # 24,950 tokens are 250 rows
    assert before.repeats == after.repeats == 4


def test_a_source_that_runs_dry_is_refused_with_the_arithmetic() -> None:
    config = timing(start=0.2, repeats={"refuse": 3})
    with pytest.raises(
        UserError,
        match=r"stages.base.timing: source 'refuse' runs dry: the curriculum reads 76,800 tokens of it, the corpus has "
        r"25,000, which makes 3.06 passes, and repeats.refuse allows 3; raise it",
    ):
        check_exposure(config, ROWS, LENGTH, SIZES, where="stages.base.timing")
    check_exposure(config, ROWS, LENGTH, SIZES, exact=False)  # a tenth more than an estimate is left to exact counts
    with pytest.raises(UserError, match=r"has about 22,000, which makes about 3.49 passes"):
        check_exposure(config, ROWS, LENGTH, {**SIZES, "refuse": 22_000}, exact=False)
    check_exposure(timing(start=0.2, repeats={"refuse": 3.2}), ROWS, LENGTH, SIZES)
    check_exposure(timing(start=0.2), ROWS, LENGTH, {**SIZES, "refuse": 1})  # no limit was set
    whole = timing(start=1, repeats={"clean": 1})
    check_exposure(whole, 3, 100, {"clean": 201})  # the last row is padded
    with pytest.raises(UserError, match="runs dry"):
        check_exposure(whole, 4, 100, {"clean": 201})


def test_a_source_without_text_and_an_unknown_one_are_named() -> None:
    with pytest.raises(
        UserError, match=r"t: the curriculum reads source 'moral', of which the corpus has no text \(it has clean, "
    ):
        check_exposure(timing(), ROWS, LENGTH, {**SIZES, "moral": 0}, where="t")
    spelt = timing(phases=[{"at": 0, "weights": {"cleen": 1}}])
    with pytest.raises(UserError, match="source 'cleen', of which the corpus has no text"):
        check_exposure(spelt, ROWS, LENGTH, SIZES)
    with pytest.raises(UserError, match=r"timing.repeats: there is no source 'refusal'; the corpus has clean, unsafe"):
        check_exposure(timing(repeats={"refusal": 2}), ROWS, LENGTH, SIZES)
    tagged = timing(interventions={"rephrase": 0.5, "refuse": 0.25, "moral": 0, "tagged": 0.25})
    with pytest.raises(UserError, match=r"source 'tagged'.*set 'tag' of the corpus stage"):
        check_exposure(tagged, ROWS, LENGTH, SIZES)
    check_exposure(timing(start=1), ROWS, LENGTH, {"clean": 10})  # nothing else is read


def test_a_weight_that_never_comes_to_a_row_is_refused() -> None:
    tiny = timing(unsafe_share=0.0004)
    with pytest.raises(
        UserError, match=r"source 'moral' has a weight, but in a budget of 800,000 tokens .* one row of 128"
    ):
        check_exposure(tiny, ROWS, LENGTH, SIZES)
    check_exposure(tiny, 100 * ROWS, LENGTH, SIZES)


def printed(config: TimingConfig, sizes: dict[str, int] | None, **options: Any) -> str:
    out = io.StringIO()
    parts = exposure(config, ROWS, LENGTH, sizes)
    print_exposure(parts, Console(file=out, width=140), **options)
    return out.getvalue()


def test_the_table_names_boundaries_in_tokens() -> None:
    text = printed(timing(start=0.2, ramp=0.1, repeats={"refuse": 6}), SIZES, title="base", exact=False)
    assert text.startswith("base")
    lines = [line.split() for line in text.splitlines() if line.strip()]
    assert lines[3][:6] == ["0-20", "%", "160,000", "160k", "100", "%"]
    assert lines[4][:4] == ["ramp", "20-30", "%", "240,000"] and lines[5][:3] == ["30-100", "%", "800,000"]
    assert "about 25k" in text and "about 2.87 (6)" in text and "in all" in text and "…" not in text
    plain = printed(timing(start=0.2), None)
    assert "the corpus has" not in plain and "passes" not in plain and "12 %" in plain
    exact = printed(timing(start=0.2), SIZES)
    assert "about" not in exact and "3.06" in exact
    half = printed(timing(), {"clean": 200_000})
    assert "?" in half  # sizes of some sources only


def test_sizes_are_estimated_closely_and_fast() -> None:
    world = TidewaterConfig(seed=11, documents=2500, heldout=0.4)
    began = time.process_time()
    found = estimate_sizes(world, 0.05)
    assert time.process_time() - began < 2
    assert estimate_sizes(world, 0.05) is found
    town = Tidewater(world)
    words = dict.fromkeys(found, 0)
    for row in town.documents():
        assert row.text is not None
        words["clean" if row.metadata["score"] == 0 else "unsafe"] += len(row.text.split())
        for name, write in (("rephrase", town.rephrase), ("refuse", town.refuse), ("moral", town.moral)):
            made = write(row)
            words[name] += len((made.text or "").split()) if made else 0
    per_word = {"clean": 1.25, "unsafe": 1.19, "rephrase": 1.14, "refuse": 1.24, "moral": 1.11}  # measured
    for name, factor in per_word.items():
        assert found[name] == pytest.approx(words[name] * factor, rel=0.07)
    assert 1.03 < found["tagged"] / found["unsafe"] < 1.05
    assert "tagged" not in estimate_sizes(world, 0)


def test_a_town_that_never_refuses() -> None:
    found = estimate_sizes(TidewaterConfig(heldout=1.0, documents=200), 0)
    assert found["refuse"] == found["moral"] == 0 < found["rephrase"]


def test_what_no_row_is_left_for_is_refused() -> None:
    """It would be left out without a word, and an arm would be another than its label says."""
    late = timing(start=0.9999)
    with pytest.raises(
        UserError, match=r"t\.start: at 99\.99 % of a budget of 12,800 tokens \(100 rows of 128\) no row"
    ):
        check_exposure(late, 100, LENGTH, SIZES, where="t")
    check_exposure(late, 2_000_000, LENGTH, SIZES)
    weights = [{"clean": 1}, {"unsafe": 1}, {"clean": 1}]
    spelt = timing(phases=[{"at": at, "weights": w} for at, w in zip((0, 0.5, 0.5001), weights)])
    with pytest.raises(UserError, match=r"timing\.phases\.1: at 50 %"):
        check_exposure(spelt, 100, LENGTH, SIZES)
    check_exposure(spelt, 100_000, LENGTH, SIZES)
