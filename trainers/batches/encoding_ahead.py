"""Gives the coming images of a training, in full batches, to the actors that encode them."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator

from dreamfleet.datasets.serve.cache import Job
from dreamfleet.datasets.serve.encoding_actors import EncodingActors, Latents
from dreamfleet.datasets.serve.latent_files import Key
from dreamfleet.trainers.batches.vae_encoding import encode_batch

MOST_TRIES = 2  # of an image by actors; the training worker encodes it then
WAIT_SECONDS = 60.0  # for an image that an actor has; the training worker encodes it then


class EncodingAhead:
    """The images that actors are to encode, in the order in which the training needs them.

    Images of equal size fill up a batch of the encoder. Once ``enough`` coming images in a row were found to be encoded
    already, the actors end, so that others can use their resources.
    """

    def __init__(self, actors: EncodingActors, *, enough: int) -> None:
        self.actors, self._enough = actors, enough
        self._coming: deque[Job] = deque()
        self._failures: Counter[Key] = Counter()
        self._encoded_in_a_row = 0

    def __contains__(self, key: Key) -> bool:
        return key in self.actors

    @property
    def is_needed(self) -> bool:
        """Whether images that were not encoded have been coming lately."""
        return self._encoded_in_a_row < self._enough

    def add(self, job: Job) -> None:
        """Add an image that the training will need after those that were added before."""
        self._coming.append(job)

    def forget(self) -> None:
        """Forget the coming images; those that actors have remain theirs."""
        self._coming.clear()

    def give(self, is_encoded: Callable[[Job], bool], *, is_all: bool) -> None:
        """Give the actors as much as they take, in full batches unless one of them is idle or no image will be added.

        ``is_all``: no image will be added.
        """
        while self.actors.has_room():
            batch = self._next_batch(is_encoded, partly=is_all or self.actors.is_idle)
            if not batch:
                return
            self.actors.give(batch)

    def results(self) -> Iterator[tuple[Job, Latents]]:
        """Yield the images that were encoded since the last call; those that failed are given once more."""
        again: list[Job] = []
        for given in self.actors.finished():
            for job, latents in zip(given.jobs, given.latents, strict=True):
                if latents is not None:
                    yield job, latents
                    continue
                self._failures[job.key] += 1
                again.append(job)
        self._coming.extendleft(reversed(again))

    def _next_batch(self, is_encoded: Callable[[Job], bool], *, partly: bool) -> list[Job]:
        """Take the first full batch from the coming images; with ``partly``, one of the first image's size at least."""
        groups: dict[tuple[int, int], dict[Key, Job]] = {}
        kept: deque[Job] = deque()
        chosen: dict[Key, Job] = {}
        while self._coming and not chosen:
            job = self._coming.popleft()
            if is_encoded(job):
                self._encoded_in_a_row += 1
                continue
            self._encoded_in_a_row = 0
            if job.key in self.actors or self._failures[job.key] >= MOST_TRIES:
                continue
            kept.append(job)
            group = groups.setdefault(job.size, {})
            group.setdefault(job.key, job)
            if len(group) == encode_batch(job.width * job.height):
                chosen = group
        if partly and not chosen and kept:
            chosen = groups[kept[0].size]
        kept = deque(job for job in kept if job.key not in chosen)
        kept.extend(self._coming)
        self._coming = kept
        return list(chosen.values())
