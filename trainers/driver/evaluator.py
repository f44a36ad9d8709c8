"""The process on a Ray cluster that computes a run's validation rounds while the workers train."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions

from dreamfleet.datasets.environment import apply_variables
from dreamfleet.datasets.errors import UserError
from dreamfleet.trainers.config.scaling import MAX_THREADS, describe
from dreamfleet.trainers.recipe import Recipe
from dreamfleet.trainers.run.rounds import RoundResult

log = logging.getLogger(__name__)
MOST_TRIES = 3  # of one round, if its process dies
TOLD_SECONDS = 60.0  # between two messages while the training waits for a round


class RoundActor:
    """The actor: builds the run's model at its first round, and keeps it."""

    def __init__(self, recipe: Mapping[str, Any], sent: Mapping[str, str], *, threads: int, begins: bool):
        apply_variables(sent)
        self.recipe, self.threads, self.begins = recipe, threads, begins
        self.worker: Callable[[int], RoundResult] | None = None

    def compute(self, step: int) -> RoundResult:
        """Return the round of ``step``; a UserError becomes its ``error``, as another try would raise it again."""
        import torch

        from dreamfleet.trainers.distributed.device import DRAWING, on_device
        from dreamfleet.trainers.recipe import build_recipe
        from dreamfleet.trainers.run.round_worker import RoundWorker

        torch.set_num_threads(self.threads)
        device = "cuda" if ray.get_gpu_ids() else "cpu"
        try:
            with on_device(device, remedies=DRAWING):
                if self.worker is None:
                    self.worker = RoundWorker(build_recipe(self.recipe), device=device, begins=self.begins)
                return self.worker(step)
        except UserError as error:
            return RoundResult(step, error=str(error))


@dataclass
class _Started:
    """A round that was started; ``tries`` counts the processes that it was given to; ``answer`` is None before."""

    step: int
    answer: Any = None
    tries: int = 1


class RayEvaluator:
    """Computes rounds one after the other in an actor with ``validation.resources``, outside of the workers' place.

    ``environment`` returns the variables of a process with so many threads; ``sent``: those that Ray must not show.
    If the actor or its node dies, another is started and computes the unfinished round again. A round that fails three
    times is returned with its error. The actor gets one round at a time: if it died in a later one, Ray could lose the
    result of an earlier one, and the failure would be counted for that.
    """

    def __init__(
        self,
        recipe: Recipe,
        sent: Mapping[str, str],
        *,
        environment: Callable[[int], dict[str, str]],
        begins: bool,
        actor: type[Any] = RoundActor,
    ):
        assert recipe.validation.resources is not None
        self.resources = recipe.validation.resources
        self._started: deque[_Started] = deque()
        self._class, self._arguments = actor, (recipe.model_dump(mode="json"), dict(sent))
        self._threads = min(MAX_THREADS, max(1, int(self.resources.get("CPU", 1))))
        self._begins, self._environment = begins, environment
        self._actor = self._start_actor()

    @property
    def waiting(self) -> int:
        """The number of rounds that were started and not returned."""
        return len(self._started)

    def start(self, step: int) -> None:
        """Compute the round of ``step`` after those that were started before."""
        self._started.append(_Started(step))
        self._submit()

    def finished(self, *, wait: bool = False) -> list[RoundResult]:
        """Return the results that were not returned before, in order; ``wait`` for the oldest one if there is none."""
        found: list[RoundResult] = []
        while self._started and self._is_ready(wait=wait and not found):
            if (result := self._take()) is not None:
                found.append(result)
        return found

    def close(self) -> None:
        """End the actor."""
        ray.kill(self._actor)

    def _submit(self) -> None:
        """Give the oldest round to the actor, unless it has it."""
        if self._started and (oldest := self._started[0]).answer is None:
            oldest.answer = self._actor.compute.remote(oldest.step)

    def _is_ready(self, *, wait: bool) -> bool:
        oldest = self._started[0]
        while not ray.wait([oldest.answer], timeout=TOLD_SECONDS if wait else 0)[0]:
            if not wait:
                return False
            log.info(
                "waiting for the validation round of step %d, which is computed with %s or waits for them",
                oldest.step,
                describe(self.resources),
            )
        return True

    def _take(self) -> RoundResult | None:
        """Return the oldest round, or None if its process died and it is computed again."""
        oldest = self._started[0]
        try:
            result: RoundResult | None = ray.get(oldest.answer)
        except ray.exceptions.RayError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            result = None
            if oldest.tries == MOST_TRIES:
                self._started.popleft()
                result = RoundResult(oldest.step, error=f"{reason} (tried {MOST_TRIES} times)")
            oldest.tries, oldest.answer = oldest.tries + 1, None
            self._restart(oldest.step, reason)
            return result
        self._started.popleft()
        self._submit()
        return result

    def _restart(self, step: int, reason: str) -> None:
        log.warning(
            "the process of the validation round of step %d failed and is started again: %s", step, reason
        )
        ray.kill(self._actor)
        self._actor = self._start_actor()
        self._submit()

    def _start_actor(self) -> Any:
        others = {name: amount for name, amount in self.resources.items() if name not in ("CPU", "GPU")}
        options = {
            "num_cpus": self.resources.get("CPU", 0),
            "num_gpus": self.resources.get("GPU", 0),
            "resources": others,
            "scheduling_strategy": "DEFAULT",  # else it would take a place of the workers' placement group
            "runtime_env": {"env_vars": self._environment(self._threads)},
        }
        actor = ray.remote(self._class).options(**options)
        return actor.remote(*self._arguments, threads=self._threads, begins=self._begins)
