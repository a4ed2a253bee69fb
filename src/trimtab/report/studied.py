"""A finished study on disk: its artefacts, verified once, its judged answers, read once, and where each stands.

Only ``study.json`` and the store are read. An artefact that several arms share is read a single time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from trimtab.artifact import Artifact
from trimtab.errors import Fault, UserError
from trimtab.evaluate.files import ATTACKS, GENERATIONS, JUDGEMENTS, PROMPTS, read_stage, stage_path, verdict_of
from trimtab.evaluate.files import METRICS as METRICS_FILE
from trimtab.evaluate.metrics import TASK, Record, from_plain
from trimtab.evaluate.mode_metrics import aim_of
from trimtab.report import panels
from trimtab.report.data import Place
from trimtab.report.pulled import pulls_modes
from trimtab.study.execute import STUDY, study_store
from trimtab.types import Generation, Result, Row


class Studied:
    """The study in ``directory``. ``UserError`` if there is none; ``Fault`` for a damaged artefact."""

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

    def of_kind(self, arm: Mapping[str, Any], *kinds: str) -> Iterator[tuple[str, Artifact]]:
        """Stage name and artefact of each of an arm's stages of some kinds."""
        for stage, id in arm["stages"].items():
            if self.steps[id]["kind"] in kinds:
                yield stage, self.artifacts[id]

    @cached_property
    def moded(self) -> bool:
        """Whether the study pulls the mode lever."""
        return pulls_modes(self.recipe)

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
                    self._cell[judged.id] = panels.Cell.of(self.records(judged), self.moded)
                found.by_arm[arm["id"], place.stage] = self._cell[judged.id]
        return found

    def records(self, judged: Artifact) -> list[Record]:
        """The judged answers of a ``judge`` artefact, read once however many arms and figures want them."""
        if judged.id not in self._read:
            answers = self.artifacts[judged.manifest["inputs"]["answers"]]
            rows = {**self._rows(answers, PROMPTS), **self._rows(answers, ATTACKS)}
            said = {v["key"]: verdict_of(v) for v in read_stage(stage_path(judged.path, JUDGEMENTS))[1]}
            header, lines = read_stage(stage_path(answers.path, GENERATIONS))
            made = [Generation.from_json(g) for g in lines]
            lost = next((g for g in made if g.key not in said or g.row_id not in rows), None)
            if lost is not None:
                raise Fault(
                    f"{judged.path}: the answer to {lost.row_id!r} has no verdict or no prompt; delete it and run again"
                )
            facts = header.get("model")
            self._read[judged.id] = [Record(rows[g.row_id], g, said[g.key], aim_of(g.mode, facts)) for g in made]
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

    def figures(self, judged: Artifact) -> list[Result]:
        if judged.id not in self._figures:
            path = stage_path(judged.path, METRICS_FILE)
            told = read_stage(path)[1] if path.exists() else []
            self._figures[judged.id] = [from_plain(d) for d in told if (d["category"] or "").startswith(TASK)]
        return self._figures[judged.id]

    def of_arm(self, arm: Mapping[str, Any]) -> list[Record]:
        return [r for _, judged in self.judged[arm["id"]] for r in self.records(judged)]
