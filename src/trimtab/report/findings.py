"""Arms against their baselines: what rose, what fell, and the findings in words.

``of_arms`` compares two arms prompt by prompt, per task (one seed, one judged stage). ``of_families`` compares arms over
all their seeds, per group of prompts and place of the grid, by contrasts (``contrasts.contrast``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from trimtab.evaluate import stats
from trimtab.evaluate.comparison import Comparison, compare_family
from trimtab.evaluate.metrics import METRICS, TASK, Record
from trimtab.levers.modes import CONDITIONS
from trimtab.report.contrasts import contrast
from trimtab.report.data import Arm, Finding, Place, comparison_row
from trimtab.report.panels import Cells

HEADLINE = (
    "risk_rate",
    "refusal_rate",
    "constructive_score",
    "switch_fidelity",
    "over_refusal_contrast_full",
    "over_refusal_benign_full",
    "accuracy",
)
"""Metrics that are drawn first and compared between arms; the others are in the tables and files."""
FINDINGS_PER_ARM = 2
NOTHING = "evidence of no difference."
ASKED = {
    "unknown": "with an unknown token", "near-miss": "with a near miss of its token", "two": "with two tokens",
    "foreign": "with another model's token",
}  # fmt: skip
"""How a model was asked that was not asked in a mode (``evaluate.conditions``)."""
Json = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    comparisons: list[Json]
    findings: list[Finding]


# -- one seed, one judged stage ------------------------------------------------------------------------------------

Pair = tuple[Json, Json, str | None, Comparison]
"""Baseline arm, arm, mode of the arm, and what changed from the one to the other."""


def of_arms(
    arms: Sequence[Json], records_of: Callable[[Mapping[str, Any]], list[Record]], same: Mapping[str, str]
) -> Found:
    """Every arm against its baseline, per task, mode and metric, paired by prompt; Holm over each arm and mode. An arm
    that is the same training as its baseline (``same``) is not compared with it."""
    pairs = list(_pairs([a for a in arms if same.get(a["id"]) != a["against"] or not a["against"]], arms, records_of))
    rows = [
        comparison_row(c, a["id"], b["id"], (c.category or "").removeprefix(TASK), mode=mode, seed=b["seed"])
        for a, b, mode, c in pairs
    ]
    return Found(rows, _told(pairs))


def _pairs(
    compared: Sequence[Json], arms: Sequence[Json], records_of: Callable[[Mapping[str, Any]], list[Record]]
) -> Iterator[Pair]:
    for arm in compared:
        base = next((a for a in arms if a["id"] == arm["against"]), None)
        if base is None:
            continue
        for mode in dict.fromkeys(r.generation.mode for r in records_of(arm)):
            ours = [r for r in records_of(arm) if r.generation.mode == mode]
            theirs = records_of(base)
            modes = {r.generation.mode for r in theirs}
            theirs = [r for r in theirs if r.generation.mode == (mode if mode in modes else None)]
            rows = {r.row.id for r in ours} & {r.row.id for r in theirs}
            ours, theirs = ([r for r in records if r.row.id in rows] for records in (ours, theirs))
            tasks = dict.fromkeys(r.row.metadata["task"] for r in ours)
            family = [
                (id, TASK + task)
                for task in tasks
                for id in HEADLINE
                if all(
                    any(METRICS[id].of(r) for r in side if r.row.metadata["task"] == task) for side in (ours, theirs)
                )
            ]
            for comparison in compare_family(theirs, ours, family):
                if comparison.n:
                    yield base, arm, mode, comparison


def _told(comparisons: Sequence[Pair]) -> list[Finding]:
    """For each arm and mode: its clearest differences from its baseline, and how many comparisons showed none."""
    pairs: dict[tuple[str, str, str | None], list[Pair]] = {}
    for item in comparisons:
        a, b, mode, _ = item
        pairs.setdefault((a["id"], b["id"], mode), []).append(item)
    found = []
    for items in pairs.values():
        a, b, mode, _ = items[0]
        clear = [c for _, _, _, c in items if c.p_holm is not None and c.p_holm < 0.05]
        clear.sort(key=lambda c: -abs(c.difference))
        shown = f"“{b['label']}”" + (f" in {mode} mode" if mode else "")
        text = f"{shown[0].upper()}{shown[1:]} against “{a['label']}”: "
        if clear:
            # One figure per metric: the second-largest difference is seldom the same news on another task.
            best = _first_of_each(clear, lambda c: c.metric)[:FINDINGS_PER_ARM]
            text += "; ".join(_sentence(c) for c in best) + ". "
            text += f"{len(clear)} of {len(items)} paired comparisons hold after adjustment."
        else:
            text += (
                f"none of {len(items)} paired comparisons shows a difference that holds after adjustment; at this "
                "number of prompts that is not evidence of no difference."
            )
        found.append(Finding(text))
    return found


def _first_of_each(items: Iterable[T], name: Callable[[T], str]) -> list[T]:
    """The first item of each name, in the order given."""
    found: dict[str, T] = {}
    for item in items:
        found.setdefault(name(item), item)
    return list(found.values())


def _sentence(c: Comparison) -> str:
    task = (c.category or "").removeprefix(TASK)
    return (
        f"{METRICS[c.metric].title} on “{task}” {100 * c.value_b:.0f} % against {100 * c.value_a:.0f} % "
        f"(difference {100 * c.difference:+.0f} points, 95 % interval {100 * c.low:+.0f} to {100 * c.high:+.0f}, n = {c.n})"
    )


# -- several seeds, a grid -----------------------------------------------------------------------------------------


def of_families(
    arms: Sequence[Arm], planned: Sequence[Json], cells: Cells, places: Sequence[Place], same: Mapping[str, str],
    told_apart: Collection[str] = (),
) -> Found:  # fmt: skip
    """Every arm against its baseline at every place, per group of prompts, over the seeds; Holm over each arm.

    An arm that is the same training as another (``same``, see ``ReportData``) is compared once, under both names, and with
    its own baseline not at all. Arms in ``told_apart`` are compared without a finding each: the prefix lever's are told
    together (``said``).
    """
    families: dict[tuple[str, str, str], list[str]] = {}
    for arm in arms:
        families.setdefault(arm.family, []).append(arm.id)
    of = {id: ids for ids in families.values() for id in ids}
    told = {arm["id"]: arm for arm in planned}
    rows: list[Json] = []
    findings: list[Finding] = []
    done: dict[tuple[str, str], list[str]] = {}
    for ids in families.values():
        against = told[ids[0]]["against"]
        if against not in of:
            continue
        pair = same.get(against, against), same.get(ids[0], ids[0])
        done.setdefault(pair, []).append(told[ids[0]]["label"])
    for ids in families.values():
        against = told[ids[0]]["against"]
        if against not in of:
            continue
        pair = same.get(against, against), same.get(ids[0], ids[0])
        if pair[0] == pair[1] or pair not in done:
            continue
        names = "” and “".join(done.pop(pair))
        mine = _adjusted(list(_rows(cells, of[against], ids, places)))
        rows += mine
        for mode in dict.fromkeys(row["mode"] for row in mine if ids[0] not in told_apart):
            some = [row for row in mine if row["mode"] == mode]
            findings.append(_family_finding(told[against]["label"], names, mode, some))
    # What is asked for comes before ways of asking that are no mode, and what differs before what does not.
    findings.sort(key=lambda finding: (finding.mode in CONDITIONS, finding.text.endswith(NOTHING)))
    return Found(rows, findings)


def _rows(cells: Cells, base: Sequence[str], ids: Sequence[str], places: Sequence[Place]) -> Iterator[Json]:
    for place in places:
        kinds = list(dict.fromkeys(k for i in ids if (c := cells.by_arm.get((i, place.stage))) for k in c.values))
        for mode, group, metric in sorted(
            (k for k in kinds if k[2] in HEADLINE), key=lambda k: (cells.groups().index(k[1]), k[2])
        ):
            ours = cells.values(ids, place.stage, group, metric, mode)
            theirs = cells.values(base, place.stage, group, metric, mode)
            if not theirs and metric != "switch_fidelity":  # what fits one mode says nothing of another
                theirs = cells.values(base, place.stage, group, metric)
            if not (ours and theirs):
                continue
            key = f"{base[0]} {ids[0]} {place.stage} {mode} {group} {metric}"
            made = contrast([(1.0, ours), (-1.0, theirs)], key=key, binary=METRICS[metric].binary)
            if made is not None:
                yield {
                    "metric": metric, "a": base[0], "b": ids[0], "task": group, "mode": mode, "stage": place.stage,
                    "seed": None, **made.plain(), "discordant": None,
                }  # fmt: skip


def _adjusted(rows: list[Json]) -> list[Json]:
    adjusted = iter(stats.holm([row["p"] for row in rows]).tolist() if rows else [])
    return [{**row, "p_holm": next(adjusted)} for row in rows]


def _family_finding(base: str, label: str, mode: str | None, rows: Sequence[Json]) -> Finding:
    apart = [row for row in rows if row["low"] > 0 or row["high"] < 0]
    held = [row for row in rows if row["p_holm"] < 0.05]
    seeds = max(row["seeds"] for row in rows)
    mean = f"mean over {seeds} seeds" if seeds > 1 else "one seed"
    asked = "" if mode is None else f" {ASKED[mode]}" if mode in ASKED else f" in {mode} mode"
    text = f"“{label}”{asked} against “{base}” ({mean}): "
    if not apart:
        text += (
            f"none of {len(rows)} differences has an interval clear of zero; with this many prompts and seeds that is not "
            f"{NOTHING}"
        )
        return Finding(text, mode=mode)
    apart.sort(key=lambda row: (row["p_holm"] >= 0.05, -abs(row["difference"])))
    best = _first_of_each(apart, lambda row: str(row["metric"]))[:FINDINGS_PER_ARM]
    parts = []
    for row in best:
        where = f"“{row['task']}”" + (f" ({row['stage']})" if row["stage"] else "")
        low, high = (100 * row[k] for k in ("low", "high"))
        parts.append(
            f"{METRICS[row['metric']].title} on {where} {100 * row['difference']:+.0f} points (95 % interval {low:+.0f} to "
            f"{high:+.0f}, n = {row['n']}" + (f", {row['seeds']} seeds)" if seeds > 1 else ")")
        )
    text += "; ".join(parts) + f". {len(apart)} of {len(rows)} intervals are clear of zero"
    expected = math.ceil(0.05 * len(rows))
    hold = "1 holds" if len(held) == 1 else f"{len(held)} hold"
    return Finding(f"{text} (about {expected} would be by chance alone); {hold} after Holm's adjustment.", mode=mode)
