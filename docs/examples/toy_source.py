"""An image source: a folder with all images in one file, `images.bin`, and a table of them, `toy.json`.

The table is a list of objects: {"start": 0, "end": 4711, "caption": "a cat", "sha256": "...", "size": [512, 768]}.
"""

import json

from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.index.exclusions import BadFile
from dreamfleet.datasets.index.sources import Listing, ScanOptions, Source, SourceImage
from dreamfleet.datasets.storage.storage import Storage


class ToySource(Source):
    """Reads folders with a `toy.json`, on disk and in buckets."""

    def matches(self, url: str) -> bool:
        return Storage(url).exists("toy.json")

    def scan(self, url: str, options: ScanOptions) -> Listing:
        folder = Storage(url.removeprefix("toy://"))
        try:
            entries = json.loads(folder.read_text("toy.json"))
        except json.JSONDecodeError as error:
            raise DataError(f"{folder.path('toy.json')} is not JSON ({error}). Write it again") from error
        images, bad = [], []
        for entry in entries:
            uri = f"toy://{folder.url}#{entry['start']}-{entry['end']}"
            if entry["start"] < entry["end"]:
                width, height = entry["size"]
                images.append(SourceImage(uri, entry.get("caption"), entry["sha256"], width, height))
            else:
                bad.append(BadFile(uri, "its byte range in the table is empty"))
        return Listing(images, bad)

    def read(self, uri: str) -> bytes:
        folder, _, place = uri.removeprefix("toy://").rpartition("#")
        start, end = map(int, place.split("-"))
        return Storage(folder).read_bytes("images.bin", start=start, end=end)
