"""Measures `data browse` on a generated index: seconds until the page can be used, for filters, and for an edit.

Seconds, and the MiB of memory that the process grew by; the table is in memory already. The rows name 1000 small images
that exist, so thumbnails are decoded as usual; indexing itself is measured elsewhere.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from measure import write_result
from PIL import Image

from dreamfleet.cluster.browse.image_table import COLUMNS, ImageTable
from dreamfleet.cluster.browse.page import BrowsePage
from dreamfleet.datasets.index.edits import EditTable
from dreamfleet.trainers.recipe import build_recipe

FILES = 1000
TAGS = [f"tag {number}" for number in range(2000)]
SHAPES = [(512, 512), (768, 512), (512, 768), (1280, 1024), (300, 260)]


def make_table(folder: Path, rows: int) -> pa.Table:
    """Return an index of ``rows`` images; the files behind it are links to a few images."""
    rng = np.random.default_rng(0)
    for number in range(FILES):
        width, height = SHAPES[number % len(SHAPES)]
        pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:07d}.jpg", quality=85)
    for number in range(FILES, rows):
        (folder / f"{number:07d}.jpg").symlink_to(folder / f"{number % FILES:07d}.jpg")
    shapes = [SHAPES[number % FILES % len(SHAPES)] for number in range(rows)]
    picks = rng.zipf(1.3, (rows, 12)) % len(TAGS)
    values: dict[str, list[Any]] = {
        "uri": [f"{folder}/{number:07d}.jpg" for number in range(rows)],
        "width": [width for width, _ in shapes],
        "height": [height for _, height in shapes],
        "caption": [", ".join(dict.fromkeys(TAGS[pick] for pick in line)) for line in picks.tolist()],
        "sha256": [f"{number:064x}" for number in range(rows)],
        "concept": [0] * rows,
        "mask": [None] * rows,
        "mask_sha256": [None] * rows,
        "phash": [None] * rows,
    }
    types = {"width": pa.int32(), "height": pa.int32(), "concept": pa.int32()}
    return pa.table({name: pa.array(values[name], types.get(name, pa.string())) for name in COLUMNS})


def measure(rows: int) -> dict[str, float]:
    """Return seconds of each operation of the page, and memory in MiB."""
    with tempfile.TemporaryDirectory() as place:
        folder, found = Path(place) / "set", {}
        folder.mkdir()
        table = make_table(folder, rows)
        recipe = build_recipe(
            {
                "data": {"instance_data_dir": str(folder), "enable_bucket": True, "resolution": 512},
                "method": {"name": "native"},
                "output_dir": "-",
            },
            source="benchmark",
            folder=".",
        )

        def load() -> ImageTable:
            return ImageTable(
                table, data=recipe.data, urls=[str(folder)], edit_tables=[EditTable(str(folder))]
            )

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        def timed(name: str, action: Any) -> Any:
            start = time.perf_counter()
            result = action()
            found[name] = round(time.perf_counter() - start, 3)
            return result

        page = timed("load the table", lambda: BrowsePage(recipe, load, title="set", modes={}))
        first = {"action": "page", "filter": {}, "start": 0, "count": 60}
        rows_shown = timed("first page of rows", lambda: page.answer(first))["rows"]
        timed("60 thumbnails", lambda: [page.find_image(f"thumb/{row['row']}/0") for row in rows_shown])
        found["first screen"] = round(sum(found.values()), 3)
        timed("tags, sizes and states", lambda: page.answer({"action": "facets"}))
        timed("filter by tag", lambda: page.answer({**first, "filter": {"tag": "tag 7"}}))
        timed("filter by text", lambda: page.answer({**first, "filter": {"text": "g 77"}}))
        timed("last page", lambda: page.answer({**first, "start": rows - 30}))
        one = {"action": "edit", "rows": [5], "do": {"add": "new"}}
        timed("edit one image", lambda: page.answer(one))
        every = {"action": "edit", "filter": {"tag": "tag 7"}, "do": {"add": "more"}}
        timed("edit all of a tag", lambda: page.answer(every))
        found["images of that tag"] = len(page.history.done[-1][0])
        found["MiB"] = round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
        return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    numbers = parser.parse_args().rows
    found = {str(count): measure(count) for count in numbers}
    write_result(
        "browse",
        {"seconds_by_rows": found},
        how=f"python benchmarks/browse.py --rows {' '.join(map(str, numbers))}",
    )
