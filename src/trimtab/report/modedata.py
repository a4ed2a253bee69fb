"""What the section on modes is made of: the tuned models of a study, and every figure of its tables, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

BASE, SFT, DPO, CHECKPOINT, ADAPTER = "base", "SFT", "SFT+DPO", "one checkpoint", "adapter"
FORMS = (BASE, SFT, DPO, CHECKPOINT, ADAPTER)
"""What a tuned model is: where the others start; without modes; by preferences; co-trained, all modes in one checkpoint or
the negative in an adapter."""


@dataclass(frozen=True)
class ModeArm:
    """The tuned model of one family of arms.

    arm, ids   its first arm, and all (one per seed)
    stage      the stage that makes the model
    form       of FORMS
    told       how it is told its mode, in words; "" for a model without modes
    token      reserved, string or words; "" without modes
    modes      mode -> which of the three behaviours it is to show
    policies   the second axis, if any
    plain      whether it is the lever's main form: no policies, with fallback rows
    deploys    models that must be deployed for the three behaviours, as they are written
    """

    arm: str
    ids: Sequence[str]
    label: str
    stage: str
    form: str
    told: str = ""
    token: str = ""
    modes: Mapping[str, str] = field(default_factory=dict)
    policies: Sequence[str] = ()
    plain: bool = True
    deploys: str = ""

    def mode_of(self, behaviour: str) -> str | None:
        """The first mode that is to show a behaviour."""
        return next((mode for mode, told in self.modes.items() if told == behaviour), None)


@dataclass(frozen=True)
class ModeFigure:
    """One figure: where it stands (``table``, ``row``, ``column``) and its value, mean over seeds with a 95 % interval.

    arm       first arm of the family
    low, high  NaN: no interval; ``value`` NaN: nothing was scored
    n         prompts per seed (fewest); ``each``: every seed's own value
    x         of a point of a curve: its place
    unit      share, score (in [-1, 1]), points (a difference of shares), count, seconds, bytes, flops or ratio
    """

    table: str
    arm: str
    row: str
    column: str
    value: float
    low: float
    high: float
    n: int = 0
    seeds: int = 1
    unscored: int = 0
    interval: str = ""
    unit: str = "share"
    each: Sequence[float] = ()
    x: float | None = None
    note: str = ""
