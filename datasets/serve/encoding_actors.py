"""Encodes images in actors on a Ray cluster, while the training that needs them runs elsewhere."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.environment import apply_variables, variables_to_send
from dreamfleet.datasets.errors import DataError, StorageError, UserError
from dreamfleet.datasets.serve.cache import Encode, Job, cut_job
from dreamfleet.datasets.serve.latent_files import Key

log = logging.getLogger(__name__)

QUEUED = 4  # batches that each actor has, so that it need not wait for the next one
MOST_DEATHS = 3  # of an actor's process without a finished batch in between; it is given up then
POLL_SECONDS = 0.2
TOLD_SECONDS = 60.0  # until a message says that an actor waits for its resources

Latents = dict[str, np.ndarray]


class EncodingActor:
    """The process that encodes: loads the model at its first call, and keeps it."""

    def __init__(self, make_encode: Callable[[], Encode], data: DataConfig, sent: Mapping[str, str]) -> None:
        apply_variables(sent)
        self.make_encode, self.data = make_encode, data
        self._encode: Encode | None = None

    def load(self) -> str:
        """Load the model; return "", or the message of an error that the user can fix."""
        try:
            self._encode = self._encode or self.make_encode()
        except UserError as error:
            return str(error)
        return ""

    def encode(self, jobs: Sequence[Job]) -> list[Latents | None]:
        """Return the latents of each image; None for one that cannot be read or decoded."""
        assert self._encode is not None
        cuts: dict[int, np.ndarray] = {}
        for number, job in enumerate(jobs):
            try:
                cuts[number] = cut_job(job, self.data)
            except (DataError, StorageError):  # the training worker reads it again, and reports it
                continue
        found = dict(zip(cuts, self._encode(list(cuts.values())), strict=True))
        return [found.get(number) for number in range(len(jobs))]


class Given(NamedTuple):
    """Images that an actor was given; ``latents`` are None for those that it could not encode."""

    jobs: Sequence[Job]
    latents: Sequence[Latents | None]


class _Place:
    """One actor and what it was given; ``ready`` is the reference of its loading, None once it is complete."""

    def __init__(self, actor: Any) -> None:
        self.actor, self.ready = actor, actor.load.remote()
        self.given: deque[tuple[Any, Sequence[Job]]] = deque()
        self.deaths = 0


class EncodingActors:
    """A pool of actors with ``resources`` each, which encode batches of images.

    ``make_encode`` loads the encoder in each actor; it must be picklable. An actor that is not placed or not loaded yet
    gets no images, so nobody waits for resources that are not free. If an actor dies, another is started in its place,
    and the images that it had come back as not encoded. Not for several threads, except :meth:`stop`. Ray must be
    running.
    """

    def __init__(
        self,
        make_encode: Callable[[], Encode],
        *,
        data: DataConfig,
        count: int,
        resources: Mapping[str, float],
        environment: Mapping[str, str],
        actor: type[Any] = EncodingActor,
    ) -> None:
        self._resources, self._environment, self._class = resources, environment, actor
        self._arguments = (make_encode, data, variables_to_send(buckets=True))
        self._stopped = threading.Event()
        self._began, self._told = time.monotonic(), False
        self._places = [_Place(self._start()) for _ in range(count)]
        self._keys: dict[Key, Any] = {}  # image -> reference of the result that will have it

    def __contains__(self, key: Key) -> bool:
        return key in self._keys

    @property
    def is_idle(self) -> bool:
        """Whether some actor is loaded and has nothing to do."""
        return any(place.ready is None and not place.given for place in self._places)

    def has_room(self) -> bool:
        """Return whether some actor is loaded and can take another batch."""
        for place in list(self._places):
            if place.ready is not None:
                self._look_at(place)
        self._tell_if_waiting()
        return any(place.ready is None and len(place.given) < QUEUED for place in self._places)

    def give(self, jobs: Sequence[Job]) -> None:
        """Give images of one size to the actor that has the fewest; :meth:`has_room` must have been true."""
        place = min((one for one in self._places if one.ready is None), key=lambda one: len(one.given))
        reference = place.actor.encode.remote(list(jobs))
        place.given.append((reference, jobs))
        self._keys |= dict.fromkeys((job.key for job in jobs), reference)

    def finished(self) -> Iterator[Given]:
        """Yield what was encoded since the last call, and what cannot be."""
        import ray

        for place in list(self._places):
            while place.given and ray.wait([place.given[0][0]], timeout=0)[0]:
                yield from self._take(place)

    def wait_for(self, key: Key, *, seconds: float) -> None:
        """Wait until the result with an image is there, for so many seconds, or until :meth:`stop` is called."""
        import ray

        end = time.monotonic() + seconds
        while not self._stopped.is_set() and time.monotonic() < end:
            if ray.wait([self._keys[key]], timeout=POLL_SECONDS)[0]:
                return

    def stop(self) -> None:
        """End all waiting, also of another thread."""
        self._stopped.set()

    def close(self) -> None:
        """End the actors; what they have not finished is dropped."""
        import ray

        self.stop()
        for place in self._places:
            ray.kill(place.actor)
        self._places, self._keys = [], {}

    def _start(self) -> Any:
        import ray

        others = {name: amount for name, amount in self._resources.items() if name not in ("CPU", "GPU")}
        options: dict[str, Any] = {
            "num_cpus": self._resources.get("CPU", 0),
            "num_gpus": self._resources.get("GPU", 0),
            "resources": others,
            "scheduling_strategy": "DEFAULT",  # else it would take a place of the workers' placement group
            "runtime_env": {"env_vars": dict(self._environment)},
        }
        return ray.remote(self._class).options(**options).remote(*self._arguments)

    def _look_at(self, place: _Place) -> None:
        """Note that an actor has loaded its model, or replace it if it died meanwhile."""
        import ray
        import ray.exceptions

        if not ray.wait([place.ready], timeout=0)[0]:
            return
        try:
            failure = ray.get(place.ready)
        except ray.exceptions.RayError as error:
            self._end(place, error)
        else:
            place.ready = None
            if failure:
                self._give_up(place, failure)

    def _take(self, place: _Place) -> Iterator[Given]:
        """Yield the oldest result of an actor; if it failed, all that it had, as not encoded."""
        import ray
        import ray.exceptions

        try:
            latents = ray.get(place.given[0][0])
        except ray.exceptions.RayError as error:
            lost = [self._drop(place) for _ in range(len(place.given))]
            self._end(place, error)
            yield from lost
        else:
            place.deaths = 0
            # Copied, since arrays of Ray keep its object store from freeing them.
            yield self._drop(place)._replace(
                latents=[one and {name: np.array(values) for name, values in one.items()} for one in latents]
            )

    def _drop(self, place: _Place) -> Given:
        _, jobs = place.given.popleft()
        for job in jobs:
            self._keys.pop(job.key, None)
        return Given(jobs, [None] * len(jobs))

    def _end(self, place: _Place, error: Exception) -> None:
        """Replace an actor that died; give up one that dies again and again, or whose encoder failed."""
        import ray
        import ray.exceptions

        place.deaths += 1
        # An encoder may fail for lack of memory: another process would too.
        if not isinstance(error, ray.exceptions.RayActorError) or place.deaths == MOST_DEATHS:
            self._give_up(place, _reason(error))
            return
        log.warning("an encoding process died and is started again: %s", _reason(error))
        ray.kill(place.actor)  # it may only be unreachable, and would keep its resources
        place.actor = self._start()
        place.ready = place.actor.load.remote()

    def _give_up(self, place: _Place, reason: str) -> None:
        import ray

        log.warning("an encoding process failed, and the training worker encodes in its place: %s", reason)
        ray.kill(place.actor)
        self._places.remove(place)

    def _tell_if_waiting(self) -> None:
        waits = all(place.ready is not None for place in self._places)
        if self._places and waits and not self._told and time.monotonic() - self._began > TOLD_SECONDS:
            self._told = True
            log.warning(
                "data.cache_resources: no encoding process has started in %.0f s; the training worker encodes until "
                "the cluster has %s free",
                TOLD_SECONDS,
                ", ".join(f"{name}: {amount:g}" for name, amount in self._resources.items()),
            )


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
