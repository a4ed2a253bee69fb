"""Which lever an arm pulls, and how: read from the recipe, its arm group and what is swept, never from a name that a
recipe chose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.levers.prefix import PrefixConfig

_TIMING: dict[str, Any] = {"start": 0.0, "exposure": "natural", "before": "safe_only", "ramp": 0.0, "dose": None}
Json = Mapping[str, Any]


@dataclass(frozen=True)
class Prefix:
    """How an arm pulls the prefix lever.

    stage     the sft stage that it is pulled at
    settings  the fields of ``PrefixConfig`` but the ratio, all of them
    swept     what else is swept: short name -> value (a size of the model, say)
    rest      everything else that the arm's group sets or sweeps: two arms that agree in it are one training at ratio 0
    """

    stage: str
    ratio: float
    settings: Json
    swept: Json
    rest: Json

    @property
    def plain(self) -> bool:
        """Whether this is the paper's main form of the lever: sentences of the usual set before the response, with loss."""
        return not self.unusual

    @property
    def unusual(self) -> dict[str, Any]:
        """The settings of another form of the lever than the paper's main one."""
        return {k: v for k in _FORMS if k in self.settings and (v := self.settings[k]) != _DEFAULTS.get(k)}

    def to_json(self) -> dict[str, Any]:
        return {"stage": self.stage, "ratio": self.ratio, **self.settings}


_DEFAULTS = PrefixConfig().plain()
_FORMS = ("variant", "placement", "opens", "loss_on_prefix", "primer", "at_inference")


def _group(recipe: Json, arm: Json) -> Json | None:
    return next((g for g in recipe["arms"] if g["name"] == arm["group"]), None)


def _swept(group: Json, arm: Json) -> dict[str, Any]:
    """Full path -> value of what is swept; an arm's settings have the short names."""
    return {
        path: arm["settings"][short]
        for path in group["sweep"]
        for short in arm["settings"]
        if path == short or path.endswith(f".{short}")
    }


def _under(root: str, varied: Json) -> dict[str, Any] | None:
    """The fields below ``root`` that are varied; None where nothing is."""
    found: dict[str, Any] = {}
    touched = False
    for path, value in varied.items():
        if path == root and isinstance(value, Mapping):
            found |= value
            touched = True
        elif path.startswith(f"{root}."):
            found[path.removeprefix(f"{root}.")] = value
            touched = True
    return found if touched else None


def timing_of(recipe: Json, arm: Json) -> dict[str, Any] | None:
    """The arm's timing settings (start, exposure, before, ramp), from the recipe, its group and what is swept; None for
    an arm whose group neither sets nor sweeps the timing, and for a curriculum that is spelt out."""
    group = _group(recipe, arm)
    stage = next((n for n in arm["stages"] if recipe["stages"].get(n, {}).get("kind") == "pretrain"), None)
    if group is None or stage is None:
        return None
    varied = _under(f"stages.{stage}.timing", {**group["set"], **_swept(group, arm)})
    if varied is None:
        return None
    timing = {**(recipe["stages"][stage].get("timing") or {}), **varied}
    if timing.get("phases"):
        return None
    kept = {k: timing.get(k, default) for k, default in _TIMING.items()}
    return {**kept, "start": float(kept["start"])}


def prefix_of(recipe: Json, arm: Json) -> Prefix | None:
    """How the arm pulls the prefix lever; None where its group neither sets nor sweeps it. Of several sft stages the last
    that it is varied at counts."""
    group = _group(recipe, arm)
    if group is None:
        return None
    swept = _swept(group, arm)
    varied = {**group["set"], **swept}
    for stage in reversed([n for n, s in recipe["stages"].items() if s["kind"] == "sft" and n in arm["stages"]]):
        root = f"stages.{stage}.prefix"
        mine = _under(root, varied)
        if mine is not None:
            settings = {**_DEFAULTS, **(recipe["stages"][stage].get("prefix") or {}), **mine}
            ratio = float(settings.pop("ratio"))
            inside = (root, f"{root}.")
            rest = {k: v for k, v in varied.items() if k != inside[0] and not k.startswith(inside[1])}
            if settings.get("strip"):  # strips at ratio 0 too
                rest["strip"] = settings["strip"]
            other = {
                short: value
                for short, value in arm["settings"].items()
                if any(p in rest and (p == short or p.endswith(f".{short}")) for p in swept)
            }
            return Prefix(stage, ratio, settings, other, rest)
    return None
