"""Computes the Danbooru tags of images with a WD tagger (SmilingWolf's ONNX models).

Preprocessing follows AUTOMATIC1111's wd14-tagger: the image is centred on a white square, with channels in the order
BGR and values from 0 to 255. The models return probabilities.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dreamfleet.datasets.errors import DataError, ModelError
from dreamfleet.datasets.images.resampling import MOST_RESIZED
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.datasets.tools.tags import escape_brackets, with_spaces

MODEL_FILE, TAGS_FILE = "model.onnx", "selected_tags.csv"
GENERAL, COPYRIGHT, CHARACTER, RATING = 0, 3, 4, 9  # category numbers in selected_tags.csv
PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")  # in order of preference
LARGEST_STRIP = 4096  # pixels; images of extreme aspect ratios are first shrunk to this longer side


@dataclass(frozen=True)
class Tagging:
    """Options of tagging. `add` and `exclude` are names of the model's tags; thresholds are probabilities.

    `sort` orders tags alphabetically instead of by probability.
    """

    general_threshold: float = 0.35
    character_threshold: float = 0.85
    rating: bool = False
    add: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    sort: bool = False
    confidence: bool = False
    spaces: bool = True
    escape: bool = False

    def __post_init__(self) -> None:
        for threshold in (self.general_threshold, self.character_threshold):
            if not 0 < threshold <= 1:
                raise DataError(f"threshold {threshold} must be above 0 and at most 1")


class Tag(NamedTuple):
    """One output of the model: a tag's name and category."""

    name: str
    category: int


class Tagger:
    """A tagger model and its tags, loaded from a local or s3:// folder, an .onnx file beside its tag list, or the hub.

    Raises ModelError if there is no such model, or if onnxruntime is not installed.
    """

    def __init__(self, place: str) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ModelError("tagging needs onnxruntime: pip install 'dreamfleet[tag]'") from error
        with _files(place) as (model, tags):
            self.tags = read_tags(tags.read_bytes(), uri=str(tags))
            try:
                known = onnxruntime.get_available_providers()
                providers = [name for name in PROVIDERS if name in known]
                self._session: Any = onnxruntime.InferenceSession(
                    str(model), _session_options(onnxruntime), providers=providers
                )
            except Exception as error:
                raise ModelError(f"{model} is not a usable ONNX model: {error}") from error
        self._input = self._session.get_inputs()[0]
        shape, width = self._input.shape, self._session.get_outputs()[0].shape[-1]
        if len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2] or not isinstance(shape[1], int):
            raise ModelError(
                f"{place} has the input shape {shape}, but a WD tagger has [images, side, side, 3]"
            )
        if isinstance(width, int) and width != len(self.tags):
            raise ModelError(f"{place} has {width} outputs, but its {TAGS_FILE} has {len(self.tags)} tags")
        self.side: int = shape[1]
        self._one_by_one = shape[0] == 1

    def probabilities(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Return the probabilities of RGB images, float32 [N,tags], in the order of `tags`."""
        batch = np.stack([square_of(image, self.side) for image in images])
        parts = [batch[number : number + 1] for number in range(len(batch))] if self._one_by_one else [batch]
        return np.concatenate([self._session.run(None, {self._input.name: part})[0] for part in parts])


def _session_options(onnxruntime: Any) -> Any:
    """Return options with the number of threads that Ray gives an actor; onnxruntime would use all CPUs."""
    options = onnxruntime.SessionOptions()
    if (threads := os.environ.get("OMP_NUM_THREADS", "")).isdigit():
        options.intra_op_num_threads = int(threads)
    return options


def square_of(image: Image.Image, side: int) -> np.ndarray:
    """Centre an RGB image on a white square and scale it: float32 [side,side,3], BGR, 0 to 255."""
    if max(image.size) > max(
        LARGEST_STRIP, MOST_RESIZED * min(image.size)
    ):  # otherwise the square could take gigabytes
        image = image.copy()
        image.thumbnail((LARGEST_STRIP, LARGEST_STRIP), Image.Resampling.BOX)
    length = max(*image.size, side)
    square = Image.new("RGB", (length, length), "white")
    square.paste(image, ((length - image.width) // 2, (length - image.height) // 2))
    if length != side:
        square = square.resize((side, side), Image.Resampling.BOX)
    return np.ascontiguousarray(np.asarray(square)[:, :, ::-1], dtype=np.float32)


def read_tags(data: bytes, *, uri: str) -> list[Tag]:
    """Parse selected_tags.csv; in files without categories the first four tags are ratings. Raises ModelError."""
    try:
        rows = list(csv.DictReader(io.StringIO(data.decode("utf-8"), newline="")))
        tags = [
            Tag(row["name"], int(row.get("category") or (RATING if number < 4 else GENERAL)))
            for number, row in enumerate(rows)
        ]
    except (UnicodeDecodeError, csv.Error, KeyError, ValueError) as error:
        raise ModelError(f"{uri} is not a tag list with a column `name`: {error}") from error
    if not tags or any(not tag.name for tag in tags):
        raise ModelError(f"{uri} is not a tag list: it is empty or has rows without a name")
    return tags


def choose_tags(probabilities: np.ndarray, tags: Sequence[Tag], how: Tagging) -> list[str]:
    """Return the tags whose probability reaches the threshold of their category; ``probabilities`` has shape [tags]."""
    limits = {
        GENERAL: how.general_threshold,
        COPYRIGHT: how.general_threshold,
        CHARACTER: how.character_threshold,
    }
    scores = {
        tag.name: float(score)
        for tag, score in zip(tags, probabilities, strict=True)
        if score >= limits.get(tag.category, 2.0) and tag.name not in how.exclude
    }
    ratings = [
        (float(score), tag.name)
        for tag, score in zip(tags, probabilities, strict=True)
        if tag.category == RATING
    ]
    if how.rating and ratings:
        score, name = max(ratings)
        scores[name] = score
    scores |= dict.fromkeys(how.add, 1.0)
    order = sorted(scores, key=lambda name: name if how.sort else (-scores[name], name))
    return [_written(name, scores[name], how) for name in order]


def tagger_of(place: str, how: Tagging) -> Callable[[Sequence[Image.Image]], list[str]]:
    """Load a tagger; return a function that returns the tags of each RGB image as a comma-separated text."""
    tagger = Tagger(place)

    def describe(images: Sequence[Image.Image]) -> list[str]:
        return [", ".join(choose_tags(row, tagger.tags, how)) for row in tagger.probabilities(images)]

    return describe


def _written(name: str, score: float, how: Tagging) -> str:
    text = with_spaces(name) if how.spaces else name
    text = escape_brackets(text) if how.escape else text
    return f"({text}:{score:.3f})" if how.confidence else text


@contextmanager
def _files(place: str) -> Iterator[tuple[Path, Path]]:
    """Yield the local paths of a model and its tag list, downloading them if necessary. Raises ModelError."""
    folder, file = place, MODEL_FILE
    if place.endswith(".onnx"):
        folder, _, file = place.rpartition("/")
    storage = Storage(folder or ".")
    if storage.exists(file):
        if not storage.exists(TAGS_FILE):
            raise ModelError(f"{storage.url} has no {TAGS_FILE}: add the tag list of {file}")
        with storage.local_copy(file) as model, storage.local_copy(TAGS_FILE) as tags:
            yield model, tags
        return
    if storage.exists() or place.count("/") != 1 or place.startswith((".", "~")):
        raise ModelError(f"no tagger in {storage.url}: a folder with {MODEL_FILE} and {TAGS_FILE} is needed")
    from huggingface_hub import hf_hub_download

    try:
        found = Path(hf_hub_download(place, MODEL_FILE)), Path(hf_hub_download(place, TAGS_FILE))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"tagger {place}: there is no such folder, and it cannot be downloaded from the hub ({error})"
        ) from error
    yield found
