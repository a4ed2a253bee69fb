"""What opens a model, a town or a connection at first use, and leaves it behind when it travels.

DataTrove copies a pipeline for every part of a local run and pickles it for worker processes, Slurm and Ray. A copy here
shares what is open (a model is loaded once for all parts); a pickle carries the settings alone, so that neither weights
nor a key are ever written to an executor's files.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Self


class Lazy:
    """Base of scorers, writers and chats. Everything costly hangs on a ``cached_property``."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not _is_cached(type(self), name)}


def _is_cached(kind: type, name: str) -> bool:
    return any(isinstance(vars(base).get(name), cached_property) for base in kind.__mro__)
