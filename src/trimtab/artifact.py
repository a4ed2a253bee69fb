"""Content-addressed, atomic, verified directories: where every step of a study leaves its work.

An artefact is ``<store>/<kind>-<id[:16]>/`` with a ``manifest.json`` that names its config, inputs, versions and the
sha256 of every file. It is written in a draft directory, flushed, and renamed into place, so it is whole or absent,
also after ``kill -9`` or a full disk. Work that can be resumed (training checkpoints, generations) lives in
``<store>/.work/`` until its artefact is complete.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from trimtab.errors import Fault, UserError
from trimtab.seeds import digest

SCHEMA = 1
MANIFEST = "manifest.json"
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_QUICK_LIMIT = 256 * 2**20


@dataclass(frozen=True)
class Artifact:
    """A finished artefact: its directory and its manifest."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def id(self) -> str:
        return str(self.manifest["id"])

    def read_json(self, name: str) -> Any:
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    def verify(self, *, full: bool = True) -> None:
        """Compare every file with the manifest; ``Fault`` names the first that differs.

        ``full=False`` skips the hashes of files over 256 MiB (sizes are always compared).
        """
        for name, entry in self.manifest["files"].items():
            file = self.path / name
            if not file.is_file() or file.stat().st_size != entry["bytes"]:
                raise self._damaged(name, "is missing" if not file.is_file() else "has another size")
            if (full or entry["bytes"] <= _QUICK_LIMIT) and sha256_file(file) != entry["sha256"]:
                raise self._damaged(name, "does not match its sha256")

    def _damaged(self, name: str, what: str) -> Fault:
        return Fault(f"{self.path / name} {what}: the artefact is damaged; delete {self.path} and run again")


@dataclass
class Draft:
    """An artefact in the making: write files below ``path``, set ``tokens``/``facts``; see ``Store.create``."""

    path: Path
    tokens: int = 0
    seconds: float | None = None
    facts: dict[str, Any] | None = None

    def write_json(self, name: str, value: Any) -> None:
        text = json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True)
        (self.path / name).write_text(text + "\n", encoding="utf-8")


class Store:
    """A directory of artefacts, safe for one writer at a time (``lock``) and any number of readers."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def directory(self, kind: str, id: str) -> Path:
        return self.root / f"{kind}-{id[:16]}"

    def work(self, kind: str, id: str) -> Path:
        """The resumable working directory of an unfinished step; removed when its artefact is complete."""
        return self.root / ".work" / f"{kind}-{id[:16]}"

    def has(self, kind: str, id: str) -> bool:
        return (self.directory(kind, id) / MANIFEST).is_file()

    def open(self, kind: str, id: str, *, verify: bool = False) -> Artifact:
        """The finished artefact; ``Fault`` if it is absent, unreadable, or another one than asked for."""
        path = self.directory(kind, id)
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise Fault(f"{path} is missing: run the study again to make it") from None
        except (OSError, ValueError) as error:
            raise Fault(f"{path / MANIFEST} cannot be read ({error}); delete {path} and run again") from None
        if not isinstance(manifest, dict) or manifest.get("id") != id or manifest.get("schema") != SCHEMA:
            raise Fault(f"{path / MANIFEST} does not belong to step {id[:16]}; delete {path} and run again")
        if manifest.pop("seal", None) != digest(manifest):
            raise Fault(f"{path / MANIFEST} does not match its own seal: it is damaged; delete {path} and run again")
        artifact = Artifact(path, manifest)
        if verify:
            artifact.verify()
        return artifact

    @contextmanager
    def create(
        self, kind: str, id: str, *, config: Mapping[str, Any], inputs: Mapping[str, str], versions: Mapping[str, str]
    ) -> Iterator[Draft]:
        """A draft directory that becomes the artefact when the block ends without an error, else disappears."""
        drafts = self.root / ".draft"
        draft = Draft(drafts / f"{kind}-{id[:16]}-{os.getpid()}")
        try:
            shutil.rmtree(draft.path, ignore_errors=True)
            draft.path.mkdir(parents=True)
            yield draft
            files = {
                str(file.relative_to(draft.path)): {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
                for file in sorted(draft.path.rglob("*"))
                if file.is_file()
            }
            manifest = {
                "schema": SCHEMA,
                "kind": kind,
                "id": id,
                "config": config,
                "inputs": inputs,
                "versions": versions,
                "content": digest(files),
                "files": files,
                "tokens": draft.tokens,
                "seconds": draft.seconds,
                "facts": draft.facts or {},
            }
            manifest = json.loads(json.dumps(manifest))  # as it will be read: tuples are lists
            draft.write_json(MANIFEST, {**manifest, "seal": digest(manifest)})
            for file in draft.path.rglob("*"):
                if file.is_file():
                    fsync(file)
            fsync(draft.path)
            final = self.directory(kind, id)
            if final.exists():  # a damaged or manifest-less leftover: the whole draft replaces it
                shutil.rmtree(final)
            draft.path.rename(final)
            fsync(self.root)
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise no_space(self.root) from error
            raise
        finally:
            shutil.rmtree(draft.path, ignore_errors=True)
        shutil.rmtree(self.work(kind, id), ignore_errors=True)

    def clear_drafts(self) -> None:
        """Remove what a killed run left: drafts, and work of steps that are done. Call it while holding ``lock``."""
        shutil.rmtree(self.root / ".draft", ignore_errors=True)
        for work in (self.root / ".work").glob("*"):
            if (self.root / work.name / MANIFEST).is_file():
                shutil.rmtree(work, ignore_errors=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the store for writing; the lock dies with the process. A second writer gets a ``UserError``."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            handle: IO[str] = (self.root / ".lock").open("w")
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise no_space(self.root) from error
            raise UserError(f"cannot write to {self.root}: {error.strerror}; choose another --out") from None
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"another trimtab run is using {self.root}; wait for it or choose another --out"
                ) from None
            yield


def no_space(path: Path) -> Fault:
    return Fault(f"no space left on the disk of {path}: free some and run again; finished steps are kept")


def is_no_space(error: BaseException | None) -> bool:
    """Whether an error, or one it was raised from, is a full disk (libraries often wrap it)."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            return True
        if any(os.strerror(number) in str(error) for number in _NO_SPACE):
            return True
        error = error.__cause__ or error.__context__
    return False


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_files(directory: Path) -> dict[str, str]:
    """Path below ``directory`` -> sha256, for every file of a model directory but cards (.md) and hidden ones."""
    return {
        path.relative_to(directory).as_posix(): sha256_file(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.suffix != ".md" and not path.relative_to(directory).parts[0].startswith(".")
    }


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file whole or not at all (temporary file in the same directory, flushed, renamed)."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise no_space(path.parent) from error
        raise UserError(f"cannot write {path}: {error.strerror}; choose another place") from None
    finally:
        if draft.exists():
            draft.unlink()


def write_jsonl(path: Path, rows: Iterator[Mapping[str, Any]] | list[Mapping[str, Any]]) -> int:
    """Write JSON lines; returns how many. Not atomic by itself: meant for drafts."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n")
            count += 1
    return count


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Read JSON lines; a line that does not parse is a ``UserError`` naming the file and the line."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except ValueError:
                raise UserError(
                    f"{path}, line {number}: not a whole JSON object (a truncated file?); mend or remove it"
                ) from None
