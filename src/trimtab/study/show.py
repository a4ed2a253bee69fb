"""What ``trimtab plan`` and ``trimtab world`` print."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trimtab.artifact import Store
from trimtab.errors import UserError
from trimtab.levers.timing import phases
from trimtab.seeds import digest
from trimtab.study.curricula import Curriculum, Sizes
from trimtab.study.estimate import Speeds, clock, count
from trimtab.study.execute import check_curricula, known_sizes
from trimtab.study.exposure import exposure, print_exposure
from trimtab.study.plan import Plan, Step
from trimtab.study.preflight import writing_costs

MANY = 60
"""Steps from which the table shows those of one stage together."""
MANY_ARMS = 6
"""Arms that the table names of one line; the others it counts."""


def print_plan(plan: Plan, store: Store, *, every: bool = False) -> None:
    """The table of steps (of a large plan: by stage, unless ``every``), the curricula, and the totals with and without
    sharing."""
    check_curricula(plan, store)
    print_costs(plan, store, agreed=True)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    speeds = Speeds(store)
    cached = {id: store.has(step.kind, id) for id, step in plan.steps.items()}
    groups: dict[tuple[str, str], list[Step]] = {}
    for step in plan.steps.values():
        one = step.id if every or len(plan.steps) < MANY else ""
        groups.setdefault((f"{step.kind} {step.name}", one), []).append(step)
    console.print(_table(plan, list(groups.values()), cached, speeds))
    print_curricula(plan, store, console)
    unshared = plan.unshared()
    missing = [step for id, step in plan.steps.items() if not cached[id]]
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


def print_curricula(plan: Plan, store: Store, console: Console) -> None:
    """What each source is read, phase by phase, of every curriculum; equal ones once."""
    shown: dict[str, list[str]] = {}
    parts: dict[str, tuple[Curriculum, Sizes]] = {}
    labels = {arm.id: arm.label for arm in plan.arms}
    for one in plan.curricula.values():
        sizes = known_sizes(one, store)
        key = digest([one.stage, phases(one.timing, one.rows), one.length, dict(sizes.tokens)])
        parts[key] = (one, sizes)
        shown.setdefault(key, []).extend(dict.fromkeys(labels[arm] for arm in one.arms))
    for key, names in shown.items():
        one, sizes = parts[key]
        found = exposure(one.timing, one.rows, one.length, sizes.tokens or None)
        title = f"{one.stage}: {_first(dict.fromkeys(names))}"
        print_exposure(found, console, title=escape(title), exact=sizes.exact)


def print_costs(plan: Plan, store: Store, *, agreed: bool) -> None:
    """What chat models will be asked to write, before they are; ``UserError`` if it has a price and nobody has agreed."""
    for stage, estimate, priced in writing_costs(plan, store):
        Console(stderr=True).print(f"corpus {escape(stage)}: {escape(estimate)}", highlight=False)
        if priced and not agreed:
            raise UserError(f"stages.{stage}.write has a price (above); say --yes to go on")


def _table(plan: Plan, groups: list[list[Step]], cached: Mapping[str, bool], speeds: Speeds) -> Table:
    table = Table(title=f"{plan.recipe.name}: {len(plan.arms)} arms, {len(plan.steps)} steps", box=box.SIMPLE_HEAD)
    for heading in ("step", "stage", "arms"):
        table.add_column(heading, overflow="fold")
    for heading in ("steps", "tokens", "FLOPs", "est. time", "state"):
        table.add_column(heading, justify="right", no_wrap=True)
    for steps in groups:
        arms = {arm.id: None for step in steps for arm in plan.arms_of(step.id)}
        names = "all" if len(arms) == len(plan.arms) else _first(arms)
        done = sum(cached[step.id] for step in steps)
        state = "cached" if done == len(steps) else "to do" if not done else f"{done} cached"
        table.add_row(
            steps[0].kind,
            escape(steps[0].name),
            escape(names),
            str(len(steps)),
            count(sum(s.tokens for s in steps)),
            count(sum(s.flops for s in steps)),
            clock(speeds.total(steps)),
            state,
            style="dim" if done == len(steps) else None,
        )
    return table


def _first(names: Mapping[str, None]) -> str:
    """The first ``MANY_ARMS`` names, and how many more there are."""
    more = len(names) - MANY_ARMS
    return ", ".join(list(names)[:MANY_ARMS]) + (f" and {more} more" if more > 0 else "")


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
