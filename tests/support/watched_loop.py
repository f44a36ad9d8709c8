"""A loop in the place of a training, for tests of the watch over workers: it fails as its plan says."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray.train

from dreamfleet.trainers.distributed.pulse import Preempted, Pulse, training_here

SECONDS = 0.05  # of a step
SAVE_EVERY = 5


def raise_error() -> None:
    raise ValueError(f"bad value at {id(object()):#x}")


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop_self() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def terminate_self() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def sleep_in_the_loop() -> None:
    time.sleep(600)


ACTS = {act.__name__: act for act in (raise_error, kill_self, stop_self, terminate_self, sleep_in_the_loop)}


def train(config: Mapping[str, Any]) -> int:
    """Take ``steps`` steps from the last saved one; return the number of starts.

    ``plan``: [step, rank, act, times]: at ``step``, ``rank`` does ``act`` in its first ``times`` starts. Files in
    ``folder`` stand for checkpoints, and make the ranks wait for each other as a collective does.
    """
    folder = Path(config["folder"])
    rank = ray.train.get_context().get_world_rank()
    saved = max((int(path.name) for path in (folder / "saved").iterdir()), default=0)
    starts = len(list(folder.glob(f"start-{rank}-*")))
    (folder / f"start-{rank}-{starts}").touch()
    with training_here(Pulse()) as pulse:
        pulse.resume(saved)
        for step in range(saved + 1, config["steps"] + 1):
            if pulse.notice is not None or (folder / f"leave-{starts}").exists():
                (folder / f"leave-{starts}").touch()
                (folder / "saved" / str(step - 1)).touch()
                raise Preempted(f"notice before step {step}")
            pulse.begin_pass({}, last=False)
            for when, who, act, times in config["plan"]:
                if (when, who) == (step, rank) and starts < times:
                    ACTS[act]()
            time.sleep(SECONDS)
            pulse.mark("reduce")
            _meet(folder / f"met-{starts}-{step}", rank)
            pulse.finish_step(step)
            if step % SAVE_EVERY == 0:
                (folder / "saved" / str(step)).touch()
                pulse.saved = step
    return starts + 1


def _meet(folder: Path, rank: int) -> None:
    """Wait until both ranks are here."""
    folder.mkdir(exist_ok=True)
    (folder / str(rank)).touch()
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.01)
