"""DreamArtist's discriminator: trains a ConvNeXt to classify images by quality, for use in prompt tuning.

Source: DreamArtist's `convnext_discriminator.py`; it is trained as by ConvNeXt's authors (arXiv 2201.03545).

Shape suffixes: N images, K classes.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.index.index import Index
from dreamfleet.datasets.index.labels import find_labels, hold_out
from dreamfleet.datasets.rng import numpy_rng
from dreamfleet.trainers.config.methods.discriminator import DiscriminatorConfig
from dreamfleet.trainers.methods.base import Base, Batch, Loss, Setting
from dreamfleet.trainers.methods.export_request import Export
from dreamfleet.trainers.methods.image_method import ImageMethod, Use
from dreamfleet.trainers.models.family import DiffusionModel
from dreamfleet.trainers.models.formats.convnext import write_convnext
from dreamfleet.trainers.models.vision.discriminator import (
    adapt_network,
    load_discriminator,
    make_network,
    make_preprocessing,
    save_network,
)
from dreamfleet.trainers.optim.param_group import ParamGroup

log = logging.getLogger(__name__)


class DiscriminatorTraining(ImageMethod):
    """Train an image classifier on labelled images; prompt tuning can use it as a loss.

    The label of an image is stored as its caption (the name of its class), so the hash of the data covers it.
    """

    needs = ()
    formats = ("transformers",)

    def __init__(self, config: DiscriminatorConfig, model: DiffusionModel, setting: Setting):
        super().__init__(config, model, setting)
        self._start = ""
        if config.convnext is None:
            self.network = make_network(
                depths=config.depths,
                hidden_sizes=config.hidden_sizes,
                classes=config.classes,
                drop_path=config.drop_path,
            )
        else:
            found = load_discriminator(config.convnext)
            self._start = _hash(found.network)
            self.network = adapt_network(found.network, classes=config.classes, drop_path=config.drop_path)
        self.network.train()
        self._preprocessing = make_preprocessing(config.input_size)
        self._numbers = {name: number for number, name in enumerate(config.classes)}
        self._weights = [torch.ones(len(config.classes))]  # outside the module tree

    @property
    def base(self) -> Base:
        return Base(
            self.config.convnext or "random weights",
            self._start,
            f"ConvNeXt, {sum(p.numel() for p in self.network.parameters()):,} parameters, {self.config.input_size} px",
        )

    def split(self, instances: Index) -> tuple[Index, Index | None]:
        """Split the labelled images into those to train on and those to test on; others are left out.

        Raises DataError for a label without a class name, or if the images to train on have fewer than two
        classes.
        """
        folders = [concept.instance_data_dir for concept in self.setting.concepts]
        kept = find_labels(instances, folders, self.config.labels)
        if self.config.test_labels:
            tested = find_labels(instances, folders, self.config.test_labels)
        else:
            tested = hold_out(instances, kept, self.config.holdout_per_class)
        kept = {row: label for row, label in kept.items() if row not in tested}
        for label in {*kept.values(), *tested.values()}:
            if label >= len(self.config.classes):
                raise DataError(
                    f"labels: there are images of class {label}, but method.classes has names for 0 to "
                    f"{len(self.config.classes) - 1} only ({', '.join(self.config.classes)}); add its name"
                )
        counts = Counter(kept.values())
        if len(counts) < 2:
            raise DataError(
                f"labels: {len(kept)} images to train on, of {len(counts)} classes; at least two classes are needed. "
                "Label some with `dreamfleet data label FOLDER`, or name the file with method.labels"
            )
        if unlabelled := len(instances) - len(kept) - len(tested):
            log.info("left out, as they have no label: %d of %d images", unlabelled, len(instances))
        if self.config.balance_classes:
            shares = torch.tensor([counts.get(number, 0) for number in range(len(self.config.classes))])
            self._weights = [len(kept) / (len(counts) * shares.clamp(min=1).float())]
        return self._named(instances, kept), self._named(instances, tested) if tested else None

    def collate(self, uses: Sequence[Use]) -> Batch:
        """Return ``pixels [N, 3, S, S]``, normalised, and ``labels [N]``."""
        return {
            "pixels": self._preprocessing([self._vary(use) for use in uses]),
            "labels": torch.tensor([self._numbers[str(use.sample.caption)] for use in uses]),
        }

    def groups(self) -> list[ParamGroup]:
        return [ParamGroup("discriminator", dict(self.network.named_parameters()))]

    def forward(self, batch: Batch) -> Loss:
        """Return the mean cross entropy, weighted by class with ``method.balance_classes``."""
        logits_NK, labels_N = self._ask(batch), batch["labels"]
        smoothing = self.config.label_smoothing
        per_sample = F.cross_entropy(logits_NK, labels_N, label_smoothing=smoothing, reduction="none")
        self._weights[0] = self._weights[0].to(labels_N.device)  # once, as each copy would block the host
        per_sample = per_sample * self._weights[0][labels_N]
        right = (logits_NK.detach().argmax(dim=1) == labels_N).float().mean()
        return Loss(per_sample.mean(), per_sample.detach(), {"train_accuracy": right})

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss``, ``right`` (1 if classified correctly, else 0) and ``label``, each ``[N]``."""
        logits_NK, labels_N = self._ask(batch), batch["labels"]
        return {
            "loss": F.cross_entropy(logits_NK, labels_N, reduction="none"),
            "right": (logits_NK.argmax(dim=1) == labels_N).float(),
            "label": labels_N,
        }

    def summarise(self, measured: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the mean loss, the accuracy over all images, and the accuracy of each class."""
        right_N, labels_N = measured["right"], measured["label"]
        return {
            "holdout_loss": float(measured["loss"].double().mean()),
            "accuracy": float(right_N.mean()),
            **{
                f"accuracy/{name}": float(right_N[labels_N == number].mean())
                for number, name in enumerate(self.config.classes)
                if (labels_N == number).any()
            },
        }

    def write(self, order: Export) -> list[Path]:
        """Write ``NAME/``, a folder for transformers; on request ``NAME.pth`` with the authors' keys."""
        paths = []
        for form in order.formats:
            path = order.folder / (order.name if form == "transformers" else f"{order.name}.pth")
            if form == "transformers":
                size = self.config.input_size
                save_network(self.network, path, size=size, dtype=order.dtype, metadata=order.metadata)
            else:
                write_convnext(self.network.state_dict(), path, dtype=order.dtype)
            paths.append(path)
        return paths

    def _ask(self, batch: Batch) -> Tensor:
        return self.network(pixel_values=batch["pixels"]).logits.float()

    def _named(self, instances: Index, labels: dict[int, int]) -> Index:
        rows = sorted(labels)
        return instances.take(rows, [self.config.classes[labels[row]] for row in rows])

    def _vary(self, use: Use) -> Image.Image:
        """Mirror an image if ``use.mirrored``, and jitter its colours at random, keyed by ``use.key``."""
        image = ImageOps.mirror(use.image) if use.mirrored else use.image
        if use.key is None or not self.config.color_jitter:
            return image
        rng, spread = numpy_rng("jitter", *use.key), self.config.color_jitter
        for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhancer(image).enhance(float(rng.uniform(1 - spread, 1 + spread)))
        return image


def _hash(network: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:10]
