"""Seeds and content hashes: every random choice in Trimtab is a pure function of a named key.

Nothing draws from a global generator, so order of calls, worker count and restarts cannot change a result.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text, whatever the order of a dict's keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """sha256 (hex, 64 characters) of ``canonical(value)``; ``value`` must be JSON-ready."""
    return hashlib.sha256(canonical(value).encode("utf-8", "surrogatepass")).hexdigest()


def seed_of(*key: str | int | float | None) -> int:
    """A 63-bit seed for a key such as ``("prefix", 3, row.id)``; stable over runs, machines and Python versions."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1


def rng_of(*key: str | int | float | None) -> np.random.Generator:
    """A numpy generator (Philox) for a key; see ``seed_of``."""
    return np.random.Generator(np.random.Philox(seed_of(*key)))


def uniform_of(*key: str | int | float | None) -> float:
    """One number in [0, 1) for a key. Comparing it with a ratio nests: the rows below .25 are below .5 too."""
    return seed_of(*key) / 2**63
