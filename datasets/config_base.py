"""The base class of every recipe section: frozen, with strict keys."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base class of recipe sections.

    Unknown keys are errors. Instances are immutable, and hashable if their fields are. Key names of other projects are
    declared with `Field(validation_alias=AliasChoices("our_name", "their_name"))`. Numbers may be given as text, since
    `1e-4` in a `key=value` override is text in YAML 1.1; NaN and infinity are rejected.
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
    """Return a single text as a list with one item, and other values unchanged; a validator for mode "before"."""
    return [value] if isinstance(value, str) else value


def split_text(value: Any) -> Any:
    """Return the items of a text such as ``a, b``, and other values unchanged; a validator for mode "before"."""
    return [item.strip() for item in value.split(",")] if isinstance(value, str) else value
