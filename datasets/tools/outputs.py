"""Where prepared images are written: files of a folder, or shards (webdataset tar files, Parquet files)."""

from __future__ import annotations

import io
import re
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import pyarrow as pa
import pyarrow.parquet as pq

from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.images.image_formats import MASK_ENDING
from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.storage.storage import Storage

ROW_GROUP_BYTES = 2**24  # of a Parquet shard, which is read in row groups
SHARD_NAME = re.compile(r"\d{6}(-\d+)?\.(tar|parquet)")
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
# The columns of Hugging Face's `datasets`, which then decodes the images.
_FEATURES = {
    "image": {"_type": "Image"},
    "text": {"dtype": "string", "_type": "Value"},
    "mask": {"_type": "Image"},
}
_SCHEMA = pa.schema(
    [("image", _IMAGE), ("text", pa.string()), ("mask", _IMAGE), ("width", pa.int32()), ("height", pa.int32())],
    metadata={"huggingface": json_text({"info": {"features": _FEATURES | {
        "width": {"dtype": "int32", "_type": "Value"}, "height": {"dtype": "int32", "_type": "Value"}
    }}})},
)  # fmt: skip


class Sample(NamedTuple):
    """One output: its name without extension, the encoded image and mask (PNG), and the manifest's facts about it."""

    stem: str
    suffix: str
    image: bytes
    mask: bytes | None
    caption: str | None
    facts: dict[str, Any]


Write = Callable[[Sample], dict[str, Any]]


class Output(ABC):
    """A place for prepared images. Picklable; each worker writes its groups of images without the others."""

    @abstractmethod
    def open(self, group: int) -> AbstractContextManager[Write]:
        """Return a context whose function writes one sample, and returns the names of its files for the manifest."""

    @staticmethod
    @abstractmethod
    def files_of(entry: Mapping[str, Any]) -> list[str]:
        """Return the names of the files that an entry of the manifest records."""


@dataclass(frozen=True)
class FolderOutput(Output):
    """Files of a folder: NAME.png, its caption NAME.txt and its mask NAME.mask.png."""

    folder: Storage

    @contextmanager
    def open(self, group: int) -> Iterator[Write]:
        """Yield a function that writes a sample's files at once; the image last, so that it is never incomplete."""

        def write(sample: Sample) -> dict[str, Any]:
            made = {"file": f"{sample.stem}.{sample.suffix}"}
            if sample.caption:
                made["caption"] = f"{sample.stem}.txt"
                self.folder.write_text(made["caption"], sample.caption + "\n")
            if sample.mask is not None:
                made["mask"] = sample.stem + MASK_ENDING
                self.folder.write_bytes(made["mask"], sample.mask)
            self.folder.write_bytes(made["file"], sample.image)
            return made

        yield write

    @staticmethod
    def files_of(entry: Mapping[str, Any]) -> list[str]:
        """Return the image, mask and caption files of an entry."""
        kinds = ("file", "mask", "caption")
        return [output[kind] for output in entry["outputs"] for kind in kinds if kind in output]


@dataclass(frozen=True)
class ShardOutput(Output):
    """Shards of at most ``limit`` bytes: `000001.tar`, or `000001.parquet` with ``kind`` parquet.

    A group that exceeds the limit continues in `000001-1.tar`. A shard appears when it is complete.
    """

    folder: Storage
    kind: str
    limit: int

    @contextmanager
    def open(self, group: int) -> Iterator[Write]:
        """Yield a function that adds a sample to the shard of the group."""
        with ExitStack() as stack:
            shard: ShardFile | None = None
            parts = 0

            def write(sample: Sample) -> dict[str, Any]:
                nonlocal shard, parts
                if shard is not None and not shard.has_room(sample, self.limit):
                    stack.pop_all().close()
                    shard = None
                if shard is None:
                    name = f"{group:06d}{f'-{parts}' if parts else ''}.{self.kind}"
                    path = stack.enter_context(self.folder.staging(name))
                    shard = stack.enter_context(SHARD_KINDS[self.kind](path, name))
                    parts += 1
                shard.add(sample)
                found: dict[str, Any] = {"shard": shard.name, "key": key_of(sample.stem)}
                found |= {"caption": True} if sample.caption else {}
                return found | ({"mask": True} if sample.mask is not None else {})

            yield write

    @staticmethod
    def files_of(entry: Mapping[str, Any]) -> list[str]:
        """Return the shards that hold the outputs of an entry."""
        return list(dict.fromkeys(output["shard"] for output in entry["outputs"]))


class ShardFile(Protocol):
    """A shard that is being written to a local path."""

    name: str

    def __init__(self, path: Path, name: str) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def has_room(self, sample: Sample, limit: int) -> bool:
        """Return whether the file stays within a limit of bytes with the sample."""
        ...

    def add(self, sample: Sample) -> None:
        """Add a sample."""
        ...


class TarShard:
    """A webdataset shard: for each sample KEY.png, KEY.txt, KEY.mask.png and KEY.json (its size and crop box)."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self._tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 - closed in __exit__

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._tar.close()

    def has_room(self, sample: Sample, limit: int) -> bool:
        """Return whether the file stays within a limit of bytes with the sample."""
        size = sum(1024 + -(-len(data) // 512) * 512 for _, data in _members(sample))
        return self._tar.offset + size + tarfile.RECORDSIZE <= limit

    def add(self, sample: Sample) -> None:
        """Add the members of a sample, without time and owner, so that equal input gives equal shards."""
        for name, data in _members(sample):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            self._tar.addfile(member, io.BytesIO(data))


class ParquetShard:
    """A Parquet shard with the columns of Hugging Face's `datasets`: image, text, mask, width, height."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self._size = self._buffered = 0
        self._rows: list[dict[str, Any]] = []
        # Images are compressed already.
        self._writer = pq.ParquetWriter(path, _SCHEMA, compression="none", use_dictionary=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._flush()
        self._writer.close()

    def has_room(self, sample: Sample, limit: int) -> bool:
        """Return whether the file stays within a limit of bytes with the sample."""
        return self._size + _bytes_of(sample) <= limit

    def add(self, sample: Sample) -> None:
        """Add a row."""
        mask = None
        if sample.mask is not None:
            mask = {"bytes": sample.mask, "path": sample.stem + MASK_ENDING}
        width, height = sample.facts["size"]
        image = {"bytes": sample.image, "path": f"{sample.stem}.{sample.suffix}"}
        self._rows.append(
            {"image": image, "text": sample.caption, "mask": mask, "width": width, "height": height}
        )
        self._size += _bytes_of(sample)
        self._buffered += _bytes_of(sample)
        if self._buffered >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=_SCHEMA))
        self._rows, self._buffered = [], 0


SHARD_KINDS: dict[str, type[ShardFile]] = {"tar": TarShard, "parquet": ParquetShard}


@dataclass(frozen=True)
class Shards:
    """Options of outputs in shards: `tar` (webdataset) or `parquet`, of at most `megabytes` (2**20 bytes) each."""

    kind: str = "tar"
    megabytes: int = 256

    def __post_init__(self) -> None:
        if self.kind not in SHARD_KINDS:
            raise DataError(f"shard format {self.kind!r} does not exist; use {' or '.join(SHARD_KINDS)}")
        if self.megabytes < 1:
            raise DataError(f"shards of {self.megabytes} MB: write at least 1")


def key_of(stem: str) -> str:
    """Return the webdataset key of a sample: its name without dots, since a key ends at the first one."""
    return stem.replace(".", "_")


def _members(sample: Sample) -> Iterator[tuple[str, bytes]]:
    key = key_of(sample.stem)
    yield f"{key}.{sample.suffix}", sample.image
    if sample.caption:
        yield f"{key}.txt", sample.caption.encode()
    if sample.mask is not None:
        yield key + MASK_ENDING, sample.mask
    yield f"{key}.json", json_text(sample.facts).encode()


def _bytes_of(sample: Sample) -> int:
    return len(sample.image) + len(sample.mask or b"") + len((sample.caption or "").encode()) + 128
