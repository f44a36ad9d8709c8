"""Threads that write files while a process computes: one of each kind for all runs of the process."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class BackgroundThread:
    """Runs functions one after the other in a thread of its own, which starts with the first of them.

    The thread does not keep the process alive: who needs a result waits for its future. After a fork the child process
    starts its own thread.
    """

    def __init__(self, name: str):
        self.name = name
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] | None = None
        self._process, self._lock = 0, threading.Lock()

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        """Run ``work`` after all work submitted before; return the future of its result."""
        future: Future[Any] = Future()
        with self._lock:
            if self._queue is None or self._process != os.getpid():
                self._queue, self._process = queue.SimpleQueue(), os.getpid()
                threading.Thread(target=self._run, args=(self._queue,), daemon=True, name=self.name).start()
            self._queue.put((future, work))
        return future

    @staticmethod
    def _run(tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]]) -> None:
        while True:
            future, work = tasks.get()
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 - raised where the result is used
                future.set_exception(error)
            del future, work  # keep neither tensors nor results until the next task


#: Serialises checkpoints and writes them to a disk.
WRITER = BackgroundThread("checkpoint-writer")
#: Copies finished checkpoints into a bucket, and waits while it is away.
UPLOADER = BackgroundThread("checkpoint-uploader")
#: Writes metrics and logs into a bucket.
LINES = BackgroundThread("line-writer")
