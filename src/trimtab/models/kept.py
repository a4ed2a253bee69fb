"""Models that are made once and kept below ``cache_root()``: written whole or not at all, every file checked at each use."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from trimtab.artifact import fsync, is_no_space, no_space, sha256_file, write_atomic
from trimtab.data.packaged import cache_root
from trimtab.errors import Fault

MANIFEST = "conversion.json"

log = logging.getLogger(__name__)


def kept_directory(name: str, identity: str, make: Callable[[Path], None]) -> Path:
    """The Hub-layout directory of a model, made now by ``make(directory)`` if it is absent or damaged.

    identity  what the model depends on; another identity is another directory

    ``Fault`` if the disk is full or the cache cannot be written; what ``make`` raises passes through.
    """
    final = cache_root() / "models" / f"{name}-{identity[:12]}"
    wrong = damage(final)
    if wrong is None:
        return final
    if final.exists():
        log.warning("%s: %s; making it again", final, wrong)
    draft = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        make(draft)
        files = {path.name: sha256_file(path) for path in sorted(draft.iterdir())}
        write_atomic(draft / MANIFEST, json.dumps({"identity": identity, "files": files}, indent=1) + "\n")
        for path in draft.iterdir():
            fsync(path)
        if damage(final) is not None:  # another process may have finished first; its directory is as good
            shutil.rmtree(final, ignore_errors=True)
            draft.rename(final)
    except Exception as error:
        if is_no_space(error):
            raise no_space(final.parent) from error
        if isinstance(error, OSError):
            if damage(final) is None:  # renamed into place by another process between our two looks
                return final
            raise Fault(f"cannot write {final} ({error.strerror}); set TRIMTAB_CACHE to a writable folder") from error
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return final


def damage(directory: Path) -> str | None:
    """Why a kept directory cannot be used, or None if every file matches its manifest."""
    try:
        files = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return "not made yet"
    except (OSError, ValueError, KeyError):
        return f"{MANIFEST} cannot be read"
    for name, expected in files.items():
        path = directory / name
        if not path.is_file() or sha256_file(path) != expected:
            return f"{name} is missing or does not match its sha256"
    return None
