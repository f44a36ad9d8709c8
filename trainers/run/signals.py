"""Writes the stop file of a run when the driver receives SIGINT or SIGTERM."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dreamfleet.datasets.errors import RunFailed, UserError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.run.run_folder import STOP_FILE

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """The first signal asks the run to save a checkpoint and end; the second raises KeyboardInterrupt.

    ``requested`` is set by the first signal. ``say`` prints a line for the user.
    """

    def __init__(self, run: Storage, say: Callable[[str], None]):
        self.run, self.say = run, say
        self.requested = threading.Event()

    def listen(self) -> None:
        """Install the signal handlers, in the main thread only.

        Ray installs its own when it starts: call this again after that.
        """
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._handle)

    def _handle(self, signum: int, frame: Any) -> None:
        if self.requested.is_set():
            raise KeyboardInterrupt
        self.requested.set()
        # In a thread: the handler may have interrupted a write to the stream that `say` prints to.
        threading.Thread(target=self._write_stop_file, daemon=True).start()

    def _write_stop_file(self) -> None:
        self.say("stopping after a checkpoint is saved (interrupt again to stop now, without a checkpoint)")
        try:
            self.run.write_text(STOP_FILE, "")
        except (UserError, RunFailed) as error:  # such as a bucket that cannot be reached
            self.say(f"the stop request did not reach the workers: {error}; interrupt again to stop now")


@contextmanager
def stop_on_signal(run: Storage, say: Callable[[str], None]) -> Iterator[Stop]:
    """Handle SIGINT and SIGTERM within this context by writing the stop file, which the workers watch.

    Signals are handled in the main thread only. After an exception the stop file remains, so that workers
    that are still running end too.
    """
    stop = Stop(run, say)
    with contextlib.suppress(UserError):
        run.remove(STOP_FILE)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stop.listen()
    try:
        yield stop
        if stop.requested.is_set():
            with contextlib.suppress(UserError, RunFailed):
                run.remove(STOP_FILE)
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
