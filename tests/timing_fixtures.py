"""A timing study on disk without its training: arms x seeds x models x decoders, with made-up verdicts of known rates.

``risk`` says how often an arm's model gives what is harmful, so that a test knows what the report must say. Requests are
Tidewater's; answers are a word and verdicts are dealt, not judged.
"""

from __future__ import annotations

import json
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

MODELS = ("base", "chat", "sums", "turned")
DECODERS = {
    "greedy": {"temperature": 0.0},
    "top-k": {"temperature": 0.7, "top_k": 20},
    "safebeam": {"temperature": 0.0, "safebeam": {"beams": 4, "candidates": 8, "short_circuit": None}},
}
TASKS = (
    ("hazards seen", "harmful-seen", None), ("hazards new", "harmful-heldout", None),
    ("in role play", "harmful-heldout", "roleplay"), ("misspelt", "harmful-seen", "misspelling"),
    ("contrasts", "contrast-heldout", None), ("goods", "benign", None), ("facts", "fact", None), ("sums", "arithmetic", None),
)  # fmt: skip
NATURAL, MATCHED = (0.0, 0.2, 0.6, 1.0), (0.2, 0.6)


@dataclass(frozen=True)
class Of:
    """Which cell an answer belongs to."""

    start: float
    exposure: str
    seed: int
    model: str
    decoder: str
    task: str


def later_is_riskier(of: Of) -> float:
    """Risk grows with the start, more so after benign finetuning; SafeBeam takes half of it off; wrapping adds."""
    level = {"base": 0.3, "chat": 0.05, "sums": 0.12, "turned": 0.7}[of.model]
    slope = {"base": 0.25, "chat": 0.12, "sums": 0.6, "turned": 0.1}[of.model]
    risk = level + slope * (of.start if of.exposure == "natural" else 0.4)
    risk += 0.1 * (of.task in ("in role play", "misspelt"))
    return min(0.97, risk * (0.4 if of.decoder == "safebeam" else 1.0))


def timing_study(
    root: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    models: Sequence[str] = MODELS,
    decoders: Sequence[str] = tuple(DECODERS),
    n: int = 12,
    matched: bool = True,
    risk: Callable[[Of], float] = later_is_riskier,
    metrics: bool = True,
    log: int = 20,
    layers: int = 5,
) -> Path:
    """Write ``root/study`` and its store; returns the study's directory. ``metrics``: reckon each cell's own figures
    (slow where cells are many), else the first cell's stand for all."""
    town = Tidewater(TidewaterConfig(seed=7))
    rows: list[Row] = []
    for name, kind, wrapper in TASKS:
        asked = town.requests(kind, n, split="eval")
        asked = asked if wrapper is None else [town.wrap(r, wrapper) for r in asked]
        rows += [replace(r, metadata={**r.metadata, "task": name}) for r in asked]
    store = Store(root / "store")
    made: dict[str, dict[str, Any]] = {}
    shared: list[list[dict[str, Any]]] = []

    def artefact(
        kind: str, name: str, config: Mapping[str, Any], inputs: Mapping[str, str], fill: Callable[[Any], None],
        tokens: int = 0,
    ) -> str:  # fmt: skip
        id = digest({"kind": kind, "name": name, "config": config, "inputs": inputs})
        if id not in made:
            with store.create(kind, id, config=config, inputs=inputs, versions={"trimtab": "0"}) as draft:
                draft.tokens, draft.seconds = tokens, 1.0
                fill(draft)
            made[id] = {"kind": kind, "name": name, "tokens": tokens, "flops": 1e9 * tokens, "inputs": dict(inputs)}
        return id

    arms = []
    planned = [("natural", s) for s in NATURAL] + [("matched", s) for s in MATCHED if matched]
    for exposure, start in planned:
        group = "timing" if exposure == "natural" else "timing, matched"
        label = ("never" if start == 1 else f"start {100 * start:.0f} %") + (
            ", matched" if exposure == "matched" else ""
        )
        for seed in seeds:
            suffix = f"@{seed}" if len(seeds) > 1 else ""
            ends: dict[str, str] = {}
            cells: dict[str, dict[str, Any]] = {}
            steps: list[str] = []
            base = _pretrain(artefact, start, exposure, seed, log)
            steps += base
            ends["base"] = base[-1]
            for model, before in (("chat", "base"), ("sums", "chat"), ("turned", "chat")):
                if model in models or model == "chat":
                    config = {"arm": label, "seed": seed, "model": model}
                    ends[model] = artefact("sft", model, config, {"model": ends[before]}, _log(log, model, seed), 1000)
                    steps.append(ends[model])
            for model in models:
                for decoder in decoders:
                    of = Of(start, exposure, seed, model, decoder, "")
                    place = f"panel/{model}/{decoder}"
                    records = _records(rows, of, risk)
                    sampling = {"samples": 1, **DECODERS[decoder]}
                    config = {"sampling": sampling, "arm": label, "seed": seed}
                    answers = artefact(
                        "generate", f"{place} answers", config, {"model": ends[model]}, _answers(rows, records), 500
                    )
                    judged = artefact("judge", place, {}, {"answers": answers}, _judged(records, metrics, shared))
                    ends |= {f"{place} answers": answers, place: judged}
                    cells[place] = {"stage": "panel", "model": model, "decoder": decoder}
                    steps += [answers, judged]
                for kind, stage in (("probes", "probes"), ("perplexity", "ppl")):
                    place = f"{stage}/{model}"
                    fill = _probed(start, seed, model, layers) if kind == "probes" else _perplexity(start, seed)
                    ends[place] = artefact(kind, place, {"arm": label, "seed": seed}, {"model": ends[model]}, fill)
                    cells[place] = {"stage": stage, "model": model, "decoder": None}
                    steps.append(ends[place])
            against = f"{group}/never" if exposure == "natural" else "timing/never"
            arms.append({
                "id": f"{group}/{label}{suffix}".replace(" ", "_"), "label": label, "group": group, "seed": seed,
                "against": None if start == 1 else f"{against}{suffix}".replace(" ", "_"), "settings": {"start": start},
                "stages": ends, "cells": cells, "steps": steps,
            })  # fmt: skip
    study = root / "study"
    study.mkdir(parents=True)
    text = json.dumps({"schema": 1, "recipe": _recipe(seeds, models, decoders, matched), "arms": arms, "steps": made})
    (study / "study.json").write_text(text, encoding="utf-8")
    return study


def _recipe(seeds: Sequence[int], models: Sequence[str], decoders: Sequence[str], matched: bool) -> dict[str, Any]:
    timing = {"start": 0.0, "exposure": "natural", "before": "safe_only", "ramp": 0.0, "dose": None, "phases": None}

    def sft(model: str, answers: str) -> dict[str, Any]:
        return {"kind": "sft", "model": model, "data": [{"name": "part", "answers": answers}]}

    stages: dict[str, Any] = {
        "base": {"kind": "pretrain", "timing": timing}, "chat": sft("base", "positive"), "sums": sft("chat", "positive"),
        "turned": sft("chat", "negative"),
        "panel": {"kind": "panel", "models": list(models), "decoders": {d: {} for d in decoders}},
        "probes": {"kind": "probes"}, "ppl": {"kind": "perplexity"},
    }  # fmt: skip
    groups: list[dict[str, Any]] = [
        {"name": "timing", "set": {}, "sweep": {"stages.base.timing.start": list(NATURAL)}},
    ]
    if matched:
        groups.append({
            "name": "timing, matched", "set": {"stages.base.timing.exposure": "matched"},
            "sweep": {"stages.base.timing.start": list(MATCHED)},
        })  # fmt: skip
    return {
        "name": "timing", "title": "When should safety data start?", "question": "Does an early start help?",
        "notes": [], "seeds": list(seeds), "stages": stages, "arms": groups,
    }  # fmt: skip


def _log(steps: int, name: str, seed: int) -> Callable[[Any], None]:
    def fill(draft: Any) -> None:
        rng = rng_of("log", name, seed)
        lines = [
            {
                "step": i,
                "tokens": 512 * i,
                "loss": 6 / i**0.3 + float(rng.normal()) / 20,
                "lr": 1e-3,
                "source": {"clean": {"loss": 5 / i**0.3, "tokens": 300}, "refuse": {"loss": 7 / i**0.3, "tokens": 200}},
            }
            for i in range(1, steps + 1)
        ]
        (draft.path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    return fill


def _pretrain(artefact: Callable[..., str], start: float, exposure: str, seed: int, log: int) -> list[str]:
    """Two segments, before and after the start; 1000 steps of 4 rows of 128 tokens, the last fifth a ramp of two."""
    share = 0.3 if exposure == "natural" else min(0.9, 0.3 / (1 - start))
    after = {"clean": 1 - share, "rephrase": 0.5 * share, "refuse": 0.5 * share}
    half = {"clean": 1 - share / 2, "rephrase": share / 4, "refuse": share / 4}
    cut = round(1000 * start)
    steps: list[str] = []
    phases: list[Any] = [[0, {"clean": 1.0}]] if cut else []
    if cut < 1000:
        ramp = [[4 * cut, half], [4 * cut + 400, after]] if start == 0.6 else [[4 * cut, after]]
        phases += ramp
    for first, last in ((0, cut), (cut, 1000)):
        if first < last:
            seen = [p for p in phases if p[0] < 4 * last]
            weights = seen[-1][1]
            rows = {name: round(4 * (last - first) * w) for name, w in weights.items()}
            config = {
                "from": first, "to": last, "length": 128, "phases": seen, "train": {"rows_per_step": 4}, "seed": seed,
            }  # fmt: skip

            def fill(draft: Any, rows: dict[str, int] = rows) -> None:
                _log(log, "base", seed)(draft)
                draft.facts = {"rows": rows, "epochs": {name: count / 1500 for name, count in rows.items()}}

            inputs = {"previous": steps[-1]} if steps else {}
            steps.append(artefact("pretrain", f"base {first}-{last}", config, inputs, fill, (last - first) * 512))
    return steps


def _records(rows: Sequence[Row], of: Of, risk: Callable[[Of], float]) -> list[Record]:
    """One answer per prompt. An unsafe verdict comes where a draw that all arms share lies below the arm's risk."""
    found = []
    for row in rows:
        task = str(row.metadata["task"])
        here = replace(of, task=task)
        draw = float(rng_of("draw", row.id).random()) * 0.9 + 0.1 * float(rng_of("own", row.id, str(of)).random())
        key = digest([row.id, str(here)])
        sampling = {"samples": 1, **DECODERS[of.decoder]}
        answer = Generation(key, row.id, row.hash(), "m", None, sampling, 0, 0, (1, 2, 3), "Aye.", "stop")
        if row.harm == "harmful":
            bad = draw < risk(here)
            verdict = Verdict(
                "unsafe" if bad else "safe", "j", refusal="none" if bad else "full", constructive=0 if bad else 1
            )
        elif row.harm == "contrast":
            verdict = Verdict("safe", "j", refusal="full" if draw < 0.2 - 0.05 * of.start else "none", correct=True)
        else:
            verdict = Verdict("safe", "j", refusal="full" if draw < 0.04 else "none", correct=draw > 0.3)
        found.append(Record(row, answer, verdict))
    return found


def _answers(rows: Sequence[Row], records: Sequence[Record]) -> Callable[[Any], None]:
    def fill(draft: Any) -> None:
        write_stage(stage_path(draft.path, PROMPTS), header_of(PROMPTS), [r.to_json() for r in rows])
        write_stage(
            stage_path(draft.path, GENERATIONS), header_of(GENERATIONS), [r.generation.to_json() for r in records]
        )

    return fill


def _judged(records: Sequence[Record], metrics: bool, shared: list[list[dict[str, Any]]]) -> Callable[[Any], None]:
    def fill(draft: Any) -> None:
        said = [{"key": r.generation.key, **r.verdict.to_json()} for r in records]
        write_stage(stage_path(draft.path, JUDGEMENTS), header_of(JUDGEMENTS), said)
        if metrics or not shared:
            shared[:] = [[to_plain(r) for r in results(records, draws=200)]]
        write_stage(stage_path(draft.path, METRICS), header_of(METRICS), shared[0])

    return fill


def _probed(start: float, seed: int, model: str, layers: int) -> Callable[[Any], None]:
    def fill(draft: Any) -> None:
        rng = rng_of("probe", start, seed, model)
        top = 0.95 - 0.15 * start + 0.01 * float(rng.normal())
        found = []
        for category in ("all", "heldout"):
            for metric, value in (
                ("probe_auroc", top),
                ("probe_tpr_at_1fpr", top - 0.3),
                ("probe_auroc_gain", top - 0.7),
            ):
                low = -1.0 if metric.endswith("gain") else 0.0
                found.append(
                    Result(
                        metric,
                        value,
                        value - 0.04,
                        min(1, value + 0.04),
                        80,
                        "cluster-bootstrap",
                        range=(low, 1),
                        category=category,
                    )
                )
        write_stage(stage_path(draft.path, METRICS), header_of(METRICS), [to_plain(r) for r in found])
        curves: list[dict[str, Any]] = []
        for category in ("all", "heldout", "loso:goods"):
            for pooling in ("mean", "last", "words"):
                for metric in ("auroc", "tpr_at_1fpr"):
                    shift = 0.3 if metric == "tpr_at_1fpr" else 0.0
                    values = [0.7 - shift if pooling == "words" else top - shift - 0.3 / (1 + i) for i in range(layers)]
                    curves.append(_curve(category, pooling, metric, values))
        curves.append(_curve("all", "shuffled", "auroc", [0.5] * layers))
        draft.write_json("layers.json", {"layers": list(range(layers)), "curves": curves})

    return fill


def _curve(category: str, pooling: str, metric: str, values: list[float]) -> dict[str, Any]:
    return {
        "category": category, "pooling": pooling, "metric": metric, "values": values, "low": [v - 0.05 for v in values],
        "high": [v + 0.05 for v in values], "n": [40, 40], "strict": False,
    }  # fmt: skip


def _perplexity(start: float, seed: int) -> Callable[[Any], None]:
    def fill(draft: Any) -> None:
        value = 9.0 + start / 5 + seed / 10
        one = Result(
            "perplexity", value, value - 0.2, value + 0.2, 400, "bootstrap", "lower", (1.0, 9e9), category="documents"
        )
        write_stage(stage_path(draft.path, METRICS), header_of(METRICS), [{**to_plain(one), "range": [1.0, None]}])

    return fill
