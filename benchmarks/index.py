"""Measures how long the index of a set takes, and its memory, for folders and tar shards of tiny generated images.

    python benchmarks/index.py --images 1000 10000 100000
    python benchmarks/index.py --images 10000 --photos 2500 --only builders ranks

Each measurement is a process of its own, so that its peak memory is that of one set. "again" opens the same set without
a change. The images are 32 x 32 PNG files: the figures are the cost per image besides reading and decoding it.
"builders" compares one process with two local processes and with Ray on two CPUs, also for photos that are decoded.
"ranks" is what a rank of a training holds of the index: memory of its own, beyond the imports, with samples, views and
batch plan in use for 200 steps.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import pickle
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import write_result
from PIL import Image

PER_SHARD = 1000
BUILDERS = ("one process", "2 processes", "Ray, 2 CPUs")
RESULT = Path(__file__).parent / "results" / "index.json"


def main() -> None:
    """Measure each number of images and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="of ranks")
    parser.add_argument("--photos", type=int, default=2000)
    parser.add_argument("--only", nargs="+", default=["rows", "builders", "ranks"], help="what is measured")
    parser.add_argument(
        "--open", nargs=3, metavar=("URL", "PHASH", "BY"), help="measure one set, in this process"
    )
    parser.add_argument(
        "--hold", metavar="FILE", help="measure what a rank holds of an index, in this process"
    )
    options = parser.parse_args()
    if options.open:
        url, phash, by = options.open
        print(json.dumps(open_once(url, phash=phash == "1", by=by)))
        return
    if options.hold:
        print(json.dumps(hold_once(options.hold)))
        return
    found = stored(options.only)
    with tempfile.TemporaryDirectory() as root:
        place = Path(root)
        if "ranks" in options.only:
            found["ranks"] = [hold(count, place / f"{count}.arrow") for count in options.rows]
        for count in options.images:
            folder, shards = make_images(place / f"folder-{count}", place / f"shards-{count}", count)
            if "builders" in options.only:
                found["builders"] += compare_builders({"folder": folder, "tar": shards}, place, count)
            for name, url, phash in (
                ("folder", folder, "0"),
                ("tar", shards, "0"),
                ("folder, phash", folder, "1"),
            ) * ("rows" in options.only):
                cache = str(place / f"cache-{name}-{count}")
                found["rows"] += [
                    {"images": count, "set": name, "when": when, **run(url, phash, cache)}
                    for when in ("first", "again")
                ]
                print(found["rows"][-2:], flush=True)
        if "builders" in options.only and options.photos:
            photos = {"photos, phash": make_photos(place / "photos", options.photos)}
            found["builders"] += compare_builders(photos, place, options.photos)
    write_result("index", found, how="; ".join(dict.fromkeys(found["commands"].values())))


def stored(chosen: list[str]) -> dict[str, Any]:
    """Return the parts of the stored result, in whose place the parts that are measured come."""
    chosen = (
        sys.argv[sys.argv.index("--only") + 1 :] if "--only" in sys.argv else ["rows", "builders", "ranks"]
    )
    before = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    command = "python benchmarks/index.py " + " ".join(sys.argv[1:])
    commands = {
        **before.get("commands", {"rows": before.get("repeat", "")}),
        **dict.fromkeys(chosen, command),
    }
    parts = {part: [] if part in chosen else before.get(part, []) for part in ("rows", "builders", "ranks")}
    return {**parts, "commands": commands}


def compare_builders(sets: dict[str, str], place: Path, count: int) -> list[dict[str, Any]]:
    """Return seconds of the first index of sets by one process, two processes, and Ray with two CPUs, in turn."""
    rows = []
    for name, url in sets.items():
        row: dict[str, Any] = {"images": count, "set": name}
        for by in BUILDERS:
            seen = run(url, "1" if "phash" in name else "0", str(place / f"by-{by}-{name}-{count}"), by=by)
            row[f"seconds, {by}"] = seen["seconds"]
        rows.append(row)
        print(row, flush=True)
    return rows


def hold(count: int, file: Path) -> dict[str, float]:
    """Return what a rank holds of an index of images in a bucket, with captions of 60 characters."""
    import pyarrow as pa

    from dreamfleet.datasets.index.image_index import SCHEMA

    digests = sorted(hashlib.sha256(str(number).encode()).hexdigest() for number in range(count))
    values = {
        "id": [digest[:16] for digest in digests],
        "uri": [f"s3://bucket/photographs/of/many/things/{number:09d}.jpg" for number in range(count)],
        "caption": [
            f"a photograph of thing {number:09d}, outdoors, daylight, grass" for number in range(count)
        ],
        "sha256": digests,
    }
    same = {"width": 1280, "height": 1024, "concept": 0, "role": "instance", "repeats": 1, "fraction": 0.0}
    columns = [values.get(name, [same.get(name)] * count) for name in SCHEMA.names]
    table = pa.Table.from_arrays(
        [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA
    )
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    done = subprocess.run(
        [sys.executable, __file__, "--hold", str(file)], capture_output=True, text=True, check=True
    )
    found = {"images": count, "table_mb": round(table.nbytes / 1e6, 1), **json.loads(done.stdout)}
    print(found, flush=True)
    return found


def hold_once(file: str) -> dict[str, float]:
    """Return the memory of this process's own that it needs to find the samples of 200 steps of an index in a file."""
    import pyarrow as pa

    from dreamfleet.datasets.buckets import training_sizes
    from dreamfleet.datasets.config import DataConfig
    from dreamfleet.datasets.index.index import Index
    from dreamfleet.datasets.plan import BatchPlan
    from dreamfleet.trainers.batches.feed import to_samples
    from dreamfleet.trainers.batches.sources import Shown

    data = DataConfig(instance_data_dir="-")
    before = own_mb()
    table = pa.ipc.open_file(pa.memory_map(file)).read_all()
    if not hasattr(Index, "lazily"):  # ranks of earlier versions were sent the table
        table = pickle.loads(pickle.dumps(table))
    index = Index(table)
    samples = to_samples(index)
    assert all(sample.uri for sample in samples)
    shown = Shown(index, data, 0)
    concepts = index.numbers("concept") if hasattr(index, "numbers") else index.column("concept")
    sizes = training_sizes(index.sizes(), data)
    plan = BatchPlan(concepts, seed=0, global_batch=8, repeats=index.uses())
    for step in range(200):
        for draw in plan.draws(step):
            assert shown.of(draw).size == sizes[draw.row] and samples[draw.row].id
    return {"own_mb": round(own_mb() - before, 1)}


def own_mb() -> float:
    """Return the memory of this process that is not mapped from files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def run(url: str, phash: str, cache: str, *, by: str = "one process") -> dict[str, float]:
    """Open a set in a process of its own; return seconds and peak memory in MB beyond that of the imports."""
    done = subprocess.run(
        [sys.executable, __file__, "--open", url, phash, by],
        env={**os.environ, "DREAMFLEET_CACHE": cache},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def open_once(url: str, *, phash: bool, by: str) -> dict[str, float]:
    """Return seconds, CPU seconds and memory of opening a set in this process; ``by``: who reads the images."""
    from dreamfleet.datasets.index.set_store import open_set

    more: dict[str, Any] = {}
    if by == "Ray, 2 CPUs":
        import ray

        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        warm = ray.remote(lambda: time.sleep(1))
        ray.get([warm.remote() for _ in range(2)])  # as in a cluster that has run something before
    elif by == "2 processes":
        from dreamfleet.datasets.processing.mapping import InProcesses

        more = {"mapper": InProcesses(2)}
    before, start, cpu = peak_mb(), time.perf_counter(), time.process_time()
    found = open_set(url, verify=False, phash=phash, **more)
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


def make_photos(folder: Path, count: int) -> str:
    """Write JPEG files of 1280 x 1024 pixels, all different, with the cost of photos."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        if number % 100 == 0:
            cells = rng.integers(0, 256, (64, 80, 3), dtype=np.uint8)
            photo = Image.fromarray(cells).resize((1280, 1024), Image.Resampling.BICUBIC)
        photo.putpixel((number % 100, 0), (255, 0, 0))
        photo.save(folder / f"{number:05d}.jpg", quality=90)
    return str(folder)


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
