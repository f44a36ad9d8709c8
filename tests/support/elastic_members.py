"""Workers of a run that are killed and that join, as plain processes, with the coordinator in the test's process."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

KEY = b"the key of a test"


def work(
    folder: str,
    tree: dict[str, Any],
    address: tuple[str, int],
    rank: int,
    expected: int,
    plan: dict[str, Any],
) -> None:
    """Train as the worker that the launcher numbers ``rank``; write the summary, or the error, as JSON."""
    import torch

    from dreamfleet.trainers.distributed.membership import Left, Membership
    from dreamfleet.trainers.recipe import build_recipe
    from dreamfleet.trainers.run.run import run_worker

    torch.set_num_threads(1)
    _plant(plan)
    membership = Membership(address, KEY, rank=rank, expected=expected, host="127.0.0.1")
    result: dict[str, Any] = {}
    completed = False
    try:
        summary = run_worker(
            build_recipe(tree), rank=rank, world=expected, resume=True, membership=membership
        )
        completed, result = (
            True,
            {"steps": summary.steps, "reason": summary.exit_reason, "workers": summary.workers},
        )
    except Left as left:
        result = {"left": str(left)}
    except BaseException as error:  # noqa: BLE001 - reported to the test
        import traceback

        result = {"error": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}
    finally:
        membership.close(completed=completed)
    Path(folder, f"worker-{rank}-{os.getpid()}.json").write_text(json.dumps(result))


def _plant(plan: dict[str, Any]) -> None:
    """Let this process end or stop itself in the ``call``-th call of ``where``, sleep in steps or saves, or wait."""
    from dreamfleet.trainers.engines.torch_engine import TorchEngine
    from dreamfleet.trainers.run.checkpoint import Checkpoints
    from dreamfleet.trainers.run.evaluation import Evaluation
    from dreamfleet.trainers.run.saves import Saves

    places: dict[str, tuple[Any, str]] = {
        "backward": (TorchEngine, "objective"),  # after the forward pass, before gradients are sent
        "step": (TorchEngine, "_step_together"),  # after the gradients were exchanged
        "evaluation": (Evaluation, "measure"),
        "save": (Saves, "start"),
    }
    if pause := plan.get("pause"):
        before = TorchEngine.begin_step
        TorchEngine.begin_step = lambda *args: (time.sleep(pause), before(*args))[1]  # type: ignore[method-assign]
    if held := plan.get("held_until"):
        begin = TorchEngine.begin_step

        def hold(engine: Any, rates: Any, step: int) -> Any:
            while step >= plan["held_at"] and not Path(held).exists():
                time.sleep(0.02)
            return begin(engine, rates, step)

        TorchEngine.begin_step = hold  # type: ignore[method-assign]
    if seconds := plan.get("slow_save"):
        write = Checkpoints.write

        def write_slowly(checkpoints: Checkpoints, *args: Any, **options: Any) -> Any:
            Path(plan["marker"]).touch()
            time.sleep(seconds)
            return write(checkpoints, *args, **options)

        Checkpoints.write = write_slowly  # type: ignore[method-assign]
    if "where" in plan:
        owner, name = places[plan["where"]]
        original, calls = getattr(owner, name), [0]

        def dies(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == plan["call"]:
                os.kill(os.getpid(), plan.get("signal", signal.SIGKILL))
            return original(*args, **kwargs)

        setattr(owner, name, dies)


class Workers:
    """The workers of one run; ``start`` adds one, which joins those that train."""

    def __init__(self, folder: Path, tree: dict[str, Any], *, expected: int, silence: float = 20.0):
        from dreamfleet.trainers.distributed.coordinator import Coordinator
        from dreamfleet.trainers.distributed.roster import Generation, Roster

        self.folder, self.tree, self.expected = folder, tree, expected
        self.generations: list[Generation] = []
        self.coordinator = Coordinator(
            Roster(expected), key=KEY, silence=silence, on_change=self.generations.append
        )
        self.processes: list[Any] = []
        self._context = multiprocessing.get_context("fork")

    def start(self, rank: int, **plan: Any) -> None:
        """Start a worker; ``plan``: see :func:`_plant`."""
        process = self._context.Process(
            target=work,
            args=(str(self.folder), self.tree, self.coordinator.address, rank, self.expected, plan),
        )
        process.start()
        self.processes.append(process)

    def wait_for(self, condition: Callable[[], bool], *, seconds: float = 120) -> None:
        """Wait until ``condition``; fail after ``seconds``, or if every worker has ended."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited {seconds} s; generations: {self.generations}"
            time.sleep(0.02)

    def end(self, *, seconds: float = 120) -> list[dict[str, Any]]:
        """Wait for all workers that were not killed; return what they wrote."""
        try:
            self.wait_for(
                lambda: all(not one.is_alive() or self.is_stopped(one.pid) for one in self.processes),
                seconds=seconds,
            )
        finally:
            for process in self.processes:
                process.kill()
                process.join()
            self.coordinator.close()
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("worker-*.json"))]

    @staticmethod
    def is_stopped(pid: int) -> bool:
        """Return whether a process is stopped by SIGSTOP."""
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        except OSError:
            return False


if __name__ == "__main__":
    sys.exit("run tests/trainers/run/test_membership.py")
