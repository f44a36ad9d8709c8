"""Base of sources that read dataset files of other trainers: folders with repeats, prompts and options."""

from __future__ import annotations

import json
import logging
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import yaml
from pydantic import ValidationError

from dreamfleet.datasets.config import Concept, DataConfig
from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.index.exclusions import Skipped
from dreamfleet.datasets.index.filters import Rules
from dreamfleet.datasets.index.scan_options import scan_options
from dreamfleet.datasets.index.set_table import SetTable, build_set
from dreamfleet.datasets.index.sources import Listing, ScanOptions, Source, find_source
from dreamfleet.datasets.path_field import absolute_path
from dreamfleet.datasets.storage.object_store import is_address
from dreamfleet.datasets.storage.storage import read_text

log = logging.getLogger(__name__)
_REPORTED: set[tuple[str, str]] = set()


class DatasetFile(Source):
    """A source whose URL is a file that describes one or more concepts.

    A subclass names the program in ``program``, the endings of its files in ``endings``, and implements ``recognises``
    and ``read_concepts``. As a whole, such a file is the union of its concepts' images.
    """

    program: str
    endings: tuple[str, ...]

    @abstractmethod
    def recognises(self, content: Any) -> bool:
        """Return whether the parsed content of a file is this program's."""

    @abstractmethod
    def read_concepts(self, content: Any, found: Found) -> list[Concept]:
        """Return the concepts in a file; report to ``found`` what is not used. Raises DataError."""

    def parse(self, text: str) -> Any:
        """Return the content of a file. Raises ValueError if it cannot be parsed."""
        return json.loads(text)

    def matches(self, url: str) -> bool:
        """Return whether a URL is a file of this program, by its ending and its content."""
        if not is_address(url) or not url.lower().endswith(self.endings) or os.path.isdir(url):
            return False
        try:
            return self.recognises(self.parse(read_text(url)))
        except (StorageError, DataError, ValueError, RecursionError, yaml.YAMLError):
            return False

    def concepts(self, url: str, data: DataConfig) -> list[Concept]:
        """Return the concepts in a file, and log how a run differs from one of that program. Raises DataError."""
        found = Found(url.removeprefix(f"{self.name}://"), self.program, data)
        try:
            content = self.parse(read_text(found.file))
        except StorageError as error:
            raise DataError(str(error)) from error
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            raise DataError(f"{found.file}: cannot be parsed ({error}). Correct the file") from error
        concepts = self.read_concepts(content, found)
        if not concepts:
            raise DataError(
                f"{found.file}: it lists no folder of training images. Add one, or name a folder instead"
            )
        found.report()
        return concepts

    def scan(self, url: str, options: ScanOptions) -> Listing:
        """List the images of all concepts; those that a concept's own condition excludes are counted in ``skipped``."""
        data = DataConfig(
            train_data_dir=url,
            caption_extension=list(options.caption_extension),
            caption_column=options.caption_column,
            allow_private_urls=options.allow_private,
            use_edits=False,  # those of this file are applied to the whole
        )
        found = Listing([])
        for concept in self.concepts(url, data):
            place = concept.instance_data_dir
            own = scan_options(concept, data, options.excluded, options.mapper)
            listed = find_source(place).scan(place, own)
            if concept.where is not None:
                _leave_out(listed, build_set(place, own, verify=False, rules=Rules((concept.where,))))
            found.extend(listed)
        return found

    def stamps(self, url: str) -> dict[str, str]:
        """Return the stamps of the files of all concepts."""
        concepts = self.concepts(url, DataConfig(train_data_dir=url))
        places = {
            place for one in concepts for place in (one.instance_data_dir, one.mask_dir) if place is not None
        }
        return {uri: stamp for place in places for uri, stamp in find_source(place).stamps(place).items()}


def _leave_out(listing: Listing, built: SetTable) -> None:
    """Remove the images from a listing that the rules of a set exclude."""
    rules = dict(zip(*(built.excluded.column(name).to_pylist() for name in ("uri", "rule")), strict=True))
    listing.images = [image for image in listing.images if image.uri not in rules]
    listing.skipped += [Skipped(built.url, rule, count) for rule, count in Counter(rules.values()).items()]


class Found:
    """What was found in one file: makes concepts with paths relative to it, and collects what a run does not use."""

    def __init__(self, file: str, program: str, data: DataConfig):
        self.file, self.program, self.data = file, program, data
        self.differences: dict[str, None] = {}  # in order, each once

    def path(self, value: Any, what: str) -> str:
        """Return a path in the file as an absolute one. Raises DataError if it is not text."""
        if not isinstance(value, str) or not value:
            raise DataError(f"{self.file}, {what}: {value!r} is not a path. Correct it")
        return absolute_path(value.replace("\\", "/"), self.file.rpartition("/")[0] or "/")

    def differs(self, key: str, value: Any, how: str) -> None:
        """Record that a key of the file has another effect here."""
        self.differences[f"{key}: {value} {how}"] = None

    def unused(
        self, values: Mapping[str, Any], known: Iterable[str], where: str, *, silent: Iterable[str] = ()
    ) -> None:
        """Record keys that have no effect here; ``silent`` ones change nothing in training."""
        for key in sorted(set(values) - set(known) - set(silent)):
            if values[key] not in (None, False, "", [], {}):
                self.differences[f"{where}{key} is not used"] = None  # the value may be a secret

    def expect(self, key: str, value: Any, recipe_key: str) -> None:
        """Record a value that the recipe must have for the same effect, if it has another."""
        own = getattr(self.data, recipe_key)
        if value is not None and value != own:
            self.differs(key, value, f"is not used: the recipe has data.{recipe_key} {own}. Set it there")

    def whole_repeats(self, key: str, value: float) -> int:
        """Return a number of uses per epoch as a whole one from 1, and record if it has another effect."""
        repeats = max(1, round(value))
        if repeats != value:
            self.differs(key, value, f"is rounded to {repeats} repeats")
        return repeats

    def concept(self, values: Mapping[str, Any], what: str) -> Concept:
        """Return a concept of the values that are not None. Raises DataError, naming the entry, if one is invalid."""
        try:
            return Concept.model_validate({key: value for key, value in values.items() if value is not None})
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise DataError(f"{self.file}, {what}: {place}: {first['msg']}. Correct the file") from error

    def report(self) -> None:
        """Log each difference, once per process."""
        for difference in self.differences:
            if (self.file, difference) in _REPORTED:
                continue
            _REPORTED.add((self.file, difference))
            log.warning("%s (%s): %s", self.file, self.program, difference)


def is_list_of(content: Any, key: str, others: Iterable[str]) -> bool:
    """Return whether a parsed file is a list of objects that each have a key and one of the others."""
    return (
        isinstance(content, list)
        and bool(content)
        and all(isinstance(one, dict) and key in one and set(others) & set(one) for one in content)
    )


def mapping(value: Any, what: str, file: str) -> Mapping[str, Any]:
    """Return a value that must be a mapping. Raises DataError otherwise."""
    if not isinstance(value, dict):
        raise DataError(f"{file}, {what}: not a mapping of keys to values. Correct the file")
    return value


def mappings(value: Any, what: str, file: str) -> list[Mapping[str, Any]]:
    """Return a value that must be a list of mappings. Raises DataError otherwise."""
    if not isinstance(value, list):
        raise DataError(f"{file}, {what}: not a list. Correct the file")
    return [mapping(one, f"{what}[{number}]", file) for number, one in enumerate(value)]
