"""Decides what happens to the tasks of a worker that died."""

from __future__ import annotations

from typing import Literal

from dreamfleet.trainers.driver.failures import Failure, FailureBudget

After = Literal["again", "alone", "failed"]


def after_death(
    budget: FailureBudget, deaths: int, *, saved: int | None = None, preempted: bool = False
) -> After:
    """Return what happens to a task whose worker has died ``deaths`` times while it ran.

    ``budget`` counts the deaths since the task's last new checkpoint, as for a run; ``saved`` is the step of the newest
    one. ``preempted``: the last death was that of a machine that was taken away, which counts neither in the budget nor
    in ``deaths``. ``alone``: the task is started again in a worker that runs no other task, so that a task that kills
    its process, for example by its memory, ends on its own and the tasks that shared the process with it complete. This
    happens from the second death on, and before the last restart.
    """
    cause: Literal["preempted", "died"] = "preempted" if preempted else "died"
    if budget.see(Failure(cause, "its process died", saved=saved)).action == "end":
        return "failed"
    if preempted:
        return "again"
    return "alone" if deaths >= 2 or budget.is_spent else "again"
