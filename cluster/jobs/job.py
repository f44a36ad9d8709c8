"""A job on a Ray cluster: its state, why it failed, and the command that continues it."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

RESUME_WITH = (
    "DREAMFLEET_RESUME_WITH"  # set in a job's environment: the command that resumes it after a failure
)
AGAIN = (
    "again"  # key in the metadata of jobs: the command that continues it, if it is not the one it was made by
)
SETTINGS = "settings"  # key in the metadata of a job: its recipe, and the digest of its package
OURS = (
    "dreamfleet"  # key in the metadata of jobs that dreamfleet submitted; its value is dreamfleet's version
)

# The usual cause of each signal, unless a user sent it.
SIGNALS = {
    "SIGKILL": ", possibly because the machine ran out of memory",
    **dict.fromkeys(("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT"), ", a crash in compiled code"),
}
# Ray's error types for a job whose driver had started and has no exit code.
DIED = ("JOB_SUPERVISOR_ACTOR_DIED", "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE")


@dataclass(frozen=True)
class Job:
    """State of a job on its cluster; times are in seconds since 1970."""

    id: str
    state: str  # PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED
    metadata: Mapping[str, str]
    started: float | None = None
    ended: float | None = None
    driver_exit_code: int | None = None
    message: str = ""
    error_type: str | None = None  # Ray's name of the failure
    driver: str | None = None  # Ray's own ID of its driver; None before that has connected

    @property
    def is_over(self) -> bool:
        """Whether the job has ended."""
        return self.state in ("SUCCEEDED", "FAILED", "STOPPED")

    @property
    def exit_code(self) -> int:
        """Exit code of the job: 0 succeeded, 1 failed, 2 failed because of a user error, 130 stopped."""
        if self.state == "SUCCEEDED":
            return 0
        if self.state == "STOPPED":
            return 130
        return self.driver_exit_code if self.driver_exit_code in (2, 130) else 1

    @property
    def reason(self) -> str | None:
        """Reason why the job failed; None if it did not fail."""
        if self.state != "FAILED":
            return None
        code = self.driver_exit_code
        if code is None:
            cause = (
                self.message.strip().partition("\n")[0].rstrip(".")
                or "the cluster does not say why it failed"
            )
            return f"its node or Ray's processes on the node died: {cause}" if self.began else cause
        if code == 130:
            return "it was interrupted after saving a checkpoint"
        number = -code if code < 0 else code - 128  # negative from Ray, above 128 from a shell
        try:
            name = signal.Signals(number).name
        except ValueError:
            return f"it ended with exit code {code}; see its log for the reason"
        return f"it was killed by {name}{SIGNALS.get(name, '')}"

    @property
    def resume(self) -> str | None:
        """Command that resumes a failed job; None if there is nothing to resume."""
        typed = self.metadata.get("command")
        if self.state != "FAILED" or not self.began or self.driver_exit_code == 2 or not typed:
            return None
        if again := self.metadata.get(AGAIN):
            return again
        return make_resume_command(shlex.split(typed))

    @property
    def began(self) -> bool:
        """Whether its driver had started."""
        return self.driver_exit_code is not None or self.error_type in DIED


def make_resume_command(typed: Sequence[str]) -> str:
    """Return the command that resumes a stopped job, without the options of `submit` itself."""
    again = [word for word in typed if word != "--resume"]
    ends = [] if typed[0] == "data" else ["--resume"]  # a cache needs no option to continue
    return shlex.join(["dreamfleet", "submit", "...", "--", *again, *ends])
