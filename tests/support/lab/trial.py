"""One run on the laboratory's cluster: its driver, the trace of its workers, and what a fault cost it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lab.laboratory import BUCKET, IMAGES, RAY_PORT, Laboratory
from lab.machine import Machine, command_line

STEPS, EVERY, AT = (
    60,
    10,
    25,
)  # steps of a run, steps between checkpoints, the step after which a fault strikes
RUN_SECONDS = 600  # longest time of a run or of a wait, on a loaded machine
FOLDERS = {"s3": f"s3://{BUCKET}/runs", "shared": "/tmp/shared/runs"}
DATA = {"s3": f"{IMAGES}/train", "shared": "/tmp/shared/cat/train"}

TRAIN = ("train",)

T = TypeVar("T")


def make_recipe(
    output_dir: str, *, storage: str, workers: Any = 2, steps: int = STEPS, **more: Any
) -> dict[str, Any]:
    """Return a recipe as plain data: DreamBooth of the cat on the pocket model; ``more`` has dotted keys with __."""
    recipe: dict[str, Any] = {
        "method": {"name": "dreambooth", "with_prior_preservation": False},
        "model": {"pretrained_model_name_or_path": "pocket"},
        "data": {"instance_data_dir": DATA[storage], "instance_prompt": "a sks cat face", "resolution": 64},
        "train": {
            "max_train_steps": steps,
            "train_batch_size": 2,
            "seed": 0,
            "checkpointing_steps": EVERY,
            "log_steps": 1,
        },
        "optimizer": {"learning_rate": 2.0e-4, "lr_scheduler": "cosine", "lr_warmup_steps": 10},
        "scaling": {"num_workers": workers, "cpus_per_worker": 1},
        "output_dir": output_dir,
    }
    for dotted, value in more.items():
        node = recipe
        *parents, last = dotted.split("__")
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return recipe


class Driver:
    """A running ``dreamfleet train``, or another ``command``, on the head or a ``machine``; and what it prints."""

    def __init__(
        self,
        lab: Laboratory,
        recipe: str,
        *options: str,
        machine: Machine | None = None,
        command: Sequence[str] = TRAIN,
    ):
        self.lines: list[str] = []
        words = ["dreamfleet", *command, recipe, "--address", f"{lab.head.ip}:{RAY_PORT}", *options]
        self.process = subprocess.Popen(
            (machine or lab.head).command(words, lab.environment()),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs. The code is negative if a signal ended it."""
        return self.process.poll()

    def wait(self, seconds: float = RUN_SECONDS) -> int | None:
        """Return the exit code, or None if it still runs after ``seconds``."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
            self.reader.join(5)
        return self.code

    def end(self) -> None:
        """Kill it if it runs."""
        self.process.kill()
        self.process.wait()
        self.reader.join(5)

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for line in output:
                self.lines.append(line.rstrip("\n"))


class Trace:
    """What the training processes of all machines wrote since this object was created (``trace/sitecustomize.py``)."""

    def __init__(self, lab: Laboratory):
        self.lab = lab
        self.begins = {machine.name: self._file(machine).stat().st_size for machine in lab.machines}

    def events(self) -> list[dict[str, Any]]:
        """Return the events by time; ``on`` names the machine."""
        found = []
        for machine in self.lab.machines:
            for line in self._file(machine).read_bytes()[self.begins[machine.name] :].splitlines():
                with contextlib.suppress(ValueError):  # the last line may be incomplete
                    found.append({**json.loads(line), "on": machine.name})
        return sorted(found, key=lambda event: event["t"])

    def steps(self) -> list[dict[str, Any]]:
        """Return the events of completed steps, once per execution: those of rank 0."""
        return [event for event in self.events() if event["event"] == "step" and event["rank"] == 0]

    def saved(self, *, since: float) -> list[dict[str, Any]]:
        """Return the events of checkpoints that were completed after a time and a first step after it."""
        first = next((step["t"] for step in self.steps() if step["t"] > since + 1), float("inf"))
        return [event for event in self.events() if event["event"] == "saved" and event["t"] > first]

    def last_step(self) -> int:
        """Return the highest completed step."""
        return max((event["step"] for event in self.steps()), default=0)

    @staticmethod
    def _file(machine: Machine) -> Any:
        return machine.disk / "tmp" / "trace.jsonl"


@dataclass
class Trial:
    """A run of a recipe on the laboratory; faults act on it and call :meth:`mark` when they strike."""

    lab: Laboratory
    name: str
    storage: str = "s3"
    workers: Any = 2
    steps: int = STEPS
    at: int = AT
    recipe: dict[str, Any] = field(default_factory=dict)  # more keys, dotted with __
    command: Sequence[str] = TRAIN  # of dreamfleet, before the recipe
    finished: set[str] = field(default_factory=set)  # subjects of a fleet that the fault found finished
    struck: float = 0.0  # time of the fault
    before: int = 0  # the last step that was complete then
    drivers: list[Driver] = field(default_factory=list)
    rival: Driver | None = None  # a second driver on the same folder

    def __post_init__(self) -> None:
        self.url = f"{FOLDERS[self.storage]}/{self.name}-{uuid.uuid4().hex[:8]}"
        self.trace = Trace(self.lab)

    def start(self, *options: str, **more: Any) -> Driver:
        """Start the run, or continue it with ``--resume``; ``more`` are further keys of the recipe."""
        made = make_recipe(
            self.url, storage=self.storage, workers=self.workers, steps=self.steps, **self.recipe, **more
        )
        name = f"recipe-{len(self.drivers)}.yaml"
        (self.lab.head.disk / "tmp" / name).write_text(json.dumps(made, indent=1))  # JSON is YAML
        self.drivers.append(Driver(self.lab, f"/tmp/{name}", *options, command=self.command))
        return self.drivers[-1]

    @property
    def driver(self) -> Driver:
        """The newest driver."""
        return self.drivers[-1]

    def mark(self) -> None:
        """Note the time of the fault and the last step before it."""
        self.struck, self.before = time.time(), self.trace.last_step()

    def wait_for_step(self, step: int) -> None:
        """Wait until ``step`` is complete. Raises AssertionError if the run ends before."""
        self.wait_for(lambda: self.trace.last_step() >= step, what=f"step {step}")

    def wait_for(self, found: Callable[[], T], *, what: str, seconds: float = RUN_SECONDS) -> T:
        """Return the first true value of ``found``. Raises AssertionError if the run ends or takes too long."""
        deadline = time.monotonic() + seconds
        while not (value := found()):
            over = self.driver.code is not None
            assert not over and time.monotonic() < deadline, (
                f"{what} did not come; the driver {f'ended with {self.driver.code}' if over else 'runs'}, "
                f"last step {self.trace.last_step()}: {self.driver.lines[-8:]}"
            )
            time.sleep(0.05)
        return value

    def worker(self, rank: int) -> tuple[Machine, int]:
        """Return machine and pid, as this host counts, of the process that took the newest step as ``rank``."""
        taken = [each for each in self.trace.events() if each["event"] == "step" and each["rank"] == rank]
        machine = next(each for each in self.lab.machines if each.name == taken[-1]["on"])
        pid = machine.pid_here(taken[-1]["pid"])
        assert pid is not None, f"rank {rank} on {machine.name} has ended"
        return machine, pid

    @contextlib.contextmanager
    def hold_save(self) -> Any:
        """Stop the next checkpoint between its files while this context lasts; yield the writer's machine and pid."""
        holds = [machine.disk / "tmp" / "trace.jsonl.hold" for machine in self.lab.machines]
        since = time.time()
        for hold in holds:
            hold.write_text("")

        def writer() -> tuple[Machine, int] | None:
            for event in self.trace.events():
                if event["event"] == "upload" and "/engine." in event["file"] and event["t"] > since:
                    machine = next(each for each in self.lab.machines if each.name == event["on"])
                    return machine, machine.pid_here(event["pid"]) or 0
            return None

        try:
            yield self.wait_for(writer, what="a save", seconds=120)
        finally:
            for hold in holds:
                hold.unlink(missing_ok=True)

    def lengthen_steps(self, seconds: float) -> None:
        """Make each step that much longer, so that a run outlasts what happens beside it; 0 undoes it."""
        for machine in self.lab.machines:
            (machine.disk / "tmp" / "trace.jsonl.slow").write_text(str(seconds))

    def close(self) -> None:
        """End the drivers that still run."""
        for driver in (*self.drivers, self.rival):
            if driver is not None and driver.code is None:
                driver.end()

    # ---- results --------------------------------------------------------------------------------------

    def repeated(self) -> int:
        """Return how many executions of steps were repetitions."""
        return sum(times - 1 for times in self.executions().values())

    def executions(self) -> Counter[tuple[str, int]]:
        """Return how often each step was taken, by run and number."""
        return Counter((event.get("run", ""), event["step"]) for event in self.trace.steps())

    def measure(self) -> dict[str, Any]:
        """Return what the fault cost: seconds until a worker started and until the first new step, steps repeated."""
        after = [event for event in self.trace.events() if event["t"] > self.struck]
        starts = [event["t"] for event in after if event["event"] == "start"]
        new = [each["t"] for each in after if each["event"] == "step" and each["step"] > self.before]
        return {
            "at_step": self.before,
            "restart_s": round(starts[0] - self.struck, 1) if starts else None,
            "new_step_s": round(new[0] - self.struck, 1) if new else None,
            "repeated": self.repeated(),
        }


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to a process of a machine, if it still lives."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def raylet_of(machine: Machine) -> int:
    """Return the pid of a node's raylet."""
    return next(pid for pid in machine.pids("raylet/raylet") if b"--raylet_socket_name" in command_line(pid))
