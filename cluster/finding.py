"""One line of the report of `dreamfleet doctor`."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Finding(NamedTuple):
    """One line of the report: ok, note (worth knowing) or MISSING (a run would fail), with the remedy."""

    name: str
    state: Literal["ok", "note", "MISSING"]
    detail: str
    remedy: str = ""
