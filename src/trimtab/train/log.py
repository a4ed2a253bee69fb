"""The two logs of a run. ``log.jsonl`` holds what the data, the seed and the config decide, and nothing else,
so that an interrupted run leaves the same bytes as an uninterrupted one; ``timing.jsonl`` holds what the
machine decides.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from trimtab.artifact import is_no_space, no_space, write_atomic
from trimtab.errors import Fault

LOG, TIMING = "log.jsonl", "timing.jsonl"


class RunLog:
    """Both files of one run, cut back to ``start`` and open for appending; one line per logged step."""

    def __init__(self, work: Path, start: int, notes: Sequence[str] = ()) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.work = work
        for name in (LOG, TIMING):
            cut_back(work / name, start)
        self._log, self._timing = ((work / name).open("a", encoding="utf-8") for name in (LOG, TIMING))
        self._append(self._timing, {"step": start, "began": True, "notes": list(notes)})

    def write(self, record: Mapping[str, Any], seconds: float, speed: float) -> None:
        """record: the figures, with their ``step``; seconds: since the call began; speed: tokens per
        second."""
        self._append(self._log, record)
        self._append(self._timing, {"step": record["step"], "seconds": seconds, "tokens_per_second": speed})

    def _append(self, file: IO[str], record: Mapping[str, Any]) -> None:
        try:
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
        except OSError as error:
            if is_no_space(error):
                raise no_space(self.work) from error
            raise Fault(f"cannot write {file.name}: {error.strerror or error}") from error

    def sync(self) -> None:
        """On the disk, not only in the system's buffers."""
        os.fsync(self._log.fileno())

    def close(self) -> None:
        self._log.close()
        self._timing.close()


def cut_back(path: Path, step: int) -> None:
    """Drop the lines after ``step`` (and a half-written last one): what comes after the checkpoint is trained
    again."""
    if not path.exists():
        return
    kept = []
    # Only "\n" ends a line: the text is written unescaped and may hold U+2028, at which str.splitlines would part it.
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            whole = json.loads(line.decode("utf-8"))["step"] <= step
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            break
        kept.append(line)
    write_atomic(path, b"".join(line + b"\n" for line in kept))


def seconds_of(work: Path) -> float:
    """Seconds that a finished training took, the parts before an interruption included as far as they count."""
    total, part = 0.0, 0.0
    for line in (work / TIMING).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record.get("began"):
            total, part = total + part, 0.0
        else:
            part = record["seconds"]
    return total + part


def flat(record: Mapping[str, Any], prefix: str = "train") -> dict[str, float]:
    """Nested figures as the trackers want them: ``train/loss``, ``train/source/web/loss``; ``step`` is left
    out."""
    out: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}/{key}")
        elif key != "step":
            out[f"{prefix}/{key}"] = value
    return out
