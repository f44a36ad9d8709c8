"""Crops and scales the images of a set into a folder or shards, with captions, masks and a manifest of all outputs."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dreamfleet.datasets.config import CAPTION_EXTENSIONS
from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.index.sources import ScanOptions
from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.processing.journal import FOLDER as JOURNAL
from dreamfleet.datasets.processing.journal import Journal
from dreamfleet.datasets.processing.mapping import mapper_of
from dreamfleet.datasets.processing.runner import Row, Workers, process
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.datasets.tools.image_set import ImageSet, list_set
from dreamfleet.datasets.tools.outputs import SHARD_NAME, FolderOutput, Output, ShardOutput, Shards, key_of
from dreamfleet.datasets.tools.prepare_image import CheckWork, PrepareWork, read_job, samples_of
from dreamfleet.datasets.tools.prepare_options import Job, Preparing, jobs_of

log = logging.getLogger(__name__)

MANIFEST = "prepared.json"
BATCH = 16  # images that a worker gets at once
MEASURED = 8  # images whose prepared size decides how many images a shard gets


def prepare(
    source: str,
    target: str,
    how: Preparing,
    *,
    shards: Shards | None = None,
    workers: Workers = Workers(),  # noqa: B008 - frozen
    caption_extension: Sequence[str] = CAPTION_EXTENSIONS,
    caption_column: str | None = None,
    mask_dir: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Prepare the images of the set `source` into the folder `target`, and return the manifest.

    The manifest, `prepared.json` in the target, contains the settings and, for every image, its SHA-256 and its outputs
    or the reason why there are none. Images whose outputs exist for the same content and settings are not processed
    again; outputs of images that no longer exist are removed. Every crop gets its caption and mask, beside it or in the
    same shard. A call that was killed is continued by the same call.

    Raises DataError if there are no images, if two outputs would have the same name, or if the target is neither empty
    nor the output of an earlier call with the same settings.
    """
    options = ScanOptions(caption_extension, caption_column, mask_dir, mapper=mapper_of(workers))
    found = list_set(source, options)
    place = Storage(target)
    jobs = jobs_of(found, how, key_of if shards is not None else str)
    settings = json.loads(json.dumps(dataclasses.asdict(how)))
    settings |= {"shards": dataclasses.asdict(shards)} if shards else {}
    output: Output = FolderOutput(place)
    if shards is not None:
        output = ShardOutput(place, shards.kind, shards.megabytes * 2**20)
    return _Preparation(found, place, output, how, settings).run(jobs, workers, progress)


class _Preparation:
    """One call of :func:`prepare`: what earlier calls did, what remains, and the manifest."""

    def __init__(
        self, source: ImageSet, target: Storage, output: Output, how: Preparing, settings: dict[str, Any]
    ) -> None:
        self.source, self.target, self.output = source, target, output
        self.how, self.settings = how, settings
        self.before = _earlier(source.url, target, settings)
        self.journal = Journal(target, "prepare")
        self.stamps: dict[str, str] = {}  # image -> stamp, of images that an interrupted call prepared
        for row in self.journal.read():
            self.before[row["name"]] = row["entry"]
            self.stamps[row["name"]] = row["stamp"]
        self.entries: dict[str, Any] = {}

    def run(
        self, jobs: Sequence[Job], workers: Workers, progress: Callable[[int, int], None]
    ) -> dict[str, Any]:
        """Prepare what is missing, and return the manifest."""
        if not self.before:
            self._save()
        stamps = self.source.stamps()
        stamp_of = {job.name: _stamp(job, stamps) for job in jobs}
        known, doubtful = self._known(jobs, stamp_of)
        checked = process(doubtful, CheckWork, workers, batch_size=BATCH)
        same = known | {row["name"] for row in checked if row["same"]}
        kept = self._kept(same)
        self.entries = {name: self.before[name] for name in kept}
        pending, at_once = self._grouped([job for job in jobs if job.name not in kept], workers)
        done = len(kept)
        progress(done, len(jobs))
        work = functools.partial(PrepareWork, self.output, self.how)
        try:
            for row in process((job._asdict() for job in pending), work, workers, batch_size=at_once):
                self.entries[row["name"]] = row["entry"]
                self.journal.add({**row, "stamp": stamp_of[row["name"]]})
                done += 1
                progress(done, len(jobs))
        finally:
            self.journal.flush()
        self._remove_stale()
        manifest = self._save()
        self.journal.clear()
        return manifest

    def _known(self, jobs: Sequence[Job], stamps: Mapping[str, str]) -> tuple[set[str], list[Row]]:
        """Return the images that are known to be prepared, and those whose content must be compared."""
        existing = set(self.target.list("", True))
        known: set[str] = set()
        doubtful: list[Row] = []
        for job in jobs:
            entry = self.before.get(job.name)
            if not entry or not entry["sha256"] or not existing.issuperset(self.output.files_of(entry)):
                continue
            if stamps[job.name] and stamps[job.name] == self.stamps.get(job.name):
                known.add(job.name)
            else:
                doubtful.append({**job._asdict(), "sha256": entry["sha256"]})
        return known, doubtful

    def _kept(self, same: set[str]) -> set[str]:
        """Return the images whose outputs are kept: not those in a shard that holds an image which changed."""
        if not isinstance(self.output, ShardOutput):
            return same
        changed = {
            file
            for name, entry in self.before.items()
            if name not in same
            for file in self.output.files_of(entry)
        }
        return {name for name in same if changed.isdisjoint(self.output.files_of(self.before[name]))}

    def _grouped(self, jobs: list[Job], workers: Workers) -> tuple[list[Job], int]:
        """Return jobs with the numbers of their groups, and the number of jobs that a worker gets at once."""
        if not isinstance(self.output, ShardOutput) or not jobs:
            return jobs, max(1, min(BATCH, -(-len(jobs) // max(1, workers.count))))
        # A group is made to fit into a shard, with some reserve, as its size is estimated from a few images.
        size = max(1, int(0.9 * self.output.limit / _mean_bytes(jobs, self.how)))
        existing = [name for name in self.target.list() if SHARD_NAME.fullmatch(name)]
        first = max((int(name[:6]) for name in existing), default=0) + 1
        return [job._replace(group=first + number // size) for number, job in enumerate(jobs)], size

    def _remove_stale(self) -> None:
        """Remove outputs of images that no longer exist or changed, and shards that an interrupted call left."""
        kept = {file for entry in self.entries.values() for file in self.output.files_of(entry)}
        stale = {file for entry in self.before.values() for file in self.output.files_of(entry)} - kept
        if isinstance(self.output, ShardOutput):
            stale |= {name for name in self.target.list() if SHARD_NAME.fullmatch(name)} - kept
        if stale:
            log.info("removed %d files whose images were removed or changed: %s ...", len(stale), min(stale))
        for file in sorted(stale):
            self.target.remove(file)

    def _save(self) -> dict[str, Any]:
        manifest = {"settings": self.settings, "pictures": dict(sorted(self.entries.items()))}
        self.target.write_text(MANIFEST, json_text(manifest, indent=1) + "\n")
        return manifest


def _earlier(source: str, target: Storage, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest entries of an earlier call with the same target. Raises DataError for other content."""
    if f"{target.url}/".startswith(f"{source}/"):
        raise DataError(f"the output {target.url} is within the input {source}. Choose another folder")
    if not target.exists(MANIFEST):
        if any(not name.startswith(f"{JOURNAL}/") for name in target.list("", True)):
            raise DataError(
                f"{target.url} is not empty, and its files are not overwritten. Choose another folder"
            )
        return {}
    try:
        manifest = json.loads(target.read_text(MANIFEST))
        before, entries = manifest["settings"], dict(manifest["pictures"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{target.path(MANIFEST)} is broken ({error}). Choose another folder") from error
    if before != settings:
        raise DataError(
            f"{target.url} was prepared with other settings (see {MANIFEST}). Use the same, or another folder"
        )
    return entries


def _stamp(job: Job, stamps: Mapping[str, str]) -> str:
    """Return a text that changes with an image, its mask or its caption; "" if that cannot be known."""
    uris = [job.uri, *([job.mask] if job.mask else [])]
    parts = [stamps.get(uri, "") for uri in uris]
    if not all(parts):
        return ""
    return hashlib.sha256("\0".join([*parts, job.caption or "", job.stem]).encode()).hexdigest()[:16]


def _mean_bytes(jobs: Sequence[Job], how: Preparing) -> float:
    """Return the mean number of bytes of an image's outputs, measured on a few images."""
    sizes = []
    for job in list(_spread(jobs, MEASURED)):
        try:
            samples = samples_of(job, *read_job(job), how)
            sizes.append(sum(len(one.image) + len(one.mask or b"") + 2048 for one in samples))
        except (DataError, StorageError):
            continue
    return max(1.0, sum(sizes) / len(sizes)) if any(sizes) else 2.0**20


def _spread(jobs: Sequence[Job], count: int) -> Iterator[Job]:
    step = max(1, len(jobs) // count)
    return iter(jobs[::step][:count])
