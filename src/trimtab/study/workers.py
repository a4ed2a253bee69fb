"""One step after the other in this process, or several side by side in worker processes.

Workers are started fresh (spawned, never forked: torch's threads do not survive a fork), send their progress through a
queue, and end themselves when the run that started them is gone, so that ``kill -9`` leaves nothing behind that writes.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

from trimtab.errors import Fault
from trimtab.progress import Reporter

if TYPE_CHECKING:
    from trimtab.study.execute import Job

_POLL = 0.2
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_events: Any = None


Waves = Sequence[Sequence["Job"]]
"""Jobs in waves; none of a later wave begins before all of the earlier ones are done."""


def run_here(waves: Waves, reporter: Reporter, between: Callable[[], None]) -> None:
    """Do the jobs in order; each comes after its inputs. ``between`` is called before each later wave, and may raise."""
    total, number = sum(map(len, waves)), 0
    for wave_number, wave in enumerate(waves):
        if wave_number:
            between()
        for job in wave:
            number += 1
            reporter.start(job.step.short, job.step.name, number, total)
            seconds = job(lambda event, name=job.step.short: reporter.update(name, event))  # type: ignore[misc]
            reporter.done(job.step.short, job.step.name, seconds)


def run_in_workers(waves: Waves, reporter: Reporter, workers: int, between: Callable[[], None]) -> None:
    """Do the jobs ``workers`` at a time, each as soon as its inputs are done. The first error stops the rest."""
    context = multiprocessing.get_context("spawn")
    events = context.Queue()
    jobs = [job for wave in waves for job in wave]
    started, total = 0, len(jobs)
    missing = {job.step.id for job in jobs}
    # numpy's own threads are counted when it is imported, so a worker must find their number there already.
    os.environ.update(dict.fromkeys(_THREADS, str(jobs[0].threads or 1)))
    pool = ProcessPoolExecutor(workers, context, _start, (events, os.getpid(), jobs[0].threads or 1))
    try:
        for number, wave in enumerate(waves):
            if number:
                between()
            todo, running = list(wave), dict[Future[float], Any]()
            while todo or running:
                ready = [job for job in todo if not missing & set(job.step.inputs.values())]
                for job in ready[: workers - len(running)]:
                    started += 1
                    reporter.start(job.step.short, job.step.name, started, total)
                    running[pool.submit(_work, job)] = job
                    todo.remove(job)
                finished, _ = wait(running, timeout=_POLL, return_when=FIRST_COMPLETED)
                _drain(events, reporter)
                for future in finished:
                    job = running.pop(future)
                    reporter.done(job.step.short, job.step.name, future.result())
                    missing.discard(job.step.id)
    except BrokenProcessPool:
        raise Fault(
            "a worker process died (out of memory, perhaps): run again to go on, with fewer --workers if it happens again"
        ) from None
    finally:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


def _drain(events: Any, reporter: Reporter) -> None:
    while True:
        try:
            name, event = events.get_nowait()
        except queue.Empty:
            return
        reporter.update(name, event)


def _start(events: Any, parent: int, threads: int) -> None:
    """In a new worker: remember the queue, take the share of the cores, and watch for the end of the parent."""
    global _events
    _events = events
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends its workers

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    import torch

    torch.set_num_threads(threads)


def _work(job: Job) -> float:
    name, last = job.step.short, 0.0

    def progress(event: Mapping[str, Any]) -> None:
        nonlocal last
        if time.monotonic() - last > _POLL:
            last = time.monotonic()
            _events.put((name, dict(event)))

    return job(progress)
