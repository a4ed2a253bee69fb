"""The base of every typed setting: closed (a misspelt field is an error), frozen and hashable by content."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A closed, frozen pydantic model. Every field carries ``Field(description=...)``; docs are generated from it."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    def plain(self) -> dict[str, Any]:
        """The setting as JSON-ready plain data, defaults included; what is hashed and what is saved."""
        return self.model_dump(mode="json")
