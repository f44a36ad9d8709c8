"""Measures `data prepare` and `data cache` by the size of a set, and the memory that unusually large input takes.

    python benchmarks/preparation.py rates --images 1000 10000
    python benchmarks/preparation.py memory

Each part replaces its figures in `results/preparation.json`; `preparation_nodes.py` adds three nodes against one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measure import RESULTS, write_result
from PIL import Image

ROWS = 1_000_000
LONG_LINE = 100 * 10**6


def main() -> None:
    """Measure one part and write it into the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", default="rates", choices=["rates", "memory", "scan"])
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument(
        "--share", type=float, default=0.25, help="share of a core for each node; 0: no limit"
    )
    parser.add_argument("--set", help="with scan: the set to scan, in this process")
    parser.add_argument(
        "--only", choices=list(WORKS), help="with rates: one command; the other rows are kept"
    )
    options = parser.parse_args()
    if options.part == "scan":
        print(json.dumps(scan(options.set)))
        return
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "rates": lambda: measure_rates(options.images, only=options.only),
        "memory": measure_memory,
    }
    words = " ".join(sys.argv[1:]) or options.part
    store(options.part, parts[options.part](), f"python benchmarks/preparation.py {words}")


def store(part: str, figures: dict[str, Any], command: str) -> None:
    """Replace the figures of a part in the result, with the command that repeats them."""
    path = RESULTS / "preparation.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    kept = {name: before[name] for name in ("rates", "memory", "nodes") if name in before}
    figures["repeat"] = command
    write_result("preparation", {**kept, part: figures}, how="see each part")


# ---- rates by the size of a set ----------------------------------------------------------------------


def measure_rates(counts: list[int], *, only: str | None = None) -> dict[str, Any]:
    """Return images per second of `prepare` and `cache` for sets of several sizes, and the slopes of their seconds.

    With ``only`` one of them is measured, and the other rows of the result are kept.
    """
    rows = []
    with tempfile.TemporaryDirectory() as root:
        for count in counts:
            images = make_images(Path(root) / f"images-{count}", count, (96, 96))
            for name in [only] if only else WORKS:
                began = time.perf_counter()
                WORKS[name](images, f"{root}/{name}-{count}")
                seconds = time.perf_counter() - began
                rows.append({"what": name, "images": count, "seconds": round(seconds, 2)})
                rows[-1]["per_second"] = round(count / seconds, 1)
                print(rows[-1], flush=True)
    measured = {(row["what"], row["images"]) for row in rows}
    path = RESULTS / "preparation.json"
    if only and path.exists():
        before = json.loads(path.read_text()).get("rates", {}).get("rows", [])
        rows += [row for row in before if (row["what"], row["images"]) not in measured]
    rows.sort(key=lambda row: (row["images"], row["what"]))
    return {"rows": rows, "slopes": {name: slope(rows, name) for name in WORKS}}


def slope(rows: list[dict[str, Any]], what: str) -> float | None:
    """Return the exponent of time over images between the smallest and the largest set: 1 is linear."""
    found = [row for row in rows if row["what"] == what]
    if len(found) < 2:
        return None
    first, last = found[0], found[-1]
    ratio = math.log(last["seconds"] / first["seconds"]) / math.log(last["images"] / first["images"])
    return round(ratio, 3)


def prepare_set(images: str, out: str) -> None:
    """Prepare a set at 64 px with a process for each core."""
    run_command("data", "prepare", images, out, "--size", "64")


def cache_set(images: str, out: str) -> None:
    """Encode a set at 64 px with the pocket model's VAE, in one process."""
    overrides = [
        f"data.instance_data_dir={images}", f"data.cache_dir={out}", "data.resolution=64", "scaling.num_workers=0",
    ]  # fmt: skip
    run_command("data", "cache", "recipes/demo.yaml", *overrides)


WORKS: dict[str, Callable[[str, str], None]] = {"prepare": prepare_set, "cache": cache_set}


def run_command(*words: str) -> None:
    """Run a `dreamfleet` command in a process of its own."""
    command = [sys.executable, "-m", "dreamfleet.cluster.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr[-2000:]}")


def make_images(folder: Path, count: int, size: tuple[int, int]) -> str:
    """Write smooth JPEG images, each different."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        cells = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        cells.resize(size, Image.Resampling.BILINEAR).save(folder / f"{number:06d}.jpg", quality=90)
    return str(folder)


# ---- memory for large row groups and long lines ------------------------------------------------------


def measure_memory() -> dict[str, Any]:
    """Return the peak memory of scanning a row group of a million images, and a table with a line of 100 MB."""
    found = {}
    with tempfile.TemporaryDirectory() as root:
        for name, url in (("row group", write_row_group(root)), ("long line", write_long_line(root))):
            command = [sys.executable, __file__, "scan", "--set", url]
            environment = {**os.environ, "DREAMFLEET_CACHE": f"{root}/cache"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            figures = json.loads(done.stdout.splitlines()[-1])
            found[name] = {"file_mb": round(os.path.getsize(url) / 1e6, 1), **figures}
            print(name, found[name], flush=True)
    return found


def write_row_group(root: str) -> str:
    """Write a Parquet file with one row group of a million small images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    seeds = Path(make_images(Path(root) / "seeds", 64, (8, 8)))
    contents = [path.read_bytes() for path in sorted(seeds.iterdir())]
    path = f"{root}/group.parquet"
    schema = pa.schema([("image", pa.binary()), ("text", pa.string())])
    columns = [
        pa.array([contents[number % 64] for number in range(ROWS)], pa.binary()),
        pa.array([f"image {number}" for number in range(ROWS)]),
    ]
    table = pa.Table.from_arrays(columns, schema=schema)
    pq.write_table(table, path, row_group_size=ROWS, use_dictionary=False, compression="none")
    assert pq.ParquetFile(path).num_row_groups == 1
    return path


def write_long_line(root: str) -> str:
    """Write a table of 1,000 addresses with a line of 100 MB in its middle."""
    path = f"{root}/long.jsonl"
    with open(path, "w") as file:
        for number in range(1000):
            if number == 500:
                file.write(json.dumps({"url": "x.png", "text": "x" * LONG_LINE}) + "\n")
            file.write(json.dumps({"url": f"{number}.png", "text": "a cat"}) + "\n")
    return path


def scan(url: str) -> dict[str, Any]:
    """Return seconds and memory of listing a set in this process: its peak beyond the imports, and what stays."""
    from dreamfleet.datasets.index.sources import ScanOptions, find_source

    source = find_source(url)  # imports what it needs
    before, began, peak = memory_mb(), time.perf_counter(), Peak()
    found = source.scan(url, ScanOptions())
    bad = [one.reason for one in found.bad]
    return {
        "images": len(found.images),
        "bad": len(bad),
        "reason": bad[0] if bad else None,
        "seconds": round(time.perf_counter() - began, 1),
        "peak_mb": round(peak.end() - before),
        "kept_mb": round(memory_mb() - before),
    }


def memory_mb() -> float:
    """Return the memory of this process without pages of files that it maps, which the system can drop."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) / 1024


class Peak(threading.Thread):
    """Samples the memory of this process until it is asked for the peak."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.largest, self._ended = memory_mb(), threading.Event()
        self.start()

    def run(self) -> None:
        """Sample it every 20 ms."""
        while not self._ended.wait(0.02):
            self.largest = max(self.largest, memory_mb())

    def end(self) -> float:
        """Return the peak in MB."""
        self._ended.set()
        return max(self.largest, memory_mb())


if __name__ == "__main__":
    main()
