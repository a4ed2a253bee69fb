"""A gate's policy: what is evaluated, and the thresholds a model must keep, as typed YAML.

Every rule has exactly one limit, and every limit is put to the bound of a 95 % interval, never to the value itself: a
figure from few prompts has a far bound and does not pass by luck. Errors name the file, the line and the field.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from trimtab.config import Config
from trimtab.errors import UserError
from trimtab.evaluate.comparison import COMPARABLE
from trimtab.evaluate.metrics import METRICS, SMALL_N, metric_of
from trimtab.settings import explain, read_yaml

LIMITS = ("at_most", "at_least", "worse_by_at_most", "no_significant_worsening")
AGAINST = LIMITS[2:]
"""The limits on the difference from a baseline."""


class Rule(Config):
    """One threshold: a metric, where it is looked at, and exactly one limit."""

    metric: str = Field(description="What is measured: a metric of `trimtab eval`, such as `safe_at_1`.")
    category: str | None = Field(
        None,
        description="Only prompts of this category, of one task (`task:NAME`), policy (`policy:NAME`) or attack "
        "(`attack:NAME`); all if left out.",
    )
    mode: str | None = Field(
        None,
        description="The mode whose answers are looked at (`none`: no control token). Needed when there are several.",
    )
    against_mode: str | None = Field(
        None, description="The baseline's mode, when it is not `mode`; only for a limit on a difference."
    )
    at_most: float | None = Field(None, description="The upper bound of the value may be no higher than this share.")
    at_least: float | None = Field(None, description="The lower bound of the value may be no lower than this share.")
    worse_by_at_most: float | None = Field(
        None, description="The bound of the paired difference from the baseline, on its bad side, may be no larger."
    )
    no_significant_worsening: float | None = Field(
        None,
        description="Level at which the model may not be significantly worse than the baseline (exact paired test, "
        "Holm-adjusted over all rules of this kind).",
    )
    min_n: int = Field(SMALL_N, ge=1, description="With fewer scored prompts than this the rule is undecided.")

    @property
    def limit(self) -> str:
        """Which of ``LIMITS`` the rule sets."""
        return next(name for name in LIMITS if getattr(self, name) is not None)

    @property
    def threshold(self) -> float:
        """The number that the limit is."""
        return float(getattr(self, self.limit))

    @property
    def is_against(self) -> bool:
        """Whether the rule needs a baseline."""
        return self.limit in AGAINST

    @model_validator(mode="after")
    def _one_limit_that_can_be_kept(self) -> Rule:
        given = [name for name in LIMITS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"set exactly one of {', '.join(LIMITS)}" + (f", not {' and '.join(given)}" if given else "")
            )
        try:
            metric = metric_of(self.metric)
        except UserError as error:
            close = difflib.get_close_matches(self.metric, METRICS, n=1)
            hint = f"no metric {self.metric!r}; did you mean {close[0]!r}?" if close else str(error).partition(": ")[2]
            raise ValueError(f"metric: {hint}") from None
        name, threshold = given[0], self.threshold
        low, high = metric.range
        if math.isinf(high):
            raise ValueError(f"metric: {self.metric!r} speaks only of prompts that were broken; use asr or hit_rate")
        if self.is_against and (self.metric not in COMPARABLE or metric.direction == "none"):
            why = "has no better side" if metric.direction == "none" else "cannot be paired with a baseline's"
            raise ValueError(f"{name}: {self.metric!r} {why}; compare another metric")
        if not self.is_against and self.against_mode is not None:
            raise ValueError("against_mode: only for worse_by_at_most and no_significant_worsening")
        least, most = {
            "at_most": (low, high), "at_least": (low, high), "worse_by_at_most": (0.0, high - low),
            "no_significant_worsening": (0.0, 1.0),
        }[name]  # fmt: skip
        if not (least < threshold < most or (name == "worse_by_at_most" and threshold == 0)):
            raise ValueError(
                f"{name}: {threshold:g} does not lie between {least:g} and {most:g}, so every model keeps it or none can; "
                "5 % is 0.05"
            )
        return self


class Policy(Config):
    """What ``trimtab gate`` holds a model to."""

    evaluation: dict[str, Any] | None = Field(
        None,
        description="How a model is evaluated (panel, modes, attacks, limit, samples, judges: the settings of "
        "`trimtab eval`). Not needed for gating an evaluation that exists.",
    )
    max_unscored: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="With a larger share of answers that no judge could tell, a rule on them is undecided.",
    )
    rules: tuple[Rule, ...] = Field(min_length=1, description="All of them must be kept.")

    def check_baseline(self, origin: str, given: bool) -> None:
        """``UserError`` when the rules (read from ``origin``) need a baseline that is not ``given``, or the reverse."""
        against = [i for i, rule in enumerate(self.rules) if rule.is_against]
        if against and not given:
            raise UserError(
                f"{origin}: rules.{against[0]}.{self.rules[against[0]].limit}: needs a baseline; give --against"
            )
        if given and not against:
            raise UserError(
                f"{origin}: no rule compares with the baseline of --against; add one with {' or '.join(AGAINST)}"
            )


def load_policy(path: Path) -> Policy:
    """The policy in a YAML file; ``UserError`` with file, line and field where it is wrong.

    The section ``evaluation`` must hold settings of `trimtab eval`, also when the gate is put to an evaluation that exists.
    """
    data = read_yaml(path, "policy")
    try:
        policy = Policy.model_validate(data)
    except ValidationError as error:
        raise _wrong(path, error.errors()[0], explain(error, data, Policy)) from None
    if policy.evaluation is None:
        return policy
    from trimtab.evaluate.run import EvalConfig  # here: it brings judges and attacks along

    try:
        EvalConfig.model_validate(policy.evaluation)
    except ValidationError as error:
        first = {**error.errors()[0], "loc": ("evaluation", *error.errors()[0]["loc"])}
        said = explain(error, policy.evaluation, EvalConfig)
        raise _wrong(path, first, f"evaluation.{said}") from None
    except UserError as error:
        raise _wrong(path, {"loc": ("evaluation",)}, f"evaluation: {error}") from None
    return policy


def _wrong(path: Path, problem: Mapping[str, Any], said: str) -> UserError:
    """``said`` with the file and the line; a rule's own check names its field first, which becomes part of the place."""
    location = tuple(problem["loc"])
    place, _, rest = said.partition(": ")
    field, colon, message = rest.partition(": ")
    if problem.get("type") == "value_error" and colon and field in Rule.model_fields and location[-1] != field:
        location, said = (*location, field), f"{place}.{field}: {message}"
    return UserError(f"{path}, line {_line(path, location)}: {said}")


def _line(path: Path, location: tuple[int | str, ...]) -> int:
    """Line of the deepest part of ``location`` that the file has."""
    node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    line = 1
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == str(part)), None)
            if found is None:
                break
            node, line = found[1], found[0].start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line
