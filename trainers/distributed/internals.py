"""The description of an undocumented attribute of a library, which a test compares with the installed version."""

from __future__ import annotations

from typing import NamedTuple


class Internal(NamedTuple):
    """An attribute of a class or module of a library; ``parameters`` are those of a method, without ``self``."""

    owner: str  # "module:class"
    name: str
    parameters: tuple[str, ...] | None = None
