"""The base class of methods that train on decoded images instead of latents and prompts."""

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
    """One use of a decoded image in pass ``epoch`` over the set; ``key`` seeds augmentation, None: no augmentation."""

    sample: Sample
    epoch: int
    image: Image.Image
    mirrored: bool = False
    key: tuple[int | str, ...] | None = None
    instead: bool = False  # whether ``image`` replaces one that cannot be decoded


class ImageMethod(Method):
    """A method that trains on batches of decoded images, and may hold out some images for evaluation."""

    @property
    def fit(self) -> Fit:
        """The function that the decoder may apply to an image before :meth:`collate`, such as shrinking it.

        By default it returns the image unchanged.
        """
        return unchanged

    @abstractmethod
    def collate(self, uses: Sequence[Use]) -> Batch:
        """Return a batch of these images, on the CPU."""

    def split(self, instances: Index) -> tuple[Index, Index | None]:
        """Return the images to train on and those to evaluate on; by default all images, and None."""
        return instances, None

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Evaluate held-out images; return values ``[N]`` by name."""
        raise NotImplementedError

    def summarise(self, measured: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the figures to log, ``holdout_loss`` among them.

        ``measured``: the values ``[N]`` of :meth:`evaluate` for all held-out images, in order, on the CPU.
        """
        raise NotImplementedError
