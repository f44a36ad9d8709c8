"""One trial of a search: an ordinary run that waits for the scheduler's decision after each validation round."""

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

from dreamfleet.datasets.environment import apply_variables
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
    """The settings that all trials of a search share."""

    folder: str  # folder of the search; its stop file ends every trial
    recipe: dict[str, Any]  # as plain data
    figures: Sequence[str]  # keys measured in a validation round
    threads: int
    uses_gpu: bool
    gpu_share: float  # the fraction of a GPU that a trial may use
    environment: Mapping[str, str]
    sent: Mapping[
        str, str
    ]  # from environment.variables_to_send; only passed through Ray's object store, never written to a file


class TrialActor(Trainable):
    """Runs successive trials for Ray Tune in one process, which saves the imports of later trials."""

    def setup(self, config: dict[str, Any], *, shared: Shared) -> None:
        """Prepare the first trial; ``config`` contains the arguments of TrialRun."""
        os.environ.update(shared.environment)
        apply_variables(shared.sent)
        self.shared = shared
        self.run = TrialRun(shared, **config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """End the previous trial if the scheduler stopped it, and prepare another."""
        self.run.stop()
        self.run = TrialRun(self.shared, **new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Train to the end of the next validation round."""
        return self.run.next_round()

    def cleanup(self) -> None:
        """End the current trial."""
        self.run.stop()


class TrialRun:
    """A run in a thread, which pauses after each validation round until :meth:`next_round` or :meth:`stop`.

    ``last_step`` is the step of the last round that was reported before an interruption; -1 for none.
    """

    def __init__(self, shared: Shared, name: str, point: dict[str, Any], last_step: int):
        self.shared, self.name, self.point, self.last_step = shared, name, point, last_step
        self.rounds: queue.SimpleQueue[dict[str, Any] | Exception] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self.has_news = True  # whether metrics.jsonl may contain a round that was not reported
        self.is_stopped = False
        self.thread = threading.Thread(target=self._work, daemon=True, name=f"trial-{name}")

    def next_round(self) -> dict[str, Any]:
        """Return the next round: ``step``, figures, and in the last round ``done`` and ``exit_reason``.

        A run that fails returns a last round with ``error`` and ``kind``. Raises errors that are neither a UserError
        nor a RunFailed nor a lack of memory.
        """
        if self.thread.ident is None:
            self.thread.start()
        else:
            self.answers.put(False)
        found = self.rounds.get()
        if isinstance(found, Exception):
            raise found
        return found

    def stop(self) -> None:
        """End the run if it is in progress: it saves a checkpoint and writes its summary and report."""
        if self.thread.is_alive():
            self.answers.put(True)
        if self.thread.ident is not None:
            self.thread.join()

    def _work(self) -> None:
        try:
            self.rounds.put(self._train())
        except (UserError, RunFailed) as error:
            self.rounds.put(_failed(str(error), type(error).__name__))
        except Exception as error:  # noqa: BLE001 - passed to the waiting thread
            if not _is_out_of_memory(error):
                self.rounds.put(error)
                return
            first_line = str(error).splitlines()[0] if str(error) else "MemoryError"
            self.rounds.put(_failed(f"the machine ran out of memory ({first_line})", "ResourceError"))

    def _train(self) -> dict[str, Any]:
        import torch

        from dreamfleet.trainers.recipe import build_recipe
        from dreamfleet.trainers.run.run import run_worker
        from dreamfleet.tune.trial_store import Trial, trial_recipe

        shared = self.shared
        torch.set_num_threads(shared.threads)
        gc.collect()  # the previous trial's objects
        if shared.uses_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        search = Storage(shared.folder)
        run = search.child(Trial(self.name, self.point).folder)
        recipe = trial_recipe(build_recipe(shared.recipe), self.point, run.path())
        with log_to_run(run, verbose=True), watch_for_stop(search) as is_interrupted:
            try:
                summary = run_worker(
                    recipe,
                    device="cuda" if shared.uses_gpu else "cpu",
                    gpu_share=shared.gpu_share,
                    resume=True,
                    should_stop=lambda: self._should_stop(run) or is_interrupted(),
                    on_progress=self._note_news,
                )
            except (UserError, RunFailed) as error:
                log.error(
                    "%s", str(error)
                )  # not the exception itself, whose traceback would keep the run in memory
                raise
        if self.is_stopped:
            write_end(run, dataclasses.replace(summary, exit_reason=STOPPED))
        *before, last = rounds_of(run, shared.figures) or [{"step": 0}]
        for figures in before:
            self._report(figures)
        return {**last, "exit_reason": summary.exit_reason, "done": True}

    def _note_news(self, line: dict[str, Any]) -> None:
        self.has_news = self.has_news or any(name in line for name in self.shared.figures)

    def _should_stop(self, run: Storage) -> bool:
        """Report new rounds and return whether the scheduler stops the run."""
        if self.has_news and not self.is_stopped:
            self.has_news = False
            for figures in rounds_of(run, self.shared.figures):
                self._report(figures)
        return self.is_stopped

    def _report(self, figures: dict[str, Any]) -> None:
        if self.is_stopped or figures["step"] <= self.last_step:
            return
        self.last_step = figures["step"]
        self.rounds.put(figures)
        self.is_stopped = self.answers.get()


def _failed(error: str, kind: str) -> dict[str, Any]:
    return {"error": error, "kind": kind, "exit_reason": "failed", "done": True}


def _is_out_of_memory(error: Exception) -> bool:
    # torch's allocator for host memory raises a plain RuntimeError.
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


def rounds_of(run: Storage, figures: Sequence[str]) -> list[dict[str, Any]]:
    """Return the validation rounds in a run's metrics, ``step`` and figures, in the order of their steps."""
    rounds: dict[int, dict[str, Any]] = {}
    for line in read_metrics(run):
        if found := {name: line[name] for name in figures if line.get(name) is not None}:
            rounds.setdefault(line["step"], {"step": line["step"]}).update(found)
    return [rounds[step] for step in sorted(rounds)]


def write_end(run: Storage, summary: Summary) -> None:
    """Rewrite the summary and report of a run with an exit reason that only the search knows."""
    from dreamfleet.trainers.artifacts.usage import describe
    from dreamfleet.trainers.report.report import write_report

    run.write_text("summary.json", json_text(dataclasses.asdict(summary), indent=1))
    write_report(run, describe=describe)
