"""Field types shared by the recipe's stages."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def _tokens(value: Any) -> Any:
    """600000, "600k", "0.6M" and "600B" are counts of tokens; anything else is an error that shows the form."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9_]+(?:\.[0-9]+)?)\s*([kKmMbBtT]?)\s*", value)
        if not match:
            raise ValueError(f"{value!r} is not a number of tokens; write 600000, 600k, 0.6M or 600B")
        return round(float(match[1].replace("_", "")) * _UNITS[match[2].lower()])
    return value


Tokens = Annotated[int, BeforeValidator(_tokens), Field(gt=0)]
"""A positive number of tokens, also written as text with a unit (k, M, B, T)."""
