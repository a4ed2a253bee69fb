"""A prefix study on disk without its training: capabilities x sizes x ratios x seeds, with made-up verdicts of known rates.

``right`` says how often an answer is right (or safe), so that a test knows what the report must say. Prompts are
Tidewater's; answers are a word and verdicts are dealt, not judged. Arms may have a token analysis.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab.analyze.metrics import plain_row
from trimtab.artifact import Store
from trimtab.evaluate.figures import results
from trimtab.evaluate.files import GENERATIONS, JUDGEMENTS, METRICS, PROMPTS, header_of, stage_path, write_stage
from trimtab.evaluate.metrics import Record, to_plain
from trimtab.seeds import digest, rng_of
from trimtab.types import Generation, Result, Row, Verdict
from trimtab.world.tidewater import Tidewater, TidewaterConfig

SIZES = {"small": 1e6, "medium": 4e6, "large": 9e6}
DECODERS = {"greedy": {"temperature": 0.0, "samples": 1}, "sampled": {"temperature": 1.0, "samples": 4}}
TASKS: dict[str, tuple[tuple[str, str, str | None], ...]] = {
    "mathematics": (("sums", "arithmetic", None),),
    "safety": (
        ("hazards held out", "harmful-heldout", None), ("in role play", "harmful-heldout", "roleplay"),
        ("contrasts", "contrast-heldout", None), ("goods", "benign", None),
    ),
    "coding": (("small programs", "code", None),),
    "factuality": (("town facts", "fact", None),),
}  # fmt: skip
SENTENCES = {"mathematics": "reasoning", "safety": "safety", "coding": "coding", "factuality": "factuality"}


@dataclass(frozen=True)
class Of:
    """Which cell an answer belongs to."""

    capability: str
    size: str
    ratio: float
    seed: int
    decoder: str
    task: str


def as_the_paper_says(of: Of) -> float:
    """Mathematics and safety gain, coding loses a little, factuality stays."""
    level = {"small": 0.35, "medium": 0.45, "large": 0.55}[of.size]
    gain = {"mathematics": 0.25, "safety": 0.3, "coding": -0.12, "factuality": 0.0}[of.capability]
    return level + gain * of.ratio


def prefix_study(
    root: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    capabilities: Sequence[str] = tuple(TASKS),
    sizes: Sequence[str] = tuple(SIZES),
    ratios: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    n: int = 12,
    right: Callable[[Of], float] = as_the_paper_says,
    log: int = 20,
    tokens: Sequence[str] = (),
    keyword: bool = False,
    metrics: bool = False,
) -> Path:
    """Write ``root/study`` and its store; returns the study's directory. ``tokens``: capabilities whose largest size has
    token analyses; ``keyword``: one more group, mathematics with the keyword set, without an arm at ratio 0 of its own."""
    town = Tidewater(TidewaterConfig(seed=7))
    store = Store(root / "store")
    made: dict[str, dict[str, Any]] = {}
    shared: list[list[dict[str, Any]]] = []

    def artefact(
        kind: str, name: str, config: Mapping[str, Any], inputs: Mapping[str, str], fill: Callable[[Any], None],
        tokens: int = 0, flops: float = 0.0,
    ) -> str:  # fmt: skip
        id = digest({"kind": kind, "name": name, "config": config, "inputs": inputs})
        if id not in made:
            with store.create(kind, id, config=config, inputs=inputs, versions={"trimtab": "0"}) as draft:
                draft.tokens, draft.seconds = tokens, 1.0
                fill(draft)
            made[id] = {"kind": kind, "name": name, "tokens": tokens, "flops": flops, "inputs": dict(inputs)}
        return id

    arms = []
    groups = [(c, c, {}, ratios) for c in capabilities]
    if keyword:
        groups.append(("mathematics, keyword", "mathematics", {"variant": "keyword"}, [r for r in ratios if r]))
    for group, capability, form, swept in groups:
        rows = _rows(town, capability, n)
        for size in sizes:
            for ratio in swept:
                label = f"{group} {size} {100 * ratio:g} %"
                for seed in seeds:
                    suffix = f"@{seed}" if len(seeds) > 1 else ""
                    config = {"size": size, "seed": seed}
                    base = artefact("pretrain", "base 0-10", {
                        "from": 0, "to": 10, "length": 128, "phases": [[0, {"clean": 1.0}]],
                        "train": {"rows_per_step": 4}, **config,
                    }, {}, _pretrained, 5120, 5120 * SIZES[size])  # fmt: skip
                    config = {**config, "ratio": ratio, "capability": capability, "form": dict(form) if ratio else {}}
                    packed = artefact("packed", "tuned", {**config, "model": None}, {}, _packed)
                    inputs = {"model": base, "packed": packed}
                    tuned = artefact(
                        "sft", "tuned", config, inputs, _log(log, ratio, size, seed), 1000, 1000 * SIZES[size]
                    )
                    ends, cells, steps = {"base": base, "tuned": tuned}, {}, [base, packed, tuned]
                    for decoder, sampling in DECODERS.items():
                        of = Of(capability, size, ratio, seed, decoder, "")
                        records = _records(rows, of, right)
                        place = f"panel/tuned/{decoder}"
                        answers = artefact(
                            "generate", f"{place} answers", {"sampling": sampling}, {"model": tuned},
                            _answers(rows, records), 500,
                        )  # fmt: skip
                        judged = artefact("judge", place, {}, {"answers": answers}, _judged(records, metrics, shared))
                        ends |= {f"{place} answers": answers, place: judged}
                        cells[place] = {"stage": "panel", "model": "tuned", "decoder": decoder}
                        steps += [answers, judged]
                    if capability in tokens and size == sizes[-1] and not form:
                        analysed = artefact("token_analysis", "tokens", {}, {"model": tuned}, _analysed(ratio, seed))
                        ends["tokens"] = analysed
                        steps.append(analysed)
                    arms.append({
                        "id": f"{group}/{label}{suffix}".replace(" ", "_"), "label": label, "group": group, "seed": seed,
                        "against": None, "settings": {"base.model": size, "ratio": ratio}, "stages": ends,
                        "cells": cells, "steps": steps,
                    })  # fmt: skip
    study = root / "study"
    study.mkdir(parents=True)
    recipe = _recipe(seeds, groups, sizes)
    text = json.dumps({"schema": 1, "recipe": recipe, "arms": arms, "steps": made})
    (study / "study.json").write_text(text, encoding="utf-8")
    return study


def _recipe(seeds: Sequence[int], groups: Sequence[Any], sizes: Sequence[str]) -> dict[str, Any]:
    stages: dict[str, Any] = {
        "base": {"kind": "pretrain", "timing": None, "model": {}},
        "tuned": {"kind": "sft", "model": "base", "data": [{"name": "part", "answers": "positive"}], "prefix": {"ratio": 0.0}},
        "panel": {"kind": "panel", "models": ["tuned"], "decoders": {d: {} for d in DECODERS}},
        "tokens": {"kind": "token_analysis"},
    }  # fmt: skip
    arms = [
        {
            "name": group,
            "set": {
                "stages.tuned.prefix.capability": SENTENCES[capability], "stages.tuned.data": [{"name": capability}],
                **{f"stages.tuned.prefix.{k}": v for k, v in form.items()},
            },
            "sweep": {"stages.base.model": list(sizes), "stages.tuned.prefix.ratio": list(swept)},
        }
        for group, capability, form, swept in groups
    ]  # fmt: skip
    return {
        "name": "prefix", "title": "How should a training answer open?", "question": "Does an opening sentence help?",
        "notes": [], "seeds": list(seeds), "stages": stages, "arms": arms,
    }  # fmt: skip


def _rows(town: Tidewater, capability: str, n: int) -> list[Row]:
    rows: list[Row] = []
    for name, kind, wrapper in TASKS[capability]:
        asked = town.requests(kind, n, split="eval")
        asked = asked if wrapper is None else [town.wrap(r, wrapper) for r in asked]
        rows += [replace(r, metadata={**r.metadata, "task": name}) for r in asked]
    return rows


def _records(rows: Sequence[Row], of: Of, right: Callable[[Of], float]) -> list[Record]:
    """Answers to every prompt; one is right (or safe) where a draw that all arms share lies below the arm's rate."""
    found = []
    sampling = DECODERS[of.decoder]
    for row in rows:
        digested = row.hash()
        here = replace(of, task=str(row.metadata["task"]))
        for sample in range(int(sampling["samples"])):
            draw = 0.85 * float(rng_of("draw", row.id, of.seed, sample).random())
            draw += 0.15 * float(rng_of("own", row.id, str(of), sample).random())
            good = draw < right(here)
            key = digest([row.id, str(here), sample])
            text = "Aye." if good else f"Nay, {rng_of('say', row.id, sample).integers(9)}."
            answer = Generation(key, row.id, digested, "m", None, sampling, 0, sample, (1, 2, 3), text, "stop")
            if row.harm == "harmful":
                verdict = Verdict(
                    "safe" if good else "unsafe", "j", refusal="full" if good else "none", constructive=1 if good else 0
                )
            elif row.harm == "contrast":
                verdict = Verdict("safe", "j", refusal="full" if draw < 0.1 + 0.1 * of.ratio else "none", correct=True)
            else:
                verdict = Verdict("safe", "j", refusal="none", correct=good)
            found.append(Record(row, answer, verdict))
    return found


def _packed(draft: Any) -> None:
    draft.facts = {"base": "the same at every ratio"}


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


def _pretrained(draft: Any) -> None:
    lines = [{"step": i, "tokens": 512 * i, "loss": 5 / i**0.3, "lr": 1e-3} for i in range(1, 11)]
    (draft.path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    draft.facts = {"rows": {"clean": 40}, "epochs": {"clean": 0.2}}


def _log(steps: int, ratio: float, size: str, seed: int) -> Callable[[Any], None]:
    """A log by span: the prefix is learned sooner than the body, and pulls less and less."""

    def fill(draft: Any) -> None:
        lines = []
        for i in range(1, steps + 1):
            noise = float(rng_of("log", ratio, size, seed, i).normal()) / 20
            body = 3 / i**0.2 - SIZES[size] / 2e7 + noise
            span = {"body": {"loss": body, "tokens": 200, "share": 1.0, "logit_grad": 0.7}}
            if ratio:
                share = 40 * ratio / (200 + 40 * ratio)
                span["body"]["share"] = 1 - share
                span["prefix"] = {
                    "loss": 4 / i,
                    "tokens": round(40 * ratio),
                    "share": share,
                    "logit_grad": 0.9 / i**0.4,
                }
            lines.append({"step": i, "tokens": 500 * i, "loss": body, "lr": 1e-3, "span": span})
        (draft.path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    return fill


def ranking(ratio: float, seed: int = 0, pull: float = 1.6) -> dict[str, Any]:
    """A ``ranking.json``: prefix tokens pull ``pull`` times as hard as body tokens, "revised" twice that."""
    words = {" revised": 2 * pull, " logical": 1.8 * pull, "Let": pull, " me": 0.6 * pull, " step": 1.1 * pull}
    body = {" the": 0.8, " harbour": 1.2, " coins": 1.0, "\u202e<b>": 1.4}
    shift = 0.01 * seed

    def of(value: float, count: int) -> dict[str, Any]:
        ends = [value, value - 0.1, value + 0.1]
        return {"count": count, "loss": ends, "logit_grad": [e / 2 for e in ends], "head_grad": None, "grad_norm": ends}

    tokens = [
        {"token": token, "span": span, **of(value + shift, 40), "ratio": {"loss": value, "grad_norm": value}}
        for span, some in (("prefix", words), ("body", body))
        for token, value in some.items()
        if span == "body" or ratio
    ]
    tokens.sort(key=lambda t: -t["grad_norm"][0])
    spans = {"body": of(1.0, 900)} | ({"prefix": of(pull + shift, 200)} if ratio else {})
    positions = [
        {"span": span, "position": i, **of((pull if span == "prefix" else 1.0) / (1 + i / 8), 30)}
        for span in spans
        for i in range(12)
    ]
    said = [*words, *body] if ratio else list(body)
    sequence = {
        "row_id": "row-1", "tokens": said, "spans": ["prefix" if t in words else "body" for t in said],
        "trained": [t != "Let" for t in said],
        "values": {
            "loss": [None if t == "Let" else {**words, **body}[t] for t in said],
            "grad_norm": [None if t == "Let" else {**words, **body}[t] for t in said],
        },
    }  # fmt: skip
    return {
        "format": 1, "measures": ["loss", "logit_grad", "head_grad", "grad_norm"],
        "method": {"projections": 64, "parameters": 1000, "exact": False}, "rows": 20, "spans": spans, "tokens": tokens,
        "positions": positions, "sequences": [sequence],
    }  # fmt: skip


def _analysed(ratio: float, seed: int) -> Callable[[Any], None]:
    def fill(draft: Any) -> None:
        draft.write_json("ranking.json", ranking(ratio, seed))
        figure = Result(
            "token_grad_norm_ratio",
            1.5 + ratio,
            1.0,
            3.0,
            8,
            "bootstrap",
            range=(0.0, math.inf),
            category="prefix / body",
        )
        write_stage(stage_path(draft.path, METRICS), header_of(METRICS), [plain_row(figure)])

    return fill
