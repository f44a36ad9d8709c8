"""What the person at the driver sees of a run: a bar on a terminal, plain lines elsewhere, warnings as they come."""

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

from dreamfleet.datasets.errors import StorageError, UserError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.driver.throughput import Pace
from dreamfleet.trainers.run.run_folder import LOG_FILE, METRICS_FILE, STOP_FILE

LOCAL_LOOK_SECONDS = 0.5
BUCKET_LOOK_SECONDS = 10.0
SECONDS_BETWEEN_LINES = 10.0
LOCAL_POLL_SECONDS = 0.2
BUCKET_POLL_SECONDS = 5.0


class Display:
    """Shows steps, loss and speed on ``stream``: one tqdm bar where it is a terminal, else a line every ten seconds."""

    def __init__(self, *, total: int | None = None, stream: TextIO | None = None):
        self.stream = stream or sys.stderr
        self.total = total
        self._bar: Any = None
        self._last_shown = -float("inf")
        self._pace = Pace()
        self._unshown: dict[str, Any] | None = None

    def show(self, line: dict[str, Any]) -> None:
        """Take in one line of metrics (``step``, ``loss``, ``images_per_second``...)."""
        step = int(line.get("step", 0))
        self.total = line.get("total_steps") or self.total
        if "loss" not in line:  # drawing the untuned model says nothing about how long a step takes
            return
        self._pace.add(line, now=time.monotonic())
        if self.stream.isatty():
            self._draw(step, line)
            return
        self._unshown = line
        if time.monotonic() - self._last_shown >= SECONDS_BETWEEN_LINES or step == self.total:
            self._print_line()

    def say(self, text: str) -> None:
        """Print a line of its own, above the bar where there is one."""
        if self._bar is not None:
            self._bar.clear()
        print(text, file=self.stream, flush=True)
        if self._bar is not None:
            self._bar.refresh()

    def close(self) -> None:
        """Show what is left and end the bar."""
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
        self._bar.set_postfix_str(", ".join(self._words(line)), refresh=True)

    def _print_line(self) -> None:
        line, self._unshown = self._unshown, None
        if line is None:
            return
        self._last_shown = time.monotonic()
        step = int(line["step"])
        of = f"/{self.total}" if self.total else ""
        self.say("  ".join([f"step {step}{of}", *self._words(line)]))

    def _words(self, line: dict[str, Any]) -> list[str]:
        words = [f"loss {line['loss']:.4f}"]
        if speed := self._pace.images_per_second:
            words.append(f"{speed:.3g} images/s")
        left = (self.total or 0) - int(line["step"])
        if left > 0 and (seconds := self._pace.seconds_left(left, now=time.monotonic())):
            words.append(f"{_clock(seconds)} left")
        return words


class RunTail:
    """Follows the metrics and the log of a run folder that other processes write, and shows what is new."""

    def __init__(self, run: Storage, display: Display):
        self.display = display
        self._files = {METRICS_FILE: _Growing(run, METRICS_FILE), LOG_FILE: _Growing(run, LOG_FILE)}
        self._pause = LOCAL_LOOK_SECONDS if run.is_local else BUCKET_LOOK_SECONDS
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True, name="run-tail")

    def __enter__(self) -> RunTail:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(timeout=30)
        self._look()
        self.display.close()

    def _follow(self) -> None:
        while not self._done.wait(self._pause):
            self._look()

    def _look(self) -> None:
        for text in self._files[LOG_FILE].new_lines():
            self.display.say(text)
        for text in self._files[METRICS_FILE].new_lines():
            try:
                self.display.show(json.loads(text))
            except (
                ValueError,
                KeyError,
                TypeError,
            ):  # a line that is still being written, or of another program
                continue


@contextmanager
def log_to_run(run: Storage, *, speak: bool) -> Iterator[None]:
    """Write what dreamfleet's loggers say to ``run.log`` of the run folder, from where the driver shows it."""
    project = logging.getLogger("dreamfleet")
    project.setLevel(logging.INFO if speak else logging.ERROR)
    handler = _RunLog(run)
    project.addHandler(handler)
    try:
        yield
    finally:
        project.removeHandler(handler)


@contextmanager
def watch_for_stop(run: Storage, *, watch: bool = True) -> Iterator[Callable[[], bool]]:
    """Give a cheap ``should_stop()``: whether somebody has put the stop mark in the run folder.

    A file on disk is looked for at most five times a second; in a bucket, a thread looks every five seconds.
    """
    if not watch:
        yield lambda: False
    elif run.is_local:
        yield _LocalMark(run.path(STOP_FILE))
    else:
        seen, done = threading.Event(), threading.Event()

        def look() -> None:
            while not done.wait(BUCKET_POLL_SECONDS):
                try:
                    if run.exists(STOP_FILE):
                        seen.set()
                        return
                except (
                    UserError
                ) as error:  # the bucket is away for a moment; saving will tell if it stays away
                    logging.getLogger(__name__).debug("stop mark not readable: %s", error)

        thread = threading.Thread(target=look, daemon=True, name="watch-for-stop")
        thread.start()
        try:
            yield seen.is_set
        finally:
            done.set()


class _Growing:
    """Gives the whole lines added to a file since it was last asked, starting from its present end."""

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
                # A resumed run writes the file anew without the lines after its checkpoint.
                self.offset = offset = min(offset, size)
                file.seek(offset)
                return file.read()
        except (OSError, StorageError):
            return b""


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class _LocalMark:
    """Looks for a file, at most every LOCAL_POLL_SECONDS."""

    def __init__(self, path: str):
        self.path, self.next_look = path, 0.0

    def __call__(self) -> bool:
        now = time.monotonic()
        if now < self.next_look:
            return False
        self.next_look = now + LOCAL_POLL_SECONDS
        return os.path.exists(self.path)


class _RunLog(logging.Handler):
    def __init__(self, run: Storage):
        super().__init__()
        self.run, self.is_writing = run, False
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        if (
            self.is_writing
        ):  # a bucket in trouble warns of that; to write it down would meet the same trouble, and so on
            return
        self.is_writing = True
        try:
            self.run.append_text(LOG_FILE, self.format(record).replace("\n", "\n  ") + "\n")
        except Exception:  # noqa: BLE001 - what logging asks of every handler
            self.handleError(record)
        finally:
            self.is_writing = False
