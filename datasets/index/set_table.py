"""The table of one image set: all its images with the facts about them, those that filters exclude, and bad files.

Every image that a source lists is in exactly one of three places, so the counts add up: seen = used + bad + excluded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from dreamfleet.datasets.config import MAX_PIXELS
from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.index.edited_source import apply_edits
from dreamfleet.datasets.index.exclusions import BadFile, Skipped, summary
from dreamfleet.datasets.index.facts import Inspected, Inspection, Known
from dreamfleet.datasets.index.filters import Rules, searchable
from dreamfleet.datasets.index.image_index import SCHEMA, Index, number_copies
from dreamfleet.datasets.index.set_columns import join_columns
from dreamfleet.datasets.index.sources import Listing, ScanOptions, find_source
from dreamfleet.datasets.index.table_builder import EXCLUDED, TableBuilder
from dreamfleet.datasets.processing.mapping import Mapper
from dreamfleet.datasets.storage.object_store import is_address
from dreamfleet.datasets.storage.storage import Storage

VERIFY_LIMIT = 2000  # sets of at most this many images are decoded completely, to find truncated files
_NO_RULES = Rules()

BAD_SCHEMA = pa.schema([("uri", pa.string()), ("reason", pa.string())])


class Counts(NamedTuple):
    """Numbers of images of a set: seen = used + bad + excluded."""

    seen: int
    used: int
    bad: int
    excluded: int


@dataclass
class SetTable:
    """The images of one source: ``rows`` has used and excluded ones, sorted by id; ``listing`` what else there is."""

    url: str
    rows: pa.Table
    listing: Listing

    @property
    def table(self) -> pa.Table:
        """The images that are used: the columns of TABLE_SCHEMA, aspect, pixels, shorter_side, tags, and own ones."""
        return self.rows.filter(pc.is_null(self.rows.column(EXCLUDED)))

    @property
    def excluded(self) -> pa.Table:
        """The images that filters leave out, and by which rule: columns uri and rule."""
        rows = self.rows.filter(pc.is_valid(self.rows.column(EXCLUDED)))
        return rows.select(["uri", EXCLUDED]).rename_columns(["uri", "rule"])

    @property
    def errors(self) -> pa.Table:
        """The images that cannot be used, and why: columns uri and reason."""
        bad = self.listing.bad
        columns = [[one.uri for one in bad], [one.reason for one in bad]]
        return pa.Table.from_arrays([pa.array(values, pa.string()) for values in columns], schema=BAD_SCHEMA)

    @property
    def counts(self) -> Counts:
        """The numbers of images seen, used, bad and excluded."""
        excluded, bad = self.rows.column(EXCLUDED), len(self.listing.bad)
        used = excluded.null_count
        return Counts(self.rows.num_rows + bad, used, bad, self.rows.num_rows - used)

    def index(self, *, concept: int = 0, role: str = "instance", repeats: int = 1) -> Index:
        """Return the index of the used images."""
        table = self.table.select(SCHEMA.names)
        for name, value in (("concept", concept), ("role", role), ("repeats", repeats)):
            field = SCHEMA.field(name)
            constant = pa.repeat(pa.scalar(value, field.type), table.num_rows)
            table = table.set_column(SCHEMA.get_field_index(name), field, constant)
        table = number_copies(table) if table.num_rows < self.rows.num_rows else table
        index = Index(table.cast(SCHEMA), bad=self.listing.bad, skipped=self.listing.skipped)
        index.others, index.shared = self.listing.others, self.listing.shared
        rules = Counter(str(rule).partition(": of ")[0] for rule in self.excluded.column("rule").to_pylist())
        index.excluded = [Skipped(self.url, rule, count) for rule, count in rules.items()]
        return index

    def require_images(self, *, max_bad_fraction: float = 1.0) -> None:
        """Raise DataError if no image is used, or a larger share than ``max_bad_fraction`` is bad."""
        counts = self.counts
        if not counts.used:
            raise DataError(self._why_empty())
        if counts.bad > max_bad_fraction * counts.seen:
            raise DataError(
                f"{self.url}: {counts.bad} of {counts.seen} images cannot be used, more than data.max_bad_fraction "
                f"{max_bad_fraction}: {_some(self.listing.bad)}. Replace or remove them, or raise the limit"
            )

    def _why_empty(self) -> str:
        listing, counts = self.listing, self.counts
        skipped = f"; skipped: {summary(listing.skipped)}" if listing.skipped else ""
        if counts.excluded:
            rules = Counter(self.excluded.column("rule").to_pylist()).most_common(3)
            return (
                f"no image of {self.url} is left: filters exclude {counts.excluded} of {counts.seen} "
                f"({', '.join(f'{rule}: {count}' for rule, count in rules)}), {counts.bad} are bad. Change the filters"
            )
        if listing.bad:
            return (
                f"no usable image in {self.url}: all {len(listing.bad)} found are bad: {_some(listing.bad)}{skipped}. "
                "Replace or convert them, or name another folder"
            )
        count = listing.others.total()
        held = f"{count} other files" if count else "nothing else" if skipped else "nothing at all"
        return (
            f"no image in {self.url}: it contains {held}{skipped}. Put images (.png, .jpg ...) there, or name another "
            "folder"
        )


def build_set(
    url: str,
    options: ScanOptions,
    *,
    max_pixels: int = MAX_PIXELS,
    verify: bool | None = None,
    phash: bool = False,
    known: Known | None = None,
    rules: Rules = _NO_RULES,
    columns: Sequence[pa.Table] = (),
    phashes: Mapping[str, str] = MappingProxyType({}),
) -> SetTable:
    """Return the table of the images at a URL; parameters as in ``build_index``.

    ``phash``: compute perceptual hashes, except those in ``phashes``, by the hash of the file. ``columns``: tables with
    more columns, by the column ``sha256``.
    Raises DataError if the source is unusable or a rule does not suit the table.
    """
    url = Storage(url).url if is_address(url) else url
    source = find_source(url)
    listing = apply_edits(source.scan(url, options), url, options.edits_for)
    check = len(listing.images) <= VERIFY_LIMIT if verify is None else verify
    inspection = Inspection(max_pixels, check, phash or rules.needs_phash)
    table = searchable(
        join_columns(_inspect(listing, inspection, source.name, known, phashes, options.mapper), columns)
    )
    rules_of_rows = rules.apply(table, where=url)
    place = table.schema.get_field_index(EXCLUDED)
    return SetTable(url, table.set_column(place, EXCLUDED, rules_of_rows), listing)


def _inspect(
    listing: Listing,
    inspection: Inspection,
    source: str,
    known: Known | None,
    phashes: Mapping[str, str],
    mapper: Mapper,
) -> pa.Table:
    """Return the table of a listing's images, which leave it, and add those that cannot be used to its bad files."""
    images, listing.images = listing.images, []
    missing = [image for image in images if inspection.recall(image, known, phashes) is None]
    read = iter(mapper(inspection.read, missing) if missing else ())
    table = TableBuilder(source)
    images.reverse()  # to release each image once it is in the table
    while images:
        found = inspection.recall(images.pop(), known, phashes) or next(read)
        if isinstance(found, Inspected):
            table.add(found)
        else:
            listing.bad.append(found)
    assert next(read, None) is None
    listing.bad.sort()
    return table.finish()


def _some(bad: Sequence[BadFile], most: int = 3) -> str:
    listed = "; ".join(f"{item.uri}: {item.reason}" for item in bad[:most])
    return listed + (f"; and {len(bad) - most} more" if len(bad) > most else "")
