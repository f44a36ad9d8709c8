"""Methods that train on decoded images instead of latents and prompts."""

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
    instead: bool = False  # a replacement, as the image itself cannot be decoded


class ImageMethod(Method):
    """A method that makes batches of decoded images; it may hold out some of them to evaluate on."""

    @property
    def fit(self) -> Fit:
        """What the decoder may do to an image, such as shrinking it, before :meth:`collate`; nothing by default."""
        return unchanged

    @abstractmethod
    def collate(self, uses: Sequence[Use]) -> Batch:
        """Make a batch of images, on the CPU."""

    def split(self, instances: Index) -> tuple[Index, Index | None]:
        """Split the images into those to train on and those to evaluate on; by default all, and None."""
        return instances, None

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Evaluate held-out images; return values ``[N]`` by name."""
        raise NotImplementedError

    def summarise(self, measured: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the figures to log from the values of all held-out images, in order and on the CPU.

        ``holdout_loss`` is among them.
        """
        raise NotImplementedError
