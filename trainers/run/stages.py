"""Times the stages of steps, and writes profiler traces of chosen steps with the stages as named ranges."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from dreamfleet.datasets.storage.storage import Storage

#: stages of a step, as the loop marks them on its pulse -> their names in metrics and traces
NAMES = {
    "data": "data_wait",
    "pass": "forward_backward",
    "last pass": "forward_backward",
    "reduce": "optimizer",
}
FOLDER = "profile"


class StageTimes:
    """Sums the seconds of each stage of a run's steps, without waiting for the device.

    On a CPU by the host's clock. A GPU computes later than the host asks, so events in its stream mark the stages,
    which are read with the metrics, when the host waits for the GPU anyway.
    """

    def __init__(self, device: torch.device):
        self.is_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self._seconds: dict[str, float] = {}
        self._steps = 0
        self.is_paused = False

    def mark(self, stage: str) -> None:
        """Note that a step has reached ``stage``; "" is its end."""
        if self.is_paused:
            self._marks = []
            return
        name = NAMES.get(stage, "")
        if self._marks and self._marks[-1][0] == name:
            return
        if not self.is_gpu:
            self._add_host(name, time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((name, event))

    def finish_step(self) -> None:
        """Count a step."""
        if not self.is_paused:
            self._steps += 1

    def read(self) -> dict[str, float]:
        """Return the mean seconds per step of each stage since the last call, by ``data_wait_seconds`` and so on."""
        if self.is_gpu and self._marks:
            self._marks[-1][1].synchronize()
            for (name, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
                self._add(name, begin.elapsed_time(end) / 1000)
            del self._marks[:-1]
        found = {
            f"{name}_seconds": seconds / self._steps for name, seconds in self._seconds.items() if self._steps
        }
        self._seconds, self._steps = {}, 0
        return found

    def _add_host(self, name: str, now: float) -> None:
        if self._marks:
            before, since = self._marks[-1]
            self._add(before, now - since)
        self._marks = [(name, now)]

    def _add(self, name: str, seconds: float) -> None:
        if name:
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds


class StepProfiler:
    """Writes a trace of steps ``first`` to ``last`` (from 1) into ``profile/`` of the run folder, one file per rank.

    The trace is Chrome's JSON, compressed, for https://ui.perfetto.dev. A run that continues within these steps
    profiles the rest of them.
    """

    def __init__(self, run: Storage, *, first: int, last: int, rank: int):
        self.run, self.first, self.last, self.rank = run, first, last, rank
        self._profile: Any = None
        self._started = 0
        self._ranges: list[Any] = []

    def covers(self, step: int) -> bool:
        """Return whether ``step`` is profiled."""
        return self.first <= step <= self.last

    def begin_step(self, step: int) -> None:
        """Start the profiler before its first step; open the range of a step that is profiled."""
        if not self.covers(step):
            return
        if self._profile is None:
            self._profile, self._started = self._start(), step
        self._open(f"step {step}")

    def mark(self, stage: str) -> None:
        """End the range of the stage before, and begin that of ``stage``."""
        if self._profile is None:
            return
        while len(self._ranges) > 1:
            self._ranges.pop().__exit__(None, None, None)
        if self._ranges and (name := NAMES.get(stage)):
            self._open(name)

    def finish_step(self, step: int) -> None:
        """Close the range of a step; write the trace after the last one."""
        while self._ranges:
            self._ranges.pop().__exit__(None, None, None)
        if self._profile is not None and step >= self.last:
            self.write()

    def write(self) -> None:
        """Write the trace of the steps so far; does nothing if none was profiled."""
        if self._profile is None:
            return
        while self._ranges:
            self._ranges.pop().__exit__(None, None, None)
        profile, self._profile = self._profile, None
        profile.stop()
        name = f"step-{self._started:06d}-rank-{self.rank}.json.gz"
        with tempfile.TemporaryDirectory(prefix="dreamfleet-profile-") as folder:
            path = Path(folder) / name
            profile.export_chrome_trace(str(path))
            self.run.write_bytes(f"{FOLDER}/{name}", path.read_bytes())

    def _open(self, name: str) -> None:
        span = torch.profiler.record_function(name)
        span.__enter__()
        self._ranges.append(span)

    @staticmethod
    def _start() -> Any:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        profile = torch.profiler.profile(activities=activities)
        profile.start()
        return profile


class Stages:
    """Follows the marks of a run: times the stages of its steps, and profiles those of ``train.profile_steps``."""

    def __init__(self, device: torch.device, profiler: StepProfiler | None = None):
        self.times, self.profiler = StageTimes(device), profiler
        self._is_between = True  # two steps

    def is_profiled(self, step: int) -> bool:
        """Return whether the time of ``step`` (from 1) does not count: it is profiled, or the trace is written."""
        profiler = self.profiler
        return profiler is not None and (profiler.covers(step) or profiler.covers(step - 1))

    def mark(self, stage: str, done: int) -> None:
        """Note that the step after ``done`` finished steps has reached ``stage``; "" is its end."""
        if self._is_between and stage:
            self._is_between = False
            self.times.is_paused = self.profiler is not None and self.profiler.covers(done + 1)
            if self.profiler is not None:
                self.profiler.begin_step(done + 1)
        self.times.mark(stage)
        if self.profiler is not None:
            self.profiler.mark(stage)
        if not stage and not self._is_between:
            self._is_between = True
            self.times.finish_step()
            if self.profiler is not None:
                self.profiler.finish_step(done)

    def read(self, done: int) -> dict[str, float]:
        """End step ``done``; return the mean times of the stages since the last call, see :meth:`StageTimes.read`."""
        self.mark("", done)
        return self.times.read()

    def close(self) -> None:
        """Write the trace of a run that ends within the profiled steps."""
        if self.profiler is not None:
            self.profiler.write()


def make_stages(run: Storage, device: torch.device, steps: tuple[int, int] | None, *, rank: int) -> Stages:
    """Return the stages of a run; ``steps``: the first and the last step to profile, None for none."""
    return Stages(device, StepProfiler(run, first=steps[0], last=steps[1], rank=rank) if steps else None)
