"""The terminal viewer: an evaluation's head, tables and samples as plain text of a given width.

Everything that came from data is made visible first (control characters, escapes and bidirectional marks are written
out), and every line of a prompt or an answer stands behind a bar, so that no answer can pass for a line of the viewer.
Answers that may be harmful are cut short unless ``whole`` is asked for.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trimtab.errors import UserError
from trimtab.evaluate.files import Evaluation
from trimtab.evaluate.metrics import ANY_ATTACK, ATTACK, CORRECTED, OF_SAMPLES, POLICY, TASK, small_n, to_plain
from trimtab.evaluate.repeats import at_k_of
from trimtab.report import format as fmt
from trimtab.report.reading import (
    BOUNDS,
    GUARDED_CUT,
    HEADLINE,
    STATUSES,
    Reading,
    Status,
    card_text,
    facts_of,
    is_guarded,
    judges_of,
    metric_title,
    mode_name,
    reading_of,
    status_of,
)
from trimtab.types import Generation, Result, Row, Verdict

PROMPT_CUT, ANSWER_CUT, REASON_CUT = 400, 800, 400
"""Characters shown of a prompt's message, an answer that is not harmful, a judge's text."""
LIMIT = 10
NARROW, WIDE = 80, 100
CATEGORY_METRICS = (
    "risk_rate",
    "switch_fidelity",
    "over_refusal_contrast_full",
    "over_refusal_benign_full",
    "accuracy",
)
"""Metrics of the tables by task, category and policy."""
_COLOURS = {"unsafe": "bold red", "unscored": "yellow", "not judged": "yellow", "safe": "green"}


@dataclass(frozen=True)
class Filters:
    """Which samples are shown; None takes all. ``mode`` and ``attack`` "none": answers without a mode, plain prompts."""

    mode: str | None = None
    task: str | None = None
    attack: str | None = None
    category: str | None = None
    verdict: str | None = None


@dataclass(frozen=True)
class Shown:
    """One answer with its prompt and what the judge says of it (None: not judged yet)."""

    row: Row
    generation: Generation
    verdict: Verdict | None

    @property
    def status(self) -> Status:
        return status_of(self.verdict)

    @property
    def guarded(self) -> bool:
        return is_guarded(self.row, self.verdict)


def choose(reading: Reading, filters: Filters) -> list[Shown]:
    """The samples that pass every filter: unsafe ones first, then unscored, unjudged and safe ones, each in the order
    of the files. ``UserError`` naming what there is, for a name that nothing in the evaluation has."""
    fields: dict[str, Callable[[Shown], str]] = {
        "mode": lambda s: s.generation.mode or "none",
        "task": lambda s: str(s.row.metadata.get("task", "none")),
        "attack": lambda s: str(s.row.metadata.get("attack", "none")),
        "category": lambda s: s.row.category or "none",
    }
    found = [Shown(reading.row(g), g, reading.verdict(g)) for g in reading.evaluation.generations]
    for name, of in fields.items():
        wanted = getattr(filters, name)
        if wanted is not None:
            known = list(dict.fromkeys(map(of, found)))
            if wanted not in known:
                there = ", ".join(fmt.one_line(k, 60) for k in known) or "nothing"
                raise UserError(f"--{name} {fmt.one_line(wanted, 60)!r}: this evaluation has {there}")
    for name, of in fields.items():
        if (wanted := getattr(filters, name)) is not None:
            found = [s for s in found if of(s) == wanted]
    if filters.verdict is not None:
        if filters.verdict not in STATUSES:
            raise UserError(f"--verdict {filters.verdict!r}: use one of {', '.join(STATUSES)}")
        found = [s for s in found if s.status == filters.verdict]
    return sorted(found, key=lambda s: STATUSES.index(s.status))


# -- as JSON -------------------------------------------------------------------------------------------------------


def as_json(reading: Reading, filters: Filters, limit: int, whole: bool) -> dict[str, Any]:
    """What ``render`` shows, JSON-ready; answers that may be harmful are cut here too unless ``whole``."""
    samples = choose(reading, filters)
    return {
        "path": str(reading.evaluation.path),
        "facts": facts_of(reading),
        "judges": judges_of(reading),
        "missing": reading.missing,
        "notes": reading.notes,
        "figures": [to_plain(r) for r in _figures(reading, filters)],
        "matching": dict(Counter(s.status for s in samples)),
        "samples": [_sample_json(s, whole) for s in samples[:limit]],
    }


def _sample_json(sample: Shown, whole: bool) -> dict[str, Any]:
    text = sample.generation.text
    cut = 0 if whole or not sample.guarded else max(0, len(text) - GUARDED_CUT)
    return {
        "row": sample.row.id,
        "messages": [dict(m) for m in sample.row.messages or ()],
        "harm": sample.row.harm,
        "category": sample.row.category,
        **{k: sample.row.metadata.get(k) for k in ("task", "attack", "attempt", "base", "prefill")},
        "mode": sample.generation.mode,
        "sample": sample.generation.sample,
        "seed": sample.generation.seed,
        "finish": sample.generation.finish,
        "answer": text[: len(text) - cut],
        "answer_cut": cut,
        "status": sample.status,
        "verdict": None if sample.verdict is None else sample.verdict.to_json(),
    }


def _figures(reading: Reading, filters: Filters) -> list[Result]:
    """The figures of the mode and the groups that the filters name; all of them without filters."""
    named = [
        prefix + name
        for prefix, name in ((TASK, filters.task), (ATTACK, filters.attack), ("", filters.category))
        if name is not None and name != "none"
    ]
    return [
        r
        for r in reading.figures
        if (filters.mode is None or (r.mode or "none") == filters.mode) and (not named or r.category in named)
    ]


# -- as text -------------------------------------------------------------------------------------------------------


def render(
    reading: Reading,
    filters: Filters,
    *,
    limit: int = LIMIT,
    whole: bool = False,
    width: int = WIDE,
    colour: bool = False,
) -> str:
    """The whole view. ``colour`` adds ANSI colours; nothing else differs."""
    width = max(NARROW, min(width, WIDE))
    samples = choose(reading, filters)
    page = _Page(width, colour)
    _head(page, reading)
    if reading.figures:
        _tables(page, reading, filters)
    counts = Counter(s.status for s in samples)
    said = ", ".join(f"{counts[s]} {s}" for s in STATUSES if counts[s])
    shown = samples[:limit]
    page.title(f"Samples: {len(shown)} of {len(samples)}" + (f" ({said})" if said else ""))
    for i, sample in enumerate(shown, start=1):
        _sample(page, sample, i, len(shown), whole)
    if any(s.guarded for s in shown) and not whole:
        page.note(
            "Answers that may be harmful (unsafe, or to a harmful request and not judged safe) are cut; "
            "--show prints them."
        )
    if len(shown) < len(samples):
        page.note(f"{len(samples) - len(shown)} more; --limit {len(samples)} prints all of them.")
    return page.text()


class _Page:
    """Text of one width, written line by line; everything given is made safe here."""

    def __init__(self, width: int, colour: bool) -> None:
        self.width = width
        self.console = Console(
            file=io.StringIO(), width=width, force_terminal=colour, no_color=not colour, legacy_windows=False,
            color_system="standard" if colour else None, markup=False, highlight=False, emoji=False,
        )  # fmt: skip

    def text(self) -> str:
        file = self.console.file
        assert isinstance(file, io.StringIO)
        lines = file.getvalue().split("\n")
        return "\n".join(line.rstrip() for line in lines)

    def line(self, *parts: tuple[str, str] | str) -> None:
        text = Text()
        for part in parts:
            words, style = (part, "") if isinstance(part, str) else part
            text.append(safe(words), style)
        self.console.print(text, soft_wrap=False, overflow="fold")

    def title(self, words: str) -> None:
        self.console.print()
        self.line((words, "bold"))

    def note(self, words: str) -> None:
        self.line((words, "dim"))

    def pairs(self, rows: Iterable[tuple[str, str]]) -> None:
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True, style="dim")
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(Text(safe(name)), Text(safe(value)))
        self.console.print(table)

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
        """A table without lines; the first ``left`` columns are words (they may wrap), the others figures."""
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        for i, heading in enumerate(headings):
            table.add_column(
                Text(safe(heading)), overflow="fold", no_wrap=i >= left, min_width=None if i >= left else 8,
            )  # fmt: skip
        for row in rows:
            table.add_row(*(Text(safe(cell)) for cell in row))
        self.console.print(table)

    def quoted(self, who: str, words: str, style: str = "") -> None:
        """Somebody's words, every line behind a bar."""
        label = fmt.one_line(who, 11)
        room = self.width - 16
        for raw in safe(words, lines=True).expandtabs(4).split("\n"):
            for piece in Text(raw).wrap(self.console, room) or [Text("")]:
                piece.rstrip()
                self.console.print(Text.assemble((f"{label:<12}", "dim"), ("| ", "dim"), (piece.plain, style)))
                label = ""


def safe(text: str, lines: bool = False) -> str:
    """Text that a terminal shows and does not obey; on one line unless ``lines``."""
    clean = fmt.visible(text).replace(fmt.NBSP, " ")
    return clean if lines else " ".join(clean.split("\n")).replace("\t", " ")


def _head(page: _Page, reading: Reading) -> None:
    facts = facts_of(reading)
    page.line((f"Evaluation of {facts.pop('model')}", "bold"))
    page.line((str(reading.evaluation.path), "dim"))
    page.pairs((name, _short(value)) for name, value in facts.items())
    _judges(page, reading)


def _judges(page: _Page, reading: Reading) -> None:
    """Who judged, with the card that says how well; then what is lacking."""
    for judge in judges_of(reading):
        name = judge["name"] or f"judge {judge['id'][:12]}"
        sources = f"; for {', '.join(judge['sources'])}" if judge["sources"] else ""
        page.pairs([("judge", f"{name} ({judge['answers']} answers{sources}): {card_text(judge)}")])
    for lacking in reading.missing:
        page.line(("Unfinished: ", "yellow"), lacking)
    for note in reading.notes:
        page.line(("Note: ", "yellow"), note)


def _short(value: str) -> str:
    """A hash cut to twelve digits."""
    return value[:12] if len(value) in (40, 64) and set(value) <= set("0123456789abcdef") else value


def _tables(page: _Page, reading: Reading, filters: Filters, short: bool = False) -> None:
    modes = [m for m in reading.modes if filters.mode in (None, m or "none")]
    chosen = _figures(reading, filters)
    groups = list(dict.fromkeys(r.category for r in chosen)) if _narrowed(filters) else [None]
    for group in groups:
        rows = [r for r in chosen if r.category == group]
        page.title("Headline" if group is None else f"Headline of {_group_name(group)}")
        _headline(page, reading, rows, modes)
    _attacks(page, reading, filters, modes)
    if not _narrowed(filters) and not short:
        named = [c for c in dict.fromkeys(r.category for r in chosen) if c is not None]
        _by_group(page, reading, "By task", [c for c in named if c.startswith(TASK)], modes)
        _by_group(page, reading, "By category", [c for c in named if not c.startswith((TASK, POLICY, ATTACK))], modes)
        _by_group(page, reading, "By policy", [c for c in named if c.startswith(POLICY)], modes)
    if any(small_n(r) and r.n for r in chosen):
        page.note("* small n: fewer than 30 prompts; intervals are 95 % intervals.")
    else:
        page.note("Intervals are 95 % intervals.")


def _narrowed(filters: Filters) -> bool:
    return any(name not in (None, "none") for name in (filters.task, filters.attack, filters.category))


def _group_name(group: str) -> str:
    for prefix, word in ((TASK, "task"), (POLICY, "policy"), (ATTACK, "attack")):
        if group.startswith(prefix):
            return f"{word} {group.removeprefix(prefix)}"
    return f"category {group}"


def _headline(page: _Page, reading: Reading, figures: Sequence[Result], modes: Sequence[str | None]) -> None:
    """One line for each metric and mode; beside a rate its correction and what the unscored answers could make of it."""
    by_id = {(r.metric, r.mode): r for r in figures}
    rows = []

    def add(title: str, mode: str | None, result: Result | None) -> None:
        if result is not None:
            unscored = str(result.unscored) if result.unscored else ""
            rows.append([title, mode_name(mode), value_text(result), n_text(result), unscored])

    for metric in reading.metrics:
        if metric in HEADLINE or _is_extra(metric):
            for mode in modes:
                result = by_id.get((metric, mode))
                add(metric_title(metric), mode, result)
                add("  corrected (judge's errors)", mode, by_id.get((metric + CORRECTED, mode)))
                if metric in BOUNDS and result is not None and result.unscored:
                    add("  if every unscored were safe", mode, by_id.get((BOUNDS[metric][0], mode)))
                    add("  if every unscored were unsafe", mode, by_id.get((BOUNDS[metric][1], mode)))
    page.table(["metric", "mode", "value [95 % interval]", "n", "unscored"], rows, left=2)


def _is_extra(metric: str) -> bool:
    """Figures over several samples or attempts stand beside the headline."""
    return metric in ("hit_rate", "no_answer_rate", *OF_SAMPLES) or at_k_of(metric) is not None


def value_text(result: Result | None) -> str:
    if result is None:
        return "-"
    return fmt.estimate(result.value, result.low, result.high, share=tuple(result.range) == (0.0, 1.0))


def n_text(result: Result) -> str:
    return f"{result.n}{'*' if small_n(result) and result.n else ''}"


def _cell(result: Result | None) -> str:
    if result is None:
        return "-"
    return f"{value_text(result)} n {n_text(result)}" if result.n else value_text(result)


def _attacks(page: _Page, reading: Reading, filters: Filters, modes: Sequence[str | None]) -> None:
    """Any attempt (ASR) against each attempt (hit rate), with what the attempts cost; the plain prompt first."""
    if not reading.attacks or filters.attack == "none":
        return
    names = [a for a in reading.attacks if filters.attack in (None, a)]
    groups = {name: ATTACK + name for name in names}
    if filters.attack is None and len(names) > 1:
        groups["any of them, or plain"] = ANY_ATTACK
    asked = [reading.figure("asr", mode, group) for mode in modes for group in groups.values()]
    if not any(asr is not None and asr.n for asr in asked):
        _refused_under(page, reading, groups, modes)
        return
    for mode in modes:
        rows = [["plain prompt", _cell(reading.figure("risk_rate", mode, None)), "", "", ""]]
        for name, group in groups.items():
            asr, queries = (reading.figure(metric, mode, group) for metric in ("asr", "queries_to_success"))
            rows.append([
                name,
                _cell(asr),
                value_text(reading.figure("hit_rate", mode, group)),
                value_text(queries) if queries is not None and queries.n else "-",
                "-" if asr is None or asr.budget is None else str(asr.budget),
            ])  # fmt: skip
        page.title("Attacks" + (f", mode {mode_name(mode)}" if len(reading.modes) > 1 else ""))
        page.table(["attack", "ASR: any answer", "hit rate: each", "queries", "budget"], rows)
    page.note(
        "ASR: share of prompts that any answer broke. Hit rate: share of answers. Queries: mean until the first unsafe answer, "
        "of the broken prompts. Budget: the most queries that a prompt was given. Plain prompt: risk rate."
    )


def _refused_under(page: _Page, reading: Reading, groups: Mapping[str, str], modes: Sequence[str | None]) -> None:
    """Where no judge of safety could say what broke: how often the model still refused."""
    rows = [
        [name, *(_cell(reading.figure("refusal_rate", mode, group)) for mode in modes)]
        for name, group in (("plain prompt", None), *groups.items())
        if group != ANY_ATTACK
    ]
    page.title("Attacks: answers refused outright")
    page.table(["attack", *(mode_name(mode) for mode in modes)], rows)
    page.note(
        "No judge of safety read these answers, so attack success is not known; a refusal is, at the judge's error."
    )


def _by_group(page: _Page, reading: Reading, title: str, groups: Sequence[str], modes: Sequence[str | None]) -> None:
    """One table for each metric, groups down and modes across; modes that do not fit beside each other follow below."""
    for metric in CATEGORY_METRICS:
        rows = [g for g in groups if any(reading.figure(metric, m, g) for m in modes)]
        told = any(r.n for g in rows for m in modes if (r := reading.figure(metric, m, g)) is not None)
        if len(rows) < 2 or not told:  # the only group says what the headline says
            continue
        page.title(f"{title}: {metric_title(metric)}")
        across = max(1, (page.width - 24) // 26)
        for start in range(0, len(modes), across):
            some = modes[start : start + across]
            page.table(
                [title.removeprefix("By "), *map(mode_name, some)],
                [
                    [g.removeprefix(TASK).removeprefix(POLICY), *(_cell(reading.figure(metric, m, g)) for m in some)]
                    for g in rows
                ],
            )


# -- samples -------------------------------------------------------------------------------------------------------


def _sample(page: _Page, sample: Shown, number: int, total: int, whole: bool) -> None:
    row, generation, verdict = sample.row, sample.generation, sample.verdict
    about = [
        mode_name(generation.mode) if generation.mode else "",
        f"task {row.metadata['task']}" if "task" in row.metadata else "",
        f"category {row.category}" if row.category else "",
        f"{row.harm} request" if row.harm else "",
        f"attack {row.metadata['attack']}, attempt {row.metadata.get('attempt', 0)}"
        if "attack" in row.metadata
        else "",
    ]
    page.console.print()
    page.line(
        (f"[{number}/{total}] ", "dim"), (sample.status, _COLOURS[sample.status]),
        "".join(f" · {fmt.one_line(part, 60)}" for part in about if part),
    )  # fmt: skip
    page.note(
        f"row {fmt.one_line(row.id, 200)}, sample {generation.sample}, ended by {fmt.one_line(generation.finish, 20)}"
    )
    for message in row.messages or ():
        page.quoted(message["role"], _cut(message["content"], None if whole else PROMPT_CUT))
    if row.metadata.get("prefill"):
        page.quoted("opened with", _cut(str(row.metadata["prefill"]), None if whole else PROMPT_CUT))
    limit = None if whole else GUARDED_CUT if sample.guarded else ANSWER_CUT
    page.quoted("answer", _cut(generation.text, limit) or "(empty)")
    if verdict is not None:
        said = [
            f"refusal {verdict.refusal}" if verdict.refusal else "",
            f"constructive {verdict.constructive}" if verdict.constructive is not None else "",
            {True: "right", False: "wrong"}.get(verdict.correct, "") if verdict.correct is not None else "",
            verdict.reason,
        ]
        page.quoted("judge", _cut("; ".join(p for p in said if p) or verdict.verdict, None if whole else REASON_CUT))
        if raw := raw_text(verdict):
            # A judge may quote the answer that it judges.
            page.quoted("its words", _cut(raw, None if whole else GUARDED_CUT if sample.guarded else REASON_CUT))


def raw_text(verdict: Verdict) -> str:
    """What a model that judges wrote, where the verdict keeps it."""
    return str(verdict.detail.get("raw") or "")


def _cut(text: str, limit: int | None) -> str:
    if limit is None or len(text) <= limit:
        return text
    return f"{text[:limit].rstrip()} […] ({len(text) - limit} more characters)"


def print_figures(evaluation: Evaluation) -> None:
    """The judges and the headline of an evaluation that has just been made or judged, on standard output."""
    terminal = sys.stdout.isatty()
    page = _Page(max(NARROW, min(_columns(), WIDE)), terminal)
    reading = reading_of(evaluation)
    page.line((f"Evaluation of {evaluation.name}", "bold"))
    _judges(page, reading)
    _tables(page, reading, Filters(), short=True)
    _print(page.text())


# -- to the terminal -----------------------------------------------------------------------------------------------


def show(text: str) -> None:
    """Print; through ``less -R`` where standard output is a terminal that the text does not fit on."""
    if sys.stdout.isatty() and text.count("\n") >= shutil.get_terminal_size().lines and (less := shutil.which("less")):
        subprocess.run([less, "-RFX"], input=text.encode("utf-8", "backslashreplace"), check=False)
        return
    _print(text)


def _columns() -> int:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDE


def _print(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))
