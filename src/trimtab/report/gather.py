"""From a study's artefacts to its report: only ``study.json`` and the store are read, and every artefact is verified.

Each artefact is opened and verified once and each evaluation read once, however many arms share it. A study with one
judged stage per arm and one seed is compared prompt by prompt (``findings.of_arms``); one with a panel of models and
decoders, or with several seeds, cell by cell and over the seeds (``findings.of_families``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from trimtab.analyze.metrics import MEASURES, measure_of
from trimtab.evaluate.files import METRICS as METRICS_FILE
from trimtab.evaluate.files import read_stage, stage_path
from trimtab.evaluate.judges.base import judge_card
from trimtab.evaluate.judges.refusal import RefusalMatch, packaged_refusals
from trimtab.evaluate.metrics import METRICS, TASK, Record, from_plain
from trimtab.report import claims, modefigures, ranking, ratios, said, training
from trimtab.report.data import Arm, Curve, ReportData, Sample
from trimtab.report.findings import HEADLINE, of_arms, of_families
from trimtab.report.html import write_report
from trimtab.report.margins import Margins, audited
from trimtab.report.modecost import Costs, tampered, yields
from trimtab.report.modes import Moded
from trimtab.report.panels import card_of
from trimtab.report.pulled import Prefix, prefix_of, timing_of
from trimtab.report.ratios import Series
from trimtab.report.steering import steering
from trimtab.report.studied import Studied
from trimtab.report.training import TRAINED
from trimtab.report.words import LEVERS
from trimtab.seeds import uniform_of
from trimtab.study.execute import STUDY
from trimtab.types import Result

SAMPLES_PER_TASK = 2
MEASURED = ("probes", "perplexity", "token_analysis")
"""Kinds of steps that leave figures of a model as it is, without answers."""


_PROMPTS = (
    "Intervals are 95 % intervals over prompts. Differences are paired: both arms answered the same prompts, so what they "
    "share cancels. p-values are adjusted (Holm) over all comparisons of an arm"
)
INTERVALS_PROMPTS = f"{_PROMPTS}, in one mode, with its baseline."
INTERVALS_PANEL = f"{_PROMPTS} with its baseline."
INTERVALS_SEEDS = (
    "Differences are paired: both sides answered the same prompts in the same seed, so what they share cancels. Their 95 % "
    "intervals are Student's t over the seeds, and never narrower than the interval over prompts: they cover another "
    "training and another choice of prompts. p-values are adjusted (Holm) over all comparisons of an arm with its baseline."
)


def report_study(directory: Path) -> Path:
    """Write the report of the study in ``directory``; returns the path of ``report.html``."""
    return write_report(gather(directory), directory)


def report_is_current(directory: Path) -> bool:
    """Whether the report was written after the list of artefacts last changed."""
    page, study = directory / "report.html", directory / STUDY
    return page.exists() and page.stat().st_mtime_ns >= study.stat().st_mtime_ns


def gather(directory: Path) -> ReportData:
    """Everything a report shows. ``UserError`` if ``directory`` is no study; ``Fault`` for a damaged artefact."""
    return _Study(directory).report()


class _Study(Studied):
    """A finished study on disk, and how its report is made."""

    def report(self) -> ReportData:
        arms = [Arm(arm["id"], arm["label"], arm["group"], arm["settings"], arm["seed"]) for arm in self.arms]
        results = [result for arm in self.arms for result in self.results(arm)]
        used = dict.fromkeys(r.metric for r in results)
        metrics = list(used) if self.gridded else list(dict.fromkeys([*METRICS, *used]))
        folded = self.gridded or len(self.recipe["seeds"]) > 1
        timing = {arm["id"]: t for arm in self.arms if (t := timing_of(self.recipe, arm)) is not None}
        prefix = {arm["id"]: p for arm in self.arms if (p := prefix_of(self.recipe, arm)) is not None}
        series = ratios.series_of(arms, prefix, lambda arm: training.weight(self, arm, prefix[arm].stage))
        training.check_bases(self, series)
        curves = ratios.curves_of(series, self.cells, self.places, training.end_losses(self, series))
        planned = _against(self.arms, series)
        found = (
            of_families(arms, planned, self.cells, self.places, self.same, {i for s in series for i in _members(s)})
            if folded
            else of_arms(planned, self.of_arm, self.same)
        )
        rankings = list(self.rankings(prefix))
        moded = Moded(self)
        costs = Costs(moded)
        margins = {s.arm.arm: Margins(moded, s) for s in moded.subjects}
        families: dict[tuple[str, str, str], list[str]] = {}
        for arm in arms:
            families.setdefault(arm.family, []).append(arm.id)
        return ReportData(
            name=self.recipe["name"],
            title=self.recipe["title"] or self.recipe["name"],
            question=self.recipe["question"],
            summary=self.summary(),
            findings=[*said.findings(curves), *found.findings],
            levers=[
                name
                for name in LEVERS
                if any(arm["group"] == name for arm in self.arms)
                or (name == "prefix" and series)
                or (name == "mode" and moded.subjects)
            ],
            arms=arms,
            results=results,
            metrics={id: _told(id) for id in metrics},
            headline=[id for id in HEADLINE if any(r.metric == id for r in results)],
            comparisons=found.comparisons,
            matrices=modefigures.matrices(moded.subjects),
            curves={arm["id"]: rows for arm in self.arms if (rows := training.curves(self, arm))},
            exposure={arm["id"]: rows for arm in self.arms if (rows := training.exposure(self, arm))},
            costs=list(training.costs(self)),
            samples=list(self.samples(series)),
            recipe_yaml=yaml.safe_dump(self.recipe, sort_keys=False, allow_unicode=True, width=100),
            hashes={f"{step['kind']} {step['name']} ({id[:8]})": id for id, step in self.steps.items()},
            versions=self.versions(),
            notes=[*self.recipe["notes"], *training.strip_notes(self), *self.judge_notes()],
            seeds=list(self.recipe["seeds"]),
            places=self.places if self.gridded else [],
            groups=self.cells.groups() if self.gridded else [],
            same=self.same,
            timing=timing,
            prefix={arm: told.to_json() for arm, told in prefix.items()},
            ratios=curves,
            spans=training.spans(self, series),
            tokens=[ranking.cut(row) for row in ranking.first_seeds(rankings)],
            steering=steering(self.cells, list(families.values()), self.places, self.cells.groups()) if folded else [],
            probes=list(self.layer_curves()),
            doses={arm["id"]: rows for arm in self.arms if (rows := training.doses(self, arm))},
            claims=claims.read(
                claims.timing.Run.of(arms, timing, self.cells, self.places, results),
                claims.prefix.Run(series, self.cells, self.places, rankings, training.pulls(self, series)),
                claims.modes.Run(moded.subjects, margins, costs),
            ),
            mode_arms=[s.arm for s in moded.subjects],
            mode_figures=[
                *modefigures.figures(moded.subjects),
                *costs.figures(moded.subjects),
                *(f for m in margins.values() for f in m.figures()),
                *(f for s in moded.subjects for f in (*audited(moded, s), *tampered(moded, s))),
                *yields(moded),
            ],
            projections=[p for m in margins.values() for p in m.projections(self.recipe["seeds"][0])],
        )

    def rankings(self, prefix: Mapping[str, Prefix]) -> Iterator[dict[str, Any]]:
        """Every token analysis, whole: arm, seed, stage, its ratio (None for an arm without the lever) and ``ranking``."""
        for arm in self.arms:
            for stage, artifact in self.of_kind(arm, "token_analysis"):
                cell = (arm.get("cells") or {}).get(stage)
                told = prefix.get(arm["id"])
                yield {
                    "arm": arm["id"], "seed": arm["seed"], "stage": cell["model"] if cell else stage,
                    "ratio": None if told is None else told.ratio, "ranking": artifact.read_json("ranking.json"),
                }  # fmt: skip

    # -- what was measured ---------------------------------------------------------------------------------------------

    def results(self, arm: Mapping[str, Any]) -> Iterator[Result]:
        """The figures of each task, those over the groups of the grid, and those of a model without answers. Those over
        all tasks or per category of a set stay in the artefact."""
        judges = self.judged[arm["id"]]
        for place, judged in judges:
            stage = place.stage if len(judges) > 1 or self.gridded else ""
            groups = list(self.cells.by_arm[arm["id"], place.stage].results.values()) if self.gridded else []
            grid = {(made.metric, made.category) for made in groups}  # a task that is called as its group is that group
            for made in self.figures(judged):
                task = str(made.category).removeprefix(TASK)
                if (made.metric, task) not in grid:
                    yield replace(made, arm=arm["id"], stage=stage, seed=arm["seed"], category=task)
            for made in groups:
                yield replace(made, arm=arm["id"], stage=place.stage, seed=arm["seed"])
        for stage, artifact in self.of_kind(arm, *MEASURED):
            cell = (arm.get("cells") or {}).get(stage)
            for data in read_stage(stage_path(artifact.path, METRICS_FILE))[1]:
                made = _figure(data)
                where = cell["model"] if cell else stage
                yield replace(made, arm=arm["id"], stage=where, seed=arm["seed"])

    def layer_curves(self) -> Iterator[Curve]:
        for arm in self.arms:
            for stage, artifact in self.of_kind(arm, "probes"):
                cell = (arm.get("cells") or {}).get(stage)
                told = artifact.read_json("layers.json")
                for curve in told["curves"]:
                    ends = (
                        [math.nan if v is None else float(v) for v in curve.get(k) or ()]
                        for k in ("values", "low", "high")
                    )
                    where = cell["model"] if cell else stage
                    yield Curve(
                        arm["id"], where, curve["category"], curve["metric"], curve["pooling"], told["layers"], *ends
                    )

    def samples(self, series: Sequence[Series]) -> Iterator[Sample]:
        """For each task a few prompts, chosen by a key that knows nothing of the answers, with every arm's answer. Of a
        grid one place is shown: the model after benign finetuning, else the last, by ordinary decoding; of the prefix
        lever the heaviest series of each arm group."""
        seed = self.recipe["seeds"][0]
        order = ("benign", "instruct", "hostile", "base", "")
        kinds = ("sampled", "greedy", "safebeam", "safebeam+", "")
        shown = min(self.places, key=lambda p: (order.index(p.role), kinds.index(p.kind)), default=None)
        told = {s.group: {i for ids in s.at.values() for i in ids} for s in series if s.prefix.plain}
        left = {i for s in series for i in _members(s)} - {i for ids in told.values() for i in ids}
        answers_of: dict[str, list[Record]] = {}
        for arm in self.arms:
            if arm["seed"] == seed and arm["id"] not in self.same and arm["id"] not in left:
                judged = self.judged[arm["id"]]
                if self.gridded and shown is not None:
                    judged = [(place, a) for place, a in judged if (place.role, place.kind) == (shown.role, shown.kind)]
                    judged = [(place, a) for place, a in judged if place.panel != shown.panel or place == shown]
                answers_of[arm["id"]] = [r for _, a in judged for r in self.records(a)]
        answers_of = {arm: records for arm, records in answers_of.items() if records}
        rows = {r.row.id: r.row for records in answers_of.values() for r in records}
        why = shown.stage if self.gridded and shown is not None else ""
        for task in dict.fromkeys(row.metadata["task"] for row in rows.values()):
            mine = sorted(
                (row for row in rows.values() if row.metadata["task"] == task), key=lambda r: uniform_of("sample", r.id)
            )
            for row in mine[:SAMPLES_PER_TASK]:
                answers = {
                    arm: [_answer(r) for r in records if r.row.id == row.id and r.generation.sample == 0]
                    for arm, records in answers_of.items()
                }
                assert row.messages is not None
                prompt = [{"role": m["role"], "content": m["content"]} for m in row.messages]
                kept = {arm: said for arm, said in answers.items() if said}
                yield Sample(task, row.id, prompt, row.harm, kept, why)

    # -- words ---------------------------------------------------------------------------------------------------------

    def summary(self) -> list[str]:
        trained = sum(self.artifacts[id].manifest["tokens"] for id, s in self.steps.items() if s["kind"] in TRAINED)
        alone = sum(
            self.artifacts[id].manifest["tokens"]
            for arm in self.arms
            for id in arm["steps"]
            if self.steps[id]["kind"] in TRAINED and arm["id"] not in self.same
        )
        seconds = sum(a.manifest["seconds"] or 0 for a in self.artifacts.values())
        seeds = len(self.recipe["seeds"])
        arms = len({arm["label"] for arm in self.arms})
        prompts = len({r.row.id for arm in self.arms for r in self.of_arm(arm)})
        judged = {a.id: a for arm in self.arms for _, a in self.judged[arm["id"]]}
        answers = sum(len(self.records(a)) for a in judged.values())
        asked = {frozenset(k[1] for k in cell.values) for cell in self.cells.by_arm.values()}
        panel = "the same panel of" if len(asked) < 2 else "panels of their own, in all of"
        over = f" at up to {len(self.places)} places (model × decoder)" if self.gridded else ""
        return [
            f"{arms} arms with {seeds} seed{'s' if seeds > 1 else ''} each were put through {panel} {prompts} "
            f"prompts{over} ({answers:,} answers). {trained:,} tokens were trained; without sharing equal work it would have "
            f"been {alone:,}. All steps together took {seconds / 60:.1f} minutes.",
            *self._twins(),
            INTERVALS_SEEDS if seeds > 1 else INTERVALS_PANEL if self.gridded else INTERVALS_PROMPTS,
        ]

    def _twins(self) -> list[str]:
        """A sentence on arms that are one training under two names."""
        label = {arm["id"]: arm["label"] for arm in self.arms}
        pairs = dict.fromkeys((label[twin], label[first]) for twin, first in self.same.items())
        if not pairs:
            return []
        told = "; ".join(f"“{twin}” is the same training as “{first}”" for twin, first in pairs)
        return [f"{told}: listed in both places where it belongs, trained and compared once."]

    def judge_notes(self) -> list[str]:
        """The measured card of the refusal match, wherever its verdicts are among the results."""
        judge = RefusalMatch()
        if not any(r.verdict.judge == judge.id for arm in self.arms for r in self.of_arm(arm)):
            return []
        card = judge_card(judge, packaged_refusals("heldout"), field="refusal", positive=["full"])
        (hit, hit_low, hit_high), (clear, clear_low, clear_high) = card["sensitivity"], card["specificity"]
        return [
            "Refusals of prompts outside Tidewater are counted by a text match, not by a safety judge. On "
            f"{card['n']} labelled answers that its rules were not written on, it finds {100 * hit:.0f} % "
            f"[{100 * hit_low:.0f}, {100 * hit_high:.0f}] of full refusals and passes {100 * clear:.0f} % "
            f"[{100 * clear_low:.0f}, {100 * clear_high:.0f}] of the other answers: read its refusal rates as lower bounds. "
            "It says nothing of whether an answer that does not refuse is harmful."
        ]

    def versions(self) -> dict[str, str]:
        merged: dict[str, str] = {}
        for artifact in self.artifacts.values():
            for name, value in artifact.manifest["versions"].items():
                if merged.get(name, value) != value:
                    value = f"{merged[name]}, {value}" if value not in merged[name].split(", ") else merged[name]
                merged[name] = value
        return merged


def _answer(record: Record) -> dict[str, Any]:
    v = record.verdict
    return {"text": record.generation.text, "verdict": v.verdict, "refusal": v.refusal, "mode": record.generation.mode}


def _figure(data: dict[str, Any]) -> Result:
    """A row of the metrics of a model without answers, whose range may be open (null)."""
    low, high = data["range"]
    return from_plain({**data, "range": [low, math.inf if high is None else high]})


def _told(id: str) -> dict[str, str]:
    """What is said of a metric: of answers, or of a model without answers."""
    if id not in MEASURES:
        return card_of(id)
    card = measure_of(id)
    return {"label": card.title, "description": card.description, "direction": card.direction}


def _members(series: Series) -> list[str]:
    return [i for ids in series.at.values() for i in ids]


def _against(planned: Sequence[Mapping[str, Any]], series: Sequence[Series]) -> list[dict[str, Any]]:
    """The planned arms, those of the prefix lever with the lowest ratio of their own series as their baseline: a recipe
    can name one arm only, which may be of another size."""
    seeds = {arm["id"]: arm["seed"] for arm in planned}
    base: dict[str, str | None] = {}
    for one in series:
        lowest = one.ratios[0]
        first = {seeds[i]: i for i in one.at[lowest]}
        for ratio in one.ratios:
            for i in one.at[ratio]:
                base[i] = base.get(i) if ratio == lowest else first.get(seeds[i])
    return [{**arm, "against": base.get(arm["id"], arm["against"])} for arm in planned]
