"""The base of every typed setting: closed (a misspelt field is an error), frozen and hashable by content."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic.fields import FieldInfo


class Config(BaseModel):
    """A closed, frozen pydantic model. Every field carries ``Field(description=...)``; docs are generated from it."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_numbers(cls, data: Any) -> Any:
        """``true`` is not 1 and ``"3"`` is not 3, although pydantic would take them."""
        if isinstance(data, Mapping):
            for name, field in cls.model_fields.items():
                value = data.get(name)
                if isinstance(value, bool | str) and _only_a_number(field):
                    raise ValueError(f"{name} must be a number, not {value!r}")
        return data

    def plain(self) -> dict[str, Any]:
        """The setting as JSON-ready plain data, defaults included; what is hashed and what is saved."""
        return self.model_dump(mode="json")


def _only_a_number(field: FieldInfo) -> bool:
    """Whether nothing but an int, a float or null fits the field (a field with a validator of its own decides itself)."""
    kinds = set(typing.get_args(field.annotation)) or {field.annotation}
    own = any(isinstance(extra, BeforeValidator) for extra in field.metadata)
    return bool(kinds & {int, float}) and kinds <= {int, float, type(None)} and not own
