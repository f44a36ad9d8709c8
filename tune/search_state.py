"""What a search records besides its trials: its duration, its end, what was freed, and the earlier searches' trials."""

from __future__ import annotations

from dataclasses import dataclass, field

from dreamfleet.trainers.config.search import Point


@dataclass(frozen=True)
class EarlierTrial:
    """A finished trial of an earlier search, from which the sampler learns (``search.warm_start``)."""

    search: str  # folder of the earlier search
    name: str
    point: Point
    figures: dict[str, float]


@dataclass
class SearchState:
    """What a search records besides its trials."""

    seconds: float = 0.0  # wall-clock time of all sessions
    freed_bytes: int = 0  # checkpoints and exports that were removed
    end_reason: str | None = None  # a key of limits.END_REASONS; None while the search runs
    exported: dict[str, int] = field(
        default_factory=dict
    )  # trial -> the step of the checkpoint in its exports/
    stale_reports: list[str] = field(
        default_factory=list
    )  # trials whose reports show files that were removed since
    earlier: list[EarlierTrial] = field(default_factory=list)
