"""evaluate.judges.sandbox against hostile programs: none passes, and the host is as it was. And honest programs pass."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import secrets
import shutil
import socket
import sqlite3
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hostile_programs import PROGRAMS, Hostile
from trimtab.errors import Fault
from trimtab.evaluate.judges import sandbox
from trimtab.evaluate.judges.confine import filters, layers
from trimtab.evaluate.judges.sandbox import Isolation, Limits, Outcome, run_program

WORKERS = 4
LIMITS = Limits(seconds=0.5, memory_mb=256, file_mb=2, disk_mb=8)
LINUX = sys.platform == "linux"
# The child without Python's own guard: what is held in then is held by the kernel.
BARE = sandbox._BOOT.replace(
    "from _collections", "confine.guard.make = lambda here: lambda *a: None\nfrom _collections"
)


class Host:
    """Canaries: files, a home, a secret, listeners and a process. ``changes`` says what became of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files, self.home, self.temp = root / "canary", root / "home", root / "temp"
        for directory in (self.files, self.home, self.temp, self.files / "empty"):
            directory.mkdir()
        self.secret = f"trimtab-secret-{secrets.token_hex(16)}"
        (self.files / "file").write_text("a file that nobody changes")
        (self.files / "secret").write_text(self.secret)
        (self.files / "module.py").write_text(f"SECRET = {self.secret!r}\n")
        (self.home / ".profile").write_text("# a canary\n")
        with sqlite3.connect(self.files / "base.db") as base:
            base.execute("create table t (word text)")
            base.execute("insert into t values (?)", (self.secret,))
        base.close()
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.udp = socket.socket(type=socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.unix = socket.socket(socket.AF_UNIX)
        here = os.open(self.files, os.O_RDONLY)
        self.unix.bind(f"/proc/self/fd/{here}/sock" if LINUX else str(self.files / "sock"))  # a path may be too long
        os.close(here)
        self.unix.listen()
        self.listeners = [self.tcp, self.udp, self.unix]
        self.abstract = f"trimtab-{secrets.token_hex(8)}"
        if LINUX:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(f"\0{self.abstract}")
            listener.listen()
            self.listeners.append(listener)
        for listener in self.listeners:
            listener.setblocking(False)
        self.children = _children() if LINUX else set()  # of other tests in this process
        self.victim = subprocess.Popen(["sleep", "600"], start_new_session=True)
        self.before = self._state()

    def program(self, hostile: Hostile) -> str:
        places = {
            "SECRET": self.files / "secret", "FILE": self.files / "file", "DIR": self.files, "HOME": self.home,
            "TEMP": self.temp, "SITE": sysconfig.get_path("purelib"), "UNIX": self.files / "sock", "ABSTRACT": self.abstract,
            "PORT": self.tcp.getsockname()[1], "UDP": self.udp.getsockname()[1], "PARENT": os.getpid(),
            "VICTIM": self.victim.pid, "ENV": "TRIMTAB_SECRET", "HASH": hashlib.sha256(self.secret.encode()).hexdigest(),
        }  # fmt: skip
        code = hostile.code
        for name, value in places.items():
            code = code.replace(f"@{name}@", str(value))
        return code

    def _state(self) -> dict[str, object]:
        """All that a program could have changed, but for the times at which something was read."""
        state: dict[str, object] = {}
        for path in sorted(self.root.rglob("*")):
            if path == self.temp or self.temp not in path.parents:
                s = path.lstat()
                times = () if path == self.temp else (s.st_mtime_ns, s.st_nlink)
                content = path.read_bytes() if path.is_file() else b""
                state[str(path)] = (s.st_mode, s.st_uid, s.st_gid, s.st_size, *times, content)
        if LINUX:
            stat = Path(f"/proc/{self.victim.pid}/stat").read_text().rpartition(")")[2].split()
            state["victim"] = ("T" in stat[0], stat[16:18], os.sched_getaffinity(self.victim.pid))
            state["mounts"] = len(Path("/proc/self/mountinfo").read_text().splitlines())
        state["host"] = (socket.gethostname(), os.getpriority(os.PRIO_PROCESS, 0))
        return state

    def changes(self) -> list[str]:
        """What is not as it was; empty when the host is untouched."""
        after = self._state() if self.victim.poll() is None else {}
        found = [name for name in {**self.before, **after} if self.before.get(name) != after.get(name)]
        found += [f"left in temp: {path}" for path in self.temp.iterdir()]
        for where in (
            "/tmp",
            "/var/tmp",
            "/dev/shm",
            "/etc",
            "/",
            sysconfig.get_path("purelib"),
            sysconfig.get_path("stdlib"),
        ):
            found += [str(path) for path in Path(where).glob("trimtab-hostile*")]
        for listener in self.listeners:
            try:
                listener.recv(1) if listener is self.udp else listener.accept()
                found.append(f"a listener heard something: {listener}")
            except BlockingIOError:
                pass
        if LINUX:
            found += [f"process left: {_command(p)}" for p in _children() - self.children if p != str(self.victim.pid)]
        return found

    def close(self) -> None:
        self.victim.kill()
        self.victim.wait()
        for listener in self.listeners:
            listener.close()


def _children() -> set[str]:
    """Processes that are children of this one now, by number."""
    found: set[str] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
            found |= set((task / "children").read_text().split())
    return found


def _command(pid: str) -> str:
    try:
        return f"{pid} {Path(f'/proc/{pid}/cmdline').read_bytes()[:200]!r}"
    except OSError:
        return pid


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    root = Path(tempfile.mkdtemp(prefix="trimtab-host-"))
    made = Host(root)
    monkeypatch.setattr(tempfile, "tempdir", str(made.temp))
    monkeypatch.setenv("TRIMTAB_SECRET", made.secret)
    if LINUX:
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # whatever a program leaves behind becomes a child of this process
    yield made
    made.close()
    shutil.rmtree(root)
    if LINUX:
        ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)


def attack(host: Host, programs: list[Hostile]) -> dict[str, Outcome]:
    with ThreadPoolExecutor(WORKERS) as pool:
        outcomes = list(pool.map(lambda p: run_program(host.program(p), LIMITS), programs))
    return {p.name: o for p, o in zip(programs, outcomes)}


def test_the_corpus_is_large_and_varied() -> None:
    assert len({p.code for p in PROGRAMS}) == len({p.name for p in PROGRAMS}) == len(PROGRAMS) >= 200
    assert len({p.name.partition(":")[0] for p in PROGRAMS}) >= 12


def check(host: Host, programs: list[Hostile]) -> None:
    """Run them; nothing passed that must not, nothing changed, and the clock held. Prints what stopped them."""
    start = time.monotonic()
    outcomes = attack(host, programs)
    took = time.monotonic() - start
    kinds = Counter(_kind(o) for o in outcomes.values()).most_common()
    levels = {(o.isolation, o.missing) for o in outcomes.values() if o.reason != "the code is not valid Unicode"}
    print(f"\n{len(outcomes)} programs in {took:.1f} s; isolation and what it lacks {levels}; ended by {dict(kinds)}")
    assert host.changes() == []
    assert {n: o.fault for n, o in outcomes.items() if o.fault} == {}
    assert [p.name for p in programs if p.expect != "any" and outcomes[p.name].passed] == []
    assert took < 10 + len(programs) * (LIMITS.seconds + 2) / WORKERS


def test_no_hostile_program_passes_and_the_host_is_untouched(host: Host) -> None:
    check(host, list(PROGRAMS))


def _below(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task")
    try:
        return [int(p) for task in tasks.iterdir() for p in (task / "children").read_text().split()]
    except OSError:
        return []


@pytest.mark.skipif(not LINUX, reason="it needs PR_SET_PDEATHSIG, Linux's")
def test_a_trimtab_that_is_killed_takes_its_programs_with_it(host: Host) -> None:
    code = (
        "from trimtab.evaluate.judges import sandbox\nsandbox.run_program('pass', sandbox.Limits())\nprint('go', flush=True)\n"
        "sandbox.run_program('while True: pass', sandbox.Limits(seconds=60))"
    )
    env = {**os.environ, "TMPDIR": str(host.temp)}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env)
    assert parent.stdout is not None and parent.stdout.readline() == b"go\n"
    inmates: list[int] = []
    until = time.monotonic() + 30
    while not inmates and time.monotonic() < until:
        inmates = [inmate for watcher in _below(parent.pid) for inmate in _below(watcher)]
    assert len(inmates) == 1
    parent.kill()
    parent.wait()
    parent.stdout.close()
    while Path(f"/proc/{inmates[0]}").exists() and time.monotonic() < until:
        for orphan in set(_below(os.getpid())) - {host.victim.pid}:
            os.waitpid(orphan, os.WNOHANG)
        time.sleep(0.01)
    for (
        path
    ) in host.temp.iterdir():  # the directory of a Trimtab that could not clean up; empty but for what was its own
        shutil.rmtree(path)
    assert host.changes() == []


WAYS = ["root", "user", "plain"]
KERNEL = [p for p in PROGRAMS if p.expect != "forge"]


def bare(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Have programs run in one way, without Python's own guard; skip where this machine does not allow the way."""
    if not LINUX:
        pytest.skip("namespaces, seccomp and Landlock are Linux's")
    probe = sandbox._run(sandbox._PROBE.encode(), Limits(), way)
    if not probe.passed:
        pytest.skip(f"this machine does not allow {way!r}: {probe.fault or probe.reason}")
    if way == "plain" and probe.isolation != "partial":
        pytest.skip(f"this kernel has no Landlock or no seccomp: {probe.missing}")
    monkeypatch.setattr(sandbox, "_found", [(way, probe)])
    monkeypatch.setattr(sandbox, "_BOOT", BARE)


@pytest.mark.parametrize("way", WAYS)
def test_the_kernel_alone_holds_a_sample_of_them(host: Host, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    bare(monkeypatch, way)
    check(host, [p for p in KERNEL if p.expect != "late"][WAYS.index(way) :: 12])


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_kernel_alone_holds_them_all(host: Host, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    bare(monkeypatch, way)
    check(host, KERNEL)


HONEST = {
    "modules": """
import math, re, itertools, collections, typing, heapq, functools, dataclasses, hashlib, json, random, string, bisect, copy
import datetime, decimal, fractions, operator, statistics, time, os, sys, io, enum, abc, contextlib, textwrap, struct, base64
import unicodedata, zlib, queue, array, cmath, calendar, csv, difflib, secrets, uuid, pprint, numbers, types, inspect, warnings
assert math.gcd(12, 18) == 6 and hashlib.md5(b"Hello world").hexdigest() == "3e25960a79dbc69b674cd4ec67a72c62"
assert hashlib.sha3_256(b"").hexdigest()[:4] == "a7ff"
assert decimal.Decimal("0.1") + decimal.Decimal("0.2") == decimal.Decimal("0.3")
""",
    "HumanEval": """
from typing import List

def has_close_elements(numbers: List[float], threshold: float) -> bool:
    numbers = sorted(numbers)
    return any(b - a < threshold for a, b in zip(numbers, numbers[1:]))

def check(candidate):
    assert candidate([1.0, 2.0, 3.9, 4.0, 5.0, 2.2], 0.3) == True
    assert candidate([1.0, 2.0, 5.9, 4.0, 5.0], 0.8) == False

check(has_close_elements)
""",
    "classes": """
import dataclasses, enum, functools, heapq, collections
@dataclasses.dataclass(order=True)
class Node:
    cost: int
    name: str = dataclasses.field(compare=False)
class Colour(enum.Enum):
    RED = 1
Point = collections.namedtuple("Point", "x y")
@functools.lru_cache(None)
def fib(n):
    return n if n < 2 else fib(n - 1) + fib(n - 2)
h = [Node(3, "c"), Node(1, "a")]
heapq.heapify(h)
assert heapq.heappop(h).name == "a" and fib(90) == 2880067194370816120 and Colour(1).name == "RED" and Point(1, 2).y == 2
""",
    "files": """
import json, os, pathlib, shutil, tempfile, csv, sqlite3, zipfile, pickle, gzip
pathlib.Path("a.json").write_text(json.dumps({"a": [1, 2]}))
assert json.load(open("a.json")) == {"a": [1, 2]} and os.listdir() == ["a.json"]
with tempfile.TemporaryDirectory() as d:
    with open(os.path.join(d, "t.csv"), "w", newline="") as f:
        csv.writer(f).writerow([1, 2])
    os.makedirs(f"{d}/x/y")
    os.rename(f"{d}/x", f"{d}/z")
with zipfile.ZipFile("z.zip", "w") as z:
    z.writestr("n", "x")
with gzip.open("g.gz", "wt") as g:
    g.write("x")
base = sqlite3.connect(":memory:")
assert base.execute("select 1 + 1").fetchone() == (2,) and pickle.loads(pickle.dumps([1])) == [1]
shutil.move("a.json", "b.json")
assert pathlib.Path.home() == pathlib.Path.cwd() and os.path.expanduser("~") == os.getcwd()
""",
    "random": """
import random, secrets, time, datetime, os
random.seed(7)
assert random.random() == 0.32383276483316237 and len(os.urandom(8)) == 8 and len(secrets.token_hex()) == 64
assert time.time() > 1e9 and datetime.date(2024, 2, 29).isoweekday() == 4
""",
    "errors": """
import sys
def f(n):
    if n < 0:
        raise ValueError("negative")
    return n
try:
    f(-1)
except ValueError as error:
    assert str(error) == "negative" and error.__traceback__ is not None
else:
    raise AssertionError
sys.setrecursionlimit(5000)
def depth(n):
    return 0 if n == 0 else 1 + depth(n - 1)
assert depth(4000) == 4000
""",
    "printing": """
import io, contextlib, sys, logging, warnings
out = io.StringIO()
with contextlib.redirect_stdout(out):
    print("a", end="")
assert out.getvalue() == "a"
print("to nobody", file=sys.stderr)
logging.warning("to nobody")
warnings.warn("to nobody")
""",
    "evaluation": """
import ast, inspect
assert eval("1 + 1") == 2 and ast.literal_eval("[1]") == [1]
scope = {}
exec("f = lambda x: x", scope)
assert scope["f"](3) == 3 and __name__ == "answer"
""",
    "generators": """
import contextvars, asyncio
def gen():
    x = yield 1
    yield x
g = gen()
assert next(g) == 1 and g.send(5) == 5
async def f():
    return 3
async def both():
    await asyncio.sleep(0)
    return await asyncio.gather(f(), f())
assert asyncio.run(both()) == [3, 3]
""",
    "work": """
x = sorted((i * 7919) % 100_003 for i in range(200_000))
assert x[0] == 0 and len(set(x)) <= 100_003
y = bytearray(100 << 20)
""",
    "alarm": """
import signal
signal.signal(signal.SIGALRM, lambda *a: None)
signal.alarm(0)
assert signal.getsignal(signal.SIGALRM)
""",
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_pass(name: str) -> None:
    outcome = run_program(HONEST[name], Limits(seconds=20))
    assert outcome.passed, outcome


@pytest.mark.skipif(not LINUX, reason="the ways are Linux's")
@pytest.mark.parametrize("way", WAYS)
def test_honest_programs_pass_in_every_way(way: str) -> None:
    if not sandbox._run(b"pass", Limits(), way).passed:
        pytest.skip(f"this machine does not allow {way!r}")
    for name, code in HONEST.items():
        outcome = sandbox._run(code.encode(), Limits(seconds=20), way)
        assert outcome.passed, (name, outcome)


def test_native_libraries_of_the_installation_load() -> None:
    code = "import numpy\nassert numpy.linalg.inv(numpy.eye(3)).sum() == 3 and numpy.random.default_rng(0).random() < 1"
    outcome = run_program(code, Limits(seconds=30, memory_mb=2048))
    assert outcome.passed, outcome


def test_threads_are_allowed_where_they_are_counted() -> None:
    code = "import threading\nx = []\nt = [threading.Thread(target=x.append, args=(i,)) for i in range(8)]\n"
    outcome = run_program(f"{code}[i.start() for i in t]\n[i.join() for i in t]\nassert len(x) == 8", Limits())
    assert outcome.passed or outcome.isolation != "full", outcome


@pytest.mark.parametrize(
    ("held", "isolation", "network"),
    [
        ("ipc mount net pid privileges seccomp", "full", "none"),
        ("ipc mount net pid privileges", "partial", "none"),
        ("landlock privileges seccomp", "partial", "none"),
        ("privileges seccomp", "limits", "none"),
        ("landlock privileges", "limits", "guarded"),
        ("", "limits", "guarded"),
    ],
)
def test_an_outcome_says_what_held(held: str, isolation: Isolation, network: str) -> None:
    report = {"start": f"ready {held}", "end": "word", "code": -9, "errors": ""}
    outcome = sandbox._outcome(report, Limits())
    assert outcome.passed and (outcome.isolation, outcome.network) == (isolation, network)
    assert set(outcome.missing) == set(sandbox._FULL) - set(held.split())


def test_a_machine_that_allows_less_than_is_required_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    lesser = Outcome(True, "", isolation="partial", missing=("mount", "pid"))
    monkeypatch.setattr(sandbox, "_found", [("plain", lesser)])
    with pytest.raises(Fault, match=r"'full' here.*allows 'partial'.*mount, pid"):
        run_program("pass", Limits(require="full"))
    assert run_program("assert True", Limits(require="partial")).passed


def test_refused_namespaces_lead_to_the_next_way(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def run(source: bytes, limits: Limits, way: str) -> Outcome:
        tried.append(way)
        return Outcome(way == "plain", "", "" if way == "plain" else "refused")

    monkeypatch.setattr(sandbox, "_run", run)
    monkeypatch.setattr(sandbox, "_found", [])
    run_program("pass", Limits())
    run_program("pass", Limits())
    assert tried == [*(["root"] if os.geteuid() == 0 else []), *(["user"] if LINUX else []), "plain", "plain", "plain"]


def test_a_program_that_never_started_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_found", [("nowhere", Outcome(True, ""))])
    monkeypatch.setattr(sandbox, "_python", lambda: ["/dev/null/nothing"])
    monkeypatch.setattr(sandbox, "_BOOT", "import os; os._exit(3)")
    outcome = run_program("pass", Limits())
    assert not outcome.passed and "limits could not be set (exit status 3)" in outcome.fault


def _answer(program: bytes, call: int, args: tuple[int, ...] = (), arch: int = 0xC000003E) -> int:
    """What a seccomp program says of a system call: the kernel's interpreter for the few instructions that ours has."""
    data = struct.pack("=iIQ6Q", call, arch, 0, *(a & (1 << 64) - 1 for a in (*args, *[0] * 6)[:6]))
    code = list(struct.iter_unpack("=HBBI", program))
    at = a = 0
    while True:
        op, yes, no, value = code[at]
        at += 1
        if op == 0x20:
            a = int.from_bytes(data[value : value + 4], "little")
        elif op == 0x06:
            return value
        else:
            at += yes if {0x15: a == value, 0x25: a > value, 0x45: bool(a & value)}[op] else no


@pytest.mark.parametrize(("machine", "which", "arch"), [("x86_64", 0, 0xC000003E), ("aarch64", 1, 0xC00000B7)])
@pytest.mark.parametrize("plain", [False, True])
def test_the_filter_says_what_it_should(machine: str, which: int, arch: int, plain: bool) -> None:
    made = filters.seccomp_program(machine, 77, plain=plain, threads=not plain)
    assert made is not None and len(made) // 8 < 4096
    ok, no, absent = 0x7FFF0000, 0x50001, 0x50026

    def says(call: int, *args: int) -> int:
        return _answer(made, call, args, arch)

    def number(entry: tuple[int, int] | int) -> int:
        return entry if isinstance(entry, int) else entry[which]

    for name, entry in filters._REFUSED.items():
        assert number(entry) == -1 or says(number(entry)) == no, name
    for name, entry in filters._REFUSED_PLAIN.items():
        assert number(entry) == -1 or says(number(entry)) == (no if plain else ok), name
    for entry in filters._ONLY_ME.values():
        assert says(entry[which], 77, 9) == ok and {says(entry[which], pid, 9) for pid in (0, 1, 78, -1)} == {no}
    for entry in filters._ONLY_ME_OR_0.values():
        assert says(entry[which], 77) == says(entry[which], 0) == ok and says(entry[which], 78) == no
    clone = filters._CLONE[which]
    assert says(clone, 17) == no and says(clone, 0x10000000) == no and says(clone, 0x3D0F00) == (no if plain else ok)
    assert says(filters._PRCTL[which], 1) == no and says(filters._PRCTL[which], 15) == ok
    assert says(filters._IOCTL[which], 0, 0x5401) == ok and {
        says(filters._IOCTL[which], 0, c) for c in filters._IOCTLS
    } == {no}
    pair = filters._PAIR[which]
    assert says(pair, 1) == ok and {says(pair, family) for family in (0, 2, 10, 16, 40)} == {no}
    assert says(435) == absent and says(451) == says(0x40000029) == absent
    everyday = {
        "read": (0, 63), "write": (1, 64), "mmap": (9, 222), "openat": (257, 56), "exit_group": (231, 94), "futex": (202, 98),
        "rt_sigaction": (13, 134), "getrandom": (318, 278), "mkdirat": (258, 34), "clock_nanosleep": (230, 115),
    }  # fmt: skip
    assert {name: says(numbers[which]) for name, numbers in everyday.items()} == dict.fromkeys(everyday, ok)
    assert _answer(made, 0, arch=0x40000003) == 0x80000000


def test_a_machine_whose_calls_are_not_listed_has_no_filter() -> None:
    assert filters.seccomp_program("riscv64", 1, plain=True, threads=False) is None


def test_what_a_program_leaves_is_removed_however_deep(tmp_path: Path) -> None:
    here = Path.cwd()
    try:
        os.chdir(tmp_path)
        for _ in range(400):
            os.mkdir("d")  # noqa: PTH102
            os.chdir("d")
        Path("f").write_text("x")
    finally:
        os.chdir(here)
    (tmp_path / "link").symlink_to(here)
    (tmp_path / "shut").mkdir(mode=0)
    assert layers.used(str(tmp_path)) > 1 << 50
    layers.clear(str(tmp_path))
    assert list(tmp_path.iterdir()) == [] and here.is_dir()


def _kind(outcome: Outcome) -> str:
    if outcome.passed:
        return "passed"
    for words in ("still running", "not allowed", "left before", "MiB of files", "exit status"):
        if words in outcome.reason:
            return words
    return outcome.reason.split(":")[0].split(".")[-1][:30] or "fault"
