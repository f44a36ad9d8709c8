"""Strikes a run with random faults for some time (`make storm`), and measures how much of the time was training.

    MINUTES=60 EVERY=60 PAIRS=0 SEED=0 SLOWER=0 make storm

One fault in each EVERY seconds, drawn with SEED, on three nodes of the laboratory (docs/faults.md); PAIRS=1 draws
pairs: a worker in a save, S3 while a worker restarts, the driver and a raylet. Nodes that a fault ended are renewed
20 s later, as an autoscaler would, and a driver that ended is started again with --resume. At the end the run is
stopped, and a run of as many steps without faults gives the weights to compare with. SLOWER seconds are added to each
step of the storm: the pocket model's are shorter than a real model's. Writes results/storm.json or storm-pairs.json.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measure import write_result

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

from lab.laboratory import Laboratory, end_on_sigterm, why_not
from lab.machine import Machine
from lab.trial import Trial, kill, raylet_of

ENDLESS = 1_000_000  # steps; the run is stopped when the storm is over
S3_SECONDS, RENEW_SECONDS = 8, 20
RECIPE = {"train__log_steps": 50, "optimizer__lr_scheduler": "constant_with_warmup"}  # no end in the schedule


@dataclass
class Storm:
    """A run in a storm: the faults that struck it, and what is to be done later."""

    trial: Trial
    source: random.Random
    struck: list[dict[str, Any]] = field(default_factory=list)
    slower: float = 0.0  # seconds added to each step
    later: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    resumed: int = 0

    @property
    def lab(self) -> Laboratory:
        """The laboratory."""
        return self.trial.lab

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Do something some seconds from now."""
        self.later.append((time.monotonic() + seconds, action))

    def wait_until(self, moment: float) -> None:
        """Wait until a moment of the monotonic clock; do what is due, and resume a run whose driver has ended."""
        while (now := time.monotonic()) < moment:
            due = [action for when, action in self.later if when <= now]
            self.later = [(when, action) for when, action in self.later if when > now]
            for action in due:
                action()
            if self.trial.driver.code is not None:
                print(
                    f"the driver ended with {self.trial.driver.code}: {self.trial.driver.lines[-3:]}",
                    flush=True,
                )
                self.trial.start("--resume")
                self.resumed += 1
            time.sleep(0.1)

    def renew(self, machine: Machine) -> None:
        """Replace a node by a new machine."""
        self.lab.renew(machine)
        self.trial.lengthen_steps(self.slower)

    # ---- faults ---------------------------------------------------------------------------------------

    def process(self, rank: int) -> tuple[Machine, int]:
        """Return machine and pid of a rank; of any training process, if the rank's has just ended."""
        try:
            return self.trial.worker(rank)
        except (AssertionError, IndexError):
            for node in self.lab.nodes:
                for pid in node.pids("RayTrainWorker"):
                    return node, pid
            raise LookupError("no training process lives") from None

    def kill_worker(self) -> str:
        """SIGKILL of rank 1."""
        machine, pid = self.process(1)
        kill(pid)
        return f"SIGKILL of a worker on {machine.name}"

    def kill_rank_0(self) -> str:
        """SIGKILL of rank 0."""
        machine, pid = self.process(0)
        kill(pid)
        return f"SIGKILL of rank 0 on {machine.name}"

    def terminate_worker(self) -> str:
        """SIGTERM of a worker."""
        machine, pid = self.process(self.source.randrange(2))
        kill(pid, signal.SIGTERM)
        return f"SIGTERM of a worker on {machine.name}"

    def kill_raylet(self) -> str:
        """SIGKILL of a raylet under a worker."""
        machine, _ = self.process(self.source.randrange(2))
        kill(raylet_of(machine))
        self.after(RENEW_SECONDS, lambda: self.renew(machine))
        return f"SIGKILL of the raylet of {machine.name}"

    def power_off(self) -> str:
        """Power failure of a worker's node."""
        machine, _ = self.process(self.source.randrange(2))
        machine.power_off()
        self.after(RENEW_SECONDS, lambda: self.renew(machine))
        return f"power failure of {machine.name}"

    def s3_away(self) -> str:
        """S3 refuses connections for some seconds."""
        self.lab.s3.kill()
        self.after(S3_SECONDS, self.lab.s3.start)
        return f"S3 away for {S3_SECONDS} s"

    def kill_in_save(self) -> str:
        """SIGKILL of the process that saves, in the middle of a save."""
        with self.trial.hold_save() as (machine, pid):
            kill(pid)
        return f"SIGKILL in a save on {machine.name}"

    def s3_away_in_restart(self) -> str:
        """S3 refuses connections while a worker restarts."""
        told = self.kill_worker()
        self.after(3, self.lab.s3.kill)
        self.after(3 + S3_SECONDS, self.lab.s3.start)
        return f"{told}, and S3 away for {S3_SECONDS} s from 3 s later on"

    def kill_driver_and_raylet(self) -> str:
        """SIGKILL of the driver and of a raylet under a worker."""
        told = self.kill_raylet()
        for pid in self.lab.head.pids("dreamfleet train"):
            kill(pid)
        return f"{told} and of the driver"


SINGLE = (
    *(Storm.kill_worker,) * 3,
    *(Storm.kill_rank_0,) * 3,
    Storm.terminate_worker,
    Storm.kill_raylet,
    Storm.power_off,
    Storm.s3_away,
)
PAIRS = (Storm.kill_in_save, Storm.s3_away_in_restart, Storm.kill_driver_and_raylet)


def rage(storm: Storm, *, minutes: float, every: float, faults: tuple[Callable[[Storm], str], ...]) -> float:
    """Strike for some minutes from the first step on; return the time of the first step."""
    trial = storm.trial
    trial.lengthen_steps(storm.slower)
    trial.start()
    trial.wait_for_step(1)
    first, began = trial.trace.steps()[0]["t"], time.monotonic()
    for number in range(round(minutes * 60 / every)):
        storm.wait_until(began + (number + 0.5) * every)
        fault = storm.source.choice(faults)
        step = trial.trace.last_step()
        try:
            told = fault(storm)
        except (LookupError, AssertionError, StopIteration) as error:
            told = f"{fault.__name__}: nothing to strike ({str(error)[:80]})"
        storm.struck.append({"at_s": round(time.time() - first, 1), "step": step, "fault": told})
        print(json.dumps(storm.struck[-1]), flush=True)
    storm.wait_until(began + minutes * 60)
    return first


def stop(storm: Storm) -> None:
    """Let the run recover from the last fault, and end it with a checkpoint."""
    trial, reached = storm.trial, storm.trial.trace.last_step()
    while trial.trace.last_step() <= reached or storm.later:
        storm.wait_until(time.monotonic() + 1)
    os.kill(next(iter(storm.lab.head.pids("dreamfleet train"))), signal.SIGTERM)
    trial.driver.wait(300)


def measure_storm(storm: Storm, first: float, end: float) -> dict[str, Any]:
    """Return what the trace outside of the run says about the time between its first step and ``end``."""
    steps = [each for each in storm.trial.trace.steps() if each["t"] <= end]
    gaps = [
        after["t"] - before["t"]
        for before, after in itertools.pairwise(steps)
        if after["pid"] == before["pid"] and after["step"] == before["step"] + 1
    ]
    seconds = statistics.median(gaps)
    last = max(each["step"] for each in steps)
    pauses = []
    for fault in storm.struck:
        new = [
            each["t"] for each in steps if each["t"] > first + fault["at_s"] and each["step"] > fault["step"]
        ]
        pauses.append(round(new[0] - first - fault["at_s"], 1) if new else None)
    return {
        "wall_s": round(end - first, 1),
        "faults": [fault | {"new_step_s": pause} for fault, pause in zip(storm.struck, pauses, strict=True)],
        "steps": last,
        "steps_repeated": len(steps) - len({each["step"] for each in steps}),
        "median_step_s": round(seconds, 4),
        "effective_training_time_traced": round(last * seconds / (end - first), 4),
        "median_new_step_s": statistics.median([pause for pause in pauses if pause is not None] or [0]),
        "resumed_by_hand": storm.resumed,
    }


def read_run(lab: Laboratory, url: str) -> dict[str, Any]:
    """Return what the run's own events and summary say: effective training time, and restarts by cause."""
    events = lab.ask("events", url)
    causes = Counter(
        f"{e['kind']}: {e.get('cause', '')}" for e in events if e["kind"] in ("failure", "regroup", "hang")
    )
    timeline = lab.ask("summary", url).get("timeline", {})
    return {
        "restarts": dict(causes),
        "effective_training_time": timeline.get("effective_training_time"),
        "seconds_by_part": timeline.get("seconds"),
    }


def main() -> None:
    """Storm, compare the weights, and write the results."""
    minutes, every = float(os.environ.get("MINUTES", 60)), float(os.environ.get("EVERY", 60))
    slower = float(os.environ.get("SLOWER", 0))
    pairs, seed = os.environ.get("PAIRS", "0") == "1", int(os.environ.get("SEED", 0))
    if reason := why_not():
        sys.exit(reason)
    end_on_sigterm()
    with Laboratory() as lab:
        storm = Storm(Trial(lab, "storm", steps=ENDLESS, recipe=RECIPE), random.Random(seed), slower=slower)
        try:
            first = rage(storm, minutes=minutes, every=every, faults=PAIRS if pairs else SINGLE)
            end = time.time()
            stop(storm)
        finally:
            storm.trial.close()
        result = measure_storm(storm, first, end) | read_run(lab, storm.trial.url)
        reached = lab.ask("last_step", storm.trial.url)
        lab.repair()
        storm.trial.lengthen_steps(0)
        calm = Trial(lab, "calm", steps=reached, recipe=RECIPE)
        try:
            calm.start().wait(minutes * 300 + 600)
        finally:
            calm.close()
        result |= {
            "exit_code": storm.trial.driver.code,
            "compared_at_step": reached,
            "largest_difference": lab.ask("difference", calm.url, storm.trial.url),
        }
    settings = {"minutes": minutes, "every_s": every, "pairs": pairs, "seed": seed, "slower_s": slower}
    how = f"MINUTES={minutes:g} EVERY={every:g} PAIRS={int(pairs)} SEED={seed} SLOWER={slower:g} make storm"
    write_result("storm-pairs" if pairs else "storm", settings | result, how=how)
    sys.exit(result["largest_difference"] != 0)


if __name__ == "__main__":
    main()
