"""The audit hook: Python's own calls are refused in words that a log can show.

It is the first fence and the weakest: it says *why* a program was stopped, and closes the ways in which Python code forges a
pass (tracing the tests, reading other frames' variables, native code). What must hold is held by the kernel.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

REFUSED = (
    "socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.kill", "pty.",
    "signal.pthread_kill", "webbrowser.", "sys.addaudithook",
    "ctypes.", "sys.settrace", "sys.setprofile", "sys.monitoring.", "sys._current_", "gc.get_",
    "cpython.PyInterpreterState_New",
)  # fmt: skip
CHANGES = (
    "shutil.", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.link", "os.symlink",
    "os.truncate", "os.utime",
)  # fmt: skip


def make(here: str) -> Callable[[str, tuple[Any, ...]], None]:
    """A hook for a program that may change files below ``here`` (which ends in a slash) and nowhere else."""
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    # All that it uses comes as a default: what is a default is in no frame, cell or module that a program could change.
    def hook(
        event: str, args: tuple[Any, ...], *, here: str = here, refused: tuple[str, ...] = REFUSED,
        changes: tuple[str, ...] = CHANGES, writes: int = writes, full: Any = os.path.realpath, text: Any = os.fsdecode,
        no: Any = PermissionError, none: Any = ImportError, either: Any = (str, bytes), isa: Any = isinstance,
    ) -> None:  # fmt: skip
        if event == "socket.__new__" and args[1] == 1:  # AF_UNIX: an event loop wakes itself through a pair of them
            return
        if event.startswith(refused):
            raise no("not allowed here: " + event)
        if event == "import" and args[1]:  # native code; ctypes is there already, and its calls are refused above
            file = full(text(args[1]))
            if file.startswith(here) or args[0].endswith("_ctypes") or "/_ctypes." in file:
                raise none("not allowed here: native code of its own")
        if event.startswith(changes) or (event == "open" and (args[2] or 0) & writes):
            for path in args[:2] if event != "open" else args[:1]:
                if isa(path, either) and not (full(text(path)) + "/").startswith(here) and text(path) != "/dev/null":
                    raise no("not allowed here: to change files outside the directory")

    return hook
