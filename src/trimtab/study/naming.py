"""The name of a step: a hash of its config, its inputs and the code that it runs, without what cannot change its artefact."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import trimtab
from trimtab.artifact import sha256_file
from trimtab.seeds import digest

_ANSWERING = (
    "world",
    "data",
    "levers",
    "models",
    "generate",
    "evaluate/panel.py",
    "evaluate/targets.py",
    "evaluate/completion.py",
    "evaluate/conditions.py",
    "evaluate/attacks",
    "evaluate/run.py",
    "evaluate/files.py",
    "study/steps/common.py",
)
_CODE: dict[str, tuple[str, ...]] = {
    "scorer": (
        "world",
        "data",
        "corpus",
        "models",
        "train/scorer.py",
        "study/steps/scorer.py",
        "study/steps/common.py",
    ),
    "corpus": (
        *_ANSWERING,
        "corpus",
        "endpoint.py",
        "study/steps/writer.py",
        "study/steps/corpus.py",
    ),
    "tokenizer": ("models", "data", "corpus", "study/steps/corpus.py", "study/steps/common.py"),
    "tokens": ("models", "data", "corpus", "study/steps/corpus.py"),
    "pretrain": ("models", "data", "train", "study/steps/pretrain.py", "study/steps/common.py"),
    "chats": ("world", "data", "levers", "models", "study/steps/chat.py", "study/steps/common.py"),
    "packed": ("data", "levers", "study/steps/chat.py"),
    "sft": ("models", "data", "levers/modes.py", "train", "study/steps/sft.py", "study/steps/common.py"),
    "adapter": ("models", "data", "levers/modes.py", "train", "study/steps/sft.py", "study/steps/common.py"),
    "dpo": (
        "world",
        "data",
        "levers",
        "models",
        "train",
        "study/steps/chat.py",
        "study/steps/dpo.py",
        "study/steps/common.py",
    ),
    "distill": (
        *_ANSWERING,
        "evaluate",
        "endpoint.py",
        "study/steps/answering.py",
        "study/steps/chat.py",
        "study/steps/distill.py",
    ),
    "generate": (*_ANSWERING, "study/steps/answering.py", "study/steps/panel.py"),
    "judge": ("world", "evaluate", "endpoint.py", "study/steps/answering.py", "study/steps/panel.py"),
    "probes": (*_ANSWERING, "evaluate", "analyze", "study/steps/analyze.py"),
    "margin": (*_ANSWERING, "evaluate/metrics.py", "analyze", "study/steps/analyze.py", "study/steps/margin.py"),
    "audit": (
        *_ANSWERING,
        "evaluate",
        "analyze",
        "study/steps/analyze.py",
        "study/steps/margin.py",
        "study/steps/audit.py",
    ),
    "perplexity": (
        "world",
        "data",
        "models",
        "evaluate/files.py",
        "evaluate/metrics.py",
        "analyze",
        "study/steps/analyze.py",
    ),
    "token_analysis": (
        "world",
        "data",
        "levers",
        "models",
        "evaluate/files.py",
        "evaluate/metrics.py",
        "analyze",
        "study/steps/analyze.py",
        "study/steps/chat.py",
        "study/steps/common.py",
        "study/steps/tokens.py",
    ),
}
"""The code that a kind of step runs: a change there gives its steps new names, so no stale work is reused."""


def name_of(kind: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The step's id (sha256, hex)."""
    return digest({"kind": kind, "config": _telling(config), "inputs": inputs, "code": code_version(kind)})


_SILENT = ("checkpoint_every", "tracker")
_ASKING = frozenset({"key_env", "concurrency", "backoff", "price_in", "price_out", "max_unanswered"})
"""How a service is asked, what that costs and when it is given up; not what it answers."""


def _telling(config: Mapping[str, Any]) -> dict[str, Any]:
    """A step's config without what cannot change its artefact: how often it is saved, and where a data file lies."""
    told = dict(config)
    told.pop("executor", None)  # where a corpus is built does not change it
    if "train" in told:
        told["train"] = {key: value for key, value in told["train"].items() if key not in _SILENT}
    for key in ("data", "prompts", "tasks", "config", "store"):
        if key in told:
            told[key] = _without_paths(told[key])
    for key in ("config", "judge"):
        if key in told:
            told[key] = _without_asking(told[key])
    return told


def _without_paths(value: Any) -> Any:
    """Where a file lies does not matter: its content is hashed beside it."""
    if isinstance(value, Mapping):
        return {k: None if k == "path" else _without_paths(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_paths(part) for part in value]
    return value


def _without_asking(value: Any) -> Any:
    """Settings without how hard a service is asked: answers that were paid for are not bought again for that."""
    if isinstance(value, Mapping):
        return {k: _without_asking(v) for k, v in value.items() if k not in _ASKING}
    if isinstance(value, (list, tuple)):
        return [_without_asking(part) for part in value]
    return value


@cache
def code_version(kind: str) -> str:
    """sha256 over the source files that a kind of step runs."""
    root = Path(trimtab.__file__).parent
    files: list[Path] = []
    for name in ("types.py", "seeds.py", *_CODE[kind]):
        path = root / name
        files += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return digest({str(file.relative_to(root)): sha256_file(file) for file in files})
