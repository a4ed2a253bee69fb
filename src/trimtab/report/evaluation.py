"""From evaluation directories to one report: the same page as a study's, its arms being the evaluations.

The first evaluation is the baseline that the others are compared with, pairwise and on the prompts that both answered.
Answers that may be harmful go into the page cut short; the evaluations' own files hold them whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from trimtab.errors import UserError
from trimtab.evaluate.comparison import Comparison, compare_family
from trimtab.evaluate.metrics import ANY_ATTACK, ATTACK, CORRECTED, METRICS, POLICY, TASK, in_group, metric_of
from trimtab.evaluate.pairing import Pairing, pair_up
from trimtab.report import format as fmt
from trimtab.report.data import Arm, Finding, Matrix, ReportData, behaviour_of, comparison_row
from trimtab.report.html import write_report
from trimtab.report.reading import (
    BOUNDS,
    HEADLINE,
    Reading,
    card_text,
    facts_of,
    judges_of,
    mode_name,
    read_evaluation,
    seeds_of,
)
from trimtab.report.samples import Change, Evaluated, task_of
from trimtab.report.samples import samples as choose_samples
from trimtab.types import Result

FINDINGS = 3
"""Clear differences told of one evaluation and mode."""
MANY_UNSCORED = 0.1
"""Share of unscored answers to harmful prompts above which the report warns."""
_SAME_FOR_ALL = ("model", "prompts", "attacked prompts", "answers", "modes", "versions")
"""Facts that are no settings, or are told elsewhere."""


def report_evaluations(directories: Sequence[Path], out: Path) -> Path:
    """Write the report of one or more evaluations into ``out``; returns the path of ``report.html``.

    ``UserError`` for a directory that is no evaluation or is given twice. Unfinished evaluations are reported as far as
    they go, with a warning.
    """
    return write_report(gather_evaluations(directories), out)


def gather_evaluations(directories: Sequence[Path]) -> ReportData:
    """Everything that the report shows."""
    if not directories:
        raise UserError("report: name at least one evaluation's directory")
    seen: set[Path] = set()
    for directory in directories:
        if directory.resolve() in seen:
            raise UserError(f"report: {directory} is given twice")
        seen.add(directory.resolve())
    return _Report([read_evaluation(directory) for directory in directories]).data()


class _Report:
    def __init__(self, readings: Sequence[Reading]) -> None:
        self.arms = _arms(readings)
        self.warnings: list[str] = []
        self.results = [
            replace(r, arm=arm.id)
            for arm in self.arms
            for r in sorted(arm.reading.figures, key=lambda r: _place(r.mode, arm.reading.modes))
        ]
        self.found = {r.metric for r in self.results}

    def data(self) -> ReportData:
        self.warn()
        changes = list(self.changes())
        facts = {arm.id: facts_of(arm.reading) for arm in self.arms}
        order = list(dict.fromkeys([*HEADLINE, *METRICS, *(r.metric for r in self.results)]))
        metrics = [metric_of(id) for id in order if id in self.found]
        labels = [arm.label for arm in self.arms]
        return ReportData(
            kind="evaluation",
            name=", ".join(arm.id for arm in self.arms),
            title=f"Evaluation of {' and '.join(labels) if len(labels) < 3 else f'{labels[0]} and {len(labels) - 1} more'}",
            summary=self.summary(),
            findings=[*self.levels(), *_differences(changes)],
            arms=[Arm(arm.id, arm.label, "models", _settings(facts, arm.id)) for arm in self.arms],
            results=self.results,
            metrics={m.id: {"label": m.title, "description": m.description, "direction": m.direction} for m in metrics},
            headline=[id for id in HEADLINE if id in self.found],
            comparisons=[_row(change) for change in changes],
            matrices=list(self.matrices()),
            samples=list(choose_samples(self.arms, changes)),
            recipe_yaml=yaml.safe_dump(
                {arm.id: arm.reading.evaluation.header.get("config") or {} for arm in self.arms},
                sort_keys=False, allow_unicode=True, width=100,
            ),
            hashes=self.hashes(),
            versions=self.versions(),
            warnings=list(dict.fromkeys(self.warnings)),
            seeds=sorted({seed for arm in self.arms for seed in seeds_of(arm.reading.evaluation)}),
            glance=self.glance(),
            facts=facts,
            judges=[
                {**judge, "arm": arm.id, "card": card_text(judge)} for arm in self.arms for judge in judges_of(arm.reading)
            ],
            bounds={id: list(pair) for id, pair in BOUNDS.items() if id in self.found},
            corrected={id: id + CORRECTED for id in METRICS if id + CORRECTED in self.found},
        )  # fmt: skip

    # -- what the figures need ----------------------------------------------------------------------------------------

    def warn(self) -> None:
        for arm in self.arms:
            self.warnings += [f"{arm.label} is unfinished: {lacking}." for lacking in arm.reading.missing]
            self.warnings += [f"{arm.label}: {note}." for note in arm.reading.notes]
            harmful = [
                r for r in arm.reading.records if r.row.harm == "harmful" and not r.verdict.detail.get("one_sided")
            ]
            open_ = sum(r.verdict.verdict == "unscored" for r in harmful)
            if open_ > MANY_UNSCORED * len(harmful):
                self.warnings.append(
                    f"{arm.label}: no judge could tell {open_} of {len(harmful)} answers to harmful prompts; read the bounds, "
                    "not the rates."
                )

    def changes(self) -> Iterator[Change]:
        """Every evaluation against the first, in each of its modes; Holm's adjustment over each such family."""
        base = self.arms[0]
        for arm in self.arms[1:]:
            for mode in arm.reading.modes:
                mode_a = mode if mode in base.reading.modes else None
                name = f"“{arm.label}”" + (f" in {mode} mode" if mode else "")
                if mode_a not in base.reading.modes:
                    self.warnings.append(
                        f"{name} is compared with nothing: “{base.label}” has no answers in such a mode."
                    )
                    continue
                try:
                    paired = pair_up(
                        base.reading.evaluation, arm.reading.evaluation, modes=(mode_a, mode), common=True,
                        allow_different_judges=True,
                    )  # fmt: skip
                except UserError as error:
                    self.warnings.append(f"{name} is not compared with “{base.label}”: {error}.")
                    continue
                self.warnings += [f"“{base.label}” (A) against “{arm.label}” (B): {said}." for said in paired.warnings]
                for comparison in compare_family(paired.records_a, paired.records_b, _family(paired)):
                    if comparison.n:
                        yield Change(base, arm, mode_a, mode, comparison)

    def matrices(self) -> Iterator[Matrix]:
        for arm in self.arms:
            plain = [r for r in arm.reading.records if "attack" not in r.row.metadata]
            for task in dict.fromkeys(task_of(r.row) for r in plain):
                shown = [
                    (mode_name(r.generation.mode), behaviour_of(r.row.harm, r.verdict))
                    for r in plain
                    if task_of(r.row) == task
                ]
                yield Matrix.of(arm.id, task, shown)

    def glance(self) -> dict[str, str]:
        rows = {id: row for arm in self.arms for id, row in arm.reading.evaluation.rows.items()}
        plain = sum("attack" not in row.metadata for row in rows.values())
        answers = sum(len(arm.reading.evaluation.generations) for arm in self.arms)
        unscored = sum(r.verdict.verdict == "unscored" for arm in self.arms for r in arm.reading.records)
        found = {"models": len(self.arms), "prompts": plain, "attacked prompts": len(rows) - plain, "answers": answers}
        return {name: f"{n:,}" for name, n in found.items() if n} | {"unscored": f"{unscored:,}"}

    def hashes(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for arm in self.arms:
            model = arm.reading.evaluation.header.get("model") or {}
            for what, key in (("weights", "identity"), ("template", "template_hash"), ("system prompt", "system_hash")):
                if model.get(key):
                    found[f"{arm.label}: {what}"] = str(model[key])
            for judge in judges_of(arm.reading):
                found[f"{arm.label}: judge {judge['name']}".rstrip()] = judge["id"]
        return found

    def versions(self) -> dict[str, str]:
        found: dict[str, list[str]] = {}
        for arm in self.arms:
            for name, version in (arm.reading.evaluation.header.get("versions") or {}).items():
                found.setdefault(str(name), []).append(str(version))
        return {name: ", ".join(dict.fromkeys(versions)) for name, versions in found.items()}

    # -- words ---------------------------------------------------------------------------------------------------------

    def summary(self) -> list[str]:
        rows = {id: row for arm in self.arms for id, row in arm.reading.evaluation.rows.items()}
        plain = [row for row in rows.values() if "attack" not in row.metadata]
        attacks = list(dict.fromkeys(a for arm in self.arms for a in arm.reading.attacks))
        tasks = len({task_of(row) for row in plain})
        one = len(self.arms) == 1
        text = f"{'One model was' if one else f'{len(self.arms)} models were'} asked {len(plain):,} prompts of {tasks} "
        text += f"task{'s' if tasks != 1 else ''}"
        if attacks:
            text += f", and the harmful ones again under {len(attacks)} attack{'s' if len(attacks) != 1 else ''}"
        more = "" if one else " Differences are paired: both answered the same prompts, so what they share cancels."
        return [
            f"{text}.",
            "Intervals are 95 % intervals over prompts: a prompt, its samples and all attempts on it count once. Answers "
            f"that no judge could tell are counted apart and never as safe.{more}",
        ]

    def levels(self) -> Iterator[Finding]:
        """One sentence for each evaluation and mode: risk, the strongest attack, over-refusal, accuracy."""
        for arm in self.arms:
            for mode in arm.reading.modes:
                parts = [
                    f"{words} {_estimate(result)}"
                    for metric, words in _LEVELS.items()
                    if (result := arm.reading.figure(metric, mode, None)) is not None and result.n
                ]
                risk = arm.reading.figure("risk_rate", mode, None)
                if risk is not None and not risk.n:
                    parts.insert(0, "no judge could tell which answers to harmful prompts were unsafe")
                broken = [
                    (name, r)
                    for name in arm.reading.attacks
                    if (r := arm.reading.figure("asr", mode, ATTACK + name)) is not None and r.n
                ]
                if broken:
                    name, worst = max(broken, key=lambda item: item[1].value)
                    among = f" of {len(broken)} attacks" if len(broken) > 1 else ""
                    parts.insert(
                        1, f"the most successful{among}, {name}, broke {_estimate(worst)} of the harmful prompts"
                    )
                if parts:
                    yield Finding(f"“{arm.label}”{f' in {mode} mode' if mode else ''}: {'; '.join(parts)}.")


_LEVELS = {
    "risk_rate": "unsafe answers to harmful prompts",
    "refusal_rate": "harmful prompts refused outright",
    "switch_fidelity": "answers that fit their mode",
    "over_refusal_contrast_full": "contrasts refused outright",
    "over_refusal_benign_full": "benign prompts refused outright",
    "accuracy": "right answers",
}


def _arms(readings: Sequence[Reading]) -> list[Evaluated]:
    """Ids from the directories' names, labels from the models'; what is not unique is told apart."""
    paths = [r.evaluation.path for r in readings]
    names = Counter(path.resolve().name for path in paths)
    ids = [p.resolve().name if names[p.resolve().name] == 1 else str(p) for p in paths]
    models = Counter(r.evaluation.name for r in readings)
    return [
        Evaluated(id, r.evaluation.name if models[r.evaluation.name] == 1 else f"{r.evaluation.name} ({id})", r)
        for id, r in zip(ids, readings)
    ]


def _place(mode: str | None, modes: Sequence[str | None]) -> int:
    """Modes in the order of the answers."""
    return modes.index(mode) if mode in modes else len(modes)


def _settings(facts: dict[str, dict[str, str]], arm: str) -> dict[str, Any]:
    """The facts in which the evaluations differ."""
    return {
        name: value
        for name, value in facts[arm].items()
        if name not in _SAME_FOR_ALL and len({other.get(name) for other in facts.values()}) > 1
    }


def _family(paired: Pairing) -> list[tuple[str, str | None]]:
    """What is compared: the headline over all prompts and, where there are several, by task; each attack; all of them."""
    rows = [r.row for r in paired.records_a]
    family: list[tuple[str, str | None]] = []
    for metric in (m for m in HEADLINE if m != "asr"):
        if not paired.both(METRICS[metric]):  # one side alone may have modes
            continue
        mine = [r.row for r in paired.records_a if METRICS[metric].of(r) and "attack" not in r.row.metadata]
        tasks = list(dict.fromkeys(TASK + str(row.metadata["task"]) for row in mine if "task" in row.metadata))
        policies = sorted({POLICY + row.policy for row in mine if row.policy is not None})
        cuts = [group for cut in (tasks, policies) if len(cut) > 1 for group in cut]
        family += [(metric, group) for group in (None, *cuts) if mine]
    attacks = list(dict.fromkeys(ATTACK + row.metadata["attack"] for row in rows if "attack" in row.metadata))
    groups = [*attacks, ANY_ATTACK] if len(attacks) > 1 else attacks
    return family + [("asr", g) for g in groups if any(METRICS["asr"].applies(row) for row in rows if in_group(row, g))]


def _row(change: Change) -> dict[str, Any]:
    c = change.comparison
    modes: dict[str, Any] = {"mode": change.mode_b}
    if change.mode_a != change.mode_b:
        modes = {"mode": None, "mode_a": mode_name(change.mode_a), "mode_b": mode_name(change.mode_b)}
    return comparison_row(c, change.a.id, change.b.id, c.category or "", **modes)


def _differences(changes: Sequence[Change]) -> Iterator[Finding]:
    """For each evaluation and mode, its clearest differences from the first, or that there are none."""
    families: dict[tuple[str, str | None], list[Change]] = {}
    for change in changes:
        families.setdefault((change.b.id, change.mode_b), []).append(change)
    for family in families.values():
        first = family[0]
        clear = [i.comparison for i in family if i.comparison.p_holm is not None and i.comparison.p_holm < 0.05]
        # The overall figure first: a task's or an attack's is often the same news.
        clear.sort(key=lambda c: (c.category is not None, -abs(c.difference)))
        text = f"“{first.b.label}”{f' in {first.mode_b} mode' if first.mode_b else ''} against “{first.a.label}”: "
        if clear:
            text += "; ".join(map(_sentence, clear[:FINDINGS])) + ". "
            text += f"{len(clear)} of {len(family)} paired comparisons hold after adjustment."
        else:
            text += f"none of {len(family)} paired comparisons shows a difference that holds after adjustment; at this "
            text += "number of prompts that is not evidence of no difference."
        yield Finding(text)


def _sentence(c: Comparison) -> str:
    group = c.category or ""
    where = f" on {group.removeprefix(TASK).removeprefix(POLICY)}" if group else ""
    if group.startswith(ATTACK):
        where = " under any attack" if group == ANY_ATTACK else f" under {group.removeprefix(ATTACK)}"
    share = METRICS[c.metric].range == (0.0, 1.0)
    change = fmt.difference(c.difference, c.low, c.high, share)
    return f"{METRICS[c.metric].title}{where} {fmt.percent(c.value_b)} % against {fmt.percent(c.value_a)} % ({change}, n {c.n})"


def _estimate(result: Result) -> str:
    return fmt.estimate(result.value, result.low, result.high, share=tuple(result.range) == (0.0, 1.0))
