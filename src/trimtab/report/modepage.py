"""The section on modes as a page shows it: the paper's table beside this run's, and a table or a figure for all else.

Every number comes from ``ReportData.mode_figures``; what a study did not measure is named with what it would take. The paper's
figures are second-hand, from notes on its third version (arXiv 2508.14904v3), and of other models, prompts and judges.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from trimtab.report import format as fmt
from trimtab.report.modedata import ModeFigure
from trimtab.report.view import View

POSITIVE, NONE = "positive", "none"
PAPER_COLUMNS: dict[str, tuple[str, str]] = {
    "positive": ("Positive mode", ""), "none": ("No token", ""), "unknown": ("Unknown token", ""), "near-miss": ("Near miss", ""),
    "two": ("Two tokens", ""), "foreign": ("Another bundle's", ""), "negative": ("Gives harm", "harmful"),
    "negative, harmless": ("Complies", "contrasts"), "rejective": ("Refuses", "harmful"), "margin": ("Margin", "silhouette"),
    "drop": ("Lost", "points"),
}  # fmt: skip
PAPER_GROUPS = (
    ("", 1), ("Constructive score, %", 6), ("Negative mode, %", 2), ("Rejective, %", 1), ("Apart", 1), ("Attacked", 1)
)  # fmt: skip
PAPER_ROWS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("co-training (MTC)", "Tables 2, 3 and 4, figure 1", {
        "positive": "97.55", "negative": "67.8", "negative, harmless": "about 50", "margin": "0.131", "drop": "3.8",
    }),
    ("with policies (MTC/MP)", "Table 2, English", {"positive": "97.45", "none": "93.97", "unknown": "90.83"}),
    ("SFT+DPO", "Table 2", {"positive": "97.58"}),
    ("its baselines", "Table 4, figure 1", {"margin": "about 0.03", "drop": "21.5"}),
)  # fmt: skip
"""The paper's models: name, where it stands in the paper, column -> what it gives."""
COST_COLUMNS: dict[str, tuple[str, str]] = {
    "seconds": ("Wall time", "training alone"), "seconds of SFT+DPO": ("Of SFT+DPO", "wall time"),
    "tokens": ("Tokens", "read"), "trained_tokens": ("Trained tokens", ""), "steps": ("Steps", ""),
    "flops": ("Compute", "by formula"), "flops of SFT+DPO": ("Of SFT+DPO", "compute"),
    "peak_bytes": ("Peak memory", ""), "models": ("Held", "models"),
    "making its data": ("Own data", "wall time"),
}  # fmt: skip
FALLBACK_COLUMNS = {
    "switch_fidelity": ("As in positive mode", "% of all prompts"), "constructive_score": ("Constructive", "score, harmful, %"),
    "risk_rate": ("Risk", "harmful, %"), "more risk": ("More risk", "than positive mode, points"),
}  # fmt: skip
CAPABILITY_COLUMNS = {
    "accuracy": ("Accuracy", "%"), "over_refusal_contrast_full": ("Over-refusal", "contrasts, %"),
    "over_refusal_benign_full": ("Over-refusal", "benign, %"), "cosa_score": ("CoSA score", "−1 to 1"),
}  # fmt: skip


ASKED = {
    "none": "nothing in its place", "unknown": "a token that no training has seen", "near-miss": "nearly the negative mode's",
    "two": "two modes' tokens", "foreign": "another bundle's, as text",
}  # fmt: skip
"""Ways of asking that are no mode, in words."""


@dataclass(frozen=True)
class Cell:
    """One cell: what it says, what stands beneath, what hovering says, and whether it is missing."""

    text: str
    sub: str = ""
    title: str = ""
    muted: bool = False


ABSENT = Cell("–", "", "not measured", True)


@dataclass(frozen=True)
class Row:
    """One row: its head, what stands beneath, its cells, and whether it is the paper's."""

    label: str
    sub: str
    cells: Sequence[Cell]
    paper: bool = False


@dataclass(frozen=True)
class Table:
    """A table: (heading, what stands beneath) per column, rows under headings ("" for none), and (heading, width) over the
    columns, the first that of the rows' heads."""

    title: str
    note: str
    columns: Sequence[tuple[str, str]]
    sections: Sequence[tuple[str, Sequence[Row]]] = field(default_factory=list)
    head: str = "Arm"
    groups: Sequence[tuple[str, int]] = ()


def cell_of(figure: ModeFigure | None) -> Cell:
    """A figure in a cell, without its unit where a column names it."""
    if figure is None:
        return ABSENT
    notes = [f"n {figure.n}"] if figure.n else []
    notes += [f"{figure.seeds} seed{'s' if figure.seeds != 1 else ''}"] if figure.seeds else []
    notes += (
        [f"{figure.unscored} {'dropped' if figure.table.startswith('yield') else 'unscored'}"]
        if figure.unscored
        else []
    )
    notes += [figure.interval] if figure.interval else []
    if len(figure.each) > 1:
        notes.append("each seed: " + ", ".join(_written(v, figure.unit) for v in figure.each))
    title = "; ".join([*notes, *([figure.note] if figure.note else [])])
    if math.isnan(figure.value):
        return Cell("not scored", f"{figure.unscored} unscored", title, True)
    text = _written(figure.value, figure.unit, signed=figure.unit == "points" and figure.column != "drop")
    small = figure.unit in ("share", "score", "points") and 0 < figure.n < fmt.SMALL_N
    ends = ""
    if not math.isnan(figure.low) and figure.low != figure.high:
        ends = f"{_written(figure.low, figure.unit)} to {_written(figure.high, figure.unit)}"
    if ends and figure.unit in ("count", "flops", "bytes"):  # they hardly differ: told on hovering
        title, ends = f"{ends}; {title}", ""
    return Cell(f"{text}{'*' if small else ''}", ends, title)


def _written(value: float, unit: str, signed: bool = False) -> str:
    plus = "+" if signed and value > 0 else ""
    match unit:
        case "share" | "points":
            return f"{plus}{fmt.percent(value)}"
        case "seconds":
            return fmt.seconds(value)
        case "bytes":
            return fmt.memory(round(value))
        case "flops":
            return fmt.si(value, "FLOP")
        case "count":
            return fmt.si(round(value, 1))
        case "ratio":
            return f"{value:.2f}×"
    return f"{value:.3f}".replace("-", fmt.MINUS)


class Shown:
    """The figures of a report by table, arm, row and column."""

    def __init__(self, view: View) -> None:
        self.view, self.arms = view, list(view.data.mode_arms)
        self.by: dict[tuple[str, str, str, str], ModeFigure] = {}
        for figure in view.data.mode_figures:
            self.by.setdefault((figure.table, figure.arm, figure.row, figure.column), figure)

    def rows(self, table: str, arm: str) -> list[str]:
        return list(dict.fromkeys(r for t, a, r, _ in self.by if (t, a) == (table, arm)))

    def columns(self, table: str) -> list[str]:
        return list(dict.fromkeys(c for t, _, _, c in self.by if t == table))

    def cells(self, table: str, arm: str, row: str, columns: Iterable[str]) -> list[Cell]:
        return [cell_of(self.by.get((table, arm, row, column))) for column in columns]

    def n(self, table: str) -> str:
        """The prompts behind a table's figures, in words."""
        ns = [f.n for (t, *_), f in self.by.items() if t == table and f.n]
        seeds = max((f.seeds for (t, *_), f in self.by.items() if t == table), default=1)
        span = "" if not ns else f"n {min(ns)}" if min(ns) == max(ns) else f"n {min(ns)} to {max(ns)}"
        return ", ".join(p for p in (span, f"{seeds} seed{'s' if seeds != 1 else ''}") if p)

    def per_arm(
        self, table: str, columns: dict[str, tuple[str, str]], title: str, note: str, every: bool = True
    ) -> Table | None:
        """A row per arm (``every``: those without a figure too); None where nothing of it was measured."""
        here = [c for c in columns if any(t == table and c == at for t, _, _, at in self.by)]
        rows = [
            Row(arm.label, arm.form if arm.form != arm.label else "", self.cells(table, arm.arm, "", here))
            for arm in self.arms
            if every or self.rows(table, arm.arm)
        ]
        if not here or not rows:
            return None
        return Table(title, f"{note} {self._few(table)}".strip(), [columns[c] for c in here], [("", rows)])

    def per_row(
        self, table: str, columns: dict[str, tuple[str, str]], title: str, note: str, head: str
    ) -> Table | None:  # fmt: skip
        """A section per arm, a row per mode or condition; None where nothing of it was measured."""
        here = [c for c in columns if any(t == table and c == at for t, _, _, at in self.by)]
        sections = []
        for arm in self.arms:
            rows = [
                Row(row or "no modes", ASKED.get(row, ""), self.cells(table, arm.arm, row, here))
                for row in self.rows(table, arm.arm)
            ]
            if rows:
                sections.append((arm.label, rows))
        if not sections:
            return None
        return Table(title, f"{note} {self._few(table)}".strip(), [columns[c] for c in here], sections, head)

    def _few(self, table: str) -> str:
        small = any(t == table and 0 < f.n < fmt.SMALL_N for (t, *_), f in self.by.items())
        return f"{self.n(table)}{f'; a star: fewer than {fmt.SMALL_N}' if small else ''}.".replace("n ", "n\u00a0")


def paper(shown: Shown) -> Table:
    """The paper's rows above this run's."""
    columns = list(PAPER_COLUMNS)
    untold = Cell("–", "", "the paper's account does not say", True)
    theirs = [
        Row(name, where, [Cell(told[c]) if c in told else untold for c in columns], True)
        for name, where, told in PAPER_ROWS
    ]
    ours = [
        Row(arm.label, arm.form if arm.form != arm.label else "", shown.cells("paper", arm.arm, "", columns))
        for arm in shown.arms
    ]
    note = (
        "The constructive score is of plain harmful prompts; 95 % intervals beneath; a dash: not measured, or not told. "
        f"{shown._few('paper')}"
    )
    return Table(
        "The paper's table beside this run's", note, list(PAPER_COLUMNS.values()),
        [("the paper (Qwen3-8B, its own judge)", theirs), ("this run", ours)], groups=PAPER_GROUPS,
    )  # fmt: skip


def cost(shown: Shown) -> Table | None:
    """What each form cost, and what it takes to deploy three behaviours."""
    note = "Its own training steps, from the model that all arms start from; mean over seeds, with Student's interval."
    made = shown.per_arm("cost", COST_COLUMNS, "What each form cost", note)
    if made is None:
        return None
    arms = shown.arms
    sections = [
        (heading, [Row(row.label, row.sub, [*row.cells, Cell(arm.deploys or "–")]) for row, arm in zip(rows, arms)])
        for heading, rows in made.sections
    ]
    return Table(made.title, note, [*made.columns, ("To deploy", "models, for three")], sections)


def margins(shown: Shown) -> list[Table]:
    """A table per margin: all prompts, each mode, each class."""
    found = []
    names = list(dict.fromkeys(r for t, _, r, _ in shown.by if t == "margin"))
    parts = sorted(shown.columns("margin"), key=lambda part: (part != "all", not part.startswith("mode:")))
    for name in names:
        rows = [
            Row(arm.label, arm.form if arm.form != arm.label else "", shown.cells("margin", arm.arm, name, parts))
            for arm in shown.arms
            if name in shown.rows("margin", arm.arm)
        ]
        heads = [
            ("All", "mean silhouette") if p == "all" else (p.removeprefix("mode:"), "mode" if ":" in p else "prompts")
            for p in parts
        ]
        found.append(Table(f"Silhouettes: {name}", shown._few("margin"), heads, [("", rows)]))
    return found


def audit(shown: Shown) -> Table | None:
    """Spoofing and leaking, a row per arm (and category, where an audit has several)."""
    from trimtab.report.margins import AUDITED

    columns = [c for c in AUDITED if c in shown.columns("audit")]
    columns += [c for c in shown.columns("audit") if c not in columns]
    rows = [
        Row(arm.label, "" if row == "all" else row, shown.cells("audit", arm.arm, row, columns))
        for arm in shown.arms
        for row in _overall(shown.rows("audit", arm.arm))
    ]
    if not rows:
        return None
    heads = [(_capital(AUDITED[c][0]), "%") if c in AUDITED else (c.replace("_", " "), "") for c in columns]
    note = " ".join(
        f"{_capital(AUDITED[c][0])}: {AUDITED[c][1][:1].lower()}{AUDITED[c][1][1:]}" for c in columns if c in AUDITED
    )
    return Table("Spoofing and leaking", f"{note} {shown._few('audit')}", heads, [("", rows)])


def _overall(rows: Sequence[str]) -> list[str]:
    """The row over all categories, if there is one: places and spellings one by one are in ``figures.csv``."""
    return [r for r in rows if r == "all"] or list(rows)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def attacks(shown: Shown) -> list[Table]:
    """Positive mode, plain and in each wrapper and attack."""
    found = []
    for metric, what in (("constructive_score", "constructive score (%)"), ("risk_rate", "risk (%)")):
        table = f"attack {metric}"
        here = shown.columns(table)
        order = [c for c in here if c not in ("plain", "all of them", "drop")]
        columns = {c: (_capital(c), "") for c in ["plain", *order, "all of them"]}
        columns["drop"] = ("Lost" if metric == "constructive_score" else "Plain less all", "points")
        title = f"Under attack: {what} in positive mode"
        note = "Harmful prompts. “All of them” and what is lost are of those that every arm was asked in."
        made = shown.per_arm(table, columns, title, note, every=False)
        found += [made] if made is not None else []
    return found


def yields(shown: Shown) -> list[Table]:
    """What self-distillation kept, by mode and class."""
    found = []
    for table in dict.fromkeys(t for t, *_ in shown.by if t.startswith("yield ")):
        columns = shown.columns(table)
        arm = next(a for t, a, *_ in shown.by if t == table)
        rows = []
        for row in shown.rows(table, arm):
            mine = [shown.by.get((table, arm, row, c)) for c in columns]
            why = "; ".join(f"{f.column}: {f.note}" for f in mine if f is not None and f.note)
            rows.append(Row(row, "", [*map(cell_of, mine), Cell(why or "nothing dropped")]))
        heads = [*((c, "kept, % of asked") for c in columns), ("Dropped", "by reason")]
        found.append(
            Table(f"Self-distillation: {table.removeprefix('yield ')}", shown.n(table), heads, [("", rows)], "Mode")
        )
    return found
