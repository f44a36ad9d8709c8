"""The base of every recipe section: frozen, strict keys, no value ever changed by a check."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One section of a recipe.

    Unknown keys are errors, instances are immutable and hashable where their fields are. Other
    projects' names come in through `Field(validation_alias=AliasChoices("our_name", "their_name"))`;
    our own name is always accepted too. Numbers may come as text from `key=value` overrides that were
    parsed as YAML, so `1e-4` (text in YAML 1.1) still reads as a float; NaN and infinity are refused.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        populate_by_name=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        ser_json_inf_nan="strings",
    )


def as_list(value: Any) -> Any:
    """Take a text for a list of it, before a list's values are checked."""
    return [value] if isinstance(value, str) else value
