"""Tests that streamed and resident images give the same losses, and that bad images do not end a run."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tiny_models import tiny_family

from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.index.index import build_index
from dreamfleet.datasets.plan import Draw
from dreamfleet.trainers.batches.sources import Shown, StreamedPixels
from dreamfleet.trainers.batches.vae_encoding import read_pixels
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.build import assemble
from dreamfleet.trainers.run.run import run_worker


def losses(folder: Path, **changes: Any) -> list[float]:
    tree = tiny.make_recipe(
        folder,
        train__gradient_accumulation_steps=2,
        train__checkpointing_steps=2,
        data__random_flip=True,
        data__center_crop=False,
        **changes,
    )
    run_worker(build_recipe(tree), resume=True)
    lines = [
        json.loads(line) for line in (Path(tree["output_dir"]) / "metrics.jsonl").read_text().splitlines()
    ]
    return [line["loss"] for line in lines]


@pytest.mark.cluster
def test_streaming_executes_the_same_plan_as_a_resident_set(tmp_path: Path, two_cpus: None) -> None:
    resident = losses(tmp_path, output_dir=str(tmp_path / "resident"))
    first = losses(
        tmp_path, output_dir=str(tmp_path / "stream"), data__source="stream", train__max_train_steps=2
    )
    assert first == pytest.approx(resident[:2], rel=1e-5)
    both = losses(tmp_path, output_dir=str(tmp_path / "stream"), data__source="stream")
    assert both == pytest.approx(resident, rel=1e-5)


@pytest.mark.cluster
def test_streamed_buckets_and_masks_equal_resident_ones(tmp_path: Path, two_cpus: None) -> None:
    changes = {
        **tiny.SHAPES,
        "data__instance_data_dir": str(tiny.make_shapes(tmp_path / "shapes")),
        "method": {"name": "native"},
    }
    resident = losses(tmp_path, output_dir=str(tmp_path / "resident"), **changes)
    streamed = losses(tmp_path, output_dir=str(tmp_path / "stream"), data__source="stream", **changes)
    assert streamed == pytest.approx(resident, rel=1e-5)


@pytest.mark.cluster
def test_images_can_be_requested_while_the_plan_is_read(tmp_path: Path, two_cpus: None) -> None:
    """Test ``take`` while the thread of the stream still reads draws from a slow plan."""
    index = build_index(tiny.make_images(tmp_path / "pictures", 3))
    data = DataConfig(instance_data_dir=str(tmp_path), resolution=tiny.RESOLUTION)
    images = StreamedPixels(index, Shown(index, data, 0), cell=4)
    draws = [Draw(row, 0) for row in (2, 0, 1)]

    def slowly() -> Iterator[Draw]:
        for draw in draws:
            time.sleep(0.2)
            yield draw

    images.follow(slowly())
    time.sleep(0.1)
    taken = torch.cat([images.take(draws[:2])["pixels"], images.take(draws[2:])["pixels"]])
    images.close()
    expected = torch.stack([torch.from_numpy(read_pixels(index.row(draw.row).uri, data)) for draw in draws])
    assert torch.equal(taken, expected)


@pytest.mark.cluster
def test_an_unreadable_image_is_replaced_and_reported(tmp_path: Path, two_cpus: None) -> None:
    """Test with an image truncated after indexing: large datasets are not decoded before the run."""
    folder = tiny.make_images(tmp_path / "pictures", 4)
    broken = folder / "002.png"
    data = broken.read_bytes()
    parts = assemble(build_recipe(tiny.make_recipe(tmp_path, data__source="stream")), DistributedContext())
    broken.write_bytes(data[: len(data) // 2])
    batches = parts.feed.stream(0)
    for step in range(4):
        expected = [draw.row for draw in parts.feed.plan.draws(step)]
        assert len(next(batches)["pixels"]) == len(expected)
    batches.close()
    assert [(Path(bad.uri).name, "002.png" in bad.reason) for bad in parts.feed.bad] == [("002.png", False)]
    assert parts.feed.bad[0].reason


@pytest.mark.cluster
def test_a_replacement_image_has_its_own_sizes_and_caption(tmp_path: Path, two_cpus: None) -> None:
    tiny_family("sdxl").save_folder(tmp_path / "model")
    folder = tmp_path / "pictures"
    folder.mkdir()
    sizes = [(40, 48), (44, 64), (52, 40), (56, 60)]
    for number, size in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}")
    tree = tiny.make_recipe(
        tmp_path,
        data__source="stream",
        data__center_crop=False,
        data__random_flip=True,
        method__name="native",
    )
    whole, parts = (assemble(build_recipe(tree), DistributedContext()) for _ in range(2))
    uris = parts.sets.instances.column("uri")
    broken = uris.index(str(folder / "1.png"))
    after = int(Path(uris[(broken + 1) % len(uris)]).stem)
    replaced = [draw.row == broken for step in range(6) for draw in parts.feed.plan.draws(step)]
    assert 0 < sum(replaced) < len(replaced)
    expected = [whole.feed.batch(step) for step in range(6)]
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:300])
    with closing(parts.feed.stream(0, 6)) as batches:
        got = list(batches)

    def values_of(batches: list[dict[str, Any]], key: str) -> list[Any]:
        return [value.tolist() if key == "time_ids" else value for batch in batches for value in batch[key]]

    width, height = sizes[after]
    for ids, true_ids, prompt, true_prompt, instead in zip(
        values_of(got, "time_ids"),
        values_of(expected, "time_ids"),
        values_of(got, "prompts"),
        values_of(expected, "prompts"),
        replaced,
        strict=True,
    ):
        if instead:
            assert ids[:2] == [height, width] and ids[4:] == [32, 32] and prompt == f"picture {after}"
            assert 0 <= ids[2] <= max(0, round(32 * height / width) - 32)  # the crop lies within the image
            assert 0 <= ids[3] <= max(0, round(32 * width / height) - 32)
        else:
            assert (ids, prompt) == (true_ids, true_prompt)
    assert all(torch.equal(one["noise"], two["noise"]) for one, two in zip(got, expected, strict=True))


@pytest.mark.cluster
def test_a_mean_over_streamed_images_equals_the_resident_one(tmp_path: Path, two_cpus: None) -> None:
    """Test also that an image that cannot be decoded and its replacement have weight 0 in the mean."""
    from dreamfleet.trainers.models.formats.aesthetic import read_aesthetic

    changes = {
        "method": {"name": "aesthetic_gradients", "aesthetic_steps": 1},
        "train__max_train_steps": None,
        "train__num_train_epochs": 1,
        "train__train_batch_size": 2,
    }
    tree = tiny.make_recipe(tmp_path, data__source="stream", **changes)
    run_worker(build_recipe(tree), resume=True)
    resident = tiny.make_recipe(tmp_path, output_dir=str(tmp_path / "resident"), **changes)
    run_worker(build_recipe(resident), resume=True)
    vectors = [
        read_aesthetic(next((Path(str(recipe["output_dir"])) / "exports").glob("*.pt")))
        for recipe in (tree, resident)
    ]
    assert torch.equal(*vectors)

    parts = assemble(build_recipe({**tree, "output_dir": str(tmp_path / "broken")}), DistributedContext())
    broken = Path(parts.sets.instances.column("uri")[1])
    broken.write_bytes(broken.read_bytes()[:200])
    batches = parts.feed.stream(0, parts.schedule.total)
    counted = torch.cat([batch["counted"] for batch in batches])
    assert counted.sum() == len(parts.sets.instances) - 1
    assert [bad.uri for bad in parts.feed.bad] == [str(broken)]
