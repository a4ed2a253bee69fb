"""An evaluation as JailbreakBench-style artefacts: JSON, one per attack and mode, one entry per harmful prompt.

The fields are those of JailbreakBench's own artefacts (arXiv 2404.01318; its ``artifact.py``). Its reader knows four
model names and only true or false for ``jailbroken``; here a prompt of which no judge could tell has null, so an
artefact with unscored prompts must be judged whole before that reader takes it. The export holds the model's answers.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from trimtab.artifact import write_atomic
from trimtab.data.thinking import begun
from trimtab.errors import UserError
from trimtab.evaluate.files import Evaluation
from trimtab.evaluate.metrics import Record, queries_of, risk
from trimtab.types import Row

AttackType = Literal["white_box", "black_box", "transfer", "manual"]
DIRECT = "direct"
"""The method of prompts that were asked as they are."""


def write_artefacts(
    evaluation: Evaluation,
    out: Path,
    *,
    attack: str | None = None,
    mode: str | None = None,
    attack_type: str | None = None,
) -> list[Path]:
    """Write the artefacts of an evaluation, or of one ``attack`` (``direct``: none) and ``mode`` (``none``: no token).

    ``out`` is a file (``*.json``) if there is one artefact, else a directory for ``<attack>-<mode>.json``. ``UserError``
    where nothing is judged, nothing is harmful, or several artefacts would go into one file.
    """
    if attack_type is not None and attack_type not in get_args(AttackType):
        raise UserError(f"attack_type: {attack_type!r} is not one of {', '.join(get_args(AttackType))}")
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in evaluation.records():
        if record.row.harm == "harmful":
            groups[_method(record.row), record.generation.mode or "none"].append(record)
    if not groups:
        raise UserError(f"{evaluation.path}: no answers to harmful prompts, so nothing for an artefact")
    chosen = {k: v for k, v in groups.items() if attack in (None, k[0]) and mode in (None, k[1])}
    has = ", ".join(f"{method} in mode {name}" for method, name in sorted(groups))
    if not chosen:
        raise UserError(f"{evaluation.path}: no such attack and mode; it has {has}")
    one_file = out.suffix == ".json" and not out.is_dir()
    if one_file and len(chosen) > 1:
        raise UserError(f"{out}: {len(chosen)} artefacts ({has}); choose with --attack and --mode, or give a directory")
    paths = []
    for (method, name), records in sorted(chosen.items()):
        path = out if one_file else out / f"{re.sub(r'[^A-Za-z0-9_.+-]', '_', f'{method}-{name}')}.json"
        data = artefact(evaluation, method, name, records, attack_type)
        write_atomic(path, json.dumps(data, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
        paths.append(path)
    return paths


def artefact(
    evaluation: Evaluation, method: str, mode: str, records: Sequence[Record], attack_type: str | None = None
) -> dict[str, Any]:
    """One artefact, JSON-ready. The success rate is over the prompts that a judge could tell; null if there are none."""
    by_base: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_base[str(record.row.metadata.get("base", record.row.id))].append(record)
    order = {id: number for number, id in enumerate(evaluation.rows)}
    bases = sorted(by_base, key=lambda id: (order.get(id, len(order)), id))
    entries = [_entry(evaluation, number, base, by_base[base]) for number, base in enumerate(bases)]
    told = [entry["jailbroken"] for entry in entries if entry["jailbroken"] is not None]
    replied = [entry["response_tokens"] for entry in entries]
    return {
        "parameters": {
            "method": method,
            "model": evaluation.name,
            "attack_type": attack_type,
            "defense": None,
            "attack_success_rate": sum(told) / len(told) if told else None,
            "total_number_of_jailbreaks": sum(told),
            "number_of_submitted_prompts": len(entries),
            "total_number_of_queries": sum(entry["number_of_queries"] for entry in entries),
            "total_prompt_tokens": None,
            "total_response_tokens": None if None in replied else sum(replied),
            "evaluation_llm_provider": "trimtab",
            "method_parameters": {"mode": mode, "unscored": len(entries) - len(told)},
        },
        "jailbreaks": entries,
    }


def _method(row: Row) -> str:
    return str(row.metadata.get("attack", DIRECT))


def _entry(evaluation: Evaluation, number: int, base: str, records: Sequence[Record]) -> dict[str, Any]:
    """One prompt: its first jailbreak, else an answer no judge could tell, else its first answer."""
    tried = sorted(records, key=lambda r: (int(r.row.metadata.get("attempt", 0)), *r.pair))
    said = [risk(record) for record in tried]
    broken = 1.0 in said
    shown = tried[said.index(1.0) if broken else said.index(None) if None in said else 0]
    asked = evaluation.rows.get(base, shown.row)
    ids = [len(record.generation.ids) for record in tried]
    local = any(ids)  # an endpoint's and an imported answer's tokens are not known
    return {
        "index": number,
        "goal": _request(asked),
        "behavior": str(asked.metadata.get("behavior", asked.id)),
        "category": asked.category or "",
        "prompt": _request(shown.row),
        "response": begun(str(shown.row.metadata.get("prefill", "")), shown.generation.text),
        "number_of_queries": queries_of(tried),
        "queries_to_jailbreak": queries_of(tried[: said.index(1.0) + 1]) if broken else None,
        "prompt_tokens": None,
        "response_tokens": sum(ids) if local else None,
        "jailbroken": True if broken else None if None in said else False,
    }


def _request(row: Row) -> str:
    """What is asked: the one user message, or the whole conversation where there is more."""
    messages = row.messages or ()
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
