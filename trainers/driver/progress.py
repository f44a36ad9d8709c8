"""Shows a run's progress and log on the driver's stderr; on workers, writes the log and polls for a stop."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from dreamfleet.datasets.errors import LeaseLost, StorageError, UserError
from dreamfleet.datasets.storage.background import LINES
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.driver.throughput import Pace
from dreamfleet.trainers.run.run_folder import LOG_FILE, METRICS_FILE, STOP_FILE

# How often the driver reads the metrics and the log of a run
LOCAL_READ_SECONDS = 0.5
BUCKET_READ_SECONDS = 10.0
SECONDS_BETWEEN_LINES = 10.0
# How often a worker looks for the stop file
LOCAL_POLL_SECONDS = 0.2
BUCKET_POLL_SECONDS = 5.0


class Display:
    """Shows steps, loss and speed on ``stream``: a tqdm bar on a terminal, else a line every ten seconds."""

    def __init__(self, *, total: int | None = None, stream: TextIO | None = None):
        self.stream = stream or sys.stderr
        self.total = total
        self._bar: Any = None
        self._last_shown = -float("inf")
        self._pace = Pace()
        self._unshown: dict[str, Any] | None = None

    def show(self, line: dict[str, Any]) -> None:
        """Show one line of metrics (``step``, ``loss``, ``images_per_second``...), if it has a loss."""
        step = int(line.get("step", 0))
        self.total = line.get("total_steps") or self.total
        if "loss" not in line:  # figures of a validation round
            return
        self._pace.add(line, now=time.monotonic())
        if self.stream.isatty():
            self._draw(step, line)
            return
        self._unshown = line
        if time.monotonic() - self._last_shown >= SECONDS_BETWEEN_LINES or step == self.total:
            self._print_line()

    def say(self, text: str) -> None:
        """Print one line of text, above the bar if there is one."""
        if self._bar is not None:
            self._bar.clear()
        print(text, file=self.stream, flush=True)
        if self._bar is not None:
            self._bar.refresh()

    def close(self) -> None:
        """Close the bar, or print the newest line if it has not been shown yet."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self._unshown is not None:
            self._print_line()

    def _draw(self, step: int, line: dict[str, Any]) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.total,
                initial=step,
                file=self.stream,
                dynamic_ncols=True,
                leave=True,
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
            )
        self._bar.total = self.total
        self._bar.n = step
        self._bar.set_postfix_str(", ".join(self._format(line)), refresh=True)

    def _print_line(self) -> None:
        line, self._unshown = self._unshown, None
        if line is None:
            return
        self._last_shown = time.monotonic()
        step = int(line["step"])
        of = f"/{self.total}" if self.total else ""
        self.say("  ".join([f"step {step}{of}", *self._format(line)]))

    def _format(self, line: dict[str, Any]) -> list[str]:
        parts = [f"loss {line['loss']:.4f}"]
        if speed := self._pace.images_per_second:
            parts.append(f"{speed:.3g} images/s")
        left = (self.total or 0) - int(line["step"])
        if left > 0 and (seconds := self._pace.seconds_left(left, now=time.monotonic())):
            parts.append(f"{_clock(seconds)} left")
        return parts


class RunTail:
    """Shows the new lines of a run's metrics and log, which other processes write."""

    def __init__(self, run: Storage, display: Display):
        self.display = display
        self._files = {METRICS_FILE: _NewLines(run, METRICS_FILE), LOG_FILE: _NewLines(run, LOG_FILE)}
        self._pause = LOCAL_READ_SECONDS if run.is_local else BUCKET_READ_SECONDS
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True, name="run-tail")

    def __enter__(self) -> RunTail:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(timeout=30)
        self._show_new()
        self.display.close()

    def _follow(self) -> None:
        while not self._done.wait(self._pause):
            self._show_new()

    def _show_new(self) -> None:
        for text in self._files[LOG_FILE].new_lines():
            self.display.say(text)
        for text in self._files[METRICS_FILE].new_lines():
            try:
                self.display.show(json.loads(text))
            except (ValueError, KeyError, TypeError):
                continue  # not a line of metrics


@contextmanager
def log_to_run(run: Storage, *, verbose: bool, when: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Write dreamfleet's log messages to ``run.log`` in the run folder; without ``verbose`` only errors.

    ``when``: whether a message belongs to this run, if several runs share the process.
    """
    project = logging.getLogger("dreamfleet")
    project.setLevel(logging.INFO if verbose else logging.ERROR)
    handler = _RunLog(run)
    handler.addFilter(lambda record: when())
    project.addHandler(handler)
    try:
        yield
    finally:
        project.removeHandler(handler)
        handler.write()


def be_verbose() -> None:
    """Write all log messages, not only errors, from now on: this process has become the one that reports."""
    logging.getLogger("dreamfleet").setLevel(logging.INFO)


@contextmanager
def watch_for_stop(run: Storage, *, watch: bool = True) -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether the run folder holds the stop file; it is cheap to call.

    A local folder is checked at most five times a second; for a bucket a thread checks every five seconds.
    Without ``watch`` the function returns False.
    """
    if not watch:
        yield lambda: False
    elif run.is_local:
        yield _LocalStopFile(run.path(STOP_FILE))
    else:
        seen, done = threading.Event(), threading.Event()

        def poll() -> None:
            while not done.wait(BUCKET_POLL_SECONDS):
                try:
                    if run.exists(STOP_FILE):
                        seen.set()
                        return
                except UserError as error:  # if the bucket stays unreachable, saving will fail
                    logging.getLogger(__name__).debug("cannot look for the stop file: %s", error)

        thread = threading.Thread(target=poll, daemon=True, name="watch-for-stop")
        thread.start()
        try:
            yield seen.is_set
        finally:
            done.set()


class _NewLines:
    """Reads the complete lines added to a file since the last call.

    The first call starts at the end that the file had when this object was created.
    """

    def __init__(self, run: Storage, name: str):
        self.run, self.name = run, name
        self.offset = len(self._read(0))

    def new_lines(self) -> list[str]:
        data = self._read(self.offset)
        whole, newline, _ = data.rpartition(b"\n")
        self.offset += len(whole) + len(newline)
        return whole.decode("utf-8", errors="replace").splitlines()

    def _read(self, offset: int) -> bytes:
        try:
            if not self.run.is_local:
                data = self.run.read_bytes(self.name) if self.run.exists(self.name) else b""
                self.offset = offset = min(offset, len(data))
                return data[offset:]
            with open(self.run.path(self.name), "rb") as file:
                size = file.seek(0, 2)
                # A resumed run rewrites the file without the lines after its checkpoint.
                self.offset = offset = min(offset, size)
                file.seek(offset)
                return file.read()
        except (OSError, StorageError):
            return b""


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class _LocalStopFile:
    """Checks whether a file exists, at most every LOCAL_POLL_SECONDS."""

    def __init__(self, path: str):
        self.path, self.next_check = path, 0.0

    def __call__(self) -> bool:
        now = time.monotonic()
        if now < self.next_check:
            return False
        self.next_check = now + LOCAL_POLL_SECONDS
        return os.path.exists(self.path)


class _RunLog(logging.Handler):
    """Appends messages to ``run.log``, in a bucket by a thread.

    A message that a write itself logs, such as a warning about its bucket, is kept for the next write.
    """

    def __init__(self, run: Storage):
        super().__init__()
        self.run, self._pending, self._is_queued = run, "", False
        self._guard, self._writing = threading.Lock(), threading.Lock()
        self._writer: int | None = None  # the thread that writes now
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        with self._guard:
            self._pending += self.format(record).replace("\n", "\n  ") + "\n"
            if self._writer == threading.get_ident():
                return
            is_queued, self._is_queued = self._is_queued, True
        if self.run.is_local:
            self.write()
        elif not is_queued:
            LINES.submit(self.write)

    def write(self) -> None:
        """Write all messages; those that cannot be written are kept for the next time."""
        with self._writing:
            with self._guard:
                text, self._pending, self._is_queued = self._pending, "", False
            self._writer = threading.get_ident()
            try:
                if text:
                    self.run.append_text(LOG_FILE, text)
            except LeaseLost:  # the log belongs to another process now
                return
            except Exception:  # noqa: BLE001 - a handler must not raise, and a warning would come back here
                with self._guard:
                    self._pending = text + self._pending
            finally:
                self._writer = None
