"""The view of a report's data that tables, figures and the CSV share: arms folded over seeds, one cell per figure.

Several seeds of one arm are averaged. The interval of such a mean is Student's t over the seeds, never narrower than the
mean of the seeds' own intervals (three seeds that agree by chance say little; the prompts are the same in each). Where
the study itself supplies a result over all seeds (``seed`` None beside results with seeds), that one is shown and the
seeds give the range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from trimtab.report import format as fmt
from trimtab.report.data import Arm, Finding, ReportData
from trimtab.types import Result

TASK, POLICY, ATTACK, ANY = "task:", "policy:", "attack:", "attack:any"
"""How the categories of an evaluation's figures begin (``evaluate.metrics``, which is slow to import)."""


@dataclass(frozen=True)
class Family:
    """One arm as the reader sees it: all its seeds. ``colour`` is its place within its group."""

    arms: tuple[Arm, ...]
    colour: int

    @property
    def id(self) -> str:
        return self.arms[0].id

    @property
    def label(self) -> str:
        return self.arms[0].label

    @property
    def group(self) -> str:
        return self.arms[0].group

    @property
    def ids(self) -> list[str]:
        return [arm.id for arm in self.arms]


@dataclass(frozen=True, order=True)
class Measure:
    """A row of a results table: what was measured, on which task, after which stage."""

    metric: str
    category: str
    stage: str

    @classmethod
    def of(cls, result: Result) -> Measure:
        return cls(result.metric, result.category or "", result.stage)


@dataclass(frozen=True)
class Column:
    """A column of a results table: an arm, and the mode it was asked for where it has modes."""

    family: Family
    mode: str | None

    @property
    def label(self) -> str:
        return self.family.label + (f" · {self.mode}" if self.mode else "")


@dataclass(frozen=True)
class Cell:
    """One figure: mean over seeds, interval, rows per seed, and every seed's own result."""

    value: float
    low: float
    high: float
    n: tuple[int, int]
    unscored: int
    seeds: tuple[Result, ...]
    intervals: tuple[str, ...]
    share: bool

    @property
    def scored(self) -> bool:
        return math.isfinite(self.value)

    @property
    def small(self) -> bool:
        return self.scored and self.n[0] < fmt.SMALL_N

    @property
    def text(self) -> str:
        return fmt.estimate(self.value, self.low, self.high, self.share)

    @property
    def n_text(self) -> str:
        low, high = self.n
        return f"n {low}" if low == high else f"n {low}–{high}"

    @property
    def notes(self) -> list[str]:
        """What the reader must know beside the value: n, small n, unscored rows, the seeds' range."""
        notes = [self.n_text]
        if self.small:
            notes.append("small n")
        if self.unscored:
            notes.append(f"{self.unscored} unscored")
        if len(self.seeds) > 1:
            write = fmt.percent if self.share else fmt.number
            values = [r.value for r in self.seeds if math.isfinite(r.value)]
            if values:
                notes.append(f"{len(self.seeds)} seeds: {write(min(values))} to {write(max(values))}")
        return notes


def fold(results: Sequence[Result], share: bool) -> Cell:
    """Fold the results of one arm, measure and mode."""
    seeds = tuple(sorted((r for r in results if r.seed is not None), key=lambda r: (r.seed or 0, r.arm)))
    overall = [r for r in results if r.seed is None]
    base = overall if len(overall) == 1 else list(results)
    scored = [r for r in base if math.isfinite(r.value)]
    value = sum(r.value for r in scored) / len(scored) if scored else math.nan
    low, high = _interval(scored)
    return Cell(
        value=value,
        low=low,
        high=high,
        n=(min(r.n for r in base), max(r.n for r in base)),
        unscored=sum(r.unscored for r in base),
        seeds=seeds if seeds else tuple(results),
        intervals=tuple(sorted({r.interval for r in base})),
        share=share,
    )


def _interval(scored: Sequence[Result]) -> tuple[float, float]:
    """The interval of a mean over seeds, within the metric's range."""
    if len(scored) < 2:
        return next(((r.low, r.high) for r in scored), (math.nan, math.nan))
    from trimtab.evaluate.stats import over_seeds  # scipy: only where there are several seeds

    _, low, high, _ = over_seeds([r.value for r in scored])
    within = [sum(ends) / len(ends) for ends in ([r.low for r in scored], [r.high for r in scored])]
    bottom, top = min(r.range[0] for r in scored), max(r.range[1] for r in scored)
    return max(bottom, min(low, within[0])), min(top, max(high, within[1]))


@dataclass
class View:
    """Arms by family and group, measures in the order of ``data.metrics``, and a cell for each figure."""

    data: ReportData
    families: list[Family] = field(init=False)
    cells: dict[tuple[Measure, str, str | None], Cell] = field(init=False)
    """(measure, family id, mode) -> figure"""
    measures: list[Measure] = field(init=False)
    _by_arm: dict[str, Family] = field(init=False)
    _shares: dict[str, bool] = field(init=False)

    def __post_init__(self) -> None:
        by_family: dict[tuple[str, str, str], list[Arm]] = {}
        for arm in self.data.arms:
            by_family.setdefault(arm.family, []).append(arm)
        self.families, places = [], dict.fromkeys((a.group for a in self.data.arms), 0)
        for arms in by_family.values():
            self.families.append(Family(tuple(arms), places[arms[0].group]))
            places[arms[0].group] += 1
        self._by_arm = {arm.id: family for family in self.families for arm in family.arms}
        self._shares = {}
        for r in self.data.results:
            self._shares[r.metric] = self._shares.get(r.metric, True) and tuple(r.range) == (0.0, 1.0)
        found: dict[tuple[Measure, str, str | None], list[Result]] = {}
        for r in self.data.results:
            found.setdefault((Measure.of(r), self.family(r.arm).id, r.mode), []).append(r)
        self.cells = {key: fold(results, self.share(key[0].metric)) for key, results in found.items()}
        order = list(dict.fromkeys([*self.data.headline, *self.data.metrics]))
        seen = list(dict.fromkeys(Measure.of(r) for r in self.data.results))
        rank = {metric: i for i, metric in enumerate(order)}
        self.measures = sorted(seen, key=lambda m: (rank.get(m.metric, len(rank)), seen.index(m)))

    @property
    def groups(self) -> list[str]:
        return list(dict.fromkeys(family.group for family in self.families))

    def family(self, arm: str) -> Family:
        return self._by_arm[arm]

    def twin(self, family: Family) -> Family | None:
        """The family before it that is the same training, under another name."""
        first = self.data.same.get(family.id)
        return None if first is None or first in family.ids else self.family(first)

    def names(self, family: Family) -> str:
        """The family's label, and those of its twins."""
        return ", ".join(f.label for f in self.families if f is family or self.twin(f) is family)

    def members(self, group: str) -> list[Family]:
        return [family for family in self.families if family.group == group]

    def ordered(self) -> list[tuple[str, list[Family]]]:
        """Families by heading: those of the timing lever first, natural before matched exposure and by start, then the
        others by their group. Without timing: by group, as they came."""
        told = self.data.timing
        rows: dict[str, list[tuple[float, Family]]] = {}
        for family in self.families:
            timing = told.get(family.id)
            several = len({(t["exposure"], t["before"]) for t in told.values()}) > 1
            if timing is None:
                heading = family.group
            else:
                heading = f"{timing['exposure']} exposure" if several else family.group
                heading += " after raw text" if timing["before"] == "raw" and several else ""
            rows.setdefault(heading, []).append((timing["start"] if timing else 0.0, family))
        first = sorted(rows, key=lambda h: (not h.startswith("natural"), not h.startswith("matched")))
        return [(h, [f for _, f in sorted(rows[h], key=lambda item: item[0])]) for h in first]

    @cached_property
    def of_series(self) -> list[tuple[str, str, str]]:
        """(arm group, series, family id) of every arm whose values the ratio curves hold."""
        told = dict.fromkeys(
            (c.group, c.series, self.family(arm).id) for c in self.data.ratios if c.pooled == 1 for arm in c.arms
        )
        return list(told)

    @cached_property
    def in_series(self) -> frozenset[str]:
        """Families that the section on ratios shows; the grids leave them out."""
        return frozenset(arm for _, _, arm in self.of_series) if self.data.places else frozenset()

    def share(self, metric: str) -> bool:
        """Whether the metric is a share (range 0 to 1), written as a percentage."""
        return self._shares.get(metric, True)

    def label(self, metric: str) -> str:
        return self.data.metrics.get(metric, {}).get("label") or metric

    def direction(self, metric: str) -> str:
        """Which way is better, in words; "" where neither is, or nobody said."""
        said = self.data.metrics.get(metric, {}).get("direction")
        said = said or next((r.direction for r in self.data.results if r.metric == metric), "none")
        return {"higher": "higher is better", "lower": "lower is better"}.get(said, "")

    def is_headline(self, metric: str) -> bool:
        return not self.data.headline or metric in self.data.headline

    def columns(self, group: str) -> list[Column]:
        """The columns of a group's table; an arm without results keeps its column, so none is hidden."""
        columns = []
        for family in self.members(group):
            modes = list(dict.fromkeys(mode for _, arm, mode in self.cells if arm == family.id)) or [None]
            columns += [Column(family, mode) for mode in modes]
        return columns

    def cell(self, measure: Measure, column: Column) -> Cell | None:
        return self.cells.get((measure, column.family.id, column.mode))

    # -- the groups of an evaluation's figures --------------------------------------------------------------------------

    def scope(self, measure: Measure) -> str:
        """What a figure is of: "all" plain prompts, a "task", "policy", "category" or "attack"; of a study always "task"."""
        if self.data.kind == "study":
            return "task"
        for prefix, name in ((TASK, "task"), (POLICY, "policy"), (ATTACK, "attack")):
            if measure.category.startswith(prefix):
                return name
        return "category" if measure.category else "all"

    def place(self, category: str) -> str:
        """The name of a figure's group, without its prefix."""
        if self.data.kind == "study":
            return category
        if category == ANY:
            return "any of them, or plain"
        return category.removeprefix(TASK).removeprefix(POLICY).removeprefix(ATTACK)

    @property
    def drawn(self) -> list[Measure]:
        """The measures that get a figure of their own. Of an evaluation: those over all prompts, and the headline by task
        where there are several; attacks are drawn together, categories are in tables, bounds beside what they bound."""
        if self.data.kind == "study":
            return [] if self.data.places else self.measures  # a grid draws them, its details are tables
        beside = {id for pair in self.data.bounds.values() for id in pair} | set(self.data.corrected.values())
        tasks = [m.metric for m in self.measures if self.scope(m) == "task"]
        return [
            m
            for m in self.measures
            if m.metric not in beside
            and (
                self.scope(m) == "all"
                or (self.scope(m) == "task" and m.metric in self.data.headline and tasks.count(m.metric) > 1)
            )
        ]

    def within(self, measure: Measure, column: Column) -> tuple[float, float] | None:
        """The value that all unscored answers counted safe, and counted unsafe, would give; None where none are."""
        names = self.data.bounds.get(measure.metric)
        cell = self.cell(measure, column)
        if names is None or cell is None or not cell.unscored:
            return None
        ends = [self.cell(Measure(name, measure.category, measure.stage), column) for name in names]
        values = [end.value for end in ends if end is not None and end.scored]
        return (min(values), max(values)) if len(values) == 2 else None

    def evidence(self, finding: Finding) -> tuple[str, list[tuple[str, Cell]]]:
        """The figures beneath a finding: what they share, then (what sets one apart, cell) in the order of its arms."""
        wanted = list(dict.fromkeys(self.family(arm).id for arm in finding.arms)) or [f.id for f in self.families]
        found = [
            (self.family(arm), measure, mode, cell)
            for arm in wanted
            for (measure, family, mode), cell in self.cells.items()
            if family == arm and any(finding.matches(r) for r in cell.seeds)
        ]
        tasks, stages = {m.category for _, m, _, _ in found}, {m.stage for _, m, _, _ in found}
        shared = [
            self.label(finding.metric),
            *(tasks if len(tasks) == 1 else ()),
            *(stages if len(stages) == 1 else ()),
        ]
        apart = [
            ([family.label, mode, m.category if len(tasks) > 1 else "", m.stage if len(stages) > 1 else ""], cell)
            for family, m, mode, cell in found
        ]
        return _dots(shared), [(_dots(parts), cell) for parts, cell in apart]


def _dots(parts: Sequence[str | None]) -> str:
    return " · ".join(part for part in parts if part)
