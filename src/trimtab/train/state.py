"""State of a run on disk: a directory of safetensors and one JSON file, no pickle; whole or absent.

A *checkpoint* (``work/checkpoint-<step>/``) holds the trained weights and the optimizer, and ends an
interruption. A *segment state* holds the optimizer only and goes beside a saved model, for the next segment
of the same budget; the hash of the weights that it belongs to keeps the two together. Both name the run
(settings, seed, data so far), so that a state of another run is refused. Tensors are stored under parameter
names, independent of order and of world size.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from trimtab.artifact import fsync, is_no_space, no_space, sha256_file
from trimtab.errors import Fault, UserError

STATE, OPTIMIZER, WEIGHTS = "state.json", "optimizer.safetensors", "weights.safetensors"
_PREFIX = "checkpoint-"
_SLOTS = ("exp_avg", "exp_avg_sq", "step")

Parameters = Mapping[str, nn.Parameter]


def save(
    path: Path,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    identity: Mapping[str, Any],
    weights: bool,
) -> None:
    """Write the state after ``step`` steps to the directory ``path``: a temporary one, flushed, then
    renamed."""
    draft = path.with_name(f".{path.name}.tmp")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        slots = {
            f"{name}::{slot}": optimizer.state[p][slot].detach().cpu().contiguous()
            for name, p in parameters.items()
            for slot in _SLOTS
            if p in optimizer.state
        }
        save_file(slots, draft / OPTIMIZER)
        if weights:
            save_file({name: p.detach().cpu().contiguous() for name, p in parameters.items()}, draft / WEIGHTS)
        body = {
            "step": step,
            "identity": dict(identity),
            "weights": weights_hash(parameters),
            "sha256": {file.name: sha256_file(file) for file in sorted(draft.iterdir())},
        }
        (draft / STATE).write_text(json.dumps(body, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        for file in draft.iterdir():
            fsync(file)
        fsync(draft)
        if path.exists():
            shutil.rmtree(path)
        draft.rename(path)
        fsync(path.parent)
    except Exception as error:
        if is_no_space(error):
            raise no_space(path.parent) from error
        if isinstance(error, OSError):
            raise Fault(f"cannot write the training state {path}: {error.strerror or error}") from error
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def read(path: Path) -> dict[str, Any]:
    """``state.json`` of a state whose files are all whole; Fault names the file that is not."""
    try:
        body: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
        files = dict(body["sha256"])
        _ = int(body["step"]), body["identity"], body["weights"]
    except FileNotFoundError:
        raise Fault(f"{path / STATE} is missing: {path} holds no training state") from None
    except (ValueError, KeyError, TypeError) as error:
        raise Fault(f"{path / STATE} is damaged ({error}); delete {path} and run again") from None
    for name, expected in files.items():
        if not (path / name).is_file() or sha256_file(path / name) != expected:
            raise Fault(f"{path / name} is missing or damaged; delete {path} and run again")
    return body


def load(path: Path, parameters: Parameters, optimizer: torch.optim.Optimizer) -> None:
    """Put the state back: the weights if it holds them (else they must be the ones it was saved with), the
    optimizer."""
    body = read(path)
    if (path / WEIGHTS).exists():
        stored = load_file(path / WEIGHTS)
        _same_names(path, set(stored), set(parameters))
        with torch.no_grad():
            for name, p in parameters.items():
                if stored[name].shape != p.shape:
                    raise UserError(f"{path}: {name} is {tuple(stored[name].shape)}, the model's {tuple(p.shape)}")
                p.copy_(stored[name])
    if weights_hash(parameters) != body["weights"]:
        raise UserError(f"{path} belongs to other weights than the model's; give the model saved beside it")
    slots = load_file(path / OPTIMIZER)
    _same_names(path, {key.rpartition("::")[0] for key in slots}, set(parameters))
    for name, p in parameters.items():
        # A copy, so that the memory is torch's own and not a mapped file's.
        optimizer.state[p] = {slot: slots[f"{name}::{slot}"].clone().to(p.device) for slot in _SLOTS}


def restore(
    work: Path,
    resume: Path | None,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    identity: Callable[[int], Mapping[str, Any]],
) -> tuple[int, list[str]]:
    """Go on from the newest whole checkpoint in ``work``, else from the segment state ``resume``, else from
    step 0.

    identity  of this run, data clipped to the given number of steps; the state's must be equal (UserError)

    Returns the step to go on at, and a note for each damaged checkpoint that was passed over (an older one
    gives the same result, only later).
    """
    notes = []
    for path in newest(work):
        try:
            body = read(path)
        except Fault as fault:
            notes.append(str(fault))
            continue
        return _take(path, body, parameters, optimizer, identity), notes
    if resume is not None:
        return _take(resume, read(resume), parameters, optimizer, identity), notes
    return 0, notes


def _take(
    path: Path,
    body: Mapping[str, Any],
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    identity: Callable[[int], Mapping[str, Any]],
) -> int:
    step = int(body["step"])
    mine = json.loads(json.dumps(identity(step)))
    odd = [key for key in mine if mine[key] != body["identity"].get(key)]
    if odd and odd[0] == "config":
        odd = [key for key, value in mine["config"].items() if value != body["identity"]["config"].get(key)] or odd
    if odd:
        raise UserError(f"{path} is the state of another run: it differs in {odd[0]!r}; use another work directory")
    load(path, parameters, optimizer)
    return step


def newest(work: Path) -> list[Path]:
    """The checkpoints in ``work``, the newest first."""
    found = [p for p in work.glob(f"{_PREFIX}*") if p.is_dir() and p.name[len(_PREFIX) :].isdigit()]
    return sorted(found, key=lambda p: int(p.name[len(_PREFIX) :]), reverse=True)


def checkpoint_path(work: Path, step: int) -> Path:
    return work / f"{_PREFIX}{step}"


def prune(work: Path, keep: int = 2) -> None:
    """Keep the newest ``keep`` checkpoints: if the last one is damaged there is one more to go on from."""
    for path in newest(work)[keep:]:
        shutil.rmtree(path)


def weights_hash(parameters: Parameters) -> str:
    """sha256 over names, dtypes and bytes of the parameters."""
    total = hashlib.sha256()
    for name, p in sorted(parameters.items()):
        total.update(f"{name} {p.dtype} {tuple(p.shape)}\n".encode())
        total.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _same_names(path: Path, stored: set[str], wanted: set[str]) -> None:
    odd = sorted(stored ^ wanted)
    if odd:
        raise UserError(f"{path} and the model differ in the parameter {odd[0]}; it is the state of another model")
