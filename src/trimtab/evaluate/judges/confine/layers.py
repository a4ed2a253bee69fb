"""The layers that the kernel gives: namespaces, a root of its own, another user, limits. Linux only, but for the limits.

There are three *ways* in. ``root``: the superuser makes the namespaces and then becomes a user that nobody else is.
``user``: anyone else, where user namespaces are allowed, does the same inside one. ``plain``: where neither is allowed, the
program stays in the machine's own file tree, and ``filters`` has to hold it.
"""
# ruff: noqa: PTH101, PTH102, PTH103, PTH104, PTH106, PTH108, PTH110, PTH112, PTH114, PTH118, PTH120, PTH123, PTH208

from __future__ import annotations

import ctypes
import os
import resource
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
NOSUID, NODEV, NOEXEC, BIND, REC, PRIVATE = 2, 4, 8, 0x1000, 0x4000, 0x40000
WORK = "/answer"
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
INODES, THREADS = 4096, 64  # files and threads that a program may have
KILL = 9  # the signal module would bring enum with it
LINUX = sys.platform == "linux"


def call(name: str, *args: Any) -> int:
    """A function of libc; ``OSError`` when it says -1. Whole numbers go as longs."""
    function = getattr(_libc(), name)
    result = function(*(ctypes.c_long(a) if isinstance(a, int) else a for a in args))
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return int(result)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def leave(way: str) -> set[str]:
    """The watcher's part: the namespaces that hold for what it forks. Names of those left; ``OSError`` where they are refused."""
    if way == "plain":
        return set()
    uid, gid = os.geteuid(), os.getegid()
    call("unshare", NEWPID | NEWNET | NEWIPC | NEWUTS | (NEWUSER if way == "user" else 0))
    if way == "user":  # be there who one was before, and nobody else
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    return {"pid", "net", "ipc"}


def die_with(parent: int) -> None:
    """Have the kernel end this process with its parent, and hand it the orphans below it."""
    if LINUX:
        call("prctl", 1, KILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        call("prctl", 36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    if parent and os.getppid() != parent:
        os._exit(1)


def shut_in(job: dict[str, Any], held: set[str], watcher: int) -> set[str]:
    """The inmate's part, before its filters: root, user, privileges, limits. Names of what holds; ``OSError`` where refused."""
    more = set()
    uid = int.from_bytes(os.urandom(4), "little") >> 2 | 1 << 30 if job["way"] == "root" else os.getuid()
    if job["way"] == "plain":
        os.chdir(job["home"] + "/work")
    else:
        _own_root(job, uid)
        call("sethostname", b"sandbox", 7)
        more.add("mount")
    if job["way"] == "root":
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    if LINUX:
        _no_privileges()
        more.add("privileges")
    die_with(0 if "pid" in held else watcher)
    seconds = int(job["seconds"]) + 1
    limits = {
        "AS": job["memory"], "FSIZE": job["file"], "CPU": seconds, "CORE": 0, "NOFILE": 64, "MEMLOCK": 0, "MSGQUEUE": 0,
        "NPROC": THREADS if "mount" in more else 0,
    }  # fmt: skip
    for name, limit in limits.items():
        if (kind := getattr(resource, f"RLIMIT_{name}", None)) is not None:
            resource.setrlimit(kind, (limit, limit))
    return more


def _own_root(job: dict[str, Any], uid: int) -> None:
    """A tree in memory with Python in it, read-only, and a directory to work in; nothing else of the machine."""
    new = job["home"]
    call("unshare", NEWNS)
    call("mount", None, b"/", None, REC | PRIVATE, None)
    sources = {path: os.open(path, os.O_PATH) for path in (*job["read"], *DEVICES) if os.path.exists(path)}
    _tmpfs(new, "mode=755,size=1m,nr_inodes=1k", NOSUID)
    for path, source in sources.items():
        target = new + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.isdir(f"/proc/self/fd/{source}"):
            os.mkdir(target)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
        call("mount", f"/proc/self/fd/{source}".encode(), target.encode(), None, BIND | REC, None)
        _read_only(target, devices=path in DEVICES, deep=True)
        os.close(source)
    os.mkdir(new + WORK)
    _tmpfs(
        new + WORK, f"mode=700,uid={uid},gid={uid if job['way'] == 'root' else os.getgid()},size={job['disk']},"
        f"nr_inodes={INODES}", NOSUID | NODEV | NOEXEC
    )  # fmt: skip
    _read_only(new, devices=False, deep=False)
    os.chdir(new)
    call("pivot_root", b".", b".")
    call("umount2", b".", 2)  # MNT_DETACH
    os.chdir(WORK)


def _tmpfs(where: str, options: str, flags: int) -> None:
    call("mount", b"tmpfs", where.encode(), b"tmpfs", flags, options.encode())


def _read_only(where: str, *, devices: bool, deep: bool) -> None:
    """mount_setattr(2): of all mounts below ``where``, and without taking away a flag that is locked there."""
    wanted = (ctypes.c_uint64 * 4)(1 | 2 | (0 if devices else 4), 0, 0, 0)  # RDONLY, NOSUID, NODEV
    call("syscall", 442, -100, where.encode(), 0x8000 if deep else 0, ctypes.byref(wanted), 32)


def _no_privileges() -> None:
    for capability in range(64):
        if _libc().prctl(24, capability, 0, 0, 0):  # PR_CAPBSET_DROP, until there is no such capability
            break
    head, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    call("capset", ctypes.byref(head), ctypes.byref(none))
    call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS


def used(work: str) -> int:
    """Bytes below ``work``, with a page for every file; a tree deeper than any answer needs counts as endless."""
    total, level = 0, [work]
    for _ in range(32):
        below = []
        for where in level:
            try:
                with os.scandir(where) as entries:
                    for entry in entries:
                        total += max(4096, entry.stat(follow_symlinks=False).st_blocks * 512)
                        if entry.is_dir(follow_symlinks=False):
                            below.append(entry.path)
            except OSError:
                continue
        level = below
    return total if not level else 1 << 60


def clear(work: str) -> None:
    """Empty ``work``, however deep its tree is and whatever its modes are: what is below is moved to the top, then removed."""
    number = 0
    while names := os.listdir(work):
        for name in names:
            path = os.path.join(work, name)
            if os.path.islink(path) or not os.path.isdir(path):
                os.unlink(path)
                continue
            os.chmod(path, 0o700)
            for inner in os.listdir(path):
                number += 1
                if os.path.isdir(os.path.join(path, inner)) and not os.path.islink(os.path.join(path, inner)):
                    os.chmod(os.path.join(path, inner), 0o700)
                os.rename(os.path.join(path, inner), os.path.join(work, f".{number}-{os.urandom(8).hex()}"))
            os.rmdir(path)


def reap() -> None:
    """End what is left below the watcher, where no process namespace has done so."""
    while True:
        try:
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                children = file.read().split()
            for child in children:
                os.kill(int(child), KILL)
                os.waitpid(int(child), 0)
        except OSError:
            return
        if not children:
            return
