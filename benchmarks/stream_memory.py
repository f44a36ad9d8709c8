"""Measures the memory of a training process and of the object store while it streams sets of different sizes.

    python benchmarks/stream_memory.py --images 1000 10000 100000

For each size, a process of its own opens the index of that many 32 x 32 PNG files as a rank does, and takes 500
batches of 8 images at 128 px from a stream on one Ray CPU. "own" is its memory besides mapped files and the object
store, beyond that after Ray was started; "store" is the part of the object store that was ever used. Both are lists:
after each 100 batches.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from index import make_images, own_mb
from measure import write_result

BATCHES, BATCH, SIDE = 500, 8, 128
EVERY = 100  # batches between two looks at the memory


def main() -> None:
    """Measure each number of images and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--stream", metavar="FILE", help="stream the images of an index, in this process")
    options = parser.parse_args()
    if options.stream:
        print(json.dumps(stream(options.stream)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as root:
        os.environ["DREAMFLEET_CACHE"] = root
        folder, _ = make_images(Path(root, "folder"), Path(root, "shards"), max(options.images))
        subprocess.run([sys.executable, "-c", WRITE, folder, root, *map(str, options.images)], check=True)
        for count in options.images:
            file = Path(root, f"{count}.arrow")
            done = subprocess.run(
                [sys.executable, __file__, "--stream", str(file)],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            rows.append({"images": count, **json.loads(done.stdout.splitlines()[-1])})
            print(rows[-1], flush=True)
    how = "python benchmarks/stream_memory.py --images " + " ".join(map(str, options.images))
    write_result("stream_memory", {"batches": BATCHES, "batch": BATCH, "side": SIDE, "rows": rows}, how=how)


WRITE = """
import sys
import pyarrow as pa
from dreamfleet.datasets.index.index import build_index
table = build_index(sys.argv[1], verify=False).table.combine_chunks()
for count in sys.argv[3:]:
    with pa.OSFile(f"{sys.argv[2]}/{count}.arrow", "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table[: int(count)])
"""


def stream(file: str) -> dict[str, object]:
    """Return the memory while 500 batches of the images of an index are streamed."""
    import pyarrow as pa
    import ray

    from dreamfleet.datasets.config import DataConfig
    from dreamfleet.datasets.index.index import Index
    from dreamfleet.datasets.plan import BatchPlan
    from dreamfleet.trainers.batches.feed import to_samples
    from dreamfleet.trainers.batches.sources import Shown, StreamedPixels

    ray.init(
        address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=10**9
    )
    before = own_mb()
    index = Index(pa.ipc.open_file(pa.memory_map(file)).read_all())
    data = DataConfig(instance_data_dir="-", resolution=SIDE, source="stream")
    samples, shown = to_samples(index), Shown(index, data, 0)
    plan = BatchPlan(index.numbers("concept"), seed=0, global_batch=BATCH, repeats=index.uses())
    images = StreamedPixels(index, shown, cell=8)
    images.follow(draw for step in range(BATCHES) for draw in plan.draws(step))
    own, store, start = [], [], time.perf_counter()
    for step in range(BATCHES):
        draws = plan.draws(step)
        assert images.take(draws)["pixels"].shape == (BATCH, 3, SIDE, SIDE)
        assert all(samples[draw.row].uri for draw in draws)
        if (step + 1) % EVERY == 0:
            own.append(round(own_mb() - before, 1))
            store.append(round(store_mb()))
    seconds = time.perf_counter() - start
    images.close()
    ray.shutdown()
    return {"own_mb": own, "store_mb": store, "images_per_second": round(BATCHES * BATCH / seconds, 1)}


def store_mb() -> float:
    """Return the part of the object store that was ever used: the allocated pages of its file in shared memory."""
    from ray._private.worker import _global_node

    raylet = _global_node.all_processes["raylet"][0].process.pid
    found = {}
    for link in Path(f"/proc/{raylet}/fd").iterdir():
        target = os.readlink(link)
        if "plasma" in target:
            status = link.stat()
            found[status.st_ino] = status.st_blocks * 512 / 2**20
    assert found, "the object store has no file in shared memory"
    return sum(found.values())


if __name__ == "__main__":
    main()
