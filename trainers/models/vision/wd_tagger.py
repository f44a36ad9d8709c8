"""Captions a folder of images with the Danbooru tags of a WD tagger (SmilingWolf's ONNX models).

Preprocessing follows AUTOMATIC1111's wd14-tagger: the image is centred on a white square, with channels in the order
BGR and values from 0 to 255. The models return probabilities.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dreamfleet.datasets.errors import DataError, ModelError, StorageError
from dreamfleet.datasets.images.images import open_image
from dreamfleet.datasets.images.resampling import MOST_RESIZED
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.datasets.tools.tags import (
    Edit,
    edit_caption,
    escape_brackets,
    read_captions,
    with_spaces,
    write_captions,
)

MODEL_FILE, TAGS_FILE = "model.onnx", "selected_tags.csv"
GENERAL, COPYRIGHT, CHARACTER, RATING = 0, 3, 4, 9  # category numbers in selected_tags.csv
PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")  # in order of preference
LARGEST_STRIP = 4096  # pixels; images of extreme aspect ratios are first shrunk to this longer side
EXISTING = ("ignore", "replace", "append", "prepend")


@dataclass(frozen=True)
class Tagging:
    """Options of tagging. `add` and `exclude` are names of the model's tags; thresholds are probabilities.

    `sort` orders tags alphabetically instead of by probability. `existing` decides about images with a caption:
    `ignore` leaves them unchanged.
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
    existing: str = "ignore"

    def __post_init__(self) -> None:
        for threshold in (self.general_threshold, self.character_threshold):
            if not 0 < threshold <= 1:
                raise DataError(f"threshold {threshold} must be above 0 and at most 1")
        if self.existing not in EXISTING:
            raise DataError(f"existing {self.existing!r} does not exist; use one of {', '.join(EXISTING)}")


class Tag(NamedTuple):
    """One output of the model: a tag's name and category."""

    name: str
    category: int


class Captioned(NamedTuple):
    """The result of captioning a folder."""

    captions: dict[str, str]  # captions that were written: name of the image -> text
    skipped: int  # number of images that already had a caption
    failed: dict[str, str]  # name of the image -> reason
    backup: str | None


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
                self._session: Any = onnxruntime.InferenceSession(str(model), providers=providers)
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


def caption_folder(
    folder: str,
    tagger: Tagger,
    how: Tagging,
    *,
    out: str | None = None,
    batch_size: int = 8,
    caption_column: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Captioned:
    """Caption the images of a folder: in place, in a .txt file beside each, or into the folder `out`.

    With `existing: ignore`, or with `out`, each batch is written immediately, so that rerunning the command continues
    after an interruption. Changes of existing captions are written at the end, after a backup; see write_captions.
    """
    captioned = read_captions(folder, caption_column)
    files, before = captioned.files, captioned.texts
    target = Storage(out) if out is not None else files.storage
    file_of = files.text_file if out is None else files.new_text_file
    written = set(target.list("", True)) if out is not None else set()
    done = {name for name in before if file_of(name) in written}
    if how.existing == "ignore":
        done |= {name for name, text in before.items() if text is not None}
    pending = [name for name in before if name not in done]
    made: dict[str, str] = {}
    failed: dict[str, str] = {}
    at_once = out is not None or how.existing == "ignore"
    for name, found in _tag_all(files.storage, pending, tagger, how, batch_size):
        if isinstance(found, Exception):
            failed[name] = str(found).removeprefix(f"{files.storage.path(name)}: ")
        else:
            made[name] = _merged(before[name], found, how.existing)
            if at_once:
                target.write_text(file_of(name), made[name] + "\n")
        if progress is not None:
            progress(len(made) + len(failed), len(pending))
    backup = None if at_once or not made else write_captions(captioned, made, None)
    if failed and not made:
        name, reason = next(iter(failed.items()))
        raise DataError(f"none of the {len(failed)} images could be read; {name}: {reason}")
    return Captioned(made, len(done), failed, backup)


def _tag_all(
    storage: Storage, names: Sequence[str], tagger: Tagger, how: Tagging, batch_size: int
) -> Iterator[tuple[str, list[str] | Exception]]:
    def load(name: str) -> Image.Image | Exception:
        try:
            return open_image(storage.read_bytes(name), uri=storage.path(name))
        except (DataError, StorageError) as error:
            return error

    with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="tagger") as pool:
        for start in range(0, len(names), batch_size):
            loaded = list(zip(names[start:], pool.map(load, names[start : start + batch_size]), strict=False))
            images = [image for _, image in loaded if isinstance(image, Image.Image)]
            rows = iter(tagger.probabilities(images) if images else ())
            for name, image in loaded:
                if isinstance(image, Image.Image):
                    yield name, choose_tags(next(rows), tagger.tags, how)
                else:
                    yield name, image


def _merged(before: str | None, tags: list[str], existing: str) -> str:
    if existing not in ("append", "prepend") or not before:
        return ", ".join(tags)
    edit = Edit(add=tuple(tags)) if existing == "append" else Edit(prepend=tuple(tags))
    return edit_caption(before, edit)


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
