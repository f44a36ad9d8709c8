"""Runs a function in a thread while the main thread handles signals."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Outcome:
    """The result or the exception of a function."""

    value: Any = None
    error: Exception | None = None


def run_in_thread(work: Callable[[], Any], *, name: str) -> Outcome:
    """Run ``work`` in a thread and wait for it; return its result or exception.

    Outside the main thread Ray installs no signal handlers, which would end a run without a checkpoint.
    """
    outcome = Outcome()

    def run() -> None:
        try:
            outcome.value = work()
        except Exception as error:  # noqa: BLE001 - passed to the waiting thread
            outcome.error = error

    thread = threading.Thread(target=run, daemon=True, name=name)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)  # with a timeout, as Python runs signal handlers only between calls
    return outcome
