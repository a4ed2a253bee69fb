"""From a study's artefacts to its report: only ``study.json`` and the store are read, and every artefact is verified.

Each artefact is opened and verified once and each evaluation read once, however many arms share it. A study with one
judged stage per arm and one seed is compared prompt by prompt (``findings.of_arms``); one with a panel of models and
decoders, or with several seeds, cell by cell and over the seeds (``findings.of_families``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from trimtab.analyze.metrics import MEASURES, measure_of
from trimtab.artifact import Artifact, read_jsonl
from trimtab.errors import Fault, UserError
from trimtab.evaluate.files import ATTACKS, GENERATIONS, JUDGEMENTS, PROMPTS, read_stage, stage_path, verdict_of
from trimtab.evaluate.files import METRICS as METRICS_FILE
from trimtab.evaluate.judges.base import judge_card
from trimtab.evaluate.judges.refusal import RefusalMatch, packaged_refusals
from trimtab.evaluate.metrics import METRICS, TASK, Record, from_plain, metric_of
from trimtab.report import panels
from trimtab.report.claims import Run, read_claims, steering
from trimtab.report.data import Arm, Cost, Curve, Matrix, Place, ReportData, Sample, behaviour_of
from trimtab.report.findings import HEADLINE, of_arms, of_families
from trimtab.report.html import write_report
from trimtab.report.words import LEVERS
from trimtab.seeds import uniform_of
from trimtab.study.execute import STUDY, study_store
from trimtab.types import Generation, Result, Row

SAMPLES_PER_TASK = 2
_LOGGED = {"source": "by_source", "span": "by_span"}
"""What a training log calls the losses of its parts, and what ``ReportData.curves`` does."""
MEASURED = ("probes", "perplexity")
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


class _Study:
    """One finished study on disk."""

    def __init__(self, directory: Path) -> None:
        path = directory / STUDY
        try:
            self.data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{path} is missing: {directory} is not a study's directory; `trimtab run` makes one"
            ) from None
        except ValueError:
            raise Fault(f"{path} is damaged; run the study again") from None
        self.recipe: dict[str, Any] = self.data["recipe"]
        self.steps: dict[str, dict[str, Any]] = self.data["steps"]
        self.arms: list[dict[str, Any]] = self.data["arms"]
        self.store = study_store(directory)
        self.artifacts: dict[str, Artifact] = {
            id: self.store.open(step["kind"], id, verify=True) for id, step in self.steps.items()
        }
        self._read: dict[str, list[Record]] = {}
        self._prompts: dict[str, Mapping[str, Row]] = {}
        self._figures: dict[str, list[Result]] = {}
        self._cell: dict[str, panels.Cell] = {}

    def report(self) -> ReportData:
        arms = [Arm(arm["id"], arm["label"], arm["group"], arm["settings"], arm["seed"]) for arm in self.arms]
        results = [result for arm in self.arms for result in self.results(arm)]
        used = dict.fromkeys(r.metric for r in results)
        metrics = list(used) if self.gridded else list(dict.fromkeys([*METRICS, *used]))
        curves = list(self.layer_curves())
        folded = self.gridded or len(self.recipe["seeds"]) > 1
        timing = {arm["id"]: t for arm in self.arms if (t := panels.timing_of(self.recipe, arm)) is not None}
        found = (
            of_families(arms, self.arms, self.cells, self.places, self.same)
            if folded
            else of_arms(self.arms, self.of_arm, self.same)
        )
        claims = read_claims(Run.of(arms, timing, self.cells, self.places, results))
        families: dict[tuple[str, str, str], list[str]] = {}
        for arm in arms:
            families.setdefault(arm.family, []).append(arm.id)
        return ReportData(
            name=self.recipe["name"],
            title=self.recipe["title"] or self.recipe["name"],
            question=self.recipe["question"],
            summary=self.summary(),
            findings=found.findings,
            levers=[name for name in LEVERS if any(arm["group"] == name for arm in self.arms)],
            arms=arms,
            results=results,
            metrics={id: _told(id) for id in metrics},
            headline=[id for id in HEADLINE if any(r.metric == id for r in results)],
            comparisons=found.comparisons,
            matrices=list(self.matrices()),
            curves={arm["id"]: rows for arm in self.arms if (rows := self.curves(arm))},
            exposure={arm["id"]: rows for arm in self.arms if (rows := self.exposure(arm))},
            costs=list(self.costs()),
            samples=list(self.samples()),
            recipe_yaml=yaml.safe_dump(self.recipe, sort_keys=False, allow_unicode=True, width=100),
            hashes={f"{step['kind']} {step['name']} ({id[:8]})": id for id, step in self.steps.items()},
            versions=self.versions(),
            notes=[*self.recipe["notes"], *self.judge_notes()],
            seeds=list(self.recipe["seeds"]),
            places=self.places if self.gridded else [],
            groups=self.cells.groups() if self.gridded else [],
            same=self.same,
            timing=timing,
            steering=steering(self.cells, list(families.values()), self.places, self.cells.groups()) if folded else [],
            probes=curves,
            doses={arm["id"]: rows for arm in self.arms if (rows := self.doses(arm))},
            claims=claims,
        )

    # -- what was measured ---------------------------------------------------------------------------------------------

    def of_kind(self, arm: Mapping[str, Any], *kinds: str) -> Iterator[tuple[str, Artifact]]:
        """Stage name and artefact of each of an arm's stages of some kinds."""
        for stage, id in arm["stages"].items():
            if self.steps[id]["kind"] in kinds:
                yield stage, self.artifacts[id]

    @property
    def gridded(self) -> bool:
        """Whether arms are measured at several places, so that results are read in a grid."""
        return any(arm.get("cells") for arm in self.arms)

    def place_of(self, arm: Mapping[str, Any], stage: str, artifact: Artifact) -> Place:
        """Where a stage stands: as the plan says, or by the model whose answers it judges."""
        cell = (arm.get("cells") or {}).get(stage)
        decoder = kind = ""
        model = cell["model"] if cell else ""
        if "answers" in artifact.manifest["inputs"]:
            answers = self.artifacts[artifact.manifest["inputs"]["answers"]].manifest
            kind = panels.decoder_kind(answers["config"].get("sampling") or {})
            decoder = cell["decoder"] if cell else kind
            made = answers["inputs"].get("model")
            model = model or next((name for name, id in arm["stages"].items() if id == made), "")
        role = self.roles.get(model, "")
        if cell is None:
            return Place(stage, stage, model, decoder, role, kind)
        several = len({(c["stage"]) for c in arm["cells"].values() if c["decoder"] is not None}) > 1
        name = " · ".join(p for p in (cell["stage"] if several else "", model, decoder) if p)
        return Place(name, cell["stage"], model, decoder, role, kind)

    @cached_property
    def same(self) -> dict[str, str]:
        """Arm id -> the first arm that is the same training: every stage of both is one artefact."""
        first: dict[tuple[tuple[str, str], ...], str] = {}
        found: dict[str, str] = {}
        for arm in self.arms:
            known = first.setdefault(tuple(sorted(arm["stages"].items())), arm["id"])
            if known != arm["id"]:
                found[arm["id"]] = known
        return found

    @cached_property
    def roles(self) -> dict[str, str]:
        return panels.roles(self.recipe["stages"])

    @cached_property
    def judged(self) -> dict[str, list[tuple[Place, Artifact]]]:
        """Arm id -> its judged stages, each with its place."""
        return {
            arm["id"]: [(self.place_of(arm, stage, a), a) for stage, a in self.of_kind(arm, "judge")]
            for arm in self.arms
        }

    @cached_property
    def places(self) -> list[Place]:
        """The places of all answers, in the recipe's order. Probes and the like have a model, not a column."""
        stages = self.recipe["stages"]
        found = dict.fromkeys(place for arm in self.arms for place, _ in self.judged[arm["id"]])
        return panels.ordered(found, list(stages), {n: list(s.get("decoders") or ()) for n, s in stages.items()})

    @cached_property
    def cells(self) -> panels.Cells:
        found = panels.Cells(seeds={arm["id"]: arm["seed"] for arm in self.arms})
        for arm in self.arms:
            for place, judged in self.judged[arm["id"]]:
                if judged.id not in self._cell:
                    self._cell[judged.id] = panels.Cell.of(self.records(judged))
                found.by_arm[arm["id"], place.stage] = self._cell[judged.id]
        return found

    def records(self, judged: Artifact) -> list[Record]:
        """The judged answers of a ``judge`` artefact, read once however many arms and figures want them."""
        if judged.id not in self._read:
            answers = self.artifacts[judged.manifest["inputs"]["answers"]]
            rows = {**self._rows(answers, PROMPTS), **self._rows(answers, ATTACKS)}
            said = {v["key"]: verdict_of(v) for v in read_stage(stage_path(judged.path, JUDGEMENTS))[1]}
            made = [Generation.from_json(g) for g in read_stage(stage_path(answers.path, GENERATIONS))[1]]
            lost = next((g for g in made if g.key not in said or g.row_id not in rows), None)
            if lost is not None:
                raise Fault(
                    f"{judged.path}: the answer to {lost.row_id!r} has no verdict or no prompt; delete it and run again"
                )
            self._read[judged.id] = [Record(rows[g.row_id], g, said[g.key]) for g in made]
        return self._read[judged.id]

    def _rows(self, answers: Artifact, stage: str) -> Mapping[str, Row]:
        """The prompts of a ``generate`` artefact; equal files, as a panel's cells have them, are parsed once."""
        path = stage_path(answers.path, stage)
        entry = answers.manifest["files"].get(path.name)
        if entry is None:
            return {}
        if entry["sha256"] not in self._prompts:
            self._prompts[entry["sha256"]] = {data["id"]: Row.from_json(data) for data in read_stage(path)[1]}
        return self._prompts[entry["sha256"]]

    def _results(self, judged: Artifact) -> list[Result]:
        if judged.id not in self._figures:
            path = stage_path(judged.path, METRICS_FILE)
            told = read_stage(path)[1] if path.exists() else []
            self._figures[judged.id] = [from_plain(d) for d in told if (d["category"] or "").startswith(TASK)]
        return self._figures[judged.id]

    def of_arm(self, arm: Mapping[str, Any]) -> list[Record]:
        return [r for _, judged in self.judged[arm["id"]] for r in self.records(judged)]

    def results(self, arm: Mapping[str, Any]) -> Iterator[Result]:
        """The figures of each task, those over the groups of the grid, and those of a model without answers. Those over
        all tasks or per category of a set stay in the artefact."""
        judges = self.judged[arm["id"]]
        for place, judged in judges:
            stage = place.stage if len(judges) > 1 or self.gridded else ""
            groups = list(self.cells.by_arm[arm["id"], place.stage].results()) if self.gridded else []
            grid = {(made.metric, made.category) for made in groups}  # a task that is called as its group is that group
            for made in self._results(judged):
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

    def matrices(self) -> Iterator[Matrix]:
        if self.gridded:
            return
        for arm in self.arms:
            records = [r for r in self.of_arm(arm) if r.generation.mode]
            for task in dict.fromkeys(r.row.metadata["task"] for r in records):
                shown = [
                    (str(r.generation.mode), behaviour_of(r.verdict)) for r in records if r.row.metadata["task"] == task
                ]
                yield Matrix.of(arm["id"], task, shown)

    def curves(self, arm: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The training logs. Of a grid, whose arms are many, the loss alone, and that by source of the first seed's
        pretraining; the artefacts keep the rest."""
        rows: list[dict[str, Any]] = []
        for id in arm["steps"]:
            step = self.steps[id]
            if step["kind"] in ("pretrain", "sft"):
                stage = step["name"].split(" ")[0]
                for row in read_jsonl(self.artifacts[id].path / "log.jsonl"):
                    kept = {k: v for k, v in row.items() if k not in _LOGGED}
                    parts = {name: row[k] for k, name in _LOGGED.items() if row.get(k)}
                    if self.gridded:
                        kept = {k: row[k] for k in ("step", "tokens", "loss")}
                        told = step["kind"] == "pretrain" and arm["seed"] == self.recipe["seeds"][0]
                        sources = parts.get("by_source", {}) if told else {}
                        parts = (
                            {"by_source": {n: {"loss": part["loss"]} for n, part in sources.items()}} if sources else {}
                        )
                    rows.append({**kept, **parts, "stage": stage})
        return rows

    def exposure(self, arm: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Share of each source in each pretraining segment, as it was read; a segment of several phases (a ramp) is split
        at them, with the shares that each phase keeps within one row."""
        rows, seen = [], 0
        for id in arm["steps"]:
            if self.steps[id]["kind"] == "pretrain":
                manifest = self.artifacts[id].manifest
                config, used = manifest["config"], manifest["facts"]["rows"]
                per_step = manifest["tokens"] // max(config["to"] - config["from"], 1)
                for last, weights in _pieces(config):
                    seen = round(last * per_step)
                    shares = used if weights is None else weights
                    total = sum(shares.values())
                    rows.append({"tokens": seen, "shares": {name: w / total for name, w in shares.items() if w}})
        return rows

    def doses(self, arm: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Tokens of each source that pretraining read, and passes over it."""
        rows: dict[str, int] = {}
        epochs: dict[str, float] = {}
        length = 0
        for id in arm["steps"]:
            if self.steps[id]["kind"] == "pretrain":
                manifest = self.artifacts[id].manifest
                length = manifest["config"]["length"]
                for name, count in manifest["facts"]["rows"].items():
                    rows[name] = rows.get(name, 0) + count
                epochs |= manifest["facts"].get("epochs", {})
        return [
            {"source": name, "tokens": count * length, "epochs": epochs.get(name)}
            for name, count in rows.items()
            if count
        ]

    def costs(self) -> Iterator[Cost]:
        for id, step in self.steps.items():
            manifest = self.artifacts[id].manifest
            tokens = manifest["tokens"]
            flops = step["flops"] * (tokens / step["tokens"] if step["tokens"] else 1)
            users = [arm["id"] for arm in self.arms if id in arm["steps"]]
            yield Cost(step["name"], step["kind"], users, tokens, flops, manifest["seconds"] or 0.0)

    def samples(self) -> Iterator[Sample]:
        """For each task a few prompts, chosen by a key that knows nothing of the answers, with every arm's answer. Of a
        grid one place is shown: the model after benign finetuning, else the last, by ordinary decoding."""
        seed = self.recipe["seeds"][0]
        order = ("benign", "instruct", "hostile", "base", "")
        kinds = ("sampled", "greedy", "safebeam", "safebeam+", "")
        shown = min(self.places, key=lambda p: (order.index(p.role), kinds.index(p.kind)), default=None)
        answers_of: dict[str, list[Record]] = {}
        for arm in self.arms:
            if arm["seed"] == seed and arm["id"] not in self.same:
                judged = self.judged[arm["id"]]
                if self.gridded and shown is not None:
                    judged = [(place, a) for place, a in judged if place == shown]
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
        trained = sum(
            self.artifacts[id].manifest["tokens"] for id, s in self.steps.items() if s["kind"] in ("pretrain", "sft")
        )
        alone = sum(
            self.artifacts[id].manifest["tokens"]
            for arm in self.arms
            for id in arm["steps"]
            if self.steps[id]["kind"] in ("pretrain", "sft") and arm["id"] not in self.same
        )
        seconds = sum(a.manifest["seconds"] or 0 for a in self.artifacts.values())
        seeds = len(self.recipe["seeds"])
        arms = len({arm["label"] for arm in self.arms})
        prompts = len({r.row.id for arm in self.arms for r in self.of_arm(arm)})
        judged = {a.id: a for arm in self.arms for _, a in self.judged[arm["id"]]}
        answers = sum(len(self.records(a)) for a in judged.values())
        over = f" at up to {len(self.places)} places (model × decoder)" if self.gridded else ""
        return [
            f"{arms} arms with {seeds} seed{'s' if seeds > 1 else ''} each were put through the same panel of {prompts} "
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
    card = measure_of(id) if id in MEASURES else metric_of(id)
    return {"label": card.title, "description": card.description, "direction": card.direction}


def _pieces(config: Mapping[str, Any]) -> Iterator[tuple[float, dict[str, float] | None]]:
    """A segment's phases as (last step, weights); weights None: one phase, whose rows were counted."""
    per_step = config["train"]["rows_per_step"]
    first, last = config["from"], config["to"]
    phases = [(row / per_step, weights) for row, weights in config["phases"]]
    inside = [
        (max(start, first), min(end, last), weights)
        for (start, weights), end in zip(phases, [*(start for start, _ in phases[1:]), float("inf")])
        if max(start, first) < min(end, last)
    ]
    for _, last, weights in inside:
        yield last, None if len(inside) == 1 else dict(weights)
