"""Measures images per second of a torch DataLoader, webdataset and dreamfleet's stream, with equal pixels.

The images are JPEG files of 1280 x 1024 pixels, made from the photos of the DreamBooth dataset. Every loader decodes,
resizes and crops them with the same function, in as many processes, and delivers batches of float32 in [-1, 1], the
input of a VAE; the batches are compared. The DataLoader and webdataset convert to float32 in their workers, as
scripts with torchvision's `ToTensor` and `Normalize` do; `data_loader_uint8` leaves that to the training process.
Rounds of the loaders alternate. The rates include the start of each loader's processes, except those of Ray: they
serve all streams of a run, and have decoded a batch before (`cold_seconds_to_first_batch`). The others' start in each
round, as in each epoch.

Ray's processes have the priority of the others (it gives them a lower one, which counts only beside other load).

CPU seconds are those of this process and of all processes that it started; they do not depend on other load on the
machine, and are the limit of the rate on a machine whose cores are all busy.
"""

from __future__ import annotations

import io
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from measure import spread, write_result
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dreamfleet.datasets.images.images import to_tensor_range
from dreamfleet.datasets.images.masks import ImageView, cut_image
from dreamfleet.datasets.index.index import Index, build_index
from dreamfleet.datasets.serve.stream import ImageStream
from dreamfleet.trainers.batches.vae_encoding import to_tensors

ROOT = Path(__file__).parent.parent
DREAMBENCH = Path(os.environ.get("DREAMBENCH", ROOT.parent / "shared/data/dreambench"))
ROUNDS, DRAWS = int(os.environ.get("ROUNDS", "3")), int(os.environ.get("DRAWS", "1024"))
FILES, SIZE, BATCH = 256, (1280, 1024), 8
CORES, EVERY_SIDE = (1, 2), (64, 512, 1024)
SIDES = tuple(map(int, os.environ.get("SIDES", "64 512 1024").split()))
FILTERS = ("scaled_lanczos", "lanczos")  # the default, and the filter of versions before it

Batches = Generator[torch.Tensor, None, None]


def make_photos(folder: Path) -> None:
    """Write JPEG files of different crops of the photos."""
    folder.mkdir()
    files, rng = sorted(DREAMBENCH.glob("*/*.jpg")), np.random.default_rng(0)
    for number in range(FILES):
        with Image.open(files[number % len(files)]) as opened:
            photo = opened.convert("RGB")
        scale = min(photo.width / SIZE[0], photo.height / SIZE[1]) * rng.uniform(0.7, 1)
        width, height = int(SIZE[0] * scale), int(SIZE[1] * scale)
        left, top = int(rng.integers(photo.width - width + 1)), int(rng.integers(photo.height - height + 1))
        photo = photo.crop((left, top, left + width, top + height)).resize(SIZE, Image.Resampling.BICUBIC)
        photo.save(folder / f"{number:04d}.jpg", quality=92)


def read(path: str, side: int, filter_name: str) -> np.ndarray:
    """Decode and crop one file: uint8 [H,W,3]."""
    return cut_image(Path(path).read_bytes(), ImageView(0), uri=path, size=side, resampling=filter_name)


class Photos(Dataset[torch.Tensor]):
    """The draws as a map-style dataset, as float32 [3,H,W] or uint8 [H,W,3]."""

    def __init__(self, paths: list[str], side: int, filter_name: str, *, as_float: bool) -> None:
        self.paths, self.side, self.filter, self.as_float = paths, side, filter_name, as_float

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> torch.Tensor:
        torch.set_num_threads(1)
        pixels = read(self.paths[number], self.side, self.filter)
        if self.as_float:
            return torch.from_numpy(to_tensor_range(pixels))
        return torch.from_numpy(pixels.copy())  # Pillow's pixels are read-only


class Loaders:
    """The loaders by name; each yields the batches of the same draws."""

    def __init__(self, index: Index, draws: list[int], shards: Path, cores: int) -> None:
        uris = index.column("uri")
        self.index, self.draws, self.shards, self.cores = index, draws, shards, cores
        self.paths = [uris[row] for row in draws]

    def data_loader(self, side: int, filter_name: str) -> Batches:
        """torch's DataLoader, whose workers return float32."""
        photos = Photos(self.paths, side, filter_name, as_float=True)
        yield from DataLoader(photos, batch_size=BATCH, num_workers=self.cores)

    def data_loader_uint8(self, side: int, filter_name: str) -> Batches:
        """torch's DataLoader, whose workers return uint8."""
        photos = Photos(self.paths, side, filter_name, as_float=False)
        for batch in DataLoader(photos, batch_size=BATCH, num_workers=self.cores):
            yield (
                batch.permute(0, 3, 1, 2)
                .to(torch.float32, memory_format=torch.contiguous_format)
                .div_(127.5)
                .sub_(1)
            )

    def webdataset(self, side: int, filter_name: str) -> Batches:
        """webdataset's pipeline over tar files that hold the draws in order (one shard per worker)."""
        import webdataset as wds

        def decode(sample: dict[str, Any]) -> torch.Tensor:
            cut = cut_image(
                sample["jpg"], ImageView(0), uri=sample["__key__"], size=side, resampling=filter_name
            )
            return torch.from_numpy(to_tensor_range(cut))

        shards = [str(path) for path in sorted(self.shards.glob(f"{self.cores}-*.tar"))]
        photos = (
            wds.WebDataset(shards, shardshuffle=False)
            .map(decode)
            .batched(BATCH, collation_fn=torch.stack, partial=True)
        )
        yield from wds.WebLoader(photos, batch_size=None, num_workers=self.cores)

    def dreamfleet(self, side: int, filter_name: str) -> Batches:
        """The stream of dreamfleet, as the feed of a training consumes it."""
        views = [ImageView(row) for row in self.draws]
        with ImageStream(self.index, views, resolution=side, resampling=filter_name) as stream:
            batch = []
            for pixels in stream:
                batch.append(pixels)
                if len(batch) == BATCH:
                    yield to_tensors(batch, cell=8)["pixels"]
                    batch = []


NAMES = ("data_loader", "data_loader_uint8", "webdataset", "dreamfleet")


def make_shards(folder: Path, paths: list[str], cores: int) -> None:
    """Write the draws as tar files, of which each worker reads one; alternate batches, so that the order is equal."""
    for worker in range(cores):
        with tarfile.open(folder / f"{cores}-{worker}.tar", "w") as shard:
            for number, path in enumerate(paths):
                if number // BATCH % cores == worker:
                    data, info = Path(path).read_bytes(), tarfile.TarInfo(f"{number:06d}.jpg")
                    info.size = len(data)
                    shard.addfile(info, io.BytesIO(data))


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and all its descendants, the ended ones included."""
    total = 0.0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
        if process is me:
            total += times.children_user + times.children_system
    return total


def seconds_to_first_batch(batches: Batches) -> float:
    """Take one batch, and return the seconds until it was there."""
    began = time.perf_counter()
    next(batches)
    seconds = time.perf_counter() - began
    batches.close()
    return seconds


def measure(make: Callable[[], Batches], expected: torch.Tensor) -> dict[str, float]:
    """Run a loader once; return its images per second, also per CPU second, and seconds to the first batch."""
    cpu, began, images, first = cpu_seconds(), time.perf_counter(), 0, 0.0
    for batch in make():
        if not images:
            first = time.perf_counter() - began
            assert torch.equal(batch, expected), "other pixels than the function itself"
        images += len(batch)
    seconds = time.perf_counter() - began
    assert images == DRAWS, images
    return {
        "images_per_second": images / seconds,
        "images_per_cpu_second": images / (cpu_seconds() - cpu),
        "seconds_to_first_batch": first,
    }


def measure_cores(cores: int, index: Index, shards: Path) -> dict[str, Any]:
    """Measure all loaders with a number of processes, which run on as many cores."""
    import ray

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    os.environ.update(RAY_worker_niceness="0")  # the name that Ray reads
    ray.init(address="local", num_cpus=cores, include_dashboard=False, log_to_driver=False)
    draws = np.random.default_rng(1).integers(0, len(index), DRAWS).tolist()
    loaders = Loaders(index, draws, shards, cores)
    make_shards(shards, loaders.paths, cores)
    found: dict[str, Any] = {
        "cold_seconds_to_first_batch": {
            name: seconds_to_first_batch(getattr(loaders, name)(SIDES[0], FILTERS[0])) for name in NAMES
        }
    }
    for side in SIDES:
        for filter_name in FILTERS:
            first = [
                torch.from_numpy(to_tensor_range(read(p, side, filter_name))) for p in loaders.paths[:BATCH]
            ]
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
            for _ in range(ROUNDS):
                for name in NAMES:
                    make = getattr(loaders, name)
                    runs[name].append(
                        measure(lambda make=make, a=side, b=filter_name: make(a, b), torch.stack(first))
                    )
            found[f"{side}px {filter_name}"] = summarize(runs)
            print(cores, side, filter_name, found[f"{side}px {filter_name}"]["dreamfleet_to"], flush=True)
    ray.shutdown()
    return found


def summarize(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return the spread of each figure, and the ratios of dreamfleet's rates to the others', by rounds."""
    figures = {
        name: {key: spread([one[key] for one in rounds]) for key in rounds[0]}
        for name, rounds in runs.items()
    }
    ratios = {
        name: {
            key: spread(
                [mine[key] / other[key] for mine, other in zip(runs["dreamfleet"], rounds, strict=True)]
            )
            for key in ("images_per_second", "images_per_cpu_second")
        }
        for name, rounds in runs.items()
        if name != "dreamfleet"
    }
    return {"loaders": figures, "dreamfleet_to": ratios}


def main() -> None:
    """Run all measurements and write the result."""
    if not DREAMBENCH.is_dir():
        sys.exit(f"no photos at {DREAMBENCH}: set DREAMBENCH to the DreamBooth dataset's folder")
    torch.set_num_threads(1)
    mine = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_photos(folder / "photos")
        index = build_index(str(folder / "photos"), verify=False)
        results = {}
        for cores in CORES:
            os.sched_setaffinity(0, mine)
            results[f"{cores} cores"] = measure_cores(cores, index, folder)
    part = "" if SIDES == EVERY_SIDE else "_" + "_".join(map(str, SIDES))
    write_result(
        f"data{part}",
        {"draws": DRAWS, "files": FILES, "size": SIZE, **results},
        how="python benchmarks/data.py",
    )


if __name__ == "__main__":
    main()
