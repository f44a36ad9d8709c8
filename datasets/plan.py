"""The batch plan: determines the images of step k from (ids, seed, global batch) alone.

A run uses an infinite sequence of draws (uses of images). Each epoch is a permutation of all images, with their
repeats, keyed by (seed, epoch). With global batch size G, step k uses positions ``[k*G, (k+1)*G)``, which are divided
into equal units. Nothing depends on the number of workers: they divide the units among them, and the position in the
data is a single number, the step.

With aspect-ratio buckets, every bucket has its own sequence, and a step uses one bucket, so that all images of a global
batch have the same size. In epochs 0 to e-1 a bucket with n draws per epoch gets ``ceil(e*n/G)`` steps, in an order
shuffled within each epoch. No draw is dropped or repeated to fill a batch: a batch at the end of an epoch is completed
with draws of the bucket's next epoch, which is shorter by as many. After e epochs every image has been used at least e
times, and no bucket is ahead by a whole batch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.rng import numpy_rng
from dreamfleet.datasets.shard_order import shard_order


class Draw(NamedTuple):
    """One use of an image: its row in the index, and the number of earlier uses of this image."""

    row: int
    epoch: int


class BatchPlan:
    """Returns the draws of each step: of instance images and, with prior preservation, of class images.

    ``concepts[i]`` is the concept of instance row i, ``repeats[i]`` its number of uses per epoch and ``buckets[i]`` its
    bucket (default: one bucket for all). Repeats may have a fraction: of n rows with the fraction f, the same concept
    and the same bucket, about f * n get one more use in an epoch, all of them equally often in the course of epochs.
    ``class_concepts[j]`` is the concept of class row j; it is empty without prior preservation. With
    ``shards``, the shard number of each instance row, an epoch is shuffled by shard_order within ``shuffle_window``
    draws, otherwise as a whole.
    """

    def __init__(
        self,
        concepts: Sequence[int] | np.ndarray,
        *,
        seed: int,
        global_batch: int,
        repeats: Sequence[float] | np.ndarray | None = None,
        buckets: Sequence[int] | None = None,
        class_concepts: Sequence[int] | np.ndarray = (),
        shards: Sequence[int] | np.ndarray | None = None,
        shuffle_window: int = 0,
    ):
        if not len(concepts):
            raise DataError("there are no training images; check data.instance_data_dir")
        if global_batch < 1:
            raise ValueError(f"global batch must be at least 1, got {global_batch}")
        self.seed, self.global_batch = seed, global_batch
        self._shards = None if shards is None else np.asarray(shards, np.int64)
        self._window = shuffle_window
        wanted = np.ones(len(concepts)) if repeats is None else np.asarray(repeats, float)
        counts = np.floor(wanted).astype(np.int64)
        self._concepts = np.asarray(concepts, np.int64)
        homes = np.zeros(len(concepts), np.int64) if buckets is None else np.asarray(buckets, np.int64)
        self._turned = _Turns(wanted - counts, self._concepts, homes)
        rows = np.repeat(np.arange(len(concepts)), counts)
        # Each repeat within an epoch gets its own noise, so draws are numbered by uses instead of epochs.
        uses = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        self._rows = np.concatenate([rows, self._turned.rows])
        self._uses = np.concatenate([uses, np.full(len(self._turned.rows), -1)])
        self._repeats = counts
        self._slots = [np.flatnonzero(homes[self._rows] == bucket) for bucket in np.unique(homes)]
        self._classes = {
            int(c): np.flatnonzero(np.asarray(class_concepts) == c) for c in np.unique(self._concepts)
        }
        self.has_classes = len(class_concepts) > 0
        missing = [c for c, rows in self._classes.items() if not len(rows)]
        if self.has_classes and missing:
            raise DataError(
                f"concept {missing[0]} has no class images; prior preservation needs at least one per concept"
            )
        assert not (self.has_classes and len(self._slots) > 1), "class partners would have other sizes"
        self._order = lru_cache(maxsize=4 * len(self._slots))(self._epoch_order)
        self._turns = lru_cache(maxsize=4)(self._epoch_turns)
        self._class_order = lru_cache(maxsize=16)(self._epoch_class_order)
        self._class_places = lru_cache(maxsize=4)(self._epoch_class_places)
        self._shares = np.bincount(self._concepts[self._rows])  # number of draws of each concept per epoch

    @property
    def epoch_length(self) -> int:
        """The number of draws in an epoch: the sum of the repeats of all images."""
        return len(self._rows)

    @property
    def smallest_bucket(self) -> int:
        """The number of draws per epoch in the smallest bucket."""
        return min(len(slots) for slots in self._slots)

    def steps_in(self, epochs: float) -> int:
        """Return the number of optimizer steps in ``epochs`` passes over the images, rounded up for each bucket."""
        exact = Fraction(epochs).limit_denominator(10**6)
        return sum(self._turns_before(bucket, exact) for bucket in range(len(self._slots)))

    def draws(self, step: int, *, unit: int = 0, num_units: int = 1) -> list[Draw]:
        """Return the instance draws of one of ``num_units`` units of ``step`` (default: those of the whole step)."""
        bucket, turn = self._turn(step)
        return [self._draw(bucket, position) for position in self._positions(turn, unit, num_units)]

    def class_draws(self, step: int, *, unit: int = 0, num_units: int = 1) -> list[Draw]:
        """Return a class draw of the same concept for each instance draw that :meth:`draws` returns."""
        if not self.has_classes:
            return []
        return [self._class_draw(position) for position in self._positions(step, unit, num_units)]

    def _positions(self, turn: int, unit: int, num_units: int) -> range:
        size, rest = divmod(self.global_batch, num_units)
        if rest:
            raise ValueError(f"global batch {self.global_batch} cannot be divided into {num_units} units")
        start = turn * self.global_batch + unit * size
        return range(start, start + size)

    def _turns_before(self, bucket: int, epochs: int | Fraction) -> int:
        return -(-epochs * len(self._slots[bucket]) // self.global_batch)  # rounded up

    def _turn(self, step: int) -> tuple[int, int]:
        """Return the bucket of a step, and the number of earlier steps that used this bucket."""
        if len(self._slots) == 1:
            return 0, step
        # Rounding up delays the start of an epoch by up to one step per bucket.
        first = max(0, (step - len(self._slots)) * self.global_batch // self.epoch_length)
        last = step * self.global_batch // self.epoch_length
        epoch = first + bisect_right(range(first, last + 1), step, key=self.steps_in) - 1
        return self._turns(epoch)[step - self.steps_in(epoch)]

    def _epoch_turns(self, epoch: int) -> list[tuple[int, int]]:
        every = range(len(self._slots))
        coming = [self._turns_before(bucket, epoch) for bucket in every]
        counts = [self._turns_before(bucket, epoch + 1) - coming[bucket] for bucket in every]
        turns = []
        for bucket in numpy_rng("buckets", self.seed, epoch).permutation(np.repeat(every, counts)).tolist():
            turns.append((bucket, coming[bucket]))
            coming[bucket] += 1
        return turns

    def _epoch_order(self, bucket: int, epoch: int) -> np.ndarray:
        apart = (bucket,) if len(self._slots) > 1 else ()
        slots, rng = self._slots[bucket], numpy_rng("order", self.seed, epoch, *apart)
        if self._shards is None:
            return rng.permutation(slots)
        return slots[shard_order(self._shards[self._rows[slots]], window=self._window, rng=rng)]

    def _epoch_class_order(self, concept: int, epoch: int) -> np.ndarray:
        return numpy_rng("class order", self.seed, concept, epoch).permutation(self._classes[concept])

    def _epoch_class_places(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the concept of each draw of an epoch, and the number of its earlier draws of the same concept."""
        concepts = self._concepts[self._rows[self._order(0, epoch)]]
        grouped = np.argsort(concepts, kind="stable")
        before = np.empty_like(concepts)
        before[grouped] = np.arange(len(concepts)) - np.searchsorted(concepts[grouped], concepts[grouped])
        return concepts, before

    def _draw(self, bucket: int, position: int) -> Draw:
        epoch, offset = divmod(position, len(self._slots[bucket]))
        slot = self._order(bucket, epoch)[offset]
        row, use = int(self._rows[slot]), int(self._uses[slot])
        if use < 0:
            row, more = self._turned.turn(int(slot) - len(self._rows), epoch)
            return Draw(row, (epoch + 1) * int(self._repeats[row]) + more)
        return Draw(row, epoch * int(self._repeats[row]) + use + self._turned.before(row, epoch))

    def _class_draw(self, position: int) -> Draw:
        # The class draw is the concept's n-th class image, where n is the number of earlier draws of the concept.
        epoch, offset = divmod(position, self.epoch_length)
        concepts, before = self._class_places(epoch)
        concept = int(concepts[offset])
        earlier = epoch * int(self._shares[concept]) + int(before[offset])
        class_epoch, class_offset = divmod(earlier, len(self._classes[concept]))
        return Draw(int(self._class_order(concept, class_epoch)[class_offset]), class_epoch)


class _Turns:
    """The uses beyond whole repeats: rows of a group (concept, bucket and fraction) take turns in a fixed order.

    ``rows`` has one entry for each such use in an epoch: a row of its group, from which concept and bucket follow.
    """

    def __init__(self, fractions: np.ndarray, concepts: np.ndarray, homes: np.ndarray):
        self._groups: list[tuple[np.ndarray, int]] = []  # rows of a group, its uses per epoch
        self._group_of = np.full(len(fractions), -1)  # of each row; -1 without a fraction
        self._place_of = np.zeros(len(fractions), np.int64)  # in its group
        some = np.flatnonzero(fractions > 1e-9)
        keys = np.stack([concepts[some], homes[some], np.round(fractions[some] * 1e9)], axis=1)
        _, inverse = np.unique(keys, axis=0, return_inverse=True)
        for group in range(int(inverse.max()) + 1 if len(some) else 0):
            rows = some[inverse.reshape(-1) == group]
            uses = round(float(fractions[rows[0]]) * len(rows))
            if uses:
                self._group_of[rows], self._place_of[rows] = len(self._groups), np.arange(len(rows))
                self._groups.append((rows, uses))
        counts = np.asarray([uses for _, uses in self._groups], np.int64)
        self._owners = np.repeat(np.arange(len(counts)), counts)
        self._numbers = np.arange(len(self._owners)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.rows = np.repeat(np.asarray([rows[0] for rows, _ in self._groups], np.int64), counts)

    def turn(self, slot: int, epoch: int) -> tuple[int, int]:
        """Return the row of a use in an epoch, and how many such uses the row had before; ``slot`` is negative."""
        rows, uses = self._groups[self._owners[slot]]
        earlier, place = divmod(epoch * uses + int(self._numbers[slot]), len(rows))
        return int(rows[place]), earlier

    def before(self, row: int, epoch: int) -> int:
        """Return the number of such uses of a row before an epoch."""
        if (group := self._group_of[row]) < 0:
            return 0
        rows, uses = self._groups[group]
        return (epoch * uses - int(self._place_of[row]) + len(rows) - 1) // len(rows)
