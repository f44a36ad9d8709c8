"""Keeps the log messages of runs out of the lines of the search or the fleet that they belong to."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from dreamfleet.trainers.packing.slot import in_slot


@contextmanager
def without_run_logs() -> Iterator[None]:
    """Keep messages of the runs, which are in their ``run.log``, out of this process's stderr."""
    handlers = [one for one in logging.getLogger("dreamfleet").handlers if type(one) is logging.StreamHandler]
    for handler in handlers:
        handler.addFilter(_is_not_of_a_run)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(_is_not_of_a_run)


def _is_not_of_a_run(record: logging.LogRecord) -> bool:
    return not in_slot()
