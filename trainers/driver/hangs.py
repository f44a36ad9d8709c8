"""Decides from the progress of a run's workers which of them hang; a function of times, without Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dreamfleet.trainers.distributed.pulse import STEP, WAITING_STAGES, Beat

SHORTEST_TIMEOUT = 60.0  # seconds
SLOWEST_STEPS = 10.0  # the default timeout in durations of the slowest recent step
QUIET_START = 10.0  # a process that loads a model may be silent for that many timeouts


@dataclass(frozen=True)
class Heard:
    """The newest beat of a worker, None before the first, and when it or the worker itself arrived."""

    beat: Beat | None
    at: float


@dataclass(frozen=True)
class Hang:
    """Ranks that hold up the run, the seconds without progress, and whether they do not answer at all."""

    ranks: tuple[int, ...]
    seconds: float
    silent: bool


def find_hang(heard: Mapping[int, Heard], now: float, timeout: float | None = None) -> Hang | None:
    """Return the workers that hang; None if none does.

    ``heard``: by rank, from a poll that asks each worker; ``now`` in the same seconds as ``Heard.at``. ``timeout``:
    seconds without progress, by default SLOWEST_STEPS times the slowest recent step, at least SHORTEST_TIMEOUT. A
    process that does not answer for that long hangs in any phase. One that answers hangs if it is within a step; steps
    with a new shape, saves and evaluations may take any time, and the others wait for them.
    """
    limit = timeout if timeout is not None else _default_timeout(heard)
    silent = {rank: now - one.at for rank, one in heard.items() if now - one.at > _patience(one, limit)}
    if silent:
        return Hang(tuple(sorted(silent)), max(silent.values()), silent=True)
    beats = {rank: one.beat for rank, one in heard.items() if one.beat is not None}
    if len(beats) < len(heard) or any(beat.phase != STEP for beat in beats.values()):
        return None
    stuck = {rank: beat for rank, beat in beats.items() if beat.seconds > limit}
    if not stuck:
        return None
    return Hang(_first_causes(stuck), max(beat.seconds for beat in stuck.values()), silent=False)


def _default_timeout(heard: Mapping[int, Heard]) -> float:
    slowest = [one.beat.slowest for one in heard.values() if one.beat is not None and one.beat.slowest]
    return max([SHORTEST_TIMEOUT, *(SLOWEST_STEPS * seconds for seconds in slowest)])


def _patience(one: Heard, limit: float) -> float:
    return limit if one.beat is not None and one.beat.slowest is not None else QUIET_START * limit


def _first_causes(stuck: Mapping[int, Beat]) -> tuple[int, ...]:
    """Return the ranks that the others wait for: those behind, else those that do not wait themselves, else all."""
    behind = min(beat.step for beat in stuck.values())
    late = [rank for rank, beat in stuck.items() if beat.step == behind]
    busy = [rank for rank in late if stuck[rank].stage not in WAITING_STAGES]
    return tuple(sorted(busy or late))
