"""The timing lever: when safety data enters pretraining (arXiv 2601.07087, on the interventions of 2504.16980).

A budget of pretraining tokens is split at ``start``. Before it the model reads safe text only (score 0, the paper's
choice) or raw text; from it on, what was scored unsafe is replaced by its interventions: rephrased (scores 1-3),
refused (4-5) and turned into moral education. ``start: 1`` is the paper's "never" arm, ``start: 0`` its parent's setup.

``exposure: natural`` keeps the unsafe share at its size on both sides of the start, so a later start means fewer
intervention tokens, as in the paper. ``matched`` gives every arm the same number of them, the *dose*, by a larger share
after a later start; with safe-only text before, the arms then read the same of every source, in another order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Literal

from pydantic import Field, model_validator

from trimtab.config import Config


class Interventions(Config):
    """How the share of unsafe text is split once the interventions have started; the parts add up to 1."""

    rephrase: float = Field(0.4, ge=0, le=1, description="Safe retellings of text scored 1-3.")
    refuse: float = Field(0.4, ge=0, le=1, description="Dialogues that refuse, made from text scored 4-5.")
    moral: float = Field(0.2, ge=0, le=1, description="Articles on why it is refused, made from text scored 4-5.")
    tagged: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Raw text scored 1-5 with the harmfulness tag; SafeBeam needs it (`corpus.tag` too).",
    )

    @model_validator(mode="after")
    def _adds_up(self) -> Interventions:
        total = self.rephrase + self.refuse + self.moral + self.tagged
        if abs(total - 1) > 1e-9:
            raise ValueError(f"rephrase + refuse + moral + tagged must be 1, not {total:g}")
        return self


class TimingPhase(Config):
    """One phase of a curriculum that is spelt out."""

    at: float = Field(ge=0, lt=1, description="Where it begins, as a fraction of the token budget.")
    weights: dict[str, float] = Field(min_length=1, description="Source -> share of the phase's tokens, on any scale.")
    ramp: float = Field(
        0.0, ge=0, le=1, description="Fraction of the budget over which the phase before passes into this one."
    )

    @model_validator(mode="after")
    def _weights_are_shares(self) -> TimingPhase:
        for name, weight in self.weights.items():
            if weight < 0:
                raise ValueError(f"weights.{name} is {weight:g}; it must be 0 or more")
        if not any(self.weights.values()):
            raise ValueError("weights are all 0; one source at least must be read")
        return self


class TimingConfig(Config):
    """When the interventions start, and what is read before."""

    start: float = Field(
        0.0, ge=0, le=1, description="Start of the interventions as a fraction of the token budget (1 = never)."
    )
    before: Literal["safe_only", "raw"] = Field(
        "safe_only",
        description="What is read before the start: score-0 text only (the paper), or raw text with the unsafe share.",
    )
    unsafe_share: float = Field(
        0.3, gt=0, lt=1, description="Share of tokens that raw text scored 1-5 has, or its interventions."
    )
    interventions: Interventions = Field(Interventions(), description="Split of that share after the start.")
    ramp: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Fraction of the budget, from the start on, over which the interventions grow to their share.",
    )
    exposure: Literal["natural", "matched"] = Field(
        "natural",
        description="`natural`: a later start means fewer intervention tokens; `matched`: every arm that has them reads "
        "the same number, with a larger share after a later start.",
    )
    dose: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Matched only: the interventions' share of the whole budget; null: `unsafe_share`, which is what a "
        "start at 0 without a ramp reads.",
    )
    phases: tuple[TimingPhase, ...] | None = Field(
        None, min_length=1, description="The curriculum spelt out, instead of all of the above."
    )
    repeats: dict[str, float] = Field(
        default_factory=dict,
        description="Source -> most passes over it; a curriculum that needs more is refused. Unlisted: no limit.",
    )

    @model_validator(mode="after")
    def _fits(self) -> TimingConfig:
        for name, most in self.repeats.items():
            if most <= 0:
                raise ValueError(f"repeats.{name} is {most:g}; it must be more than 0")
        if self.phases is not None:
            self._check_phases(self.phases)
            return self
        if self.dose is not None and self.exposure == "natural":
            raise ValueError("dose is for 'exposure: matched'; natural exposure follows from unsafe_share and start")
        if self.start < 1 and self.start + self.ramp > 1 + _TINY:
            raise ValueError(
                f"ramp: {self.ramp:g} of the budget after a start at {self.start:g} ends at {self.start + self.ramp:g}, "
                f"past its end; use at most {1 - self.start:g}"
            )
        if self.exposure == "matched" and self.start < 1:
            _share_after(self, self.start, 1 - self.start - self.ramp / 2)
        return self

    def _check_phases(self, spelt: tuple[TimingPhase, ...]) -> None:
        for name, field in type(self).model_fields.items():
            if name not in ("phases", "repeats") and getattr(self, name) != field.get_default():
                raise ValueError(f"{name} has no meaning beside 'phases', which spell the curriculum out; leave it out")
        at = [phase.at for phase in spelt]
        if at[0] != 0 or any(b <= a for a, b in pairwise(at)):
            raise ValueError(f"phases must begin at 0 and at growing fractions after it, not at {at}")
        if spelt[0].ramp:
            raise ValueError(
                f"phases.0.ramp is {spelt[0].ramp:g}, but there is no phase before the first; leave it out"
            )
        for number, (phase, end) in enumerate(zip(spelt, [*at[1:], 1.0], strict=True)):
            if phase.at + phase.ramp > end + _TINY:
                raise ValueError(
                    f"phases.{number}.ramp: {phase.ramp:g} of the budget from {phase.at:g} on ends at "
                    f"{phase.at + phase.ramp:g}, past the phase's end at {end:g}; use at most {end - phase.at:g}"
                )


RAMP_STEPS = 50
"""A ramp is a stair of so many phases, or of one per row where it has fewer rows."""
_TINY = 1e-9
_DIGITS = 12


def phases(config: TimingConfig, rows: int) -> list[tuple[int, dict[str, float]]]:
    """The curriculum as ``[(first row, {source: weight})]`` over ``rows`` packed rows; weights of a phase add up to 1.

    Begins and ends of phases and ramps are rounded to the nearest row; a phase without rows, or with the weights of the
    one before, is left out. A step of a ramp has the mean weight of the straight line over its rows, so a ramp reads
    exactly what the line reads. What a curriculum reads before some row follows from what its settings say up to there:
    arms that agree so far have equal phases. ``ValueError`` if matched exposure cannot be reached in so many rows.
    """
    stops = _stops(config, rows)
    found: list[tuple[int, dict[str, float]]] = []
    before: dict[str, float] = {}
    for number, (first, end, weights) in enumerate(stops):
        limit = stops[number + 1][0] if number + 1 < len(stops) else rows
        for row, part in [*_ramp(first, min(end, limit)), (end, 1.0)]:
            if row < limit:
                mixed = weights if part == 1 else _between(before, weights, part)
                if found and found[-1][0] == row:
                    found.pop()
                if not found or found[-1][1] != mixed:
                    found.append((row, mixed))
        before = weights
    return found


def ramps(config: TimingConfig, rows: int) -> list[tuple[int, int]]:
    """The rows [first, end) of each ramp that has any."""
    return [(first, end) for first, end, _ in _stops(config, rows) if first < end]


def _stops(config: TimingConfig, rows: int) -> list[tuple[int, int, dict[str, float]]]:
    """Where each phase begins, where its ramp ends (where it begins if it has none), and its weights."""
    if config.phases is not None:
        return [
            (round(phase.at * rows), round(min(phase.at + phase.ramp, 1) * rows), _shares(phase.weights))
            for phase in config.phases
        ]
    start = round(config.start * rows)
    end = max(start, round(min(config.start + config.ramp, 1) * rows))
    share = config.unsafe_share
    before = {"clean": 1.0} if config.before == "safe_only" else {"clean": 1 - share, "unsafe": share}
    stops = [(0, 0, _shares(before))]
    if config.start < 1:
        if config.exposure == "matched":
            share = _share_after(config, start / rows, rows - (start + end) / 2, rows)
        after = {"clean": round(1 - share, _DIGITS)} | {
            k: share * part for k, part in config.interventions.plain().items()
        }
        stops.append((start, end, _shares(after)))
    return stops


def _share_after(config: TimingConfig, start: float, left: float, rows: int | None = None) -> float:
    """The interventions' share once they are all there, so that the dose is read in what is ``left`` of the budget.

    ``left`` is in rows, or a fraction of the budget if ``rows`` is None; a ramp reads half, so it counts half in it.
    """
    dose = config.unsafe_share if config.dose is None else config.dose
    budget = 1.0 if rows is None else rows
    if dose * budget > left * (1 + _TINY):
        needed, rest = f"{dose:g} of the budget", f"{left:g} of it is"
        if rows is not None:
            needed, rest = f"{dose:g} of {rows} rows = {dose * rows:g} rows", f"{left:g} are"
        half = f" and a ramp over {100 * config.ramp:g} %, which counts half," if config.ramp else ""
        latest, most = 1 - dose - config.ramp / 2, math.floor(left / budget * 1e4 + 1e-6) / 1e4
        cures = [f"start at {100 * latest:.4g} % or earlier"] if latest >= 0 else []
        cures += [f"set a dose of {most:g} or less"] if most > 0 else []
        raise ValueError(
            f"dose: the interventions need {needed}, but after a start at {100 * start:.4g} %{half} only {rest} left; "
            + ", or ".join(cures or ["start earlier"])
        )
    # Written so that a start at 0 without a ramp has the dose itself, to the last bit: it is the natural arm then.
    return min(1.0, dose * (budget / left))


def _shares(weights: Mapping[str, float]) -> dict[str, float]:
    """Weights that add up to 1, without zeros, and rounded so that equal curricula written differently are equal."""
    total = math.fsum(weights.values())
    shares = {name: round(weight / total, _DIGITS) for name, weight in weights.items() if weight > 0}
    for name, share in shares.items():
        if share == 0:
            raise ValueError(
                f"the share of {name!r} is {weights[name] / total:.2g}, too small to be read; raise it or set it to 0"
            )
    return shares


def _between(a: Mapping[str, float], b: Mapping[str, float], part: float) -> dict[str, float]:
    """The mix that has gone ``part`` of the way from ``a`` to ``b``."""
    names = dict.fromkeys([*a, *b])
    return _shares({name: (1 - part) * a.get(name, 0) + part * b.get(name, 0) for name in names})


def _ramp(first: int, end: int) -> list[tuple[int, float]]:
    """First row and part of the way of each step of a ramp over the rows [first, end)."""
    steps = min(RAMP_STEPS, end - first)
    edges = [first + (end - first) * step // steps for step in range(steps + 1)] if steps else []
    return [(lo, (lo + hi - 2 * first) / 2 / (end - first)) for lo, hi in pairwise(edges)]
