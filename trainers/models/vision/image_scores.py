"""Scores images with classifiers and object detectors of transformers: aesthetics, watermarks, numbers of faces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from dreamfleet.datasets.errors import ModelError
from dreamfleet.datasets.storage.node_cache import node_copy
from dreamfleet.trainers.distributed.device import best_device, explain_out_of_memory
from dreamfleet.trainers.models.pretrained import quiet_libraries
from dreamfleet.trainers.models.vision.captioner import MEMORY, explained


class Classifier:
    """Returns the probability of a label for each image; the model is an image classifier of transformers.

    ``label`` may be left out for a model with a single output, whose value is then returned (a regression), and for two
    labels, of which the second is taken. Raises ModelError if there is no such model or label.
    """

    @explain_out_of_memory(MEMORY)
    def __init__(self, place: str, label: str = "") -> None:
        from transformers import AutoModelForImageClassification

        self._processor, self._model = _load(place, AutoModelForImageClassification)
        labels = _labels(self._model.config)
        if not label and len(labels) > 2:
            raise ModelError(
                f"{place} has {len(labels)} labels: write {place}:LABEL with one of {_some(labels)}"
            )
        self._number = _find(labels, label, place) if label else len(labels) - 1
        self._is_regression = len(labels) == 1

    @explain_out_of_memory(MEMORY)
    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> list[float]:
        """Return the value of each RGB image."""
        inputs = self._processor(images=list(images), return_tensors="pt").to(
            self._model.device, self._model.dtype
        )
        logits = self._model(**inputs).logits.float()
        values = logits if self._is_regression else logits.softmax(-1)
        return [round(float(value), 6) for value in values[:, self._number]]


class Detector:
    """Counts the objects of a label in each image, with at least ``threshold`` probability.

    The model is an object detector of transformers (such as YOLOS or DETR); without ``label`` all objects count. Raises
    ModelError if there is no such model or label.
    """

    @explain_out_of_memory(MEMORY)
    def __init__(self, place: str, label: str = "", threshold: float = 0.5) -> None:
        from transformers import AutoModelForObjectDetection

        self._processor, self._model = _load(place, AutoModelForObjectDetection)
        labels = _labels(self._model.config)
        self._number = _find(labels, label, place) if label else None
        self._threshold = threshold

    @explain_out_of_memory(MEMORY)
    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> list[int]:
        """Return the number of objects in each RGB image."""
        inputs = self._processor(images=list(images), return_tensors="pt").to(
            self._model.device, self._model.dtype
        )
        found = self._processor.post_process_object_detection(
            self._model(**inputs), threshold=self._threshold
        )
        kinds = [one["labels"].tolist() for one in found]
        return [sum(self._number in (None, kind) for kind in one) for one in kinds]


def _load(place: str, kind: Any) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor

    quiet_libraries()
    with node_copy(place) as folder, explained(place, folder):
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        model = kind.from_pretrained(folder, local_files_only=True)
    return processor, model.eval().to(best_device())


def _labels(config: Any) -> dict[int, str]:
    names: Mapping[Any, Any] = config.id2label
    return {int(number): str(name) for number, name in names.items()}


def _find(labels: Mapping[int, str], label: str, place: str) -> int:
    for number, name in labels.items():
        if name.casefold() == label.casefold():
            return number
    raise ModelError(f"{place} has no label {label!r}; it has {_some(labels)}")


def _some(labels: Mapping[int, str]) -> str:
    names = list(labels.values())
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
