"""Passes the metrics and events of the runs in this process on, such as to Ray's metrics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from dreamfleet.datasets.storage.storage import Storage

#: Called with the run folder, the rank (None: the process is no worker), and a line of metrics or an event, which has a
#: ``kind``. It must return fast: a step waits for it.
Observer = Callable[[Storage, "int | None", Mapping[str, Any]], None]

log = logging.getLogger(__name__)
_observers: list[Observer] = []


def observe_runs(observer: Observer) -> None:
    """Call ``observer`` with every line of metrics, on every rank, and every event of this process from now on."""
    if observer not in _observers:
        _observers.append(observer)


def stop_observing(observer: Observer) -> None:
    """Undo :func:`observe_runs`."""
    if observer in _observers:
        _observers.remove(observer)


def tell_observers(run: Storage, rank: int | None, line: Mapping[str, Any]) -> None:
    """Pass a line of metrics or an event on; an observer that raises is removed, with a warning."""
    for observer in list(_observers):
        try:
            observer(run, rank, line)
        except Exception as error:  # noqa: BLE001 - showing a run must not end it
            log.warning("metrics are no longer passed to %s: %s", observer, error)
            stop_observing(observer)
