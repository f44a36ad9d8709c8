"""Measures how long the index of a set takes, and its memory, for folders and tar shards of tiny generated images.

    python benchmarks/index.py --images 1000 10000 100000

Each measurement is a process of its own, so that its peak memory is that of one set. "again" opens the same set without
a change. The images are 32 x 32 PNG files: the figures are the cost per image besides reading and decoding it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from measure import write_result
from PIL import Image

PER_SHARD = 1000


def main() -> None:
    """Measure each number of images and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--open", nargs=2, metavar=("URL", "PHASH"), help="measure one set, in this process")
    options = parser.parse_args()
    if options.open:
        print(json.dumps(open_once(options.open[0], phash=options.open[1] == "1")))
        return
    rows = []
    with tempfile.TemporaryDirectory() as root:
        place = Path(root)
        for count in options.images:
            folder, shards = make_images(place / f"folder-{count}", place / f"shards-{count}", count)
            for name, url, phash in (
                ("folder", folder, "0"),
                ("tar", shards, "0"),
                ("folder, phash", folder, "1"),
            ):
                cache = str(place / f"cache-{name}-{count}")
                rows += [
                    {"images": count, "set": name, "when": when, **run(url, phash, cache)}
                    for when in ("first", "again")
                ]
                print(rows[-2:], flush=True)
    write_result(
        "index",
        {"rows": rows},
        how="python benchmarks/index.py --images " + " ".join(map(str, options.images)),
    )


def run(url: str, phash: str, cache: str) -> dict[str, float]:
    """Open a set in a process of its own; return seconds and peak memory in MB beyond that of the imports."""
    done = subprocess.run(
        [sys.executable, __file__, "--open", url, phash],
        env={**os.environ, "DREAMFLEET_CACHE": cache},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def open_once(url: str, *, phash: bool) -> dict[str, float]:
    """Return seconds, CPU seconds and memory of opening a set in this process."""
    from dreamfleet.datasets.index.set_store import open_set

    before, start, cpu = peak_mb(), time.perf_counter(), time.process_time()
    found = open_set(url, verify=False, phash=phash)
    assert found.counts.bad == 0
    seconds = time.perf_counter() - start
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "images_per_cpu_second": round(found.counts.seen / (time.process_time() - cpu)),
        "peak_mb": round(peak_mb() - before),
        "index_mb": round(os.path.getsize(found.address) / 1e6, 2),
    }


def peak_mb() -> float:
    """Return the peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def make_images(folder: Path, shards: Path, count: int) -> tuple[str, str]:
    """Write images with captions into a folder and into shards; their times are old enough to be remembered."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    shards.mkdir()
    for first in range(0, count, PER_SHARD):
        with tarfile.open(shards / f"{first // PER_SHARD:05d}.tar", "w") as tar:
            for number in range(first, min(count, first + PER_SHARD)):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
                    buffer, "PNG", compress_level=0
                )
                for ending, data in (
                    (".png", buffer.getvalue()),
                    (".txt", f"image {number}, a tag".encode()),
                ):
                    (folder / f"{number:07d}{ending}").write_bytes(data)
                    info = tarfile.TarInfo(f"{number:07d}{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    for path in (*folder.iterdir(), *shards.iterdir()):
        os.utime(path, (1_000_000, 1_000_000))
    return str(folder), str(shards)


if __name__ == "__main__":
    main()
