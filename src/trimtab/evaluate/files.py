"""The staged files of one evaluation: prompts -> attacks -> generations -> judgements -> metrics.

Each is JSON lines whose first line is a header: the stage, the whole resolved config, the hashes of template and system
prompt, versions. ``generations`` and ``judgements`` are append-only while a run is under way, each row under the hash of
all that made it; a line torn by a kill is cut off at the next start and made again. A finished stage is put in order and
replaced whole, so a run that was killed leaves the same bytes as one that was not. Judging reads ``generations`` alone,
so it can be done again, by another judge, into files of its own (``judgements-NAME.jsonl``, ``metrics-NAME.jsonl``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from trimtab.artifact import fsync, is_no_space, no_space, write_atomic
from trimtab.errors import Fault, UserError
from trimtab.evaluate.metrics import Record, from_plain, to_plain
from trimtab.evaluate.mode_metrics import aim_of
from trimtab.types import Generation, Result, Row, Verdict

SCHEMA = 1
HEADER = "trimtab_evaluation"
PROMPTS, ATTACKS, GENERATIONS, JUDGEMENTS, METRICS = "prompts", "attacks", "generations", "judgements", "metrics"
Json = dict[str, Any]
_VERDICT = {f.name for f in fields(Verdict)}


def stage_path(directory: Path, stage: str, judging: str | None = None) -> Path:
    """``directory/STAGE.jsonl``; ``STAGE-JUDGING.jsonl`` for a second judging of the same answers."""
    return directory / (f"{stage}.jsonl" if judging is None else f"{stage}-{judging}.jsonl")


def header_of(stage: str, **facts: Any) -> Json:
    """The first line of a stage's file."""
    return {HEADER: SCHEMA, "stage": stage, **facts}


def line_of(data: Mapping[str, Any]) -> str:
    """One row as a line; keys sorted, so that equal rows are equal bytes."""
    return json.dumps(data, ensure_ascii=False, sort_keys=True) + "\n"


def read_stage(path: Path) -> tuple[Json, list[Json]]:
    """Header and rows of a stage. A torn last line is left out; ``Fault`` for damage anywhere else, ``UserError`` for a
    file that is missing or no stage of an evaluation."""
    header, rows, end = _scan(path)
    tail = path.stat().st_size - end
    if tail and b"\n" in _tail(path, end):
        raise Fault(f"{path}: line {len(rows) + 2} is not a whole JSON object; delete the file and run again")
    return header, rows


def write_stage(path: Path, header: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a whole stage, or nothing."""
    write_atomic(path, "".join([line_of(header), *map(line_of, rows)]))


def resume_stage(
    path: Path,
    header: Mapping[str, Any],
    whole: Callable[[Json], object] = dict,
    instead: str = "choose another --out",
    decides: Callable[[Json], Json] = dict,
) -> list[Json]:
    """The whole rows of an earlier run of the same stage, up to the first for which ``whole`` raises; whatever a kill or
    a power cut left torn after them is cut off. ``decides``: of a header, what must be equal.

    ``UserError`` when the file was written under another header: its rows would not be this run's.
    """
    if not path.exists():
        write_stage(path, header, ())
        return []
    found, rows, end = _scan(path, whole)
    old, new = decides(found), decides(json.loads(line_of(header)))
    if old != new:
        changed = ", ".join(sorted(_changed(old, new))[:4])
        raise UserError(f"{path} holds an evaluation with other settings ({changed}); {instead}, or delete it")
    if end < path.stat().st_size:
        with path.open("r+b") as file:
            file.truncate(end)
    return rows


@contextmanager
def appending(path: Path) -> Iterator[Callable[[Sequence[Mapping[str, Any]]], None]]:
    """A function that appends rows to a stage and returns once they are on the disk."""

    def fault(error: OSError) -> Exception:
        return no_space(path.parent) if is_no_space(error) else Fault(f"{path}: {error.strerror}")

    try:
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        raise fault(error) from error

    def append(rows: Sequence[Mapping[str, Any]]) -> None:
        try:
            file.write("".join(map(line_of, rows)))
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:  # of this file: what fails in the work between two calls is not ours to explain
            raise fault(error) from error

    try:
        yield append
    finally:
        try:
            file.close()
        except OSError as error:
            raise fault(error) from error
    fsync(path.parent)


def _scan(path: Path, whole: Callable[[Json], object] = dict) -> tuple[Json, list[Json], int]:
    """Header, whole rows, and the byte where the last whole row ends."""
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is missing: {path.parent} is not an evaluation; `trimtab eval` makes one") from None
    rows: list[Json] = []
    end = 0
    # Only "\n" ends a line: answers are written unescaped and may hold U+2028, at which str.splitlines would part them.
    for line in data.split(b"\n")[:-1]:
        try:
            row = json.loads(line.decode("utf-8"))
            if not isinstance(row, dict):
                break
            if rows:  # the first is the header
                whole(row)
        except (ValueError, TypeError, KeyError, UserError):
            break
        rows.append(row)
        end += len(line) + 1
    if not rows or rows[0].get(HEADER) != SCHEMA:
        raise UserError(f"{path}: its first line is not the header of an evaluation; choose another directory")
    return rows[0], rows[1:], end


def _tail(path: Path, start: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read()


def _changed(old: Any, new: Any, name: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() | new.keys():
            yield from _changed(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name


# -- a whole evaluation --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """An evaluation on disk, read.

    header      first line of ``generations.jsonl``: config, model, hashes, versions
    judging     first line of ``judgements.jsonl``: which judges, their cards; empty before anything was judged
    rows        every prompt and every attempt, by id, in order
    verdicts    by ``Generation.key``
    """

    path: Path
    header: Json
    judging: Json
    rows: Mapping[str, Row]
    generations: Sequence[Generation]
    verdicts: Mapping[str, Verdict]
    results: Sequence[Result]

    @property
    def name(self) -> str:
        """What tables call the evaluation: the model's name, or the directory's where that is not known."""
        return str(self.header.get("model", {}).get("name") or self.path.name)

    def records(self) -> list[Record]:
        """Every judged answer, in the order of the files. ``UserError`` if some answer has no verdict yet."""
        missing = sum(g.key not in self.verdicts for g in self.generations)
        if missing:
            raise UserError(f"{self.path}: {missing} answers are not judged; `trimtab judge {self.path}` judges them")
        return self.judged()

    def judged(self) -> list[Record]:
        """The answers that are judged so far, in the order of the files."""
        facts = self.header.get("model")
        return [
            Record(self.rows[g.row_id], g, self.verdicts[g.key], aim_of(g.mode, facts))
            for g in self.generations
            if g.key in self.verdicts
        ]


def open_evaluation(
    directory: Path | str, judging: str | None = None, judged_in: Path | str | None = None
) -> Evaluation:
    """Read an evaluation; ``judging`` names a second judging, ``judged_in`` another directory that holds the judgements
    (a study keeps them apart). Unfinished ones can be read as far as they are."""
    directory = Path(directory)
    judged_at = directory if judged_in is None else Path(judged_in)
    header, answers = read_stage(stage_path(directory, GENERATIONS))
    rows: dict[str, Row] = {}
    for stage in (PROMPTS, ATTACKS):
        path = stage_path(directory, stage)
        if stage == PROMPTS or path.exists():
            rows.update((data["id"], Row.from_json(data)) for data in read_stage(path)[1])
    lost = next((a["row_id"] for a in answers if a["row_id"] not in rows), None)
    if lost is not None:
        raise Fault(
            f"{directory}: the prompt of row {lost!r} is neither in {PROMPTS}.jsonl nor in {ATTACKS}.jsonl; restore the "
            "file, or delete the directory and evaluate again"
        )
    judged: Json = {}
    verdicts: dict[str, Verdict] = {}
    path = stage_path(judged_at, JUDGEMENTS, judging)
    if judging is not None and not path.exists():
        start = f"{JUDGEMENTS}-"
        have = sorted(p.name[len(start) : -len(".jsonl")] for p in judged_at.glob(f"{start}*.jsonl"))
        raise UserError(f"{judged_at}: no judging {judging!r}; it has {', '.join(have) or 'none but the first'}")
    if path.exists():
        judged, said = read_stage(path)
        verdicts = {data["key"]: verdict_of(data) for data in said}
    path = stage_path(judged_at, METRICS, judging)
    results = [from_plain(data) for data in read_stage(path)[1]] if path.exists() else []
    return Evaluation(
        directory, header, judged, rows, [Generation.from_json(a) for a in answers], verdicts, results
    )  # fmt: skip


def verdict_of(data: Mapping[str, Any]) -> Verdict:
    """The verdict in a row of ``judgements.jsonl``."""
    return Verdict(**{k: v for k, v in data.items() if k in _VERDICT})


def write_evaluation(
    directory: Path,
    header: Mapping[str, Any],
    rows: Iterable[Row],
    generations: Iterable[Generation],
    *,
    judging: Mapping[str, Any] | None = None,
    verdicts: Mapping[str, Verdict] | None = None,
    results: Iterable[Result] = (),
) -> Evaluation:
    """Write a finished evaluation whose answers were made elsewhere (``interop``). ``header`` holds ``config`` and
    ``model`` (with its ``name``); ``UserError`` when ``directory`` holds an evaluation already."""
    if stage_path(directory, GENERATIONS).exists():
        raise UserError(f"{directory} holds an evaluation already; choose another --out, or delete it")
    plain: list[Json] = []
    attempts: list[Json] = []
    for row in rows:
        (attempts if "attack" in row.metadata else plain).append(row.to_json())
    write_stage(stage_path(directory, PROMPTS), header_of(PROMPTS, **header), plain)
    if attempts:
        write_stage(stage_path(directory, ATTACKS), header_of(ATTACKS, **header), attempts)
    if verdicts is not None:
        said = [{"key": key, **verdict.to_json()} for key, verdict in verdicts.items()]
        write_stage(stage_path(directory, JUDGEMENTS), header_of(JUDGEMENTS, **(judging or {})), said)
    if found := [to_plain(result) for result in results]:
        write_stage(stage_path(directory, METRICS), header_of(METRICS), found)
    answers = [generation.to_json() for generation in generations]
    write_stage(stage_path(directory, GENERATIONS), header_of(GENERATIONS, **header), answers)
    return open_evaluation(directory)
