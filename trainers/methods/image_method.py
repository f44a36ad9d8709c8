"""Methods that see decoded pictures, where others are given latents and prompts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from dreamfleet.datasets.images.vision_transform import Fit, unchanged
from dreamfleet.datasets.index.index import Index
from dreamfleet.trainers.methods.base import Batch, Method, Sample


class Use(NamedTuple):
    """One use of a decoded picture, in which pass over the set (from 0); ``key``, of its chances, None: as it is."""

    sample: Sample
    epoch: int
    image: Image.Image
    mirrored: bool = False
    key: tuple[int | str, ...] | None = None
    instead: bool = False  # another picture, as its own cannot be decoded


class ImageMethod(Method):
    """A method that makes its batches from decoded pictures; it may set some of them apart to measure with."""

    @property
    def fit(self) -> Fit:
        """What the decoder may do to an image, such as shrinking it, before :meth:`collate`; nothing by default."""
        return unchanged

    @abstractmethod
    def collate(self, uses: Sequence[Use]) -> Batch:
        """Make a batch of images, on the CPU."""

    def split(self, instances: Index) -> tuple[Index, Index | None]:
        """Split the pictures into those to train on and those to measure with; usually all, and None."""
        return instances, None

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Measure images that were set apart: values ``[N]`` by name."""
        raise NotImplementedError

    def summarise(self, measured: Mapping[str, Tensor]) -> dict[str, float]:
        """Turn the values of all images that were set apart, in order and on the CPU, into the figures to log.

        ``holdout_loss`` is among them.
        """
        raise NotImplementedError
