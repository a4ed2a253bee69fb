"""Which lever an arm pulls, and how: read from the recipe, its arm group and what is swept, never from a name that a
recipe chose."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.levers.modes import ModesConfig
from trimtab.levers.prefix import PrefixConfig
from trimtab.settings import put

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


# -- the mode lever ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Modes:
    """How an arm pulls the mode lever: the sft stage that it is pulled at, and the lever's settings there."""

    stage: str
    config: ModesConfig

    @property
    def words(self) -> str:
        """The form in words: "reserved tokens, one checkpoint"."""
        config = self.config
        token = {"reserved": "reserved tokens", "string": "random strings", "words": "instructions"}[config.token]
        parts = [f"{token} at the {config.at}" if config.at == "header" else token]
        if any(config.behaviour(name) == "negative" for name in config.names):
            parts.append("the negative mode in an adapter" if config.separate else "one checkpoint")
        parts += [f"policies {', '.join(config.policies)}"] if config.policies else []
        parts += ["prompts shared"] if config.shared else []
        carry = {"none": "no token", "unknown": "an unknown one", "typed": "a typed one"}
        share = f"{100 * config.fallback:g} % with {', '.join(carry[f] for f in config.fallbacks)}"
        return ", ".join([*parts, f"fallback rows: {share if config.fallback else 'none'}"])


@dataclass(frozen=True)
class Tamper:
    """A finetuning of an arm's tuned model: its stage, the stages from the tuned model to it, and on what."""

    stage: str
    chain: tuple[str, ...]
    hostile: bool


def arm_stages(recipe: Json, arm: Json) -> dict[str, dict[str, Any]]:
    """The stages that an arm goes through, as its group and its sweep set them, in the recipe's order."""
    raw = {"stages": copy.deepcopy(dict(recipe["stages"]))}
    group = _group(recipe, arm)
    swept = {} if group is None else _swept(group, arm)
    for path, value in {**(group["set"] if group else {}), **swept}.items():
        names = list((group or {}).get("names", {}).get(path, ()))
        put(raw, path, group["sweep"][path][names.index(value)] if group and value in names else value, origin="study")
    return {name: stage for name, stage in raw["stages"].items() if name in _gone_through(arm)}


def _gone_through(arm: Json) -> set[str]:
    """Names of an arm's stages; the cells of a panel stand under ``stage/model/decoder``."""
    return {name.split("/")[0] for name in arm["stages"]}


def pulls_modes(recipe: Json) -> bool:
    """Whether some arm of a study may pull the mode lever, or is a baseline that is trained by preferences."""
    stages = [s for s in recipe["stages"].values() if s["kind"] == "sft" and s.get("modes")]
    varied = [p for g in recipe["arms"] for p in (*g["set"], *g["sweep"]) if p.split(".")[2:3] == ["modes"]]
    sft = [p for p in varied if recipe["stages"].get(p.split(".")[1], {}).get("kind") == "sft"]
    return bool(stages or sft or any(s["kind"] == "dpo" for s in recipe["stages"].values()))


def _lever(stage: Json) -> ModesConfig | None:
    return ModesConfig.model_validate(stage["modes"]) if stage["kind"] == "sft" and stage.get("modes") else None


def modes_of(recipe: Json, arm: Json) -> Modes | None:
    """How the arm's tuned model was told its modes; None where the stage that made it does not pull the lever."""
    stages = arm_stages(recipe, arm)
    tuned = tuned_of(recipe, arm)
    config = None if tuned is None else _lever(stages[tuned])
    return None if tuned is None or config is None else Modes(tuned, config)


def pulls(recipe: Json, arm: Json) -> bool:
    """Whether an arm's tuned model pulls the mode lever, or is trained by preferences."""
    tuned = tuned_of(recipe, arm)
    return tuned is not None and (recipe["stages"][tuned]["kind"] == "dpo" or modes_of(recipe, arm) is not None)


def _token_stages(recipe: Json) -> set[str]:
    """The stages at which some arm group of the study gives a model tokens for its modes."""
    found: set[str] = set()
    for group in recipe["arms"]:
        varied = [{path: value} for path, values in group["sweep"].items() for value in values]
        for one in varied or [{}]:
            raw = {"stages": copy.deepcopy(dict(recipe["stages"]))}
            for path, value in {**group["set"], **one}.items():
                put(raw, path, value, origin="study")
            through = group.get("stages") or raw["stages"]
            found |= {name for name in through if _tokens(raw["stages"][name])}
    return found


def _tokens(stage: Json) -> bool:
    config = _lever(stage)
    return config is not None and config.token != "words"


def tuned_of(recipe: Json, arm: Json) -> str | None:
    """The stage that makes an arm's tuned model: the last that gives it tokens or is trained by preferences; else the one at
    which other arms are given tokens; else the last that tells modes in words, is a finetuning on answers that are not
    negative, or a pretraining. None for an arm without a model."""
    stages, given = arm_stages(recipe, arm), _token_stages(recipe)

    def last(wanted: Any) -> str | None:
        return next((name for name, stage in reversed(stages.items()) if wanted(name, stage)), None)

    return (
        last(lambda name, stage: stage["kind"] == "dpo" or _tokens(stage))
        or last(lambda name, stage: name in given)
        or last(lambda name, stage: _lever(stage) is not None)
        or last(lambda name, stage: stage["kind"] == "sft" and not _hostile(stage))
        or last(lambda name, stage: stage["kind"] == "pretrain")
    )


def _hostile(stage: Json) -> bool:
    return any(part.get("answers", "positive") == "negative" for part in stage.get("data", ()))


def tampering_of(recipe: Json, arm: Json, tuned: str) -> Iterator[Tamper]:
    """The stages that finetune an arm's tuned model further, or what came of that, without pulling the lever again."""
    stages = arm_stages(recipe, arm)
    chains: dict[str, tuple[tuple[str, ...], bool]] = {tuned: ((), False)}
    for name, stage in stages.items():
        model = stage.get("model")
        if stage["kind"] != "sft" or name == tuned or _lever(stage) is not None or not isinstance(model, str):
            continue
        if model in chains:
            before, hostile = chains[model]
            chains[name] = (*before, name), hostile or _hostile(stage)
            yield Tamper(name, *chains[name])
