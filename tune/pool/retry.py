"""Decides what happens to the tasks of a worker that died."""

from __future__ import annotations

from typing import Literal

After = Literal["again", "alone", "failed"]


def after_death(deaths: int, max_failures: int) -> After:
    """Return what happens to a task whose worker has died ``deaths`` times while it ran.

    ``max_failures``: the restarts that a task gets; -1 for no limit. ``alone``: the task is started again in a worker
    that runs no other task, so that a task that kills its process, for example by its memory, ends on its own and the
    tasks that shared the process with it complete. This happens from the second death on, and before the last restart.
    """
    if 0 <= max_failures < deaths:
        return "failed"
    return "alone" if deaths >= 2 or deaths == max_failures else "again"
