"""Rules that say what becomes of one setting of another trainer: a key of the recipe, or nothing with an effect."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Effect(StrEnum):
    """What the loss of a setting without a counterpart means for the training."""

    IGNORED = "ignored safely"
    CHANGES = "changes results"
    BLOCKS = "blocks"


class Untranslatable(Exception):
    """A value that the recipe cannot express, with the effect of leaving it out and the reason, a clause."""

    def __init__(self, effect: Effect, reason: str):
        super().__init__(reason)
        self.effect, self.reason = effect, reason


def unchanged(value: Any) -> Any:
    """Return the value."""
    return value


@dataclass(frozen=True)
class To:
    """A setting that has a key in the recipe.

    ``convert`` returns the recipe's value and may raise Untranslatable. ``note`` describes a change of meaning, and
    becomes a comment; "" if there is none. Values in ``off`` mean that the option is not used; they are not written.
    """

    key: str
    convert: Callable[[Any], Any] = unchanged
    note: str = ""
    off: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Gone:
    """A setting without a key in the recipe: the effect of leaving it out, and the reason, a clause.

    Values in ``off`` mean that the option is not used; they are not reported.
    """

    effect: Effect
    reason: str
    off: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Joined:
    """A setting that the program's own code translates together with others into ``keys``; ``note`` says how."""

    keys: tuple[str, ...]
    note: str


Rule = To | Gone | Joined
Table = Mapping[str, Rule]

UNSET: tuple[Any, ...] = (None, "", "None", "none", [], {})
FALSE: tuple[Any, ...] = (False, 0, *UNSET)


def to(section: str, *names: str) -> dict[str, Rule]:
    """Return rules for settings that have the recipe's name in a section, without a change of meaning."""
    return {name: To(f"{section}.{name}") for name in names}


def ignored(reason: str, *names: str) -> dict[str, Rule]:
    """Return rules for settings whose absence does not change what is trained. They are reported with the reason."""
    return {name: Gone(Effect.IGNORED, reason, UNSET) for name in names}


def changes(reason: str, *names: str, off: tuple[Any, ...] = FALSE) -> dict[str, Rule]:
    """Return rules for settings whose absence changes results, unless their value is one of ``off``."""
    return {name: Gone(Effect.CHANGES, reason, off) for name in names}


def blocks(reason: str, *names: str, off: tuple[Any, ...] = FALSE) -> dict[str, Rule]:
    """Return rules for settings without which the training makes no sense, unless their value is one of ``off``."""
    return {name: Gone(Effect.BLOCKS, reason, off) for name in names}


def joined(note: str, keys: Iterable[str] | str, *names: str) -> dict[str, Rule]:
    """Return rules for settings that are translated together into ``keys``."""
    return dict.fromkeys(names, Joined((keys,) if isinstance(keys, str) else tuple(keys), note))


def choice(
    values: Mapping[Any, Any], *, otherwise: str = "", effect: Effect = Effect.CHANGES
) -> Callable[[Any], Any]:
    """Return a conversion by a table, whose texts are compared without case.

    Other values are returned unchanged, or with ``otherwise`` raise Untranslatable.
    """
    known = {key.lower() if isinstance(key, str) else key: value for key, value in values.items()}

    def convert(value: Any) -> Any:
        key = value.strip().lower() if isinstance(value, str) else value
        if key in known:
            return known[key]
        if otherwise:
            raise Untranslatable(effect, otherwise)
        return value

    return convert


def plain(value: Any) -> Any:
    """Return text that is a number, true or false as that value, for comparisons; other values unchanged."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            pass
    return text


def number(value: Any) -> float:
    """Return a number, also from text. Raises Untranslatable for other values."""
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise Untranslatable(Effect.CHANGES, "is not a number")
    return found


def is_off(value: Any, off: tuple[Any, ...]) -> bool:
    """Return whether a value is one of ``off``; text is compared as the number that it spells, false is no number."""
    found = plain(value)
    return any(
        found == other and isinstance(found, bool) == isinstance(other, bool) for other in (*off, *UNSET)
    )
