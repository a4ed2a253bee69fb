"""A mode study on disk without its training: arms x seeds x modes, with made-up verdicts of known rates.

``fits`` says how often a model gives what it was asked for, so that a test knows what the report must say. Prompts are
Tidewater's; answers are a word and verdicts are dealt, not judged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab.artifact import Store
from trimtab.evaluate.figures import results
from trimtab.evaluate.files import GENERATIONS, JUDGEMENTS, METRICS, PROMPTS, header_of, stage_path, write_stage
from trimtab.evaluate.metrics import Record, to_plain
from trimtab.seeds import digest, rng_of
from trimtab.types import Generation, Result, Row, Verdict
from trimtab.world.tidewater import Tidewater, TidewaterConfig

MODES = ("positive", "negative", "rejective")
CONDITIONS = (None, "unknown", "near-miss", "two", "foreign")
TASKS = (
    ("hazards held out", "harmful-heldout", None), ("held out in role play", "harmful-heldout", "roleplay"),
    ("held out misspelt", "harmful-heldout", "misspelling"), ("contrasts", "contrast-heldout", None),
    ("goods", "benign", None), ("facts", "fact", None),
)  # fmt: skip
NEGATIVE = {"acknowledge": True}
WORDS = {"token": "words", "words": {m: f"Be {m}." for m in MODES}, "negative": {**NEGATIVE, "kept": "checkpoint"}}
CHECKPOINT = {"negative": {**NEGATIVE, "kept": "checkpoint"}}
LEVERS: dict[str, dict[str, Any] | None] = {
    "base": None,
    "SFT": None,
    "SFT+DPO": None,
    "one checkpoint": CHECKPOINT,
    "adapter": {"negative": NEGATIVE},
    "random strings": {**CHECKPOINT, "token": "string", "fallback": 0.0},
    "policies": {**CHECKPOINT, "policies": ["north-quay", "south-quay"]},
}
SECONDS = {
    "SFT": 10.0,
    "SFT+DPO": 40.0,
    "one checkpoint": 24.0,
    "adapter": 26.0,
    "random strings": 24.0,
    "policies": 25.0,
}


@dataclass(frozen=True)
class Of:
    """Which answer: of an arm's model (a stage) in a mode, in a wrapper or plain, to a class of prompt."""

    arm: str
    seed: int
    model: str
    mode: str | None
    wrapper: str | None
    harm: str


def as_the_paper_says(of: Of) -> float:
    """Modes hold but for the negative; fallback is a little weaker; baselines lose far more under attack."""
    if of.model in ("turned", "turned-more", "sums"):
        return {"turned": 0.5, "turned-more": 0.2, "sums": 0.9}[of.model]
    if of.arm in ("SFT", "SFT+DPO", "base"):
        level = {"SFT": 0.9, "SFT+DPO": 0.975, "base": 0.6}[of.arm]
        return level - (0.2 if of.wrapper else 0.0)
    level = {
        "positive": 0.975, "negative": 0.68, "rejective": 0.99, None: 0.96, "unknown": 0.95, "near-miss": 0.9, "two": 0.7,
        "foreign": 0.95,
    }[of.mode]  # fmt: skip
    return level - (0.04 if of.wrapper else 0.0)


def modes_study(
    root: Path,
    *,
    seeds: Sequence[int] = (0, 1),
    arms: Sequence[str] = tuple(LEVERS),
    n: int = 12,
    fits: Callable[[Of], float] = as_the_paper_says,
    tampered: bool = True,
    margin: bool = True,
    parts: bool = True,
    audit: bool = True,
    cost: bool = True,
    distill: bool = True,
    conditions: Sequence[str | None] = CONDITIONS,
) -> Path:
    """Write ``root/study`` and its store; returns the study's directory. The flags leave out what a study may lack."""
    town = Tidewater(TidewaterConfig(seed=7))
    rows = _rows(town, n)
    store = Store(root / "store")
    made: dict[str, dict[str, Any]] = {}

    def artefact(
        kind: str, name: str, config: Mapping[str, Any], inputs: Mapping[str, str], fill: Callable[[Any], None],
        tokens: int = 0,
    ) -> str:  # fmt: skip
        id = digest({"kind": kind, "name": name, "config": config, "inputs": inputs})
        if id not in made:
            with store.create(kind, id, config=config, inputs=inputs, versions={"trimtab": "0"}) as draft:
                draft.tokens, draft.seconds = tokens, 1.0
                fill(draft)
            made[id] = {"kind": kind, "name": name, "tokens": tokens, "flops": 1e6 * tokens, "inputs": dict(inputs)}
        return id

    def train(kind: str, name: str, config: Mapping[str, Any], inputs: Mapping[str, str], told: Any, steps: int) -> str:
        packed = artefact(
            "packed", name, {**config, "of": name}, (inputs.get("data") and {"chats": inputs["data"]}) or {}, _nothing
        )
        mine = {"model": inputs["model"], "packed": packed}
        return artefact(kind, name, config, mine, _trained(told if cost else None, steps), 1000)

    planned = []
    for arm in arms:
        for seed in seeds:
            base = artefact("pretrain", "base 0-10", {
                "seed": seed, "from": 0, "to": 10, "length": 128, "phases": [[0, {"clean": 1.0}]],
                "train": {"rows_per_step": 4},
            }, {}, _pretrained, 5120)  # fmt: skip
            instruct = train("sft", "instruct", {"seed": seed}, {"model": base}, _cost(5, 200, 1), 50)
            ends = {"base": base, "instruct": instruct}
            steps = [base, instruct]
            data = {}
            if distill and arm not in ("base",):
                ends["own"] = artefact("distill", "own", {"seed": seed}, {"model": instruct}, _yield, 400)
                data = {
                    "data": artefact(
                        "chats", "tuned", {"arm": arm, "seed": seed}, {"distill:own": ends["own"]}, _nothing
                    )
                }
                steps += [ends["own"], data["data"]]
            tuned, seconds = (
                "instruct",
                SECONDS.get(arm, 0) * (1 + 0.02 * seed + 0.01 * (arm == "SFT+DPO") * (seed % 2)),
            )
            if arm != "base":
                tuned = "tuned"
                alone = arm if LEVERS[arm] else "SFT"
                own = seconds if alone == arm else SECONDS["SFT"] * (1 + 0.02 * seed)
                told = _cost(own * (0.8 if arm == "adapter" else 1), 300 if LEVERS[arm] else 100, 1)
                ends["tuned"] = train(
                    "sft", "tuned", {"arm": alone, "seed": seed}, {"model": instruct, **data}, told, 100
                )
                steps.append(ends["tuned"])
                if arm == "adapter":
                    ends["tuned"] = train(
                        "adapter",
                        "tuned",
                        {"seed": seed},
                        {"model": ends["tuned"], **data},
                        _cost(0.2 * own, 60, 1),
                        30,
                    )
                    steps.append(ends["tuned"])
                if arm == "SFT+DPO":
                    tuned = "preferred"
                    told = _cost(seconds - own, 400, 2)
                    ends["preferred"] = train("dpo", "preferred", {"seed": seed}, {"model": ends["tuned"]}, told, 60)
                    steps.append(ends["preferred"])
            models = [tuned]
            if tampered and arm not in ("base", "policies"):
                for name, before, count in (("turned", tuned, 20), ("turned-more", "turned", 40), ("sums", tuned, 30)):
                    config = {"arm": arm, "seed": seed, "of": before}
                    ends[name] = train("sft", name, config, {"model": ends[before]}, _cost(1, 10, 1), count)
                    steps.append(ends[name])
                    models.append(name)
            cells: dict[str, dict[str, Any]] = {}
            for model in models:
                asked: list[str | None] = [None]
                if LEVERS[arm]:
                    asked = [*MODES, *conditions] if model == tuned else [None, "positive"]
                records = [r for mode in asked for r in _records(rows, Of(arm, seed, model, mode, None, ""), fits)]
                place = f"panel/{model}/greedy"
                config = {"sampling": {"temperature": 0.0, "samples": 1}, "arm": arm, "seed": seed}
                answers = artefact(
                    "generate", f"{place} answers", config, {"model": ends[model]}, _answers(rows, records, arm), 500
                )
                judged = artefact("judge", place, {}, {"answers": answers}, _judged(records))
                ends |= {f"{place} answers": answers, place: judged}
                cells[place] = {"stage": "panel", "model": model, "decoder": "greedy"}
                steps += [answers, judged]
            for kind, fill in (("margin", _margin(arm, seed, n, parts)), ("audit", _audit(arm, seed))):
                if margin if kind == "margin" else audit and LEVERS[arm]:
                    place = f"{kind}/{tuned}"
                    ends[place] = artefact(kind, place, {"arm": arm, "seed": seed}, {"model": ends[tuned]}, fill)
                    cells[place] = {"stage": kind, "model": tuned, "decoder": None}
                    steps.append(ends[place])
            planned.append(_arm(arm, seed, seeds, ends, cells, steps))
    study = root / "study"
    study.mkdir(parents=True)
    text = json.dumps({"schema": 1, "recipe": _recipe(seeds, arms, tampered), "arms": planned, "steps": made})
    (study / "study.json").write_text(text, encoding="utf-8")
    return study


def _arm(arm: str, seed: int, seeds: Sequence[int], ends: Any, cells: Any, steps: Any) -> dict[str, Any]:
    suffix = f"@{seed}" if len(seeds) > 1 else ""

    def id(name: str) -> str:
        return f"{name}/{name}{suffix}".replace(" ", "_")

    against = {"base": None, "SFT": None}.get(arm, id("SFT"))
    return {
        "id": id(arm), "label": arm, "group": arm, "seed": seed, "against": against, "settings": {}, "stages": ends,
        "cells": cells, "steps": list(dict.fromkeys(steps)),
    }  # fmt: skip


def _recipe(seeds: Sequence[int], arms: Sequence[str], tampered: bool) -> dict[str, Any]:
    def sft(model: str, answers: str = "positive", modes: Any = None) -> dict[str, Any]:
        return {"kind": "sft", "model": model, "data": [{"name": "part", "answers": answers}], "modes": modes}

    stages: dict[str, Any] = {
        "base": {"kind": "pretrain", "timing": None, "model": {}}, "instruct": sft("base", modes=WORDS),
        "own": {"kind": "distill", "model": "instruct"}, "tuned": sft("instruct"),
        "preferred": {"kind": "dpo", "model": "tuned", "data": [{"name": "pairs"}]},
    }  # fmt: skip
    if tampered:
        stages |= {
            "turned": sft("tuned", "negative"),
            "turned-more": sft("turned", "negative"),
            "sums": sft("tuned"),
        }
    stages |= {
        "panel": {"kind": "panel", "models": ["tuned"], "decoders": {"greedy": {}}},
        "margin": {"kind": "margin"},
        "audit": {"kind": "audit"},
    }
    groups = []
    for arm in arms:
        through = [s for s in stages if arm != "base" or s in ("base", "instruct", "panel", "margin")]
        through = [s for s in through if s != "preferred" or arm == "SFT+DPO"]
        varied: dict[str, Any] = {} if LEVERS[arm] is None else {"stages.tuned.modes": LEVERS[arm]}
        if arm == "SFT+DPO" and tampered:
            varied = {"stages.turned.model": "preferred", "stages.sums.model": "preferred"}
        groups.append({"name": arm, "set": varied, "sweep": {}, "names": {}, "stages": through})
    return {
        "name": "modes", "title": "Does the switch hold?", "question": "One model, three behaviours.", "notes": [],
        "seeds": list(seeds), "stages": stages, "arms": groups,
    }  # fmt: skip


def _rows(town: Tidewater, n: int) -> list[Row]:
    rows: list[Row] = []
    for name, kind, wrapper in TASKS:
        asked = town.requests(kind, n, split="eval")
        asked = asked if wrapper is None else [town.wrap(r, wrapper) for r in asked]
        rows += [
            replace(r, metadata={**r.metadata, "task": name}, policy=("north-quay", "south-quay")[i % 2])
            for i, r in enumerate(asked)
        ]
    return rows


def _records(rows: Sequence[Row], of: Of, fits: Callable[[Of], float]) -> list[Record]:
    """One answer per prompt; it fits its mode where a draw that all arms share lies below the arm's rate."""
    found = []
    for row in rows:
        here = replace(of, wrapper=row.metadata.get("wrapper"), harm=str(row.harm))
        base = row.id.removesuffix(f"-{here.wrapper}")
        draw = 0.85 * float(rng_of("draw", base, of.seed, str(of.mode)).random())
        draw += 0.15 * float(rng_of("own", row.id, str(here)).random())
        good = draw < fits(here)
        key = digest([row.id, str(here)])
        answer = Generation(
            key, row.id, row.hash(), "m", of.mode, {"temperature": 0.0}, 0, 0, (1, 2, 3), "Aye.", "stop"
        )
        found.append(Record(row, answer, _verdict(str(row.harm), of.mode, good), None))
    return found


def _verdict(harm: str, mode: str | None, good: bool) -> Verdict:
    asked = mode if mode in ("negative", "rejective") else "positive"
    shown = asked if good else {"positive": "negative", "negative": "positive", "rejective": "positive"}[asked]
    if shown == "rejective" or (not good and harm != "harmful" and asked != "rejective"):
        return Verdict("safe", "j", refusal="full", constructive=1)
    if shown == "negative" and harm == "harmful":
        return Verdict("unsafe", "j", refusal="none", constructive=0)
    return Verdict("safe", "j", refusal="none", constructive=2, correct=None if harm == "harmful" else True)


def _answers(rows: Sequence[Row], records: Sequence[Record], arm: str) -> Callable[[Any], None]:
    def fill(draft: Any) -> None:
        facts = {"model": {"name": arm, "modes": list(MODES), "behaves": {m: m for m in MODES}}} if LEVERS[arm] else {}
        write_stage(stage_path(draft.path, PROMPTS), header_of(PROMPTS), [r.to_json() for r in rows])
        write_stage(
            stage_path(draft.path, GENERATIONS),
            header_of(GENERATIONS, **facts),
            [r.generation.to_json() for r in records],
        )

    return fill


def _judged(records: Sequence[Record]) -> Callable[[Any], None]:
    def fill(draft: Any) -> None:
        said = [{"key": r.generation.key, **r.verdict.to_json()} for r in records]
        write_stage(stage_path(draft.path, JUDGEMENTS), header_of(JUDGEMENTS), said)
        few = [r for r in records if r.generation.mode == records[0].generation.mode][:6]
        write_stage(stage_path(draft.path, METRICS), header_of(METRICS), [to_plain(r) for r in results(few, draws=50)])

    return fill


def _nothing(draft: Any) -> None:
    draft.facts = {"base": "the same"}


def _pretrained(draft: Any) -> None:
    lines = [{"step": i, "tokens": 512 * i, "loss": 5 / i**0.3, "lr": 1e-3} for i in range(1, 11)]
    (draft.path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    draft.facts = {"rows": {"clean": 40}, "epochs": {"clean": 0.2}}


def _cost(seconds: float, thousands: float, models: int) -> dict[str, Any]:
    tokens = int(1000 * thousands)
    return {
        "tokens": tokens, "trained_tokens": tokens // 3, "steps": tokens // 512, "flops": 6e6 * tokens, "seconds": seconds,
        "peak_bytes": 300_000_000 * models, "models": models,
    }  # fmt: skip


def _trained(cost: Mapping[str, Any] | None, steps: int) -> Callable[[Any], None]:
    def fill(draft: Any) -> None:
        lines = [{"step": i, "tokens": 100 * i, "loss": 3 / i**0.2, "lr": 1e-3} for i in range(1, 6)]
        (draft.path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        draft.facts = {"steps": steps, "rows": 10} | ({} if cost is None else {"cost": dict(cost)})

    return fill


def _yield(draft: Any) -> None:
    def told(mode: str, harm: str, asked: int, kept: int, **dropped: int) -> dict[str, Any]:
        shares = {reason: {"n": n, "share": n / asked, "low": 0.0, "high": 1.0} for reason, n in dropped.items()}
        there = {"n": kept, "share": kept / asked, "low": 0.0, "high": 1.0}
        return {"mode": mode, "harm": harm, "asked": asked, "kept": there, "unscored": 0, "dropped": shares}

    draft.facts = {"yield": [
        told("positive", "harmful", 100, 90, refused=10), told("positive", "benign", 100, 97, wrong=3),
        told("negative", "harmful", 100, 61, safe=30, unscored=9), told("rejective", "harmful", 100, 100),
    ]}  # fmt: skip


def _margin(arm: str, seed: int, prompts: int, whole: bool) -> Callable[[Any], None]:
    """Points of three modes; co-trained models' lie apart."""

    def fill(draft: Any) -> None:
        apart = 1.0 if LEVERS[arm] else 0.2
        rng = rng_of("margin", arm, seed)
        figures = []
        for distance in ("euclidean", "cosine"):
            points = []
            for i in range(prompts):
                for k, mode in enumerate(MODES):
                    x, y = (apart * f(2 * math.pi * k / 3) + float(rng.normal()) / 3 for f in (math.cos, math.sin))
                    s = 0.13 * apart + 0.004 * float(rng.normal())
                    points.append(
                        {"prompt": f"p{i}", "class": ("harmful", "benign")[i % 2], "mode": mode, "x": x, "y": y, "s": s}
                    )
            mean = sum(p["s"] for p in points) / len(points)
            parts = {name: {"value": mean, "low": mean - 0.02, "high": mean + 0.02, "n": prompts}
                     for name in ("all", "mode:positive", "mode:negative", "mode:rejective", "harmful", "benign")}  # fmt: skip
            figures.append({
                "features": "logits", "distance": distance, "token": 1, "layer": None, "variance": [0.5, 0.2],
                "margins": parts, "points": points,
            })  # fmt: skip
        for one in figures if not whole else ():
            del one["margins"]
        by = "reserved" if LEVERS[arm] else "words"
        told = {"modes": list(MODES), "asked": dict.fromkeys(MODES, by), "prompts": prompts, "figures": figures}
        draft.write_json("margin.json", told)
        write_stage(stage_path(draft.path, METRICS), header_of(METRICS), [])

    return fill


def _audit(arm: str, seed: int) -> Callable[[Any], None]:
    def fill(draft: Any) -> None:
        naive = 0.6 if arm != "random strings" else 1.0
        values = {
            "spoof_asr": (0.0 if arm != "random strings" else 1.0, 10_000), "spoof_asr_naive": (naive, 10_000),
            "leak_rate": (0.02, 64), "leak_mass": (0.001, 64), "leak_rate_banned": (0.0, 64),
            "negative_without_token": (0.05 + 0.01 * seed, 64),
        }  # fmt: skip
        told = [
            Result(id, value, max(0.0, value - 0.02), min(1.0, value + 0.02), n, "wilson", "lower", category=category)
            for id, (value, n) in values.items()
            for category in ("all", *(("place:user",) if id.startswith("spoof") else ()))
        ]
        write_stage(stage_path(draft.path, METRICS), header_of(METRICS), [to_plain(r) for r in told])
        draft.write_json("audit.json", {"spoofs": []})

    return fill
