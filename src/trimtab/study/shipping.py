"""``trimtab export STUDY --arm LABEL``: the finished bundle of an arm, out of the store, with what was measured of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trimtab.artifact import Store
from trimtab.errors import UserError
from trimtab.evaluate.files import METRICS, read_stage, stage_path
from trimtab.evaluate.metrics import TASK
from trimtab.models.bundle import MANIFEST, BundleManifest, copy_bundle, drafted, seal, verify_bundle
from trimtab.models.card import FIGURES
from trimtab.study.execute import STUDY, study_store

SUMMARY = ("constructive_score", "risk_rate", "over_refusal_benign_full", "over_refusal_contrast_full", "accuracy")
"""What a card says of a model; the report has the rest."""
_MODELS = frozenset({"pretrain", "sft", "adapter", "dpo"})


def read_study(directory: Path) -> dict[str, Any]:
    """``study.json``; ``UserError`` for a directory that is no study."""
    path = directory / STUDY
    if not path.is_file():
        raise UserError(f"{path} is missing: {directory} is not a study's directory; `trimtab run` makes one")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def export_arm(directory: Path, label: str, stage: str | None, out: Path) -> BundleManifest:
    """Copy the bundle of an arm out of a study's store to ``out``, verified, whole or not at all; returns its manifest, whose
    ``evaluation`` sums up the arm's judged answers of this very model.

    label  the arm's label or id; of an arm of several seeds the first
    stage  whose model it is; None: the arm's last stage that makes one

    ``UserError`` for an arm or a stage that there is not, with those that there are; ``Fault`` for a damaged artefact.
    """
    study, store = read_study(directory), study_store(directory)
    arms = [arm for arm in study["arms"] if label in (arm["id"], arm["label"])]
    if not arms:
        known = ", ".join(dict.fromkeys(arm["label"] for arm in study["arms"]))
        raise UserError(f"--arm {label!r} is none of this study's arms: {known}")
    arm, steps = arms[0], study["steps"]
    made = {name: id for name, id in arm["stages"].items() if steps[id]["kind"] in _MODELS}
    if not made or (stage is not None and stage not in made):
        asked = "" if stage is None else f"--stage {stage!r}: "
        raise UserError(f"{asked}arm {label!r} makes these models: {', '.join(made) or 'none'}")
    name = list(made)[-1] if stage is None else stage
    source = store.open(steps[made[name]]["kind"], made[name], verify=True).path / "model"
    if not (source / MANIFEST).is_file():
        raise UserError(f"stage {name!r} of arm {label!r} leaves no bundle; choose another --stage")
    old = verify_bundle(source)
    told = {"study": study["recipe"]["name"], "arm": arm["label"], "stage": name, "seed": arm["seed"]}
    figures = list(_figures(store, steps, arm, made[name]))
    evaluation = {**told, FIGURES: figures} if figures else told
    with drafted(out) as draft:
        copy_bundle(source, old, draft)
        seal(draft, out.name, old.model_copy(update={"evaluation": evaluation}))
        return verify_bundle(draft)


def _figures(store: Store, steps: Mapping[str, Any], arm: Mapping[str, Any], model: str) -> Iterator[dict[str, Any]]:
    """The figures of ``SUMMARY`` over everything and by task, of the arm's judged answers of one model."""
    for stage, id in arm["stages"].items():
        if steps[id]["kind"] != "judge" or steps[steps[id]["inputs"]["answers"]]["inputs"].get("model") != model:
            continue
        judged = store.open("judge", id, verify=True)
        for row in read_stage(stage_path(judged.path, METRICS))[1]:
            category = row["category"]
            if row["metric"] not in SUMMARY or (category is not None and not category.startswith(TASK)):
                continue
            if row["value"] is not None and math.isfinite(row["value"]):
                task = None if category is None else category.removeprefix(TASK)
                kept = {key: row[key] for key in ("metric", "mode", "value", "low", "high", "interval", "n")}
                yield {"judged": stage, "task": task, **kept}
