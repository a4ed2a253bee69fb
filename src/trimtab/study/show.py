"""What ``trimtab plan`` and ``trimtab world`` print."""

from __future__ import annotations

from itertools import islice

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trimtab.artifact import Store
from trimtab.errors import UserError
from trimtab.study.estimate import Speeds
from trimtab.study.plan import Plan, Step


def print_plan(plan: Plan, store: Store) -> None:
    """The table of steps, and the totals with and without sharing."""
    speeds = Speeds(store)
    table = Table(title=f"{plan.recipe.name}: {len(plan.arms)} arms, {len(plan.steps)} steps", box=box.SIMPLE_HEAD)
    for heading in ("step", "stage", "arms"):
        table.add_column(heading, overflow="fold")
    for heading in ("tokens", "FLOPs", "est. time", "state"):
        table.add_column(heading, justify="right", no_wrap=True)
    missing: list[Step] = []
    for step in plan.steps.values():
        cached = store.has(step.kind, step.id)
        missing += [] if cached else [step]
        arms = plan.arms_of(step.id)
        names = "all" if len(arms) == len(plan.arms) else ", ".join(arm.id for arm in arms)
        table.add_row(
            step.kind,
            escape(step.name),
            escape(names),
            count(step.tokens),
            count(step.flops),
            clock(speeds.seconds(step)),
            "cached" if cached else "to do",
            style="dim" if cached else None,
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(table)
    unshared = plan.unshared()
    for label, steps in (
        ("without sharing", unshared),
        ("shared", list(plan.steps.values())),
        ("still to do", missing),
    ):
        tokens, flops = sum(s.tokens for s in steps), sum(s.flops for s in steps)
        console.print(
            f"{label:>16}: {len(steps):3d} steps  {count(tokens):>8} tokens  {count(flops):>8} FLOPs  "
            f"about {clock(speeds.total(steps))}"
        )


def print_world(kind: str, n: int, seed: int, mode: str) -> None:
    """A few documents or answered requests of Tidewater."""
    from trimtab.world.config import TidewaterConfig
    from trimtab.world.tidewater import Tidewater

    if mode not in ("positive", "rejective"):
        raise UserError(f"--mode {mode!r}: 'positive' or 'rejective'; negative answers are not printed")
    town = Tidewater(TidewaterConfig(seed=seed))
    console = Console()
    if kind == "documents":
        for row in islice(town.documents(), n):
            console.print(f"[bold]score {row.metadata['score']}[/bold]  [dim]{escape(row.category or '')}[/dim]")
            console.print(escape(row.text or ""), end="\n\n")
        return
    for row in town.requests(kind, n, split="eval"):
        answer = town.answer(row, mode)
        verdict = town.judge(row, answer)
        assert row.messages is not None
        console.print(
            f"[bold]{row.harm}[/bold]  [dim]{escape(row.id)}[/dim]\n  > {escape(row.messages[-1]['content'])}"
        )
        console.print(f"  {escape(answer)}\n  [dim]{verdict.verdict}, refusal {verdict.refusal}[/dim]", end="\n\n")


def count(value: float) -> str:
    """1234567 -> 1.23M; 0 -> -."""
    if not value:
        return "-"
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def clock(seconds: float) -> str:
    """75 -> 1:15; over an hour h:mm:ss; over four days in days."""
    if seconds >= 4 * 86400:
        return f"{seconds / 86400:,.0f} days"
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
