"""What steps share that run stages of an evaluation: progress, and files that a killed run leaves and a finished one keeps."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trimtab.artifact import write_atomic
from trimtab.evaluate import files
from trimtab.study.execute import Context


class Told:
    """Stages of an evaluation told to the step's own progress."""

    def __init__(self, context: Context) -> None:
        self.context = context

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        yield

    def update(self, finished: int, total: int, note: str, **more: Any) -> None:
        self.context.progress({"step": finished, "total": total, "note": note, **more})


def keep_only_ours(context: Context, identity: str) -> None:
    """Drop what a killed run left under other facts (another version of a library, say): it would not be this run's."""
    mark = context.work / "facts"
    if not mark.exists() or mark.read_text() != identity:
        for path in context.work.glob("*.jsonl"):
            path.unlink()
        write_atomic(mark, identity)


def move_stages(context: Context, *stages: str) -> None:
    """Finished files of an evaluation from the working directory into the artefact."""
    for stage in stages:
        path = files.stage_path(context.work, stage)
        if path.exists():
            shutil.copyfile(path, context.draft.path / path.name)
