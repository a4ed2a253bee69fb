"""The two filters of Linux that need no privilege: seccomp over system calls, Landlock over files.

seccomp is written out here (a classic BPF program through prctl), since no library of it may be presumed. It refuses what no
test of a model's code needs: sockets, other programs, new processes (threads may be), signals to others, mounts, namespaces,
tracing, kernel interfaces, memory that limits do not count, and every system call younger than the list. Landlock stands in
for a root of its own where there is none: the program reads Python and nothing else, and writes in its directory alone.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from . import layers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_NONE = -1
# name: (x86_64, aarch64); one number where all machines have the same
_REFUSED: dict[str, tuple[int, int] | int] = {
    "socket": (41, 198), "fork": (57, _NONE), "vfork": (58, _NONE), "execve": (59, 221), "execveat": (322, 281),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_open": 434, "pidfd_getfd": 438, "pidfd_send_signal": 424, "process_madvise": 440, "process_mrelease": 448,
    "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118),
    "sched_setattr": (314, 274), "migrate_pages": (256, 238), "move_pages": (279, 239),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": 428,
    "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442,
    "swapon": (167, 224), "swapoff": (168, 225), "quotactl": (179, 60), "quotactl_fd": 443,
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "mknod": (133, _NONE), "mknodat": (259, 33),
    "acct": (163, 89), "unshare": (272, 97), "setns": (308, 268),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142),
    "syslog": (103, 116), "sethostname": (170, 161), "setdomainname": (171, 162), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171), "iopl": (172, _NONE),
    "ioperm": (173, _NONE), "modify_ldt": (154, _NONE), "personality": (135, 92), "vhangup": (153, 58),
    "lookup_dcookie": (212, 18), "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427,
    "fanotify_init": (300, 262),
    # memory that RLIMIT_AS does not count
    "memfd_create": (319, 279), "memfd_secret": 447, "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190),
    "mq_open": (240, 180),
}  # fmt: skip
# Landlock does not hold what is written about a file: its mode, owner, times and attributes.
_REFUSED_PLAIN: dict[str, tuple[int, int] | int] = {
    "chmod": (90, _NONE), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, _NONE), "fchown": (93, 55),
    "lchown": (94, _NONE), "fchownat": (260, 54), "utime": (132, _NONE), "utimes": (235, _NONE),
    "futimesat": (261, _NONE), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
}  # fmt: skip
_ONLY_ME = {"kill": (62, 129), "tgkill": (234, 131)}
_ONLY_ME_OR_0 = {"prlimit64": (302, 261), "sched_setaffinity": (203, 122)}
_CLONE, _CLONE3, _PRCTL, _IOCTL, _PAIR = (56, 220), 435, (157, 167), (16, 29), (53, 199)
_IOCTLS = (0x5412, 0x541C, 0x40086602, 0x401C5820)  # TIOCSTI, TIOCLINUX, FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR
_YOUNGEST = 450
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_LOAD, _EQUAL, _GREATER, _BITS, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000


def install(job: dict[str, Any], held: set[str]) -> set[str]:
    """Put on what this kernel has; the names of what holds. Landlock only where there is no root of its own."""
    if not layers.LINUX:
        return set()
    more = set()
    if job["way"] == "plain" and _landlock(job["read"], job["home"] + "/work"):
        more.add("landlock")
    # RLIMIT_NPROC counts the threads of one program only where it is a user of its own, and never the superuser's
    threads = job["way"] == "root" or (job["way"] == "user" and os.getuid() != 0)
    if _seccomp(plain=job["way"] == "plain", threads=threads):
        more.add("seccomp")
    return more


def seccomp_program(machine: str, me: int, *, plain: bool, threads: bool) -> bytes | None:
    """The BPF program for a machine and the process ``me``, or None where the system calls of the machine are not listed.

    plain    refuse also what writes about files (modes, owners, times), which Landlock does not hold
    threads  let the program have threads; other processes it never has
    """
    if machine not in _MACHINES or struct.calcsize("P") != 8:
        return None
    which, arch = _MACHINES[machine]

    def number(entry: tuple[int, int] | int) -> int:
        return entry if isinstance(entry, int) else entry[which]

    def op(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("=HBBI", code, yes, no, value & 0xFFFFFFFF)

    def when(call: int, *then: bytes) -> list[bytes]:
        return [op(_EQUAL, call, 0, len(then)), *then]

    refuse, absent = op(_RETURN, _ERROR | errno.EPERM), op(_RETURN, _ERROR | errno.ENOSYS)
    allow = op(_RETURN, _ALLOW)
    first, second = op(_LOAD, 16), op(_LOAD, 24)  # the low halves of the arguments
    program = [op(_LOAD, 4), op(_EQUAL, arch, 1, 0), op(_RETURN, _KILL), op(_LOAD, 0)]
    program += [op(_GREATER, _YOUNGEST, 0, 1), absent]
    for entry in (*_REFUSED.values(), *(_REFUSED_PLAIN.values() if plain else ())):
        if number(entry) != _NONE:
            program += when(number(entry), refuse)
    program += when(_CLONE3, absent)  # its flags are in memory: libc then takes clone, whose flags are here
    program += when(
        number(_CLONE), *([first, op(_BITS, 0x10000, 0, 1), allow] if threads else []), refuse
    )  # CLONE_THREAD
    for entry in _ONLY_ME.values():
        program += when(number(entry), first, op(_EQUAL, me, 0, 1), allow, refuse)
    for entry in _ONLY_ME_OR_0.values():
        program += when(number(entry), first, op(_EQUAL, me, 1, 0), op(_EQUAL, 0, 0, 1), allow, refuse)
    program += when(number(_PRCTL), first, op(_EQUAL, 1, 1, 0), allow, refuse)  # PR_SET_PDEATHSIG
    program += when(number(_PAIR), first, op(_EQUAL, 1, 0, 1), allow, refuse)  # AF_UNIX: asyncio's own pipe
    checks = [op(_EQUAL, value, len(_IOCTLS) - i, 0) for i, value in enumerate(_IOCTLS)]
    program += when(number(_IOCTL), second, *checks, allow, refuse)
    return b"".join([*program, allow])


def _seccomp(*, plain: bool, threads: bool) -> bool:
    program = seccomp_program(os.uname().machine, os.getpid(), plain=plain, threads=threads)
    if program is None:
        return False
    code = ctypes.create_string_buffer(program, len(program))
    head = ctypes.create_string_buffer(struct.pack("@HxxxxxxP", len(program) // 8, ctypes.addressof(code)))
    try:
        layers.call("prctl", 22, 2, ctypes.byref(head), 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    except OSError:
        return False
    return True


def _landlock(read: list[str], work: str) -> bool:
    """Read what is in ``read``, anything in ``work``, no TCP, no abstract sockets, no signals, as far as the kernel has it."""
    try:
        version = layers.call("syscall", 444, None, 0, 1)
    except OSError:
        return False
    files = (1 << 13) - 1
    for since, bit in ((2, 1 << 13), (3, 1 << 14), (5, 1 << 15)):
        files |= bit if version >= since else 0
    rules = struct.pack("=QQQ", files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    try:
        ruleset = layers.call("syscall", 444, rules, size, 0)
        reading, one = 1 << 2 | 1 << 3, 1 << 1 | 1 << 2 | (1 << 14 & files)
        for path, allowed in (*((p, reading) for p in read), *((d, one) for d in layers.DEVICES), (work, files)):
            if os.path.exists(path):  # noqa: PTH110
                where = os.open(path, os.O_PATH)
                kind = allowed if os.path.isdir(path) else allowed & (one | 1)  # noqa: PTH112
                layers.call("syscall", 445, ruleset, 1, struct.pack("=Qi", kind, where), 0)
                os.close(where)
        layers.call("syscall", 446, ruleset, 0)
        os.close(ruleset)
    except OSError:
        return False
    return True
