"""Lines that the commands for jobs print."""

from __future__ import annotations

import time
from typing import Any

from dreamfleet.cluster.jobs.job import SETTINGS, Job


def end_of(job: Job) -> str:
    """Return how a job ended: its state, the reason for a failure, and the command that resumes it."""
    lines = [f"{job.id} {job.state}" + (f": {job.reason}" if job.reason else "")]
    if job.reason and job.driver_exit_code is None:  # there is no log with more detail
        lines += job.message.strip().splitlines()[1:]
    if job.resume:
        lines.append(f"continue with: {job.resume}")
    return "\n".join(lines)


def row_of(job: Job) -> tuple[str, ...]:
    """Return the row of a job in the table of jobs."""
    started = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.started)) if job.started else "-"
    return (job.id, job.state, started, _clock(job), job.metadata["command"], job.metadata["output_dir"])


def queued_row(entry: dict[str, Any]) -> tuple[str, ...]:
    """Return the row of a waiting run in the table of jobs."""
    state = entry["state"] + (f" ({entry['reason'].partition(chr(10))[0]})" if entry["reason"] else "")
    return (
        entry["id"],
        state,
        "-",
        "-",
        f"{entry['command']} [priority {entry['priority']}]",
        entry["output_dir"],
    )


def plain_job(job: Job) -> dict[str, Any]:
    """Return a job as plain data for JSON."""
    times = {"started": job.started, "ended": job.ended, "exit_code": job.exit_code if job.is_over else None}
    end = {"reason": job.reason, "resume": job.resume} if job.reason else {}
    shown = {name: value for name, value in job.metadata.items() if name != SETTINGS}
    return {"id": job.id, "state": job.state, **times, **end, **shown}


def _clock(job: Job) -> str:
    if not job.started:
        return "-"
    minutes, seconds = divmod(int((job.ended or time.time()) - job.started), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
