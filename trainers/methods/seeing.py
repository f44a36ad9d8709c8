"""Methods that see decoded pictures, where others are given latents and prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from PIL import Image

from dreamfleet.datasets.decode import Fit
from dreamfleet.datasets.fitting import as_it_is
from dreamfleet.datasets.index import Index
from dreamfleet.trainers.methods.base import Batch, Method, Sample


class Use(NamedTuple):
    """One use of a decoded picture, in which pass over the set (from 0); ``key``, of its chances, None: as it is."""

    sample: Sample
    epoch: int
    picture: Image.Image
    mirrored: bool = False
    key: tuple[int | str, ...] | None = None
    instead: bool = False  # another picture, as its own cannot be decoded


class SeeingMethod(Method):
    """A method that makes its batches from decoded pictures; it may set some of them apart to measure with."""

    @property
    def fit(self) -> Fit:
        """What may be done to a picture before :meth:`see`, anywhere on the cluster; usually nothing."""
        return as_it_is

    def see(self, uses: Sequence[Use]) -> Batch:
        """Turn pictures into a batch on the CPU."""
        raise NotImplementedError

    def choose(self, instances: Index) -> tuple[Index, Index | None]:
        """Split the pictures into those to train on and those to measure with; usually all, and None."""
        return instances, None

    def examine(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Measure the pictures that were set apart: figures by name, ``holdout_loss`` among them."""
        raise NotImplementedError
