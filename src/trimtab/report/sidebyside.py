"""Two evaluations side by side, as text for a terminal: warnings first, then the figures, then the answers that changed.

Everything that came from data is made visible before it is printed, so that no answer can move the cursor or pass for a
line of the table. Answers that may be harmful are cut short unless the whole is asked for.
"""

from __future__ import annotations

import io

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trimtab.evaluate.comparison import Comparison
from trimtab.evaluate.metrics import ANY_ATTACK, ATTACK, POLICY, SMALL_N, TASK, metric_of
from trimtab.evaluate.sidebyside import Change, SideBySide
from trimtab.report import format as fmt

PROMPT_CUT, ANSWER_CUT = 240, 400
"""Characters shown of a prompt, and of an answer that is not harmful."""
NARROW, WIDE = 80, 110
_KINDS = {
    "unsafe": ("safe -> unsafe", "bold red"), "worse": ("worse", "red"), "other": ("changed", "yellow"),
    "better": ("better", "green"),
}  # fmt: skip


def render(
    found: SideBySide, *, discordant: int = 5, whole: bool = False, width: int = 100, colour: bool = False
) -> str:
    """The whole comparison. ``discordant``: how many changed answers are printed; ``whole``: uncut ones."""
    console = Console(
        file=io.StringIO(), width=max(NARROW, min(width, WIDE)), force_terminal=colour, no_color=not colour, markup=False,
        highlight=False, emoji=False, legacy_windows=False, color_system="standard" if colour else None,
    )  # fmt: skip
    console.print(Text.assemble(("A  ", "bold"), _plain(found.a.label), ("  " + _plain(found.a.path), "dim")))
    console.print(Text.assemble(("B  ", "bold"), _plain(found.b.label), ("  " + _plain(found.b.path), "dim")))
    for warning in found.warnings:
        console.print(Text(f"warning: {_plain(warning)}", style="yellow"))
    console.print(Text(f"{found.pairs} answers to the same prompts; differences are B - A, with 95 % intervals", "dim"))
    if found.overall:
        console.print(_table("Overall", "metric", [(_metric(c), c) for c in found.overall]))
    for metric in dict.fromkeys(c.metric for c in found.groups):
        mine = [c for c in found.groups if c.metric == metric]
        console.print(_table(metric_of(metric).title, "group", [(_group(c.category), c) for c in mine]))
    console.print(Text(
        "p: exact McNemar (sign flips of whole prompts for scores and repeated samples). Holm: adjusted over the "
        "metrics of the first table, then within a metric over its categories, its tasks and its attacks. "
        "open: unscored on a side, left out. seen: smallest difference found with 80 % power. "
        f"* fewer than {SMALL_N} prompts.", "dim",
    ))  # fmt: skip
    _changes(console, found, discordant, whole)
    file = console.file
    assert isinstance(file, io.StringIO)
    return "\n".join(line.rstrip() for line in file.getvalue().split("\n"))


def _table(title: str, first: str, rows: list[tuple[str, Comparison]]) -> Table:
    table = Table(
        title=Text(title, "bold"), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False,
        header_style="dim",
    )  # fmt: skip
    table.add_column(first, overflow="fold", min_width=12)
    for heading in ("A", "B", "difference", "p", "Holm", "n (open)", "up/down", "seen"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, c in rows:
        share = metric_of(c.metric).range == (0.0, 1.0)
        write = fmt.percent if share else fmt.number
        style = ""
        if c.p_holm is not None and c.p_holm < 0.05:
            bad = {"lower": c.difference > 0, "higher": c.difference < 0}.get(metric_of(c.metric).direction)
            style = "yellow" if bad is None else "red" if bad else "green"
        small = "*" if 0 < c.n < SMALL_N else ""
        table.add_row(
            Text(_plain(name)), _value(write(c.value_a), share), _value(write(c.value_b), share),
            Text(_plain(fmt.difference(c.difference, c.low, c.high, share)).replace(" points", ""), style),
            fmt.p_value(c.p), Text(fmt.p_value(c.p_holm), style),
            f"{c.n}{small}" + (f" ({c.unscored})" if c.unscored else ""), f"{c.up}/{c.down}",
            "–" if c.detectable is None else _value(write(c.detectable), share),
        )  # fmt: skip
    return table


def _changes(console: Console, found: SideBySide, limit: int, whole: bool) -> None:
    counts = [
        f"{count} {_KINDS[kind][0]}" for kind in _KINDS if (count := sum(c.kind == kind for c in found.discordant))
    ]
    shown = found.discordant[:limit]
    console.print()
    title = f"Changed answers: {len(shown)} of {len(found.discordant)}" + (f" ({', '.join(counts)})" if counts else "")
    console.print(Text(title, "bold"))
    for number, change in enumerate(shown, start=1):
        _change(console, number, change, whole)
    if any(change.shown(False) != change.shown(True) for change in shown) and not whole:
        console.print(Text("Answers that may be harmful are cut; --show prints them.", "dim"))


def _change(console: Console, number: int, change: Change, whole: bool) -> None:
    kind, style = _KINDS[change.kind]
    about = [
        f"{change.harm} request" if change.harm else "", f"task {change.task}" if change.task else "",
        f"category {change.category}" if change.category else "", f"attack {change.attack}" if change.attack else "",
    ]  # fmt: skip
    console.print()
    console.print(Text.assemble(
        (f"{number}. ", "dim"), (kind, style), "".join(f" · {fmt.one_line(part, 60)}" for part in about if part),
    ))  # fmt: skip
    console.print(Text(f"   row {fmt.one_line(change.row_id, 160)}, sample {change.sample}", "dim"))
    console.print(Text(f"   {fmt.one_line(change.prompt, 100_000 if whole else PROMPT_CUT)}", overflow="fold"))
    table = Table(box=box.MINIMAL, padding=(0, 1), expand=True, header_style="dim")
    table.add_column(Text(f"A: {fmt.one_line(change.said_a, 80)}"), ratio=1, overflow="fold")
    table.add_column(Text(f"B: {fmt.one_line(change.said_b, 80)}"), ratio=1, overflow="fold")
    table.add_row(*(_answer(text, whole) for text in change.shown(whole)))
    console.print(table)


def _answer(text: str, whole: bool) -> Text:
    safe = fmt.visible(text).replace(fmt.NBSP, " ").expandtabs(4)
    if not whole and len(safe) > ANSWER_CUT:
        safe = f"{safe[:ANSWER_CUT].rstrip()}…"
    return Text(safe) if safe.strip() else Text("(empty)", "dim")


def _metric(c: Comparison) -> str:
    title = metric_of(c.metric).title
    return title if c.category is None else f"{title} ({_group(c.category)})"


def _group(category: str | None) -> str:
    if category is None:
        return "all"
    if category == ANY_ATTACK:
        return "any attack"
    for prefix, word in ((TASK, "task"), (POLICY, "policy"), (ATTACK, "attack")):
        if category.startswith(prefix):
            return f"{word} {category.removeprefix(prefix)}"
    return category


def _value(written: str, share: bool) -> str:
    return _plain(f"{written} %" if share and written != "–" else written)


def _plain(text: str) -> str:
    return fmt.visible(text).replace(fmt.NBSP, " ").replace("\n", " ").replace("\t", " ")
