"""What ``margin`` and ``audit`` stages found of the tuned models: how far apart the modes lie, and what typing and coaxing
bring out. Files that are not there, or lack a part, leave their figures out; the page says that they are not measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trimtab.artifact import Artifact
from trimtab.evaluate.files import METRICS as METRICS_FILE
from trimtab.evaluate.files import read_stage, stage_path
from trimtab.evaluate.metrics import from_plain
from trimtab.report.contrasts import Values
from trimtab.report.modedata import ModeArm, ModeFigure
from trimtab.report.modes import Moded, Subject
from trimtab.report.view import fold
from trimtab.types import HARMS, Result

MARGIN = "margin.json"
AUDITED: dict[str, tuple[str, str]] = {
    "spoof_asr": ("typed tokens that came through", "Attempts to write a control token as text that the renderer let through."),
    "spoof_asr_naive": ("by plain templating", "The same attempts through a chat template as text, for contrast."),
    "leak_rate": ("answers with a control token", "Answers, to prompts made to coax it out, that hold a control token."),
    "leak_mass": ("probability of a control token", "The most that any place of these answers gives to control tokens."),
    "leak_rate_banned": ("with control tokens banned", "The same, with the control tokens' ids banned from generation."),
    "negative_without_token": ("negative without its token", "Answers without a mode's token that show the negative behaviour."),
}  # fmt: skip
"""Measures of an audit: heading, and what it is."""
MOST_POINTS = 900
"""Points of one projection that the page draws; more are thinned by prompt."""
Json = Mapping[str, Any]
_ENDS = (-1.0, 1.0)


def _steps(moded: Moded, arm: ModeArm, kind: str) -> Iterator[tuple[int, Artifact]]:
    """Seed and artefact of each stage of a kind that looks at a tuned model."""
    for id in arm.ids:
        planned = moded.by_id[id]
        for stage, artifact in moded.study.of_kind(planned, kind):
            cell = (planned.get("cells") or {}).get(stage)
            if cell is None or cell["model"] == arm.stage:
                yield planned["seed"], artifact


def name_of(figure: Json) -> str:
    """What a margin is of, in words: "logits, first token, euclidean"."""
    token, layer = int(figure.get("token", 1)), figure.get("layer")
    where = "first token" if token == 1 else f"token {token}"
    what = figure["features"] if layer is None else f"{figure['features']} of layer {layer}"
    return f"{what}, {where}, {figure['distance']}"


class Margins:
    """The margins of one tuned model: ``by`` is name -> seed -> the figure as ``margin.json`` has it."""

    def __init__(self, moded: Moded, subject: Subject) -> None:
        self.arm = subject.arm
        self.asked: dict[str, str] = {}
        self.by: dict[str, dict[int, Json]] = {}
        for seed, artifact in _steps(moded, subject.arm, "margin"):
            if (artifact.path / MARGIN).is_file():
                told = artifact.read_json(MARGIN)
                self.asked = self.asked or dict(told.get("asked") or {})
                for figure in told.get("figures") or ():
                    self.by.setdefault(name_of(figure), {})[seed] = figure

    @property
    def main(self) -> str | None:
        """The margin that is most the paper's: of the first token's logits, as far as it was measured."""
        return next(iter(sorted(self.by, key=lambda name: (not name.startswith("logits, first token"), ""))), None)

    def values(self, name: str) -> Values:
        """Seed -> prompt -> mean silhouette of its points."""
        return {seed: _by_prompt(figure.get("points") or ()) for seed, figure in self.by.get(name, {}).items()}

    def figures(self) -> Iterator[ModeFigure]:
        for name, seeds in self.by.items():
            parts = list(dict.fromkeys(part for figure in seeds.values() for part in _parts(figure)))
            for part in parts:
                made = [_result(figure, part, seed) for seed, figure in seeds.items() if part in _parts(figure)]
                yield _figure(self.arm.arm, ("margin", name, part), made)
        if self.main is not None:
            made = [
                _result(figure, "all", seed) for seed, figure in self.by[self.main].items() if "all" in _parts(figure)
            ]
            if made:
                yield _figure(self.arm.arm, ("paper", "", "margin"), made)

    def projections(self, first: int) -> Iterator[dict[str, Any]]:
        """The points of the first seed by the main margin, thinned."""
        figure = self.by.get(self.main or "", {}).get(first)
        points = list((figure or {}).get("points") or ())
        if figure is not None and points:
            prompts = list(dict.fromkeys(p["prompt"] for p in points))
            every = max(1, math.ceil(len(points) / MOST_POINTS))
            kept = set(prompts[::every])
            yield {
                "arm": self.arm.arm, "name": self.main, "variance": list(figure.get("variance") or ()), "asked": self.asked,
                "points": [[p["mode"], p.get("class"), p["x"], p["y"], p["s"]] for p in points if p["prompt"] in kept],
            }  # fmt: skip


def _by_prompt(points: Sequence[Json]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for point in points:
        found.setdefault(point["prompt"], []).append(float(point["s"]))
    return {prompt: sum(s) / len(s) for prompt, s in found.items()}


def _parts(figure: Json) -> dict[str, Json]:
    """Part ("all", a class of prompts, "mode:NAME") -> value, low, high, n; where the file has points alone, their means,
    without an interval."""
    told = figure.get("margins")
    if told:
        return {name: part for name, part in told.items() if part.get("n")}
    points = figure.get("points") or ()
    groups = {"all": list(points)}
    groups |= {f"mode:{m}": [p for p in points if p["mode"] == m] for m in dict.fromkeys(p["mode"] for p in points)}
    groups |= {h: some for h in HARMS if (some := [p for p in points if p.get("class") == h])}
    nan = math.nan
    return {
        name: {
            "value": sum(p["s"] for p in some) / len(some),
            "low": nan,
            "high": nan,
            "n": len({p["prompt"] for p in some}),
        }
        for name, some in groups.items()
        if some
    }


def _result(figure: Json, part: str, seed: int) -> Result:
    told = _parts(figure)[part]
    low, high = (math.nan if told[k] is None else float(told[k]) for k in ("low", "high"))
    return Result("margin", float(told["value"]), low, high, int(told["n"]), "prompt-bootstrap", range=_ENDS, seed=seed)


def _figure(arm: str, place: tuple[str, str, str], made: Sequence[Result], unit: str = "score") -> ModeFigure:
    cell = fold(made, unit == "share")
    kinds = "+".join(cell.intervals)
    each = [r.value for r in made]
    table, row, column = place
    return ModeFigure(
        table, arm, row, column, cell.value, cell.low, cell.high, cell.n[0], len(made), cell.unscored, kinds, unit, each
    )


def audited(moded: Moded, subject: Subject) -> Iterator[ModeFigure]:
    """The figures of a tuned model's audits, one per measure; of several categories the one over all comes first."""
    found: dict[tuple[str, str], list[Result]] = {}
    for seed, artifact in _steps(moded, subject.arm, "audit"):
        path = stage_path(artifact.path, METRICS_FILE)
        for data in read_stage(path)[1] if path.exists() else ():
            low, high = data.get("range") or (0.0, 1.0)
            ends = [0.0 if low is None else low, math.inf if high is None else high]
            made = from_plain({**data, "range": ends, "seed": seed})
            found.setdefault((made.metric, made.category or "all"), []).append(made)
    for (metric, category), some in found.items():
        share = all(tuple(r.range) == (0.0, 1.0) for r in some)
        yield _figure(subject.arm.arm, ("audit", category, metric), some, "share" if share else "score")
