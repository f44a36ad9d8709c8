"""Decides whether a run, or a task of a search or a fleet, continues after a failure; a function of what happened."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

#: ``error``: code of the run raised an exception; ``memory``: the process was killed for lack of memory; ``died``: it
#: was killed or crashed; ``lost``: its node or the connection to it was lost; ``hung``: it made no progress;
#: ``preempted``: its place was taken away, which was announced or is certain; ``mistake``: a UserError or RunFailed.
Cause = Literal["error", "memory", "died", "lost", "hung", "preempted", "mistake"]

_VARIABLE = re.compile(r"0x[0-9a-fA-F]+|\d+(?:\.\d+)?")  # addresses, sizes, ports, process numbers
_REMEDIES = {
    "error": "starting the workers again does not help. Fix the cause, then continue with --resume",
    "memory": "the workers need more memory than their machine has. Lower train.train_batch_size, use fewer workers "
    "per machine or another engine, then continue with --resume",
}


@dataclass(frozen=True)
class Failure:
    """One failure of the workers of a run.

    ``error``: the class and message of the exception, or what is known of a death. ``step``: the last finished step, if
    known; ``saved``: the step of the newest checkpoint then, None without one. ``rank`` and ``node``: of the worker
    that failed first.
    """

    cause: Cause
    error: str
    step: int | None = None
    saved: int | None = None
    rank: int | None = None
    node: str | None = None

    @property
    def signature(self) -> tuple[str, str, int | None] | None:
        """What is equal if the run itself causes the failure again; None for failures of machines."""
        if self.cause == "error":
            return self.cause, _VARIABLE.sub("#", self.error), self.step
        # The step at which memory ends varies a little: the checkpoint that the run started from does not.
        return (self.cause, "", self.saved) if self.cause == "memory" else None


class Decision(NamedTuple):
    """Whether the run goes on, and why not; ``counted``: failures since the last new checkpoint."""

    action: Literal["again", "end"]
    reason: str = ""
    counted: int = 0


@dataclass
class FailureBudget:
    """Counts the failures since the last new checkpoint; ``max_failures`` of them are survived, -1 for no limit.

    Preemptions do not count. A failure that the run itself causes ends it when it is seen for the second time at the
    same step, since a restart repeats it.
    """

    max_failures: int
    counted: int = 0
    saved: int | None = None
    seen: set[tuple[str, str, int | None]] = field(default_factory=set)

    @property
    def is_spent(self) -> bool:
        """Whether the next failure that counts ends the run."""
        return 0 <= self.max_failures <= self.counted

    def see(self, failure: Failure) -> Decision:
        """Count a failure; return whether the run continues."""
        self.note_saved(failure.saved)
        if failure.cause == "preempted":
            return Decision("again", counted=self.counted)
        self.counted += 1
        if failure.cause == "mistake":
            return Decision("end", failure.error, self.counted)
        if failure.signature in self.seen:
            where = "while starting" if failure.step is None else f"after step {failure.step}"
            reason = f"the run failed twice {where} with the same error, {failure.error}: {_REMEDIES[failure.cause]}"
            return Decision("end", reason, self.counted)
        if failure.signature is not None:
            self.seen.add(failure.signature)
        if 0 <= self.max_failures < self.counted:
            return Decision("end", self._explain(failure), self.counted)
        return Decision("again", counted=self.counted)

    def note_saved(self, saved: int | None) -> None:
        """Set the step of the newest checkpoint; a newer one than before sets the count to 0."""
        if saved is not None and (self.saved is None or saved > self.saved):
            self.saved, self.counted = saved, 0

    def _explain(self, failure: Failure) -> str:
        since = "without a checkpoint" if self.saved is None else f"since the checkpoint of step {self.saved}"
        times = "once" if self.counted == 1 else f"{self.counted} times"
        who = "a worker" if failure.rank is None else f"worker {failure.rank}"
        return (
            f"workers failed {times} {since}, more than scaling.max_failures {self.max_failures} allows; the last one: "
            f"{who}: {failure.error}. Continue from the newest checkpoint with --resume"
        )
