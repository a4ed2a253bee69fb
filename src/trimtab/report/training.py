"""What a study's trainings logged and read: losses, shares of the sources, doses, cost, and the prefix lever's spans."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from trimtab.artifact import read_jsonl
from trimtab.errors import Fault
from trimtab.report.data import Cost, SpanCurve
from trimtab.report.ratios import Series
from trimtab.report.studied import Studied

_LOGGED = {"source": "by_source", "span": "by_span"}
"""What a training log calls the losses of its parts, and what ``ReportData.curves`` does."""
TRAINED = ("pretrain", "sft", "adapter", "dpo")
"""Kinds of steps that train a model."""
BINS = 40
"""Points of a curve by span."""
LAST = 0.1
"""Share of a training's logged steps whose mean loss stands for its end."""


def curves(study: Studied, arm: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The training logs. Of a grid, whose arms are many, the loss alone, and that by source of the first seed's
    pretraining; the artefacts keep the rest."""
    rows: list[dict[str, Any]] = []
    for id in arm["steps"]:
        step = study.steps[id]
        log = study.artifacts[id].path / "log.jsonl"
        if step["kind"] in TRAINED and log.exists():
            stage = step["name"].split(" ")[0] + (" (adapter)" if step["kind"] == "adapter" else "")
            for row in read_jsonl(log):
                kept = {k: v for k, v in row.items() if k not in _LOGGED}
                parts = {name: row[k] for k, name in _LOGGED.items() if row.get(k)}
                if study.gridded:
                    kept = {k: row[k] for k in ("step", "tokens", "loss")}
                    told = step["kind"] == "pretrain" and arm["seed"] == study.recipe["seeds"][0]
                    sources = parts.get("by_source", {}) if told else {}
                    parts = {"by_source": {n: {"loss": part["loss"]} for n, part in sources.items()}} if sources else {}
                rows.append({**kept, **parts, "stage": stage})
    return rows


def exposure(study: Studied, arm: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Share of each source in each pretraining segment, as it was read; a segment of several phases (a ramp) is split
    at them, with the shares that each phase keeps within one row."""
    rows, seen = [], 0
    for id in arm["steps"]:
        if study.steps[id]["kind"] == "pretrain":
            manifest = study.artifacts[id].manifest
            config, used = manifest["config"], manifest["facts"]["rows"]
            per_step = manifest["tokens"] // max(config["to"] - config["from"], 1)
            for last, weights in _pieces(config):
                seen = round(last * per_step)
                shares = used if weights is None else weights
                total = sum(shares.values())
                rows.append({"tokens": seen, "shares": {name: w / total for name, w in shares.items() if w}})
    return rows


def doses(study: Studied, arm: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tokens of each source that pretraining read, and passes over it."""
    rows: dict[str, int] = {}
    epochs: dict[str, float] = {}
    length = 0
    for id in arm["steps"]:
        if study.steps[id]["kind"] == "pretrain":
            manifest = study.artifacts[id].manifest
            length = manifest["config"]["length"]
            for name, count in manifest["facts"]["rows"].items():
                rows[name] = rows.get(name, 0) + count
            epochs |= manifest["facts"].get("epochs", {})
    return [
        {"source": name, "tokens": count * length, "epochs": epochs.get(name)} for name, count in rows.items() if count
    ]


def costs(study: Studied) -> Iterator[Cost]:
    for id, step in study.steps.items():
        manifest = study.artifacts[id].manifest
        tokens = manifest["tokens"]
        flops = step["flops"] * (tokens / step["tokens"] if step["tokens"] else 1)
        users = [arm["id"] for arm in study.arms if id in arm["steps"]]
        yield Cost(step["name"], step["kind"], users, tokens, flops, manifest["seconds"] or 0.0)


def _pieces(config: Mapping[str, Any]) -> Iterator[tuple[float, dict[str, float] | None]]:
    """A segment's phases as (last step, weights); weights None: one phase, whose rows were counted."""
    per_step = config["train"]["rows_per_step"]
    first, last = config["from"], config["to"]
    phases = [(row / per_step, weights) for row, weights in config["phases"]]
    inside = [
        (max(start, first), min(end, last), weights)
        for (start, weights), end in zip(phases, [*(start for start, _ in phases[1:]), float("inf")])
        if max(start, first) < min(end, last)
    ]
    for _, last, weights in inside:
        yield last, None if len(inside) == 1 else dict(weights)


# -- the prefix lever --------------------------------------------------------------------------------------------------


def weight(study: Studied, arm: str, stage: str) -> float:
    """Training FLOPs per token of an arm's stage: how heavy its model is; 0 where nobody knows."""
    for id in next(a for a in study.arms if a["id"] == arm)["steps"]:
        step = study.steps[id]
        if step["kind"] == "sft" and step["name"].split(" ")[0] == stage and step["tokens"]:
            return float(step["flops"] / step["tokens"])
    return 0.0


def strip_notes(study: Studied) -> Iterator[str]:
    """What strip mode removed from each training set, in a sentence."""
    for id, step in study.steps.items():
        told = study.artifacts[id].manifest["facts"].get("stripped") if step["kind"] == "chats" else None
        if told:
            most = ", ".join(f"“{o['text']}” ({o['rows']})" for o in told["openings"][:3])
            left = f" {told['emptied']} rows were nothing else and are left out." if told["emptied"] else ""
            yield (
                f"Boilerplate was stripped from {told['changed']} of {told['rows']} responses of {step['name']}, "
                f"{told['different']} different openings{': ' + most if most else ''}.{left}"
            )


def check_bases(study: Studied, series: Sequence[Series]) -> None:
    """``Fault`` where two ratios of a series were trained on other base rows, or in another order, in the same seed: their
    difference would not be the prefix's. (The plan shares the rows, so this is found only in a damaged store.)"""
    for one in series:
        found: dict[int, dict[str, str]] = {}
        for ids in one.at.values():
            for id in ids:
                arm = next(a for a in study.arms if a["id"] == id)
                packed = study.artifacts[study.artifacts[arm["stages"][one.prefix.stage]].manifest["inputs"]["packed"]]
                found.setdefault(arm["seed"], {})[packed.manifest["facts"]["base"]] = id
        for bases in found.values():
            if len(bases) > 1:
                raise Fault(
                    f"arms {' and '.join(bases.values())} differ in more than their prefixes: their base rows have other hashes"
                )


def _log(study: Studied, arm: Mapping[str, Any], stage: str) -> list[dict[str, Any]]:
    """The log of one sft stage of an arm."""
    id = arm["stages"].get(stage)
    return list(read_jsonl(study.artifacts[id].path / "log.jsonl")) if id is not None else []


def _logs(study: Studied, series: Sequence[Series]) -> Iterator[tuple[Series, float, str, list[dict[str, Any]]]]:
    """Series, ratio, arm id and log of every training of the lever."""
    of = {arm["id"]: arm for arm in study.arms}
    for one in series:
        for ratio, ids in one.at.items():
            for id in ids:
                yield one, ratio, id, _log(study, of[id], one.prefix.stage)


def end_losses(study: Studied, series: Sequence[Series]) -> dict[str, float]:
    """Arm -> mean loss of its body tokens over the last tenth of the logged steps; arms without a log by span have none."""
    found = {}
    for _, _, arm, rows in _logs(study, series):
        told = [row["span"]["body"]["loss"] for row in rows if "body" in (row.get("span") or {})]
        if told:
            last = told[-max(1, math.ceil(LAST * len(told))) :]
            found[arm] = sum(last) / len(last)
    return found


def _pull(part: Mapping[str, Any]) -> tuple[float, str]:
    """How hard a span pulls: its gradient's norm, or where that was not taken the logit gradients of its tokens together."""
    if "grad_norm" in part:
        return float(part["grad_norm"]), "gradient norm"
    return float(part["tokens"] * part["logit_grad"]), "logit gradient"


def pulls(study: Studied, series: Sequence[Series]) -> dict[str, float]:
    """Arm -> logit gradient of a prefix token over that of a body token, less one, mean over the training's logged steps."""
    found = {}
    for _, _, arm, rows in _logs(study, series):
        sums = {"prefix": [0.0, 0.0], "body": [0.0, 0.0]}
        for row in rows:
            for span, part in (row.get("span") or {}).items():
                if span in sums:
                    sums[span][0] += part["tokens"] * part["logit_grad"]
                    sums[span][1] += part["tokens"]
        if all(tokens and pull for pull, tokens in sums.values()):
            prefix, body = (pull / tokens for pull, tokens in sums.values())
            found[arm] = prefix / body - 1
    return found


def spans(study: Studied, series: Sequence[Series]) -> list[SpanCurve]:
    """Loss of prefix and body, and the prefix's share of tokens and gradient, of every arm with a prefix in it; mean over
    its seeds in at most ``BINS`` bins."""
    found = []
    logs: dict[tuple[int, float], list[list[dict[str, Any]]]] = {}
    for one, ratio, _, rows in _logs(study, series):
        if any("prefix" in (row.get("span") or {}) for row in rows):
            logs.setdefault((series.index(one), ratio), []).append(rows)
    for (place, ratio), runs in logs.items():
        one = series[place]
        binned = list(_binned(runs))
        measure = next(_pull(row["span"]["prefix"])[1] for row in runs[0] if "prefix" in (row.get("span") or {}))
        found.append(SpanCurve(
            one.at[ratio][0], one.group, one.label, ratio, [b["tokens"] for b in binned],
            {span: [b[span] for b in binned] for span in ("prefix", "body")},
            [b["token_share"] for b in binned], [b["gradient_share"] for b in binned], measure,
        ))  # fmt: skip
    return found


def _binned(runs: Sequence[Sequence[Mapping[str, Any]]]) -> Iterator[dict[str, Any]]:
    """The rows of several seeds' logs in bins of training tokens: mean losses, shares of sums."""
    rows = sorted((row for run in runs for row in run if row.get("span")), key=lambda row: row["tokens"])
    steps = sorted({row["tokens"] for row in rows})
    size = max(1, math.ceil(len(steps) / BINS))
    for i in range(0, len(steps), size):
        inside = set(steps[i : i + size])
        mine = [row["span"] for row in rows if row["tokens"] in inside]
        told = {s: [row[s] for row in mine if s in row] for s in ("prefix", "body")}
        counts = {s: sum(part["tokens"] for part in parts) for s, parts in told.items()}
        pull = {s: sum(_pull(part)[0] for part in parts) for s, parts in told.items()}
        yield {
            "tokens": round(sum(inside) / len(inside)),
            **{s: _mean([(part["loss"], part["tokens"]) for part in parts]) for s, parts in told.items()},
            "token_share": _share(counts), "gradient_share": _share(pull),
        }  # fmt: skip


def _mean(values: Iterable[tuple[float, float]]) -> float | None:
    told = list(values)
    total = sum(w for _, w in told)
    return round(sum(v * w for v, w in told) / total, 5) if total else None


def _share(of: Mapping[str, float]) -> float | None:
    total = sum(of.values())
    return round(of["prefix"] / total, 5) if total else None
