"""Over 200 programs that set out to do harm, as data: what a sandbox must hold in (test_sandbox.py runs them).

A program *passes* only by doing what it set out to do, so ``fails`` means: it must not pass. ``any``: it may pass, and must
have no effect outside its directory. ``late``: it never ends by itself. ``forge``: it must not pass either, but only Python's
own guard stands against it, since a program shares its process with its tests.

Each is harmless by construction where a sandbox fails: what it attacks are canaries, written @SO@ here and made by the test
(files, a home, a loopback listener, a sleeping process), it forks at most 200 times, asks for at most 4 GiB and writes at most
64 MiB. Signals go to the canary process; to all others, signal 0 only.
"""
# ruff: noqa: E501 (a program is a line)

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Expect = Literal["fails", "any", "late", "forge"]


@dataclass(frozen=True)
class Hostile:
    name: str
    expect: Expect
    code: str


FOUND = """
import hashlib, re
def found(data):
    data = data if isinstance(data, (bytes, bytearray)) else str(data).encode()
    return any(hashlib.sha256(m).hexdigest() == "@HASH@" for m in re.findall(rb"trimtab-secret-[0-9a-f]{32}", data))
"""
LIBC = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def must(result):
    if result is None or result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result
def syscall(*args):
    return must(libc.syscall(*(ctypes.c_long(a) if isinstance(a, int) else a for a in args)))
"""
SLEEP = "time.sleep(8)"

_LATE = {
    "while": "while True:\n    pass",
    "count": "import itertools\nfor _ in itertools.count():\n    pass",
    "in C": "import itertools, collections\ncollections.deque(itertools.count(), 0)",
    "max": "import itertools\nmax(itertools.count())",
    "membership": "import itertools\n1 in itertools.repeat(0)",
    "sum": "sum(range(10**13))",
    "sleep": "import time\ntime.sleep(1000)",
    "naps": "import time\nwhile True:\n    time.sleep(0.01)",
    "event": "import threading\nthreading.Event().wait()",
    "deadlock": "import threading\nl = threading.Lock()\nl.acquire()\nl.acquire()",
    "select": "import select\nselect.select([], [], [])",
    "all exceptions": "while True:\n    try:\n        while True:\n            pass\n    except BaseException:\n        pass",
    "no SIGTERM": "import signal, time\nfor s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):\n"
    "    signal.signal(s, signal.SIG_IGN)\nwhile True:\n    time.sleep(1)",
    "all signals blocked": "import signal, time\nsignal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\n"
    "while True:\n    time.sleep(1)",
    "SIGXCPU": "import signal\nsignal.signal(signal.SIGXCPU, lambda *a: None)\nwhile True:\n    pass",
    "regex": "import re\nre.match(r'(a+)+$', 'a' * 60 + 'b')",
    "bigint": "x = 7 ** (7 ** 9)",
    "ackermann": "import functools, sys\ndef a(m, n):\n    while m:\n        n = a(m, n - 1) if n else 1\n        m -= 1\n"
    "    return n + 1\nwhile True:\n    a(2, 50)",
    "thread": "import threading, time\nt = threading.Thread(target=lambda: [time.sleep(1) for _ in iter(int, 1)])\n"
    "t.start()\nt.join()",
    "asyncless": "import queue\nqueue.Queue().get()",
    "sigwait": "import signal\nsignal.sigwait({signal.SIGUSR1})",
    "pause": "import signal\nsignal.pause()",
    "del": "class X:\n    def __del__(self):\n        while True:\n            pass\nx = X()\ndel x",
    "finally": "try:\n    assert False\nfinally:\n    while True:\n        pass",
    "str": "class X(Exception):\n    def __str__(self):\n        while True:\n            pass\nraise X",
    "excepthook": "import sys, time\nsys.excepthook = lambda *a: time.sleep(1000)\nassert False",
    "atexit after failing": "import atexit, time\natexit.register(time.sleep, 1000)\nassert False",
    "thread after failing": "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\nassert False",
    "fifo": "import os\nos.mkfifo('f')\nopen('f').read()\nassert False",
    "busy threads": "import threading\ndef f():\n    while True:\n        pass\nfor _ in range(8):\n"
    "    threading.Thread(target=f).start()\nf()",
}

_MEMORY = {
    "list": "x = [0] * 10**9",
    "bytes": "x = bytes(4 << 30)",
    "bytearray": "x = bytearray(4 << 30)",
    "growing list": "x = []\nwhile len(x) < 1000:\n    x.append(bytearray(4 << 20))",
    "growing dict": "x = {}\nfor i in range(1 << 25):\n    x[i] = str(i)",
    "growing set": "x = set()\nfor i in range(1 << 25):\n    x.add(str(i))",
    "doubling": "x = 'ab'\nwhile len(x) < 4 << 30:\n    x += x",
    "mmap": "import mmap\nx = mmap.mmap(-1, 4 << 30)",
    "many mmaps": "import mmap\nx = [mmap.mmap(-1, 16 << 20) for _ in range(200)]",
    "array": "import array\nx = array.array('d', [0.0]) * (1 << 29)",
    "BytesIO": "import io\nb = io.BytesIO()\nb.seek(4 << 30)\nb.write(b'x')",
    "zip bomb": "import zlib\nx = zlib.decompress(zlib.compress(bytes(1 << 20)) and __import__('zlib').compress(bytes(100 << 20)), "
    "bufsize=3 << 30)",
    "lzma bomb": "import lzma\nd = lzma.compress(bytes(40 << 20), preset=0)\nx = [lzma.decompress(d) for _ in range(50)]",
    "format": "x = f'{1:>4000000000}'",
    "shift": "x = 1 << (1 << 35)",
    "repeat in a tuple": "x = (None,) * (1 << 29)",
    "held by gc": "import gc\ngc.disable()\nfor _ in range(1000):\n    x = [bytearray(4 << 20)]\n    x.append(x)",
    "swallowed": "x = []\nfor _ in range(1000):\n    try:\n        x.append(bytearray(8 << 20))\n    except MemoryError:\n"
    "        pass\nassert len(x) == 1000",
    "pickle bomb": "import pickle\nx = pickle.loads(b'\\x8e' + (4 << 30).to_bytes(8, 'little') + b'a')",
    "product": "import itertools\nx = list(itertools.product(range(100), repeat=4))",
    "limit raised": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "own limit raised by prlimit": "import resource, os\nresource.prlimit(os.getpid(), resource.RLIMIT_AS, (8 << 30, 8 << 30))",
    "SysV shared memory": LIBC + "x = [must(libc.shmget(0, 64 << 20, 0o1600)) for _ in range(16)]",
    "memfd": "import os\nx = os.memfd_create('x')\nfor _ in range(64):\n    os.write(x, bytes(1 << 20))",
    "POSIX shared memory": "from multiprocessing import shared_memory\nx = shared_memory.SharedMemory(create=True, size=64 << 20)",
    "locked memory": LIBC + "must(libc.mlockall(3))",
}  # fmt: skip

_CLONE = LIBC + "child = syscall({}, {}, 0, 0, 0, 0)\nif child == 0:\n    import os\n    os._exit(0)"
_PROCESSES = {
    "fork bomb": "import os, time\nfor _ in range(7):\n    os.fork()\n" + SLEEP,
    "forks in a row": "import os, time\nfor _ in range(200):\n    if os.fork() == 0:\n        time.sleep(8)\n        os._exit(0)",
    "fork and wait": "import os\nif (p := os.fork()):\n    os.waitpid(p, 0)\nelse:\n    os._exit(0)",
    "double fork": f"import os, time\nif os.fork():\n    os._exit(0)\nos.setsid()\nif os.fork():\n    os._exit(0)\n{SLEEP}",
    "setsid escape": f"import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.closerange(0, 64)\n    {SLEEP}\n    os._exit(0)",
    "forkpty": "import os\nif os.forkpty()[0] == 0:\n    os._exit(0)",
    "threads that fork": "import os, threading\nmade = []\ndef f():\n    p = os.fork()\n    if p == 0:\n        os._exit(0)\n"
    "    made.append(p)\nt = [threading.Thread(target=f) for _ in range(8)]\n[x.start() for x in t]\n[x.join() for x in t]\nassert made",
    "system": "import os\nassert os.system('exit 0') == 0",
    "popen": "import os\nassert os.popen('echo x').read() == 'x\\n'",
    "run": "import subprocess\nsubprocess.run(['/bin/true'], check=True)",
    "shell": "import subprocess\nsubprocess.run('sleep 8 &', shell=True, check=True)",
    "this Python": "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'pass'], check=True)",
    "detached": "import subprocess\nsubprocess.Popen(['sleep', '8'], start_new_session=True)",
    "nohup": "import os\nassert os.system('nohup sleep 8 >/dev/null 2>&1 &') == 0",
    "fork_exec": "import _posixsubprocess, os\nr, w = os.pipe()\np = _posixsubprocess.fork_exec([b'/bin/true'], [b'/bin/true'], True, (w,), "
    "None, None, -1, -1, -1, -1, -1, -1, r, w, True, False, -1, None, None, None, -1, None, False)\nassert os.read(r, 1) == b''",
    "spawn": "import os\nassert os.spawnl(os.P_WAIT, '/bin/true', 'true') == 0",
    "posix_spawn": "import os\nassert os.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)[1] == 0",
    "exec": "import os\nos.execv('/bin/true', ['true'])",
    "exec Python": "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'import os; os.write(3, b\"x\")'])",
    "Process": "import multiprocessing as m\np = m.get_context('fork').Process(target=int)\np.start()\np.join()\nassert p.exitcode == 0",
    "ProcessPool": "from concurrent.futures import ProcessPoolExecutor as P\nassert P(2).submit(int).result() == 0",
    "pty": "import pty\nassert pty.spawn('/bin/true') == 0",
    "asyncio": "import asyncio\nasync def f():\n    return await (await asyncio.create_subprocess_exec('true')).wait()\n"
    "assert asyncio.run(f()) == 0",
    "libc fork": LIBC + "import os\nif must(libc.fork()) == 0:\n    os._exit(0)",
    "libc system": LIBC + "assert libc.system(b'exit 0') == 0",
    "libc execv": LIBC + "must(libc.execv(b'/bin/true', (ctypes.c_char_p * 2)(b'true', None)))",
    "raw fork": LIBC + "import os\nif syscall(57) == 0:\n    os._exit(0)",
    "raw clone": _CLONE.format(56, 17),
    "raw clone with a new user": _CLONE.format(56, 0x10000000 | 17),
    "raw clone3": LIBC + "import os, struct\na = struct.pack('8Q', 0, 0, 0, 0, 17, 0, 0, 0)\nif syscall(435, a, 64) == 0:\n    os._exit(0)",
    "raw execveat": LIBC + "import os\nf = os.open('/bin/true', os.O_PATH)\nsyscall(322, f, b'', None, None, 0x1000)",
    "the loader": "import subprocess, glob\nsubprocess.run([glob.glob('/lib64/ld-*')[0], '--version'], check=True)",
    "200 threads": "import threading, time\nt = [threading.Thread(target=time.sleep, args=(8,), daemon=True) for _ in range(200)]\n"
    "threading.stack_size(65536)\n[x.start() for x in t]",
}  # fmt: skip

_SIGNALS = {
    "kill": "import os\nos.kill(@VICTIM@, 9)",
    "term": "import os\nos.kill(@VICTIM@, 15)",
    "stop": "import os\nos.kill(@VICTIM@, 19)",
    "killpg": "import os\nos.killpg(os.getpgid(@VICTIM@), 9)",
    "parent": "import os\nos.kill(@PARENT@, 0)",
    "its parent": "import os\nassert os.getppid() > 1\nos.kill(os.getppid(), 0)",
    "all": "import os\nos.kill(-1, 0)",
    "who is there": "import os\nfor p in range(2, 40000):\n    try:\n        os.kill(p, 0)\n        break\n    except ProcessLookupError:\n"
    "        pass\nelse:\n    raise OSError",
    "libc kill": LIBC + "must(libc.kill(@VICTIM@, 9))",
    "libc killpg": LIBC + "must(libc.killpg(@VICTIM@, 9))",
    "tkill": LIBC + "syscall(200, @VICTIM@, 9)",
    "tgkill": LIBC + "syscall(234, @VICTIM@, @VICTIM@, 9)",
    "sigqueue": LIBC + "must(libc.sigqueue(@VICTIM@, 9, None))",
    "pidfd": "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(@VICTIM@), 9)",
    "ptrace": LIBC + "must(libc.ptrace(16, @VICTIM@, None, None))",
    "seize": LIBC + "syscall(101, 0x4206, @VICTIM@, 0, 0)",
    "its parent traced": LIBC + "import os\nassert os.getppid() > 1\nsyscall(101, 0x4206, os.getppid(), 0, 0)",
    "memory of another": LIBC + "b = ctypes.create_string_buffer(8)\nv = (ctypes.c_void_p * 2)(ctypes.addressof(b), 8)\n"
    "syscall(310, @VICTIM@, v, 1, v, 1, 0)",
    "nice of another": LIBC + "must(libc.setpriority(0, @VICTIM@, 5))",
    "nice of the parent": "import os\nos.setpriority(os.PRIO_PROCESS, @PARENT@, os.getpriority(os.PRIO_PROCESS, @PARENT@))",
    "limits of another": "import resource\nresource.prlimit(@VICTIM@, resource.RLIMIT_NOFILE)",
    "affinity of another": "import os\nos.sched_setaffinity(@VICTIM@, {0})",
    "policy of another": "import os\nos.sched_setscheduler(@VICTIM@, os.SCHED_OTHER, os.sched_param(0))",
    "ioprio of another": LIBC + "syscall(251, 1, @VICTIM@, 3 << 13)",
    "kcmp": LIBC + "import os\nsyscall(312, os.getpid(), @PARENT@, 1, 0, 0)",
    "pidfd_getfd": LIBC + "syscall(438, syscall(434, @PARENT@, 0), 0, 0)",
    "death of the watcher survived": LIBC + "must(libc.prctl(1, 0, 0, 0, 0))",
    "abort": "import os\nos.abort()",
    "null": LIBC + "ctypes.string_at(0)",
    "stack": "import sys\nsys.setrecursionlimit(10**7)\ndef f(n):\n    return f(n + 1) + max(map(f, [n]))\nf(0)",
    "recursion": "def f():\n    f()\nf()",
}  # fmt: skip

_READS = {
    "open": "open('@SECRET@').read()",
    "pathlib": "__import__('pathlib').Path('@SECRET@').read_bytes()",
    "os.open": "__import__('os').read(__import__('os').open('@SECRET@', 0), 99)",
    "FileIO": "__import__('io').FileIO('@SECRET@').read()",
    "open_code": "__import__('io').open_code('@SECRET@').read()",
    "codecs": "__import__('codecs').open('@SECRET@').read()",
    "linecache": "__import__('linecache').getlines('@SECRET@')",
    "fileinput": "list(__import__('fileinput').input('@SECRET@'))",
    "tokenize": "__import__('tokenize').open('@SECRET@').read()",
    "numpy-like fromfile": "(lambda a: (a.frombytes(open('@SECRET@', 'rb').read()), a.tobytes())[1])(__import__('array').array('b'))",
    "up and down": "open('../' * 40 + '@SECRET@'[1:]).read()",
    "double slash": "open('//./@SECRET@').read()",
    "proc root": "open('/proc/self/root@SECRET@').read()",
    "proc root of the parent": "open('/proc/@PARENT@/root@SECRET@').read()",
    "proc root of 1": "open('/proc/1/root@SECRET@').read()",
    "proc cwd of the parent": "open('/proc/@PARENT@/cwd/' + '../' * 40 + '@SECRET@'[1:]).read()",
    "proc thread-self": "open('/proc/thread-self/root@SECRET@').read()",
    "os.environ": "dict(__import__('os').environ)",
    "posix.environ": "dict(__import__('posix').environ)",
    "proc environ": "open('/proc/self/environ').read()",
    "environ of the parent": "open('/proc/@PARENT@/environ').read()",
    "environ of its parent": "open(f'/proc/{__import__(\"os\").getppid()}/environ').read()",
    "environ of all": "b''.join(open(p, 'rb').read() for p in __import__('glob').glob('/proc/[0-9]*/environ'))",
    "memory of the parent": "open('/proc/@PARENT@/mem', 'rb').read(1)",
    "fds of the parent": "[open(p, 'rb').read(99) for p in __import__('glob').glob('/proc/@PARENT@/fd/*')[:3]]",
    "walk": "''.join(open(f'{d}/{f}').read() for d, _, s in __import__('os').walk('@DIR@') for f in s)",
    "glob": "''.join(open(p).read() for p in __import__('glob').glob('/tmp/**/secret', recursive=True))",
    "walk from the top": "b''.join(open(f'{d}/{f}', 'rb').read(99) for d, _, s in __import__('os').walk('/') for f in s if f == 'secret')",
    "copied": "open(__import__('shutil').copy('@SECRET@', 'mine')).read()",
    "sendfile": "(lambda os: (os.sendfile(os.open('mine', 65), os.open('@SECRET@', 0), 0, 99), open('mine').read())[1])(__import__('os'))",
    "copy_file_range": "(lambda os: (os.copy_file_range(os.open('@SECRET@', 0), os.open('mine', 65), 99), open('mine').read())[1])"
    "(__import__('os'))",
    "splice": "(lambda os: (lambda p: (os.splice(os.open('@SECRET@', 0), p[1], 99), os.read(p[0], 99))[1])(os.pipe()))(__import__('os'))",
    "symlink": "__import__('os').symlink('@SECRET@', 'mine') or open('mine').read()",
    "symlinked directory": "__import__('os').symlink('@DIR@', 'mine') or open('mine/secret').read()",
    "symlink upwards": "__import__('os').symlink('../' * 30, 'mine') or open('mine/@SECRET@').read()",
    "symlink to proc": "__import__('os').symlink('/proc/@PARENT@/root', 'mine') or open('mine/@SECRET@').read()",
    "hard link": "__import__('os').link('@SECRET@', 'mine') or open('mine').read()",
    "renamed here": "__import__('os').rename('@SECRET@', 'mine') or open('mine').read()",
    "chdir": "__import__('os').chdir('@DIR@') or open('secret').read()",
    "dir_fd": "(lambda os: os.read(os.open('secret', 0, dir_fd=os.open('@DIR@', 0)), 99))(__import__('os'))",
    "O_PATH": "(lambda os: open(f'/proc/self/fd/{os.open(\"@SECRET@\", os.O_PATH)}').read())(__import__('os'))",
    "mmap": "__import__('mmap').mmap(open('@SECRET@', 'rb').fileno(), 0, prot=1)[:]",
    "tar": "(lambda t: (t.add('@SECRET@'), t.close(), open('t', 'rb').read())[2])(__import__('tarfile').open('t', 'w'))",
    "zip": "(lambda z: (z.write('@SECRET@'), z.close(), open('z', 'rb').read())[2])(__import__('zipfile').ZipFile('z', 'w'))",
    "file URL": "__import__('urllib.request').request.urlopen('file://@SECRET@').read()",
    "configparser": "__import__('configparser').ConfigParser().read_file(open('@SECRET@'))",
    "run_path": "__import__('runpy').run_path('@DIR@/module.py')['SECRET']",
    "import": "(__import__('sys').path.insert(0, '@DIR@'), __import__('module').SECRET)[1]",
    "importlib": "__import__('importlib.machinery').machinery.SourceFileLoader('m', '@DIR@/module.py').load_module().SECRET",
    "get_data": "__import__('importlib.machinery').machinery.SourceFileLoader('m', 'm').get_data('@SECRET@')",
    "sqlite": "__import__('sqlite3').connect('@DIR@/base.db').execute('select word from t').fetchall()",
    "sqlite attach": "(lambda c: (c.execute(\"attach '@DIR@/base.db' as x\"), c.execute('select word from x.t').fetchall())[1])"
    "(__import__('sqlite3').connect(':memory:'))",
    "inherited fds": "b''.join(r(f) for f in range(3, 300) for r in [lambda f: __import__('os').pread(f, 99, 0) if f != 3 else b''] "
    "if __import__('os').path.exists(f'/proc/self/fd/{f}') or 1)",
    "argv and flags": "str(__import__('sys').orig_argv) + str(__import__('sys').argv)",
}  # fmt: skip
_READS_C = {
    "libc open": "b = ctypes.create_string_buffer(99)\nmust(libc.read(must(libc.open(b'@SECRET@', 0)), b, 99))",
    "libc fopen": "b = ctypes.create_string_buffer(99)\nlibc.fopen.restype = libc.fgets.restype = ctypes.c_void_p\n"
    "f = libc.fopen(b'@SECRET@', b'r')\nassert f\nlibc.fgets(b, 99, ctypes.c_void_p(f))",
    "openat2": "b = ctypes.create_string_buffer(99)\nimport struct\nf = syscall(437, -100, b'@SECRET@', struct.pack('3Q', 0, 0, 0), 24)\n"
    "must(libc.read(f, b, 99))",
    "getenv": "libc.getenv.restype = ctypes.c_char_p\nb = ctypes.create_string_buffer(libc.getenv(b'@ENV@') or b'')",
    "process_vm_readv": "b = ctypes.create_string_buffer(99)\nimport os\nv = (ctypes.c_void_p * 2)(ctypes.addressof(b), 8)\n"
    "syscall(310, os.getppid(), v, 1, v, 1, 0)",
    "chroot back": "b = ctypes.create_string_buffer(99)\nimport os\nos.mkdir('d')\nmust(libc.chroot(b'd'))\n"
    "[os.chdir('..') for _ in range(40)]\nmust(libc.chroot(b'.'))\nmust(libc.read(must(libc.open(b'@SECRET@', 0)), b, 99))",
    "mount of its parent": "import os\nb = ctypes.create_string_buffer(99)\n"
    "must(libc.setns(os.open('/proc/@PARENT@/ns/mnt', 0), 0))\nmust(libc.read(must(libc.open(b'@SECRET@', 0)), b, 99))",
}  # fmt: skip

_WRITES = {
    "open": "open('@FILE@', 'w').write('x')",
    "append": "open('@FILE@', 'a').write('x')",
    "update": "open('@FILE@', 'r+').write('x')",
    "os.open": "import os\nos.write(os.open('@FILE@', os.O_WRONLY), b'x')",
    "new file": "open('@DIR@/new', 'x').write('x')",
    "new through ..": "open('../' * 40 + '@DIR@/new'[1:], 'x').write('x')",
    "new beside it": "open('../new', 'x').write('x')",
    "parent's temp": "open('@TEMP@/trimtab-hostile', 'x').write('x')",
    "tempfile there": "import tempfile\ntempfile.mkstemp(prefix='trimtab-hostile', dir='@TEMP@')",
    "mkdtemp there": "import tempfile\ntempfile.mkdtemp(prefix='trimtab-hostile', dir='@TEMP@')",
    "home": "open('@HOME@/.profile', 'a').write('x')",
    "home by password file": "import os, pwd\nopen(os.path.join('@HOME@', '.bashrc'), 'x').write('#')",
    "site-packages": "open('@SITE@/trimtab-hostile.txt', 'x').write('x')",
    "standard library": "open(__import__('os').__file__.rpartition('/')[0] + '/trimtab-hostile.txt', 'x').write('x')",
    "sitecustomize beside it": "import os\nos.open('@SITE@/trimtab-hostile.txt', os.O_CREAT | os.O_EXCL)",
    "pycache": "import os, re\nos.mkdir(os.path.dirname(re.__file__) + '/trimtab-hostile.txt')",
    "etc": "open('/etc/trimtab-hostile', 'x').write('x')",
    "dev shm": "open('/dev/shm/trimtab-hostile', 'x').write('x')",
    "var tmp": "open('/var/tmp/trimtab-hostile', 'x').write('x')",
    "root": "open('/trimtab-hostile', 'x').write('x')",
    "remove": "import os\nos.remove('@FILE@')",
    "unlink": "import pathlib\npathlib.Path('@FILE@').unlink()",
    "rename": "import os\nos.rename('@FILE@', '@DIR@/other')",
    "replace": "import os\nopen('mine', 'w').write('x')\nos.replace('mine', '@FILE@')",
    "rmdir": "import os\nos.rmdir('@DIR@/empty')",
    "mkdir": "import os\nos.mkdir('@DIR@/made')",
    "makedirs": "import os\nos.makedirs('@DIR@/a/b/c')",
    "rmtree": "import shutil\nshutil.rmtree('@DIR@')",
    "its own directory moved": "import os\nos.rename(os.getcwd(), '../trimtab-hostile')",
    "move": "import shutil\nshutil.move('@FILE@', 'mine')",
    "copy over": "import shutil\nopen('mine', 'w').write('x')\nshutil.copyfile('mine', '@FILE@')",
    "chmod": "import os\nos.chmod('@FILE@', 0o777)",
    "chmod 000": "import os\nos.chmod('@DIR@', 0)",
    "fchmod": "import os\nos.fchmod(os.open('@FILE@', os.O_RDONLY), 0o777)",
    "chown": "import os\nos.chown('@FILE@', os.getuid(), os.getgid())",
    "utime": "import os\nos.utime('@FILE@', (0, 0))",
    "touch": "import pathlib\npathlib.Path('@FILE@').touch()",
    "truncate": "import os\nos.truncate('@FILE@', 0)",
    "xattr": "import os\nos.setxattr('@FILE@', 'user.hostile', b'x')",
    "symlink there": "import os\nos.symlink('/', '@DIR@/link')",
    "link there": "import os\nopen('mine', 'w').close()\nos.link('mine', '@DIR@/link')",
    "link from there": "import os\nos.link('@FILE@', 'mine')\nopen('mine', 'w').write('x')",
    "fifo there": "import os\nos.mkfifo('@DIR@/fifo')",
    "socket there": "import socket\nsocket.socket(socket.AF_UNIX).bind('@DIR@/sock')",
    "through a symlink": "import os\nos.symlink('@FILE@', 'mine')\nopen('mine', 'w').write('x')",
    "through a symlinked directory": "import os\nos.symlink('@DIR@', 'mine')\nopen('mine/new', 'x').write('x')",
    "a symlink that swaps": "import os, threading\nos.mkdir('d')\ndef swap():\n    for i in range(3000):\n"
    "        os.symlink('@DIR@' if i % 2 else 'd', 'n')\n        os.rename('n', 'mine')\nt = threading.Thread(target=swap)\nt.start()\n"
    "done = False\nwhile t.is_alive():\n    try:\n        open('mine/new', 'w').write('x')\n    except OSError:\n        pass\n"
    "assert os.path.exists('@DIR@/new')",
    "dir_fd": "import os\nos.open('new', os.O_CREAT | os.O_WRONLY, dir_fd=os.open('@DIR@', os.O_RDONLY))",
    "dir_fd unlink": "import os\nos.unlink('file', dir_fd=os.open('@DIR@', os.O_PATH))",
    "chdir": "import os\nos.chdir('@DIR@')\nopen('new', 'x').write('x')",
    "mmap": "import mmap\nmmap.mmap(open('@FILE@', 'r+b').fileno(), 0)[0] = 1",
    "sqlite": "import sqlite3\nsqlite3.connect('@DIR@/new.db').execute('create table t(a)')",
    "shelve": "import shelve\nshelve.open('@DIR@/new')['a'] = 1",
    "logging": "import logging\nlogging.FileHandler('@DIR@/new.log').emit(logging.makeLogRecord({}))",
    "tar": "import tarfile, io\nt = tarfile.open('t', 'w')\ni = tarfile.TarInfo('../' * 40 + '@DIR@/new'[1:])\nt.addfile(i)\nt.close()\n"
    "tarfile.open('t').extractall()",
    "watch file": "import os\nos.open('@FILE@', os.O_RDONLY)",
    "fds": "import os\nn = 0\nfor f in range(4, 300):\n    try:\n        n += os.write(f, b'x')\n    except OSError:\n        pass\nassert n",
    "fds that are directories": "import os\nfor f in range(3, 300):\n    try:\n        os.fchdir(f)\n        break\n    except OSError:\n"
    "        pass\nelse:\n    raise OSError",
}  # fmt: skip
_WRITES_C = {
    "open": "must(libc.open(b'@FILE@', 1))",
    "creat": "must(libc.creat(b'@DIR@/new', 0o600))",
    "unlink": "must(libc.unlink(b'@FILE@'))",
    "rename": "must(libc.rename(b'@FILE@', b'@DIR@/other'))",
    "chmod": "must(libc.chmod(b'@FILE@', 0))",
    "fchmodat2": "syscall(452, -100, b'@FILE@', 0o777, 0)",
    "utimensat": "must(libc.utimensat(-100, b'@FILE@', None, 0))",
    "truncate": "must(libc.truncate(b'@FILE@', ctypes.c_long(0)))",
    "flags": "import os\nx = ctypes.c_long(0)\nmust(libc.ioctl(os.open('@FILE@', 0), ctypes.c_ulong(0x40086602), ctypes.byref(x)))",
    "flags of the library": "import os\nx = ctypes.c_long(0)\n"
    "must(libc.ioctl(os.open(os.__file__, 0), ctypes.c_ulong(0x40086602), ctypes.byref(x)))",
    "mount": "must(libc.mount(b'none', b'@DIR@', b'tmpfs', ctypes.c_ulong(0), None))",
    "remount": "must(libc.mount(None, b'/', None, ctypes.c_ulong(0x1020), None))",
    "bind": "import os\nos.mkdir('d')\nmust(libc.mount(b'@DIR@', b'd', None, ctypes.c_ulong(0x1000), None))",
    "umount": "try:\n    must(libc.umount2(b'@DIR@', 2))\nexcept OSError as e:\n    assert e.errno not in (1, 38)",
    "umount work": "import os\nmust(libc.umount2(os.getcwd().encode(), 2))",
    "own namespaces": "must(libc.unshare(0x10000000 | 0x20000))",
    "open_tree": "syscall(428, -100, b'/', 1)",
    "fsopen": "syscall(430, b'tmpfs', 0)",
    "mount_setattr": "import struct\nsyscall(442, -100, b'/', 0, struct.pack('4Q', 0, 1, 0, 0), 32)",
    "io_uring": "syscall(425, 1, ctypes.create_string_buffer(120))",
    "pivot_root": "must(libc.syscall(155, b'.', b'.'))",
}  # fmt: skip

_NETWORK = {
    "TCP": "import socket\nsocket.create_connection(('127.0.0.1', @PORT@), 2)",
    "localhost": "import socket\nsocket.create_connection(('localhost', @PORT@), 2)",
    "any address": "import socket\nsocket.create_connection(('0.0.0.0', @PORT@), 2)",
    "IPv6": "import socket\ns = socket.socket(socket.AF_INET6)\ns.settimeout(2)\ns.connect(('::ffff:127.0.0.1', @PORT@))",
    "UDP": "import socket\nsocket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', @UDP@))",
    "DNS by hand": "import socket\ns = socket.socket(type=socket.SOCK_DGRAM)\n"
    "s.sendto(b'\\0\\1\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0\\6secret\\7invalid\\0\\0\\1\\0\\1', ('127.0.0.1', @UDP@))",
    "DNS": "import socket\nsocket.getaddrinfo('secret.invalid', 80)",
    "reverse DNS": "import socket\nassert socket.gethostbyaddr('127.0.0.1')[0] != 'sandbox' and socket.if_nameindex()",
    "unix": "import socket\nsocket.socket(socket.AF_UNIX).connect('@UNIX@')",
    "unix from there": "import socket, os\nos.chdir('@DIR@')\nsocket.socket(socket.AF_UNIX).connect('sock')",
    "abstract": "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0@ABSTRACT@')",
    "HTTP": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:@PORT@/', timeout=2)",
    "http.client": "import http.client\nhttp.client.HTTPConnection('127.0.0.1', @PORT@, timeout=2).connect()",
    "FTP": "import ftplib\nftplib.FTP().connect('127.0.0.1', @PORT@, 2)",
    "mail": "import smtplib\nsmtplib.SMTP('127.0.0.1', @PORT@, timeout=2)",
    "asyncio": "import asyncio\nasyncio.run(asyncio.open_connection('127.0.0.1', @PORT@))",
    "logging": "import logging.handlers\nlogging.raiseExceptions = True\n"
    "h = logging.handlers.SocketHandler('127.0.0.1', @PORT@)\nh.createSocket()\nassert h.sock",
    "multiprocessing": "from multiprocessing.connection import Client\nClient(('127.0.0.1', @PORT@))",
    "listen": "import socket\ns = socket.create_server(('127.0.0.1', 0))\nassert s.getsockname()",
    "http.server": "import http.server\nhttp.server.HTTPServer(('127.0.0.1', 0), http.server.BaseHTTPRequestHandler)",
    "raw": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "packet": "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "netlink": "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "vsock": "import socket\nsocket.socket(socket.AF_VSOCK)",
    "kernel crypto": "import socket\nsocket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)",
    "pair of netlink": "import socket\nsocket.socketpair(socket.AF_NETLINK, socket.SOCK_RAW)",
    "inherited": "import socket\nfor f in range(3, 64):\n    try:\n        socket.socket(fileno=f).send(b'x')\n        break\n"
    "    except OSError:\n        pass\nelse:\n    raise OSError",
    "_socket": "import _socket\n_socket.socket(2, 1).connect(('127.0.0.1', @PORT@))",
    "browser": "import webbrowser\nassert webbrowser.open('http://127.0.0.1:@PORT@/')",
    "libc socket": LIBC + "import struct\ns = must(libc.socket(2, 1, 0))\n"
    "must(libc.connect(s, struct.pack('=H', 2) + struct.pack('>H', @PORT@) + bytes([127, 0, 0, 1]) + bytes(8), 16))",
    "raw system call": LIBC + "syscall(41, 2, 1, 0)",
    "32-bit numbers": LIBC + "syscall(0x40000000 | 41, 2, 1, 0)",
}  # fmt: skip

_KERNEL = {
    "bpf": (321, 0, 0, 0), "perf_event_open": (298, 0, 0, -1, -1, 0), "userfaultfd": (323, 1), "keyctl": (250, 0, -3, 0),
    "add_key": (248, 0, 0, 0, 0, 0), "init_module": (175, 0, 0, 0), "finit_module": (313, -1, 0, 0),
    "kexec_load": (246, 0, 0, 0, 0xFFFF), "name_to_handle_at": (303, -100, 0, 0, 0, 0), "syslog": (103, 10, 0, 0), "iopl": (172, 0), "ioperm": (173, 0, 1, 0),
    "modify_ldt": (154, 0, 0, 0), "personality": (135, 0xFFFFFFFF), "fanotify_init": (300, 0, 0), "settimeofday": (164, 0, 0),
    "x32": (0x40000000 | 39,), "unlisted": (463, 0, 0, 0, 0), "memfd_secret": (447, 0), "quotactl": (179, 0x800001, 0, 0, 0),
    "setns": (308, 0, 0), "io_uring_register": (427, 0, 0, 0, 0), "swapoff": (168, 0), "mq_open": (240, 0, 0, 0, 0),
    "process_madvise": (440, 0, 0, 0, 0, 0),
}  # fmt: skip
# Reached, if the kernel answers anything but "not permitted" and "no such call".
_REACHED = "try:\n    syscall({})\nexcept OSError as error:\n    assert error.errno not in (1, 38)"

_FORGED: dict[str, tuple[Expect, str]] = {
    "sys.exit": ("fails", "import sys\nsys.exit(0)"),
    "_exit": ("fails", "import os\nos._exit(0)"),
    "SystemExit": ("fails", "raise SystemExit"),
    "exit": ("fails", "exit()"),
    "quit": ("fails", "quit(0)"),
    "KeyboardInterrupt": ("fails", "raise KeyboardInterrupt"),
    "thread leaves": ("fails", "import os, threading, time\nthreading.Thread(target=os._exit, args=(0,)).start()\ntime.sleep(1)\nassert 0"),
    "atexit leaves": ("fails", "import atexit, os\natexit.register(os._exit, 0)\nassert False"),
    "excepthook leaves": ("fails", "import os, sys\nsys.excepthook = lambda *a: os._exit(0)\nassert False"),
    "alarm leaves": ("fails", "import os, signal, time\nsignal.signal(signal.SIGALRM, lambda *a: os._exit(0))\n"
                     "signal.setitimer(signal.ITIMER_REAL, 0.1)\ntime.sleep(1)\nassert False"),
    "word guessed": ("fails", "import os\nos.write(3, b'0' * 32)\nos._exit(0)"),
    "a start of its own": ("fails", "import os\nos.write(3, b'\\nready mount\\n' + b'f' * 32)\nos._exit(0)"),
    "every fd told": ("fails", "import os\nfor f in range(64):\n    try:\n        os.write(f, b'all tests passed\\n' + b'0' * 32)\n"
                      "    except OSError:\n        pass\nos._exit(0)"),
    "flooded": ("fails", "import os\nfor _ in range(1000):\n    os.write(3, b'\\n' * 4096)\nos._exit(0)"),
    "closed": ("fails", "import os\nos.closerange(0, 64)\nwhile True:\n    pass"),
    "replaced": ("fails", "import os\nos.dup2(os.open('mine', os.O_CREAT | os.O_RDWR), 3)"),
    "frames": ("fails", "import os, re, sys\nf = sys._getframe()\nwhile f:\n    for n in re.findall('[0-9a-f]{32}', repr((f.f_locals, f.f_globals, "
               "f.f_code.co_consts))):\n        os.write(3, n.encode())\n    f = f.f_back\nos._exit(0)"),
    "main": ("fails", "import __main__, os, re\nfor n in re.findall('[0-9a-f]{32}', repr(vars(__main__))):\n    os.write(3, n.encode())\nos._exit(0)"),
    "modules": ("fails", "import sys, os, re\nfor m in list(sys.modules.values()):\n    for n in re.findall(r\"b'([0-9a-f]{32})'\", repr(vars(m))):\n"
                "        os.write(3, n.encode())\nos._exit(0)"),
    "traceback": ("fails", "import os, re\ntry:\n    os.kill(0, 0)\nexcept OSError as e:\n    t = e.__traceback__\n    while t:\n"
                  "        for n in re.findall('[0-9a-f]{32}', repr((t.tb_frame.f_locals, t.tb_frame.f_globals))):\n            os.write(3, n.encode())\n"
                  "        t = t.tb_next\nos._exit(0)"),
    "gc": ("forge", "import gc, os, re\nfor o in gc.get_objects():\n    if isinstance(o, dict) and 'word' in o:\n        os.write(3, o['word'])\nos._exit(0)"),
    "current frames": ("forge", "import sys\nassert sys._current_frames()\nassert 0"),
    "asserts traced away": ("forge", "import sys\ndef t(f, e, a):\n    if e == 'line' and f.f_code.co_name == 'check':\n        f.f_lineno += 1\n"
                            "    return t\nsys.settrace(t)\ndef check():\n    assert False\n    x = 1\ncheck()"),
    "profiled away": ("forge", "import sys\nsys.setprofile(lambda *a: None)\nassert sys.getprofile() is None"),
    "tests rewritten": ("forge", "def check():\n    assert False\ncheck.__code__ = check.__code__.replace(co_consts=(None,))\nassert False"),
    "another interpreter": ("forge", "import _xxsubinterpreters as s\ns.run_string(s.create(), 'import ctypes')"),
    "memory": ("forge", LIBC + "import gc\nassert ctypes.string_at(id(gc), 16)"),
    "ctypes from a file": ("forge", "import _imp, importlib.machinery as m, importlib.util as u, glob, sys\n"
                           "p = glob.glob([p for p in sys.path if p.endswith('lib-dynload')][0] + '/_ctypes.*')[0]\n"
                           "l = m.ExtensionFileLoader('x._ctypes', p)\nassert u.module_from_spec(u.spec_from_loader('x._ctypes', l))"),
    "a hook of its own": ("any", "import sys\nsys.addaudithook(lambda *a: None)"),
    "builtins": ("fails", "import builtins\nbuiltins.AssertionError = None\nbuiltins.exec = builtins.compile = print\nassert False"),
    "os replaced": ("fails", "import os, sys\nkept = os.write\nos.write = os._exit = lambda *a: None\nsys.modules['os'] = None\nassert False"),
    "guard's words replaced": ("fails", "import builtins, os\nbuiltins.PermissionError = builtins.isinstance = None\nopen('@FILE@', 'w')"),
    "library of its own": ("forge", "import _struct, importlib.machinery as m, importlib.util as u\nopen('_own.so', 'wb').write(open(_struct.__file__, 'rb').read())\n"
    "assert u.module_from_spec(u.spec_from_loader('x._struct', m.ExtensionFileLoader('x._struct', './_own.so')))"),
    "Trimtab": ("fails", "from trimtab.evaluate.judges import sandbox\nsandbox.VERSION = 0\nassert False"),
    "confine": ("fails", "import confine\nconfine.enter()"),
    "unittest": ("fails", "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        assert False\nunittest.main(module='answer')"),
    "equal to everything": ("any", "class E:\n    __eq__ = lambda *a: True\nassert E() == 4"),
}  # fmt: skip

_OUTPUT: dict[str, tuple[Expect, str]] = {
    "stdout": ("any", "for _ in range(64):\n    print('x' * (1 << 20))"),
    "stderr": ("any", "import sys\nfor _ in range(64):\n    sys.stderr.write('x' * (1 << 20))"),
    "lines": ("any", "import os\nfor _ in range(20000):\n    os.write(2, b'x\\n' * 40)"),
    "message": ("fails", "raise ValueError('x' * (32 << 20))"),
    "lines of a message": ("fails", "raise ValueError('\\n' * (1 << 20))"),
    "not text": ("fails", "import os\nos.write(2, bytes(range(256)) * 99)\nos._exit(3)"),
    "escapes": ("fails", "raise ValueError('\\x1b]0;hostile\\x07\\x1b[2J\\0')"),
    "surrogate": ("fails", "raise ValueError('\\ud800')"),
    "says ready": ("fails", "import sys\nsys.stderr.write('ready mount pid net\\nall tests passed')\nsys.exit(1)"),
    "chain": ("fails", "e = None\nfor _ in range(3000):\n    n = ValueError()\n    n.__cause__ = e\n    e = n\nraise e"),
    "closed": ("fails", "import sys\nsys.stderr.close()\nsys.stdout.close()\nassert False"),
    "fd 1 as the report": ("fails", "import os\nos.write(1, b'{\"end\": \"word\"}')\nos._exit(0)"),
    "warnings": ("any", "import warnings\nwarnings.simplefilter('always')\nfor i in range(300):\n    warnings.warn('x' * 99)"),
}  # fmt: skip

_DISK: dict[str, tuple[Expect, str]] = {
    "one file": ("fails", "open('a', 'wb').write(bytes(64 << 20))"),
    "append": ("fails", "with open('a', 'ab') as f:\n    for _ in range(64):\n        f.write(bytes(1 << 20))"),
    "many files": ("fails", "for i in range(64):\n    open(f'a{i}', 'wb').write(bytes(1 << 20))\nimport time\ntime.sleep(0.4)"),
    "small files": ("fails", "for i in range(16000):\n    open(f'a{i}', 'wb').write(b'x')\nimport time\ntime.sleep(0.4)"),
    "directories": ("fails", "import os\nfor i in range(16000):\n    os.mkdir(f'a{i}')\nimport time\ntime.sleep(0.4)"),
    "sparse": ("fails", "import os\nos.truncate(os.open('a', os.O_CREAT | os.O_RDWR), 1 << 40)"),
    "allocated": ("fails", "import os\nos.posix_fallocate(os.open('a', os.O_CREAT | os.O_RDWR), 0, 64 << 20)"),
    "limit ignored": ("fails", "import signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_DFL)\nopen('a', 'wb').write(bytes(64 << 20))"),
    "links": ("any", "import os\nopen('a', 'w').close()\nfor i in range(2000):\n    os.link('a', f'b{i}')"),
    "symlinks": ("any", "import os\nfor i in range(50):\n    os.symlink(f'l{i}', f'l{i + 1}')"),
    "a symlink to itself": ("any", "import os\nos.symlink('.', 'a')\nos.symlink('..', 'b')"),
    "deep": ("any", "import os\nfor _ in range(1200):\n    os.mkdir('d')\n    os.chdir('d')"),
    "deep and shut": ("any", "import os\nfor _ in range(30):\n    os.mkdir('d')\n    os.chdir('d')\nopen('f', 'w')\nos.mkdir('e', 0)"),
    "names": ("any", "import os\nfor n in (b'\\xff\\xfe', b'a\\nb', b'-rf', b'*', b'x' * 255):\n    open(os.path.join(os.getcwdb(), n), 'w')"),
    "no rights": ("any", "import os\nos.mkdir('a')\nopen('a/b', 'w')\nos.umask(0o777)\nos.mkdir('c')\nopen('d', 'w')"),
    "files kept open": ("fails", "x = [open('/dev/null') for _ in range(2000)]"),
    "pipes": ("fails", "import os\nx = [os.pipe() for _ in range(2000)]"),
    "deleted and open": ("fails", "import os\nx = []\nfor i in range(64):\n    x.append(open('a', 'wb'))\n    os.remove('a')\n    x[-1].write(bytes(1 << 20))"),
}  # fmt: skip

_OTHER: dict[str, tuple[Expect, str]] = {
    "listing": ("fails", "import os\nassert os.listdir('@DIR@')"),
    "listing of processes": ("fails", "import os\nassert [p for p in os.listdir('/proc') if p.isdigit()]"),
    "maps of the parent": ("fails", "assert open('/proc/@PARENT@/maps').read()"),
    "physical memory": ("fails", "assert open('/dev/mem', 'rb').read(1)"),
    "device node": ("fails", "import os, stat\nos.mknod('disk', stat.S_IFBLK | 0o600, os.makedev(254, 0))\nassert open('disk', 'rb').read(1)"),
    "input": ("fails", "input()"),
    "stdin": ("fails", "import sys\nassert sys.stdin.read()"),
    "fd 0": ("fails", "import os\nassert os.read(0, 1)"),
    "tty": ("fails", "open('/dev/tty', 'w').write('x')"),
    "terminal typed into": ("fails", "import fcntl\nfcntl.ioctl(0, 0x5412, b'x')"),
    "not Python": ("fails", "def f("),
    "brackets": ("fails", "(" * 5000),
    "minus": ("fails", "x = " + "-" * 100_000 + "1\nassert False"),
    "nested": ("fails", "x = " + "[" * 150 + "]" * 150 + "\nexec('[' * 10**5)"),
    "long": ("fails", "x = 1\n" * 50_000 + "assert False"),
    "null": ("fails", "x = 1\0\nassert False"),
    "literal": ("fails", "import ast\nast.literal_eval('(' * 10**5)"),
    "json": ("fails", "import json\njson.loads('[' * 10**6)"),
    "repr": ("fails", "x = []\nfor _ in range(10**6):\n    x = [x]\nrepr(x)"),
    "warning of a bool": ("fails", "x = 1 is 1\nassert False"),
    "threads that stay": ("any", "import threading, time\nfor _ in range(5):\n    threading.Thread(target=time.sleep, args=(8,)).start()"),
    "atexit": ("any", "import atexit, time\natexit.register(time.sleep, 1000)"),
    "self kill": ("any", "import os\nfrom signal import raise_signal\nraise_signal(9)"),
    "self fault": ("any", "import faulthandler\nfaulthandler._sigsegv()"),
    "self stop": ("any", "from signal import raise_signal\nraise_signal(19)"),
    "session": ("any", "import os\nos.setpgid(0, 0)"),
    "environment": ("any", "import os\nos.environ['PATH'] = os.environ['LD_PRELOAD'] = '/nowhere'"),
    "umask": ("any", "import os\nos.umask(0)"),
    "clock": ("fails", "import time\ntime.clock_settime(time.CLOCK_REALTIME, time.clock_gettime(time.CLOCK_REALTIME))"),
    "host name": ("fails", "import socket\nsocket.sethostname(socket.gethostname())"),
    "superuser": ("fails", "import os\nos.setuid(0)\nopen('@SECRET@').read()"),
    "chroot": ("fails", "import os\nos.chroot('.')"),
    "priority": ("any", "import os\nos.nice(1)"),
    "lock on the library": ("any", "import fcntl, os\nfcntl.flock(open(os.__file__), fcntl.LOCK_SH)"),
    "inotify": ("any", "import select\nselect.epoll()"),
    "prctl name": ("any", "import sys\nsys.stdout = sys.stderr = None"),
}  # fmt: skip


def _named(family: str, programs: dict[str, str], expect: Expect, before: str = "") -> list[Hostile]:
    return [Hostile(f"{family}: {name}", expect, before + code) for name, code in programs.items()]


PROGRAMS: tuple[Hostile, ...] = (
    *_named("loop", _LATE, "late"),
    *_named("memory", _MEMORY, "fails"),
    *_named("process", _PROCESSES, "fails"),
    *_named("signal", _SIGNALS, "fails"),
    *(Hostile(f"read: {name}", "fails", f"{FOUND}assert found({what})") for name, what in _READS.items()),
    *(
        Hostile(f"read in C: {name}", "fails", f"{FOUND}{LIBC}{what}\nassert found(b.raw)")
        for name, what in _READS_C.items()
    ),
    *_named("write", _WRITES, "fails"),
    *_named("write in C", _WRITES_C, "fails", LIBC),
    *_named("network", _NETWORK, "fails"),
    *(
        Hostile(f"kernel: {name}", "fails", LIBC + _REACHED.format(", ".join(map(str, call))))
        for name, call in _KERNEL.items()
    ),
    *(
        Hostile(f"{family}: {name}", expect, code)
        for family, programs in (("forge", _FORGED), ("output", _OUTPUT), ("disk", _DISK), ("other", _OTHER))
        for name, (expect, code) in programs.items()
    ),
)
