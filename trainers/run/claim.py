"""Takes the lease of an output_dir, if its holder has ended or stopped renewing it."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable
from dataclasses import replace

from dreamfleet.datasets.errors import RecipeError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.run.lease import (
    CONFIRM_SECONDS,
    EXPIRY_SECONDS,
    Holder,
    Lease,
    LeaseFile,
    SystemTime,
    as_text,
    is_alive,
    judge,
    seconds_of,
    this_process,
)

POLL_SECONDS, WAIT_SECONDS = 1.0, 5.0  # intervals of looking at another owner's lease


class Held(RecipeError):
    """Another process owns the output_dir."""


def claim(
    file: LeaseFile,
    me: Holder,
    *,
    take_over: bool,
    wait: Callable[[], object] | None,
    say: Callable[[str], None],
) -> Lease:
    """Take the lease of a folder, if necessary after waiting; return it."""
    watch = _Watch(file, me, say)
    while True:
        lease, reason = _next_free(watch, take_over=take_over, wait=wait)

        def change(found: Lease, judged: Lease = lease) -> Lease:
            if found.token != judged.token:
                raise _Changed
            _require_top_free(file, found)
            now = as_text(file.clock.now())
            return replace(
                found, owner=secrets.token_hex(8), holder=me, since=now, renewed=now, released="", top=""
            )

        with contextlib.suppress(_Changed):
            taken = file.update(change)
            if reason:
                say(f"taking over {file.folder.path()} from {lease.describe(file.clock.now())}: {reason}")
            return taken


class _Changed(Exception):
    """The lease has changed since it was judged."""


def _require_top_free(file: LeaseFile, lease: Lease) -> None:
    """Raise Held if the folder is part of a search or fleet that runs now."""
    if lease.top and (holder := describe_holder(Storage(lease.top), clock=file.clock)):
        raise Held(
            f"{file.folder.path()} is part of {lease.top}, which is in use by {holder}: wait until it ends, or use "
            "another output_dir"
        )


def _next_free(watch: _Watch, *, take_over: bool, wait: Callable[[], object] | None) -> tuple[Lease, str]:
    """Wait until the lease can be taken; return it, and why it can be taken from its holder ("" if there is none)."""
    while True:
        lease, state, reason = watch.look()
        if state in ("free", "dead"):
            return lease, reason
        if take_over:
            return lease, "--take-over"
        if state == "held":
            if wait is None:
                raise Held(watch.describe_held(lease))
            wait()
            watch.say_once(
                f"waiting for {watch.file.folder.path()}, in use by {lease.describe(watch.clock.now())}"
            )
        watch.clock.sleep(POLL_SECONDS if state == "unknown" else WAIT_SECONDS)


class _Watch:
    """Watches the lease of another process; its state is known when it was renewed, or was not for long enough."""

    def __init__(self, file: LeaseFile, me: Holder, say: Callable[[str], None]):
        self.file, self.me, self.say, self.clock = file, me, say, file.clock
        self._token: str | None = None  # of the record that is watched
        self._since = self._patience = 0.0
        self._said = set[str]()

    def look(self) -> tuple[Lease, str, str]:
        """Return the lease, its state, and the reason if the state is "dead"."""
        lease = self.file.read()
        state = judge(lease, self.me, self.clock.now(), is_alive=is_alive)
        if state == "dead":
            return lease, state, "its process has ended"
        if state != "unknown":
            return lease, state, ""
        now = self.clock.monotonic()
        if lease.token != self._token:
            was_watched = self._token is not None
            age = self.clock.now() - seconds_of(lease.renewed)  # may be wrong, as the clocks may differ
            self._patience = min(EXPIRY_SECONDS, max(CONFIRM_SECONDS, EXPIRY_SECONDS - age))
            self._token, self._since = lease.token, now
            if was_watched:
                return lease, "held", ""
        if now - self._since >= self._patience:
            return (
                lease,
                "dead",
                f"it was not renewed for {now - self._since:.0f} s while this process waited",
            )
        self.say_once(
            f"{self.file.folder.path()} is held by {lease.describe(self.clock.now())}: waiting up to "
            f"{self._patience:.0f} s to see whether that process still runs"
        )
        return lease, "unknown", ""

    def say_once(self, text: str) -> None:
        """Say a line, unless one of its kind was said."""
        if (kind := text.split()[0]) not in self._said:
            self._said.add(kind)
            self.say(text)

    def describe_held(self, lease: Lease) -> str:
        """Return the message for a folder that another process owns."""
        holder = lease.holder
        assert holder is not None
        stop = f"dreamfleet stop {holder.job}" if holder.job else f"kill {holder.pid} on {holder.host}"
        return (
            f"output_dir {self.file.folder.path()} is in use by {lease.describe(self.clock.now())}: wait until that "
            f"ends, stop it ({stop}), use another output_dir, or continue its run here with --take-over, which "
            "ends the other at its next write"
        )


def describe_holder(folder: Storage, *, clock: SystemTime | None = None) -> str | None:
    """Return who owns a folder now, as far as its lease tells; None if nobody does, or the holder has ended."""
    clock = clock or SystemTime()
    lease = LeaseFile(folder).read()
    if judge(lease, this_process(), clock.now(), is_alive=is_alive) in ("free", "dead"):
        return None
    return lease.describe(clock.now())
