"""Running code that a model wrote: shut in by the kernel as far as the machine allows, with limits, and watched from outside.

``full``, on a Linux that lets a process make namespaces (as the superuser, or an ordinary user where user namespaces are
allowed): the program sees a file tree in memory that holds Python read-only and a directory of its own, and no file of the
user; no process but itself, which nothing that it starts outlives; no network interface; no system call of a list
(``confine.filters``). ``partial``, where namespaces are forbidden (most containers): Landlock and seccomp refuse it all files
but Python's, sockets, other processes and signals to them. ``limits``, elsewhere (macOS, an old kernel): limits and Python's
own audit hook, a guard against accidents only. ``Outcome`` says which held and ``Limits.require`` insists. docs/evaluation.md
says what no level holds in; above all, a program shares its process with its tests, so an answer written to deceive its own
tests can (an object that says it equals everything is enough).
"""

from __future__ import annotations

import contextlib
import functools
import marshal
import os
import secrets
import signal
import site
import subprocess
import sys
import sysconfig
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field

from trimtab.config import Config
from trimtab.errors import Fault
from trimtab.evaluate.judges import confine

VERSION = 2
"""Part of the identity of a judge that runs code: change it with anything here that could alter an outcome."""

Isolation = Literal["limits", "partial", "full"]
"""How a program was shut in, from the weakest on; see the module."""

_FULL = ("mount", "pid", "net", "ipc", "seccomp", "privileges")
_START = 30.0  # seconds in which a program must have been started
_PROBE = "import decimal, hashlib, random, tempfile\nwith tempfile.TemporaryFile() as f:\n    f.write(b'x')"
_BOOT = confine.BOOT
_lock = threading.Lock()
_found: list[tuple[str, Outcome]] = []  # the strictest way that works on this machine, once it is known


class Limits(Config):
    """What a program may use, and how well it must be shut in."""

    seconds: float = Field(10.0, gt=0, le=600, description="Wall-clock time, and processor time, of one program.")
    memory_mb: int = Field(1024, ge=64, description="Address space in MiB (RLIMIT_AS).")
    file_mb: int = Field(16, ge=0, description="Largest file that may be written, in MiB (RLIMIT_FSIZE).")
    disk_mb: int = Field(64, ge=1, description="All files of a program together, in MiB.")
    require: Isolation = Field(
        "limits",
        description="The least isolation under which code is run: `limits`, `partial` or `full`; with less, the run stops.",
    )


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended. ``passed``: it ran to its end. ``fault``: why nothing can be said of the program, or ''.

    network    "none": the program had no network; "guarded": only Python's own calls were refused
    isolation  how it was shut in (see the module), and in ``missing`` the layers that ``full`` has and it had not
    """

    passed: bool
    reason: str
    fault: str = ""
    network: Literal["none", "guarded"] = "guarded"
    isolation: Isolation = "limits"
    missing: tuple[str, ...] = _FULL


def run_program(program: str, limits: Limits) -> Outcome:
    """Run a whole Python program (the tests at its end) and say whether it came to its end without an error.

    Raises ``Fault`` when this machine cannot shut it in as well as ``limits.require`` asks.
    """
    try:
        source = program.encode()
    except UnicodeEncodeError:
        return Outcome(False, "the code is not valid Unicode")
    way, probe = _strictest()
    if probe.fault:
        return probe
    levels = get_args(Isolation)
    if levels.index(probe.isolation) < levels.index(limits.require):
        raise Fault(
            f"code must be shut in {limits.require!r} here ('require'), and this machine allows {probe.isolation!r}: it lacks "
            f"{', '.join(probe.missing)} (docs/evaluation.md, Running code); allow namespaces, or ask for less"
        )
    return _run(source, limits, way)


def _strictest() -> tuple[str, Outcome]:
    """The strictest way in which a plain program passes here, tried once per process, and how that ended."""
    with _lock:
        if _found:
            return _found[0]
        ways = ["root"] if os.geteuid() == 0 else []
        for way in [*ways, "user", "plain"] if sys.platform == "linux" else ["plain"]:
            outcome = _run(_PROBE.encode(), Limits(), way)
            if outcome.passed:
                _found.append((way, outcome))
                break
        else:
            outcome = outcome if outcome.fault else Outcome(False, "", f"no program passes here ({outcome.reason})")
        return way, outcome


def _run(source: bytes, limits: Limits, way: str) -> Outcome:
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="trimtab-code-") as root:
        (Path(root) / "work").mkdir()
        job = {
            "way": way, "word": word, "home": str(Path(root).resolve()), "parent": os.getpid(), "start": _START,
            "seconds": limits.seconds, "memory": limits.memory_mb << 20, "file": limits.file_mb << 20,
            "disk": limits.disk_mb << 20, "read": _python(), "program": source,
        }  # fmt: skip
        try:
            watcher = subprocess.Popen(
                [sys.executable, "-I", "-B", "-c", _BOOT, str(Path(confine.__file__).parents[1])],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root, start_new_session=True,
                env={"LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        except OSError as error:
            return Outcome(False, "", f"the code could not be started ({error.strerror})")
        try:
            said, errors = watcher.communicate(marshal.dumps(job), _START + limits.seconds + 10)
        except subprocess.TimeoutExpired:
            said, errors = b"", b"the watcher did not answer"
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(watcher.pid, signal.SIGKILL)
            watcher.communicate()
    try:
        report = marshal.loads(said)
    except (EOFError, ValueError, TypeError):
        report = {"start": "", "end": "left", "code": watcher.returncode, "errors": errors.decode("utf-8", "replace")}
    return _outcome(report, limits)


@functools.cache
def _python() -> list[str]:
    """The directories that Python and its packages are read from, and the system's libraries; none inside another."""
    paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    paths |= {*site.getsitepackages(), f"{sys.base_exec_prefix}/lib", "/lib", "/lib64", "/usr/lib", "/usr/lib64"}
    paths |= {"/usr/share/zoneinfo", "/etc/ld.so.cache"}
    whole = sorted(path for path in paths if Path(path).exists())
    return [path for path in whole if not any(path.startswith(f"{other}/") for other in whole)]


def _outcome(report: dict[str, Any], limits: Limits) -> Outcome:
    lines = report["errors"].strip().splitlines()
    last = lines[-1][:200] if lines else f"exit status {report['code']}"
    start, _, layers = report["start"].partition(" ")
    if start != "ready":
        if report["end"] == "late":
            return Outcome(False, "", f"the code could not be started in {_START:g} s")
        return Outcome(False, "", f"the limits could not be set ({layers or last})")
    held = set(layers.split())
    missing = tuple(layer for layer in _FULL if layer not in held)
    network: Literal["none", "guarded"] = "none" if held & {"net", "seccomp"} else "guarded"
    isolation: Isolation = "full" if not missing else "limits"
    if missing and network == "none" and held & {"mount", "landlock"}:
        isolation = "partial"
    ended = functools.partial(Outcome, network=network, isolation=isolation, missing=missing)
    if report["end"] == "word":
        return ended(True, "all tests passed")
    if report["end"] == "late":
        return ended(False, f"still running after {limits.seconds:g} s")
    if report["end"] == "disk":
        return ended(False, f"more than {limits.disk_mb} MiB of files")
    return ended(False, last if report["code"] else "it left before the tests were done")
