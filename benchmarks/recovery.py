"""Measures the seconds from a killed worker to the next new step, and to the full number of workers, on this machine.

Usage: ``python benchmarks/recovery.py [--workers 2] [--kills 5] [--recipe recipes/demo.yaml]``. Writes
results/recovery.json.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import write_result

from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.launch import fit
from dreamfleet.trainers.recipe import load_recipe
from dreamfleet.trainers.report.events import read_events

STEPS_BETWEEN = 10


def main() -> None:
    """Train, kill a random worker whenever all are present, and print the seconds of each recovery as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--recipe", default="recipes/demo.yaml")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(
            options.recipe,
            [
                f"output_dir={folder}/run",
                f"scaling.num_workers={options.workers}",
                "scaling.max_failures=-1",
                f"train.max_train_steps={options.steps}",
                "train.train_batch_size=1",
                "train.log_steps=1",
                "train.checkpointing_steps=100000",
                "train.export=false",
                "method.with_prior_preservation=false",
                "validation.prompts=[]",
                "validation.metrics=[loss]",
                "validation.steps=100000",
            ],
        )
        killer = Killer(Storage(recipe.output_dir), options.workers, options.kills)
        fit(recipe, on_progress=killer.see)
        regroups = [event for event in read_events(killer.run) if event["kind"] == "regroup"]
        how = f"python benchmarks/recovery.py --workers {options.workers} --kills {options.kills}"
        write_result("recovery", {"workers": options.workers, **killer.figures(regroups)}, how=how)


class Killer:
    """Kills a worker some steps after all are present; measures when the next line of metrics appears."""

    def __init__(self, run: Storage, workers: int, kills: int):
        self.run, self.workers, self.kills = run, workers, kills
        self.killed_at: float | None = None
        self.step_at_kill = self.next_kill = 0
        self.to_next_step: list[float] = []
        self.next_kill = STEPS_BETWEEN
        self.world = workers

    def see(self, line: dict[str, Any]) -> None:
        """Look at a line of metrics."""
        if "loss" not in line:
            return
        now, step = time.monotonic(), int(line["step"])
        if (
            self.killed_at is not None and step > self.step_at_kill + 1
        ):  # the step after the one that was under way
            self.to_next_step.append(now - self.killed_at)
            self.killed_at = None
        found = [event["world"] for event in read_events(self.run) if event["kind"] == "regroup"]
        if found and found[-1] != self.world:
            self.world, self.next_kill = found[-1], step + STEPS_BETWEEN
        ready = self.world == self.workers and step >= self.next_kill and self.killed_at is None
        if not ready:
            return
        if len(self.to_next_step) == self.kills:
            self.run.write_text("STOP", "")
        else:
            os.kill(_workers()[-1], signal.SIGKILL)
            self.killed_at, self.step_at_kill = time.monotonic(), step

    def figures(self, regroups: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the measured seconds."""
        shrunk = [event for event in regroups if event["lost"]]
        grown = [event for event in regroups if event["joined"]]
        return {
            "to_next_step_seconds": [round(one, 2) for one in self.to_next_step],
            "median": statistics.median(self.to_next_step) if self.to_next_step else None,
            "regroup_seconds": [round(event["seconds"], 3) for event in shrunk],
            "join_seconds": [round(event["seconds"], 3) for event in grown],
            "to_all_workers_seconds": [
                round(after["clock"] - before["clock"], 1)
                for before, after in zip(shrunk, grown, strict=False)
            ],
        }


def _workers() -> list[int]:
    """Return the processes of Ray's training workers that this process started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _is_ours(int(entry.name)):
            found.append(int(entry.name))
    return sorted(found)


def _is_ours(process: int) -> bool:
    try:
        name = Path(f"/proc/{process}/cmdline").read_text()
        if not (name.startswith("ray::") and "TrainWorker" in name):
            return False
        while process > 1 and process != os.getpid():
            status = Path(f"/proc/{process}/status").read_text()
            parent = re.search(r"^PPid:\s+(\d+)", status, re.MULTILINE)
            process = int(parent[1]) if parent else 0
    except OSError:
        return False
    return process == os.getpid()


if __name__ == "__main__":
    main()
