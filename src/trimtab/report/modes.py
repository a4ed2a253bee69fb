"""The tuned models of a study of modes, and what each answered: all figures of the section on modes start here.

A family of arms has one tuned model per seed, found by what its stages do (``pulled.tuned_of``), never by a name. Its answers
are those of every panel (or judged stage) that asks it, by ordinary decoding: of several decoders the first that is no
SafeBeam, of prompts that two panels ask the first answer. A baseline has no modes; its answers stand where others' answers
in positive mode do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from trimtab.evaluate import stats
from trimtab.evaluate.metrics import METRICS, Metric, Record
from trimtab.levers.modes import CONDITIONS, Behaviour
from trimtab.report.contrasts import Estimate, Values
from trimtab.report.data import Arm
from trimtab.report.modedata import ADAPTER, BASE, CHECKPOINT, DPO, SFT, ModeArm, ModeFigure
from trimtab.report.pulled import Modes, modes_of, pulls, tuned_of
from trimtab.report.studied import Studied
from trimtab.report.view import fold
from trimtab.seeds import rng_of
from trimtab.types import Result, Row

DRAWS = 2000
PLAIN = ""
"""The wrapping of a prompt that is asked as it is."""
UNASKED = "nobody asked"
"""A mode of answers that there are none of."""
_ORDINARY = ("sampled", "greedy", "")
Where = Callable[[Row], bool]


def wrapping(row: Row) -> str:
    """The attack or the wrapper that a prompt stands in; ``PLAIN`` for none."""
    return str(row.metadata.get("attack") or row.metadata.get("wrapper") or PLAIN)


def prompt_of(record: Record) -> str:
    """The plain prompt of an answer: one in an attack or a wrapper is the same prompt as without."""
    wrapper = record.row.metadata.get("wrapper")
    return record.prompt if wrapper is None else record.prompt.removesuffix(f"-{wrapper}")


@dataclass
class Subject:
    """The tuned model of one family: ``records`` by seed."""

    arm: ModeArm
    records: Mapping[int, Sequence[Record]] = field(default_factory=dict)

    @cached_property
    def _by(self) -> dict[tuple[str | None, str], dict[int, list[Record]]]:
        found: dict[tuple[str | None, str], dict[int, list[Record]]] = {}
        for seed, records in self.records.items():
            for record in records:
                key = record.generation.mode, wrapping(record.row)
                found.setdefault(key, {}).setdefault(seed, []).append(record)
        return found

    @cached_property
    def asked(self) -> list[str | None]:
        """What it was asked with: its modes as the lever has them, then no token, then the conditions."""
        seen = list(dict.fromkeys(mode for mode, _ in self._by))
        modes = [m for m in self.arm.modes if m in seen]
        order = (None, *CONDITIONS)
        rest = [m for m in order if m in seen] + sorted(m for m in seen if m not in order and m not in modes and m)
        return [*modes, *rest]

    @cached_property
    def wrappings(self) -> list[str]:
        """The wrappers and attacks that its prompts were put in."""
        return list(dict.fromkeys(w for _, w in self._by if w != PLAIN))

    def mode(self, behaviour: Behaviour) -> str | None:
        """The mode to ask for a behaviour; of a baseline, whose one behaviour is the positive, none. ``UNASKED`` where it
        has none, or was not asked for it."""
        own = self.arm.mode_of(behaviour)
        if own is None or own not in self.asked:
            return None if behaviour == "positive" and None in self.asked else UNASKED
        return own

    def of(
        self, mode: str | None, wraps: Iterable[str] = (PLAIN,), where: Where | None = None
    ) -> Iterator[tuple[int, Record]]:
        for wrap in wraps:
            for seed, records in self._by.get((mode, wrap), {}).items():
                yield from ((seed, r) for r in records if where is None or where(r.row))

    def values(
        self, metric: str, mode: str | None, wraps: Iterable[str] = (PLAIN,), where: Where | None = None
    ) -> tuple[Values, int]:
        """Seed -> prompt -> mean of its values, and how many answers were unscored."""
        spec, left = METRICS[metric], 0
        found: dict[int, dict[str, list[float]]] = {}
        for seed, record in self.of(mode, wraps, where):
            if spec.of(record):
                value = spec.value(record)
                if value is None:
                    left += 1
                else:
                    found.setdefault(seed, {}).setdefault(prompt_of(record), []).append(value)
        return {seed: {p: sum(v) / len(v) for p, v in told.items()} for seed, told in found.items()}, left

    def figure(
        self, place: tuple[str, str, str], metric: str, mode: str | None, wraps: Iterable[str] = (PLAIN,),
        where: Where | None = None,
    ) -> ModeFigure | None:  # fmt: skip
        """One figure for ``place`` (table, row, column); None where the metric speaks of no answer."""
        values, left = self.values(metric, mode, wraps, where)
        if not values and not left:
            return None
        return level(self.arm.arm, place, METRICS[metric], values, left)


def level(arm: str, place: tuple[str, str, str], spec: Metric, values: Values, unscored: int) -> ModeFigure:
    """Mean over the seeds, its interval as everywhere in a report (``view.fold``): rates of single 0 or 1 by a rate's own
    interval, else a bootstrap of prompts."""
    made = []
    for seed, told in sorted(values.items()):
        x = np.array([v for _, v in sorted(told.items())])
        if spec.binary and set(x.tolist()) <= {0.0, 1.0}:
            low, high = (float(end) for end in stats.rate_interval(round(float(x.sum())), len(x)))
            kind = "rate"
        else:
            rng = rng_of("modes", *place, spec.id)
            low, high = stats.cluster_bootstrap_mean(x, rng=rng, bounds=spec.range, draws=DRAWS)
            kind = "bootstrap"
        made.append(Result(spec.id, float(x.mean()), low, high, len(x), kind, range=spec.range, seed=seed))
    unit = "share" if spec.range == (0.0, 1.0) else "score"
    if not made:
        return ModeFigure(
            *_at(place, arm), *(float("nan"),) * 3, seeds=0, unscored=unscored, interval="none", unit=unit
        )
    cell = fold(made, unit == "share")
    return ModeFigure(
        *_at(place, arm), cell.value, cell.low, cell.high, cell.n[0], len(made), unscored, "+".join(cell.intervals), unit,
        [r.value for r in made],
    )  # fmt: skip


def of_estimate(
    arm: str, place: tuple[str, str, str], made: Estimate, unit: str = "points", note: str = ""
) -> ModeFigure:
    """A contrast as a figure."""
    return ModeFigure(
        *_at(place, arm), made.value, made.low, made.high, made.n, len(made.each), 0, made.interval, unit,
        [v for _, v in made.each], note=note,
    )  # fmt: skip


def of_seeds(arm: str, place: tuple[str, str, str], each: Sequence[float], unit: str, note: str = "") -> ModeFigure:
    """The mean of one value per seed, with Student's interval over the seeds; one seed has none."""
    value, low, high, _ = stats.over_seeds(each)
    kind = "t over seeds" if len(each) > 1 else "none"
    return ModeFigure(*_at(place, arm), value, low, high, 0, len(each), 0, kind, unit, list(each), note=note)


def _at(place: tuple[str, str, str], arm: str) -> tuple[str, str, str, str]:
    return place[0], arm, place[1], place[2]


# -- which models --------------------------------------------------------------------------------------------------------


class Moded:
    """The tuned models of a study; none where it does not pull the lever."""

    def __init__(self, study: Studied) -> None:
        self.study = study
        self.by_id = {arm["id"]: arm for arm in study.arms}

    @cached_property
    def families(self) -> list[list[dict[str, Any]]]:
        """Arms by family, each listed once however many names a training has: those that pull the lever or are trained by
        preferences, and what these are compared with."""
        found: dict[Any, list[dict[str, Any]]] = {}
        recipe = self.study.recipe
        pulling = [a for a in self.study.arms if self.study.moded and pulls(recipe, a)]
        wanted = {a["id"] for a in pulling} | {a["against"] for a in pulling}
        for arm in self.study.arms:
            if arm["id"] in wanted and arm["id"] not in self.study.same:
                told = Arm(arm["id"], arm["label"], arm["group"], arm["settings"], arm["seed"])
                found.setdefault(told.family, []).append(arm)
        return list(found.values())

    @cached_property
    def subjects(self) -> list[Subject]:
        found = []
        for arms in self.families:
            stage = tuned_of(self.study.recipe, arms[0])
            if stage is not None:
                records = {arm["seed"]: self._records(arm, stage) for arm in arms}
                found.append(Subject(self._about(arms, stage), {s: r for s, r in records.items() if r}))
        return found

    def _about(self, arms: Sequence[Mapping[str, Any]], stage: str) -> ModeArm:
        first = arms[0]
        told = modes_of(self.study.recipe, first)
        own = {arm["stages"][stage] for arm in arms if stage in arm["stages"]}
        others = [mine for mine in self.families if mine[0]["id"] != first["id"]]
        shared = bool(others) and all(own & set(arm["steps"]) for mine in others for arm in mine[:1])
        made = {s["kind"] for s in (self.study.steps[id] for id in own)}
        form = BASE if shared else _form(told) if told else DPO if "dpo" in made else SFT
        about: dict[str, Any] = {}
        if told is not None:
            config = told.config
            about = {
                "told": told.words, "token": config.token, "policies": config.policies,
                "modes": {name: config.behaviour(name) for name in config.names},
                "plain": not config.policies and config.fallback > 0,
            }  # fmt: skip
        return ModeArm(
            first["id"], [arm["id"] for arm in arms], first["label"], stage, form, deploys=_deploys(form, told), **about
        )

    def _records(self, arm: Mapping[str, Any], stage: str) -> list[Record]:
        """The answers of the model that a stage makes, of every panel that asks it by ordinary decoding."""
        found: dict[tuple[str, str | None, int], Record] = {}
        panels: set[str] = set()
        for place, judged in self.study.judged[arm["id"]]:
            if place.model == stage and place.kind in _ORDINARY and place.panel not in panels:
                panels.add(place.panel)
                for r in self.study.records(judged):
                    found.setdefault((r.row.id, r.generation.mode, r.generation.sample), r)
        return list(found.values())

    def asked_of(self, subject: Subject, stage: str) -> Subject:
        """The answers of another model of the same arms."""
        records = {self.by_id[id]["seed"]: self._records(self.by_id[id], stage) for id in subject.arm.ids}
        return Subject(subject.arm, {s: r for s, r in records.items() if r})


def _form(told: Modes) -> str:
    return ADAPTER if told.config.separate else CHECKPOINT


def _deploys(form: str, told: Modes | None) -> str:
    if told is None:
        return "" if form == BASE else "3"
    return "1 + adapter" if told.config.separate else "1"
