"""One trial in a process of its own: an ordinary run that waits at each validation round for the scheduler's word."""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.tune import Trainable

from dreamfleet.datasets.environment import take_over
from dreamfleet.datasets.errors import RunFailed, UserError
from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.driver.progress import log_to_run, watch_for_stop
from dreamfleet.trainers.report.metrics_log import read_metrics
from dreamfleet.trainers.run.summary import Summary

STOPPED = "stopped by the scheduler"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shared:
    """What all trials of a search have in common."""

    folder: str  # of the search: its stop mark ends every trial
    recipe: dict[str, Any]  # plain data
    figures: Sequence[str]  # what a validation round measures
    threads: int
    uses_gpu: bool
    gpu_share: float  # the part of a GPU that is a trial's
    environment: Mapping[str, str]
    sent: Mapping[str, str]  # of environment.to_send; comes through Ray's memory and is written nowhere


class TrialActor(Trainable):
    """Runs trials for Ray Tune, one after the other: what was imported for the first serves the next ones too."""

    def setup(self, config: dict[str, Any], *, shared: Shared) -> None:
        """Begin the first trial; ``config`` is what TrialRun takes."""
        os.environ.update(shared.environment)
        take_over(shared.sent)
        self.shared = shared
        self.run = TrialRun(shared, **config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """End the trial before, if the scheduler has stopped it, and begin another."""
        self.run.stop()
        self.run = TrialRun(self.shared, **new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Train to the end of the next validation round."""
        return self.run.next_round()

    def cleanup(self) -> None:
        """End the trial in hand."""
        self.run.stop()


class TrialRun:
    """A run in a thread that stops after each validation round until it is told to go on.

    ``told`` is the step of the last round that is known already, from before an interruption; -1 for none.
    """

    def __init__(self, shared: Shared, name: str, point: dict[str, Any], told: int):
        self.shared, self.name, self.point, self.told = shared, name, point, told
        self.rounds: queue.SimpleQueue[dict[str, Any] | Exception] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self.news = True  # whether metrics.jsonl may hold a round that was not told
        self.is_stopped = False
        self.thread = threading.Thread(target=self._work, daemon=True, name=f"trial-{name}")

    def next_round(self) -> dict[str, Any]:
        """Return the next round: ``step``, figures, and ``done`` with an ``exit_reason`` once there is no more.

        A failure of the run itself is such a last round too, with ``error`` and ``kind``. Raises what is neither the
        user's to mend nor the run's own doing.
        """
        if self.thread.ident is None:
            self.thread.start()
        else:
            self.answers.put(False)
        told = self.rounds.get()
        if isinstance(told, Exception):
            raise told
        return told

    def stop(self) -> None:
        """End the run, unless it has ended: it saves a checkpoint and writes its summary and report."""
        if self.thread.is_alive():
            self.answers.put(True)
        if self.thread.ident is not None:
            self.thread.join()

    def _work(self) -> None:
        try:
            self.rounds.put(self._train())
        except (UserError, RunFailed) as error:
            self.rounds.put(
                {"error": str(error), "kind": type(error).__name__, "exit_reason": "failed", "done": True}
            )
        except Exception as error:  # noqa: BLE001 - handed to the thread that waits, whatever it is
            if not _is_out_of_memory(error):
                self.rounds.put(error)
                return
            told = f"the machine's memory was used up ({str(error).splitlines()[0] if str(error) else 'MemoryError'})"
            self.rounds.put({"error": told, "kind": "ResourceError", "exit_reason": "failed", "done": True})

    def _train(self) -> dict[str, Any]:
        import torch

        from dreamfleet.trainers.recipe import build_recipe
        from dreamfleet.trainers.run.run import run_worker
        from dreamfleet.tune.trial_store import Trial, trial_recipe

        shared = self.shared
        torch.set_num_threads(shared.threads)
        gc.collect()  # what the trial before has left
        if shared.uses_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        search = Storage(shared.folder)
        run = search.child(Trial(self.name, self.point).folder)
        recipe = trial_recipe(build_recipe(shared.recipe), self.point, run.path())
        with log_to_run(run, verbose=True), watch_for_stop(search) as marked:
            try:
                summary = run_worker(
                    recipe,
                    device="cuda" if shared.uses_gpu else "cpu",
                    gpu_share=shared.gpu_share,
                    resume=True,
                    should_stop=lambda: self._ask(run) or marked(),
                    on_progress=self._look_at,
                )
            except (UserError, RunFailed) as error:
                log.error("%s", str(error))  # the error itself holds the whole run, by its traceback
                raise
        if self.is_stopped:
            write_end(run, dataclasses.replace(summary, exit_reason=STOPPED))
        *before, last = rounds_of(run, shared.figures) or [{"step": 0}]
        for figures in before:
            self._tell(figures)
        return {**last, "exit_reason": summary.exit_reason, "done": True}

    def _look_at(self, line: dict[str, Any]) -> None:
        self.news = self.news or any(name in line for name in self.shared.figures)

    def _ask(self, run: Storage) -> bool:
        """Tell what was measured since the last time; say whether the scheduler wants the run to end."""
        if self.news and not self.is_stopped:
            self.news = False
            for figures in rounds_of(run, self.shared.figures):
                self._tell(figures)
        return self.is_stopped

    def _tell(self, figures: dict[str, Any]) -> None:
        if self.is_stopped or figures["step"] <= self.told:
            return
        self.told = figures["step"]
        self.rounds.put(figures)
        self.is_stopped = self.answers.get()


def _is_out_of_memory(error: Exception) -> bool:
    # torch's allocator for the host raises a bare RuntimeError.
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


def rounds_of(run: Storage, figures: Sequence[str]) -> list[dict[str, Any]]:
    """List the validation rounds of a run from its metrics: ``step`` and figures, in their order."""
    rounds: dict[int, dict[str, Any]] = {}
    for line in read_metrics(run):
        if found := {name: line[name] for name in figures if line.get(name) is not None}:
            rounds.setdefault(line["step"], {"step": line["step"]}).update(found)
    return [rounds[step] for step in sorted(rounds)]


def write_end(run: Storage, summary: Summary) -> None:
    """Write summary and report of a run again, for an ending that the run itself does not know of."""
    from dreamfleet.trainers.artifacts.usage import describe
    from dreamfleet.trainers.report.report import write_report

    run.write_text("summary.json", json_text(dataclasses.asdict(summary), indent=1))
    write_report(run, describe=describe)
