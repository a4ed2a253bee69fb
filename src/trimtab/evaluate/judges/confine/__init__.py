"""What happens inside the process that runs a model's code: it shuts itself in, runs the program, and is watched.

Only the standard library, and nothing of Trimtab: ``sandbox`` starts a fresh interpreter on ``BOOT``, so that all of this is
done after exec, in a process with one thread. Every program pays for it, so it imports little (no typing, pathlib, json).

There are two processes. The *watcher* reads the job, forks, and keeps the clock; it never runs a line of the program. The
*inmate* builds the layers around itself (``layers``, ``filters``, ``guard``) and then runs the program. Between them are two
pipes: errors (read to the end, the last bytes kept), and one for the word that says that the program has come to its end.
Whatever the inmate does, it is killed when the clock says so, when it has said the word or when it has closed the pipes;
with it, in a process namespace, goes everything that it started.
"""

from __future__ import annotations

import marshal
import os
import select
import sys
import time

from . import filters, guard, layers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

BOOT = """
import sys
sys.path.insert(0, sys.argv[1])
import confine
del sys.path[0]
from _collections import deque
deque(map(exec, *confine.enter()), 0)
"""
"""What ``python -c`` is given, with the directory of this package as its argument.

The two codes that ``exec`` gets, the program and then the saying of the word, are held by iterators in C: no frame below the
program's has them in a variable, so code that walks the stack finds no word to forge a pass with.
"""

_KEPT = 4000  # bytes of what was written to standard error last


def enter() -> tuple[Iterator[Any], Iterator[dict[str, Any]]]:
    """Never returns in the watcher; in the inmate, what ``exec`` is to be called with."""
    job = marshal.load(sys.stdin.buffer)
    program = job.pop("program")
    held = layers.leave(job["way"])
    layers.die_with(job["parent"])
    errors, stderr = os.pipe()
    said, say = os.pipe()
    watcher = os.getpid()
    inmate = os.fork()
    if inmate:
        os.close(stderr)
        os.close(say)
        report = _watch(inmate, errors, said, job)
        with open(1, "wb", closefd=False) as out:
            marshal.dump(report, out)
        os._exit(0)
    nothing = os.open(os.devnull, os.O_RDWR)
    for here, there in ((nothing, 0), (nothing, 1), (stderr, 2)):
        os.dup2(here, there)
    word = job.pop("word").encode()
    try:
        os.dup2(say, 3)
        os.closerange(4, 256)
        held |= layers.shut_in(job, held, watcher)
        held |= filters.install(job, held)
    except (OSError, ValueError, AttributeError) as error:
        os.write(3, b"refused %s: %s" % (type(error).__name__.encode(), str(error).encode()))
        os._exit(1)
    os.write(3, b"ready %s\n" % " ".join(sorted(held)).encode())
    work = os.getcwd()  # noqa: PTH109
    os.environ["HOME"] = os.environ["TMPDIR"] = work
    sys.argv[:] = ["answer.py"]
    for name in [n for n in sys.modules if n.partition(".")[0] == "confine"]:
        del sys.modules[name]
    sys.modules["answer"] = type(sys)("answer")
    main = sys.modules["__main__"].__dict__
    main.clear()
    main["__name__"] = "__main__"
    end = compile("write(3, word)\nleave(0)", "end", "exec")
    sys.addaudithook(guard.make(work + os.sep))
    code = compile(program, "answer.py", "exec")
    mine = {"__name__": "answer", "__builtins__": __builtins__}
    return iter((code, end)), iter((mine, {"write": os.write, "leave": os._exit, "word": word}))


def _watch(inmate: int, errors: int, said: int, job: dict[str, Any]) -> dict[str, Any]:
    """Keep the clock over the inmate and end it; the report that ``sandbox`` reads."""
    poll = select.poll()
    for pipe in (errors, said):
        poll.register(pipe, select.POLLIN)
    got, still = {errors: b"", said: b""}, {errors, said}
    word = b"\n" + job["word"].encode()
    ready, end, status = False, "", None
    until = time.monotonic() + job["start"]
    while not end:
        wait = min(100, int(1000 * (until - time.monotonic())) + 1)
        news = poll.poll(max(0, wait)) if still else []
        for pipe, _ in news:
            data = os.read(pipe, 1 << 16)
            if not data:
                poll.unregister(pipe)
                still.remove(pipe)
            got[pipe] = (got[pipe] + data)[-_KEPT:] if pipe == errors else (got[pipe] + data)[:_KEPT]
        if not ready and b"\n" in got[said]:
            ready, until = True, time.monotonic() + job["seconds"]
        if got[said].endswith(word):
            end = "word"
        elif time.monotonic() > until:
            end = "late"
        elif ready and job["way"] == "plain" and layers.used(job["home"] + "/work") > job["disk"]:
            end = "disk"
        elif not still or (not news and (status := _ended(inmate)) is not None):
            end = "left"
    if status is None:
        os.kill(inmate, layers.KILL)
        status = os.waitstatus_to_exitcode(os.waitpid(inmate, 0)[1])
    layers.reap()
    layers.clear(job["home"] + "/work")
    start = got[said].partition(b"\n")[0].decode("utf-8", "replace")
    return {"start": start, "end": end, "code": status, "errors": got[errors].decode("utf-8", "replace")}


def _ended(inmate: int) -> int | None:
    pid, status = os.waitpid(inmate, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None
