"""Where a DataTrove pipeline runs: on this machine, on Slurm or on Ray, by one setting; an error in a block is one line.

DataTrove keeps what is done (``completions/<rank>``), so a run that was killed goes on with the parts that are missing. It
logs every step through loguru; here that is silent on this machine and kept in files on a cluster. What goes wrong inside a
part is written to ``errors/`` by the pipeline's last block (``reporting``) and raised here, because a cluster's executor
tells no more than that a part is missing.

Slurm's executor returns when the job is queued; ``run_pipeline`` waits for its parts, or for the job to be gone.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.artifact import is_no_space, no_space, write_atomic
from trimtab.corpus.config import ExecutorConfig
from trimtab.errors import Fault, TrimtabError, UserError

if TYPE_CHECKING:
    from datatrove.executor.base import PipelineExecutor
    from datatrove.pipeline.base import PipelineStep

POLL = 10.0
"""Seconds between two looks at the parts of a Slurm job."""
PATIENCE = 60
"""Looks at the queue, one after the other, that may fail: a controller that restarts does not end a job."""
_JOB = "slurm_job"


def run_pipeline(blocks: Sequence[PipelineStep], config: ExecutorConfig, work: Path) -> None:
    """Run the blocks over all ``config.tasks`` parts; parts that ``work`` holds as done are not done again.

    The last block does its work inside ``reporting(work, rank)``. Raises the error of the first part that failed, or
    ``Fault`` if a part did not finish.
    """
    shutil.rmtree(work / "errors", ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    executor = make_executor(blocks, config, work)
    try:
        with quiet():
            if config.kind == "slurm":
                _run_slurm(executor, work)
            elif config.kind == "local" and min(config.workers, config.tasks) == 1:
                _run_here(blocks, executor)
            else:
                executor.run()
    except TrimtabError:
        raise
    except Exception as error:
        if is_no_space(error):
            raise no_space(work) from error
        _raise_first(work)
        raise
    _raise_first(work)
    missing = executor.get_incomplete_ranks(skip_completed=True)
    if missing:
        raise Fault(
            f"executor: part {missing[0]} of {config.tasks} did not finish ({len(missing)} did not); the logs are in "
            f"{work}; the same command goes on with what is missing"
        )


def make_executor(blocks: Sequence[PipelineStep], config: ExecutorConfig, work: Path) -> PipelineExecutor:
    """DataTrove's executor for a setting; ``UserError`` where the cluster's tools are missing or 'partition' is."""
    from datatrove import executor

    logs = str(work)
    if config.kind == "local":
        workers = min(config.workers, config.tasks)
        return executor.LocalPipelineExecutor(list(blocks), tasks=config.tasks, workers=workers, logging_dir=logs)
    if config.kind == "ray":
        if importlib.util.find_spec("ray") is None:
            raise UserError("executor.kind: 'ray' needs Ray; run: pip install ray (or use 'local')")
        with quiet():  # it warns of a local logging_dir; docs/corpus.md says that the directory must be shared
            return executor.RayPipelineExecutor(
                list(blocks),
                tasks=config.tasks,
                workers=config.workers,
                logging_dir=logs,
                cpus_per_task=config.cpus_per_task,
                mem_per_cpu_gb=config.mem_per_cpu_gb,
            )
    if config.partition is None:
        raise UserError("executor.partition: Slurm needs the name of a partition (`sinfo` lists them)")
    if shutil.which("sbatch") is None:
        raise UserError("executor.kind: 'slurm' needs sbatch, which this machine does not have; run it on a login node")
    return executor.SlurmPipelineExecutor(
        list(blocks),
        tasks=config.tasks,
        workers=config.workers,
        time=config.time,
        partition=config.partition,
        cpus_per_task=config.cpus_per_task,
        mem_per_cpu_gb=config.mem_per_cpu_gb,
        logging_dir=logs,
        job_name="trimtab-corpus",
        qos="",
        # The job's shell may not have this environment on its path, and DataTrove's launcher is a script in it.
        env_command=f'export PATH="{Path(sys.executable).parent}:$PATH"',
        requeue=False,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """DataTrove's log, off."""
    silence()
    try:
        yield
    finally:
        from loguru import logger

        logger.enable("datatrove")


def silence() -> None:
    """DataTrove's log, off for good: what a block calls where it is unpacked in a worker process of its own."""
    from loguru import logger

    logger.disable("datatrove")


@contextmanager
def reporting(work: Path, rank: int) -> Iterator[None]:
    """Write what goes wrong inside to ``work/errors``, and raise it as an error that survives being sent on. A worker process
    in which it is used ends with the process that started it."""
    _follow()
    try:
        yield
    except Exception as error:
        known = isinstance(error, TrimtabError)
        said = str(error) if known else f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
        kind = "UserError" if isinstance(error, UserError) else "Fault"
        file = work / "errors" / f"{rank:05d}.json"
        if not known:
            said = f"corpus: unexpected {said:.300}; {file} shows where"
        with suppress(TrimtabError):  # a full disk: the error itself still says what was wrong
            write_atomic(file, json.dumps({"kind": kind, "said": said, "trace": traceback.format_exc()}))
        # A plain one: an error with a constructor of its own cannot be unpacked in the process that waits for it.
        raise (UserError if kind == "UserError" else Fault)(said) from error


_following = False


def _follow() -> None:
    """In one of the local executor's worker processes: end it as soon as its parent is gone. After ``kill -9`` it would go on
    with its part, move the half-written part of the next run into place and mark it as done."""
    global _following
    import multiprocess  # DataTrove's own

    parent = multiprocess.parent_process()
    if parent is None or _following:
        return
    _following = True

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_here(blocks: Sequence[PipelineStep], executor: PipelineExecutor) -> None:
    """The parts one after the other in this process. DataTrove's local executor would start a process to count them by,
    which outlives a ``kill -9``; its marks of what is done are kept, so that the number of workers may change."""
    for rank in executor.get_incomplete_ranks():
        data: Any = None
        for block in blocks:
            data = block(data, rank, executor.world_size)
        deque(data, maxlen=0)
        executor.mark_rank_as_completed(rank)


def _raise_first(work: Path) -> None:
    for file in sorted((work / "errors").glob("*.json")):
        told = json.loads(file.read_text(encoding="utf-8"))
        raise (UserError if told["kind"] == "UserError" else Fault)(told["said"])


def _run_slurm(executor: Any, work: Path) -> None:
    """Queue the job, unless one of an earlier run is still there, and wait until its parts are done or it is gone."""
    mark = work / _JOB
    job = mark.read_text() if mark.is_file() else ""
    queued = _Queue()
    if not job or not queued(job):
        try:
            executor.run()
        except (subprocess.CalledProcessError, OSError) as error:
            raise Fault(f"executor: sbatch failed ({error}); check executor.partition and executor.time") from None
        job = str(executor.job_id)
        write_atomic(mark, job)
    while executor.get_incomplete_ranks(skip_completed=True):
        here = queued(job)
        if not here and executor.get_incomplete_ranks(skip_completed=True):
            break  # asked again, as the last part may have ended between the two questions
        time.sleep(POLL)
    mark.unlink(missing_ok=True)


class _Queue:
    """Asks Slurm whether it still knows of a job that waits or runs. A question that fails is no answer: the job is taken to be
    there, since a second one would write the same parts. ``Fault`` after ``PATIENCE`` of them."""

    def __init__(self) -> None:
        self.failed = 0

    def __call__(self, job: str) -> bool:
        command = ["squeue", "--noheader", "--jobs", job]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            code, said, error = done.returncode, done.stdout.strip(), done.stderr.strip()
        except OSError as fault:
            code, said, error = 1, "", fault.strerror or str(fault)
        if code == 0 or "invalid job id" in error.lower():  # so it says of a job that ended a while ago
            self.failed = 0
            return code == 0 and bool(said)
        self.failed += 1
        if self.failed >= PATIENCE:
            line = (error.splitlines() or [f"exit code {code}"])[0]
            raise Fault(
                f"executor: squeue does not say whether job {job} is there ({line}); run again to go on waiting for it"
            )
        return True
