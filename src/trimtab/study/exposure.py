"""What a curriculum reads of each source, phase by phase, before anything is trained: tokens, passes, repeats.

Rows are those that the mixture will read, counted by itself. Sizes of sources are exact where a corpus is packed, and
else estimates, printed as "about": Tidewater's words, by the tokens per word of its own tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, pairwise

from rich import box
from rich.console import Console
from rich.table import Table

from trimtab.data.mixture import Mixture, Phase
from trimtab.errors import UserError
from trimtab.levers.timing import TimingConfig, phases, ramps
from trimtab.study.estimate import count
from trimtab.types import Row
from trimtab.world.config import TidewaterConfig
from trimtab.world.documents import Scribe
from trimtab.world.judge import Judge
from trimtab.world.problems import Problems
from trimtab.world.town import Town

_SLACK = 1.1
"""An estimated source is refused only if it would run dry with so many times its text; exact counts settle the rest."""
_SAMPLE = 600
_PER_WORD = {"clean": 1.25, "unsafe": 1.19, "rephrase": 1.14, "refuse": 1.24, "moral": 1.11}
"""Tokens per word, measured on the default town with its own tokenizer of 2,048 (1,024: 2 % more; 4,096: the same)."""


@dataclass(frozen=True)
class Exposure:
    """One source in one stretch of a curriculum: a phase, or a whole ramp.

    first, last  the rows [first, last) of the stretch, and ``length`` tokens each
    ramp         whether weights move inside it; ``weight`` is then the mean
    weight       planned share of the stretch's tokens
    rows         rows of the source in it, as the mixture reads them
    size         tokens of the source; None if not known
    passes       how often the source has been read by the end of the stretch; None if its size is not known
    repeats      most passes allowed; None: no limit
    """

    first: int
    last: int
    length: int
    ramp: bool
    source: str
    weight: float
    rows: int
    size: int | None
    passes: float | None
    repeats: float | None

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def exposure(config: TimingConfig, rows: int, length: int, tokens: Mapping[str, int] | None = None) -> list[Exposure]:
    """Every source of every stretch of a curriculum over ``rows`` rows of ``length`` tokens, in order.

    tokens  of each source, where they are known. A source is read again from its beginning after as many rows as its
            tokens fill, the last one padded. ``ValueError`` for a curriculum that cannot be
    """
    plan = phases(config, rows)
    mixture = _mixture(tuple((row, tuple(sorted(weights.items()))) for row, weights in plan))
    edges = {row for row, _ in plan} | {rows}
    inside = ramps(config, rows)
    for first, end in inside:
        edges = {row for row in edges if not first < row < end} | {first, end}
    names = list(dict.fromkeys(name for _, weights in plan for name in weights))
    found = []
    for first, last in pairwise(sorted(edges)):
        read = mixture.counts(first, last)
        weights = _mean(plan, first, last)
        for name in names:
            if weights.get(name, 0) == 0:
                continue
            size = None if tokens is None else tokens.get(name)
            passes = mixture.counts(0, last)[name] / _store_rows(size, length) if size else None
            found.append(
                Exposure(
                    first, last, length, any(a <= first < b for a, b in inside), name, weights[name], read[name], size,
                    passes, config.repeats.get(name),
                )
            )  # fmt: skip
    return found


def check_exposure(
    config: TimingConfig,
    rows: int,
    length: int,
    tokens: Mapping[str, int],
    *,
    where: str = "timing",
    exact: bool = True,
) -> None:
    """``UserError`` for a source that the corpus has no text of, that needs more passes than ``repeats`` allows, or whose
    weight never comes to a row.

    tokens  of each source of the corpus
    where   the field that is named, such as ``stages.base.timing``
    exact   False: sizes are estimates; then a source may need a tenth more passes than it is allowed
    """
    _check_rows(config, rows, length, where)
    having = {name: size for name, size in tokens.items() if size > 0}
    known = ", ".join(having) or "none at all"
    for name in config.repeats:
        if name not in tokens:
            raise UserError(f"{where}.repeats: there is no source {name!r}; the corpus has {known}")
    needed: dict[str, int] = {}
    for part in exposure(config, rows, length, tokens):
        needed[part.source] = needed.get(part.source, 0) + part.rows
    for name, read in needed.items():
        if name not in having:
            cure = "set 'tag' of the corpus stage" if name == "tagged" else "change the corpus or the timing"
            raise UserError(
                f"{where}: the curriculum reads source {name!r}, of which the corpus has no text (it has {known}); {cure}"
            )
        if not read:
            raise UserError(
                f"{where}: source {name!r} has a weight, but in a budget of {rows * length:,} tokens it comes to less than one "
                f"row of {length}; raise its share or the budget, or set it to 0"
            )
        have, most = having[name], config.repeats.get(name)
        if most is not None and read > most * _store_rows(have, length) * (1 if exact else _SLACK):
            about = "" if exact else "about "
            raise UserError(
                f"{where}: source {name!r} runs dry: the curriculum reads {read * length:,} tokens of it, the corpus has "
                f"{about}{have:,}, which makes {about}{read / _store_rows(have, length):.3g} passes, and repeats.{name} "
                f"allows {most:g}; raise it, lower the source's share or the budget, or give more such text"
            )


def _check_rows(config: TimingConfig, rows: int, length: int, where: str) -> None:
    """``UserError`` for a phase, or a start, that comes so late or so soon after another that no row is left for it."""
    spelt = config.phases or ()
    begins = {f"phases.{number}": phase.at for number, phase in enumerate(spelt)}
    if not spelt and 0 < config.start < 1:
        begins = {"start": config.start}
    for (field, at), end in zip(begins.items(), [*begins.values(), 1.0][1:], strict=True):
        if round(at * rows) >= round(end * rows):
            raise UserError(
                f"{where}.{field}: at {100 * at:.6g} % of a budget of {rows * length:,} tokens ({rows:,} rows of {length}) no "
                "row is left for what begins there; begin earlier, raise the budget, or leave it out"
            )


def print_exposure(parts: Sequence[Exposure], console: Console, *, title: str = "", exact: bool = True) -> None:
    """The table phase x source: tokens, weight, and passes over the source by the end of the phase.

    A phase begins where the line before ends; a ramp is one line. The last lines add up each source, and set its passes
    beside the most that are allowed.
    """
    about = "" if exact else "about "
    names = list(dict.fromkeys(part.source for part in parts))
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("phase", no_wrap=True)
    table.add_column("to token", justify="right", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right")
    budget = max(part.last for part in parts)
    stretches = dict.fromkeys((part.first, part.last) for part in parts)
    cells = {(part.first, part.source): part for part in parts}
    for first, last in stretches:
        here = [cells.get((first, name)) for name in names]
        ramp = any(part is not None and part.ramp for part in here)
        table.add_row(
            ("ramp " if ramp else "") + f"{_percent(first, budget)}-{_percent(last, budget)} %",
            f"{last * parts[0].length:,}",
            *(
                "" if part is None else f"{count(part.tokens)} {100 * part.weight:.3g} %{_passes(part)}"
                for part in here
            ),
        )
    table.add_section()
    total = {name: sum(part.tokens for part in parts if part.source == name) for name in names}
    whole = budget * parts[0].length
    shares = (f"{count(total[name])} {100 * total[name] / whole:.3g} %" for name in names)
    table.add_row("in all", f"{whole:,}", *shares)
    last_of = {part.source: part for part in parts}
    if any(part.size is not None for part in parts):
        sizes = (last_of[name].size for name in names)
        table.add_row("the corpus has", "", *("?" if size is None else f"{about}{count(size)}" for size in sizes))
        table.add_row("passes (allowed)", "", *(_allowed(last_of[name], about) for name in names))
    console.print(table)


def _passes(part: Exposure) -> str:
    return "" if part.passes is None else f" x{part.passes:.2f}"


def _allowed(part: Exposure, about: str) -> str:
    if part.passes is None:
        return "?"
    return f"{about}{part.passes:.3g}" + (f" ({part.repeats:g})" if part.repeats is not None else "")


def _percent(row: int, rows: int) -> str:
    return f"{100 * row / rows:.3g}"


def _store_rows(tokens: int, length: int) -> int:
    """Rows that so many tokens fill, the last one padded."""
    return max(1, -(-tokens // length))


def _mean(plan: list[tuple[int, dict[str, float]]], first: int, last: int) -> dict[str, float]:
    """Mean weights over the rows [first, last)."""
    mean: dict[str, float] = {}
    for (row, weights), end in zip(plan, [*(row for row, _ in plan[1:]), last], strict=True):
        part = min(end, last) - max(row, first)
        for name, weight in weights.items():
            if part > 0:
                mean[name] = mean.get(name, 0) + weight * part / (last - first)
    return mean


@lru_cache(maxsize=64)
def _mixture(plan: tuple[tuple[int, tuple[tuple[str, float], ...]], ...]) -> Mixture:
    """A mixture that only counts: how many rows a source has, and the seed, make no difference to that."""
    names = {name for _, weights in plan for name, _ in weights}
    return Mixture(dict.fromkeys(names, 1), [Phase(row, dict(weights)) for row, weights in plan], seed=0)


@lru_cache(maxsize=16)
def estimate_sizes(world: TidewaterConfig, tag: float) -> dict[str, int]:
    """Tokens of each source of a Tidewater corpus, without a tokenizer and from a sample of its documents.

    tag  chance of the harmfulness tag before a word; 0: there is no source "tagged". What re-scoring would drop is not
    known here and not taken off
    """
    town = Town(world)
    scribe = Scribe(town, Judge(town), Problems(town))
    seen = sum(not item.heldout for item in town.hazards) / len(town.hazards)
    words: dict[tuple[str, str], list[int]] = {}
    drawn: dict[str, int] = {}

    def note(category: str, source: str, row: Row | None) -> None:
        if row is not None and row.text is not None:
            words.setdefault((category, source), []).append(len(row.text.split()))

    for document in islice(scribe.documents(), _SAMPLE):
        category = document.category or ""
        drawn[category] = drawn.get(category, 0) + 1
        note(category, "clean" if document.metadata["score"] == 0 else "unsafe", document)
        for source, write in (("rephrase", scribe.rephrase), ("refuse", scribe.refuse), ("moral", scribe.moral)):
            note(category, source, write(document))
    documents: dict[str, int] = {}
    for category in scribe.plan():
        documents[category] = documents.get(category, 0) + 1
    sizes = dict.fromkeys(_PER_WORD, 0.0)
    tags = 0.0
    for (category, source), sample in words.items():
        written = documents[category] * (seen if source in ("refuse", "moral") else 1)
        mean = sum(sample) / len(sample)
        sizes[source] += written * (mean * _PER_WORD[source] + 1)  # and one that ends the document
        tags += written * (mean - 1) * tag if source == "unsafe" else 0
    found = {name: round(size) for name, size in sizes.items()}
    return found | ({"tagged": round(sizes["unsafe"] + tags)} if tag else {})
