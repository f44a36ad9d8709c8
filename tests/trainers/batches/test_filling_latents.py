"""Tests of runs that fill their latent cache while they train."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from dreamfleet.datasets.errors import RecipeError
from dreamfleet.datasets.serve.encoding import encoding_of
from dreamfleet.datasets.serve.latent_files import LatentCache, open_cache
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.batches import filling_latents
from dreamfleet.trainers.batches.filling_latents import FillingLatents
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.models.family import DiffusionModel
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.build import Parts, assemble
from dreamfleet.trainers.run.run import run_worker


def losses(tree: dict[str, Any]) -> list[float]:
    run_worker(build_recipe(tree), resume=True)
    lines = (Path(tree["output_dir"]) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def changes(folder: Path) -> dict[str, Any]:
    return {
        "data__cache": "while_training",
        "data__cache_dir": str(folder / "cache"),
        "data__random_flip": True,
        "train__max_train_steps": 6,
        "train__checkpointing_steps": 2,
    }


def cache_of(parts: Parts) -> LatentCache:
    data = parts.recipe.data
    return open_cache(Storage(str(data.cache_dir)), encoding_of(data, parts.model.encoder_hash))


@pytest.mark.parametrize("source", ["auto", "stream"])
def test_the_losses_are_those_of_latents_encoded_before(tmp_path: Path, source: str) -> None:
    plain = losses(
        tiny.make_recipe(
            tmp_path, data__random_flip=True, train__max_train_steps=6, output_dir=str(tmp_path / "plain")
        )
    )
    options = {**changes(tmp_path), "data__source": source}
    first = tiny.make_recipe(
        tmp_path, output_dir=str(tmp_path / "run"), **{**options, "train__max_train_steps": 2}
    )
    assert losses(first) == plain[:2]
    begun = cache_of(assemble(build_recipe(first), DistributedContext(), keeps_files=False))
    assert 0 < len(begun.entries) <= 8
    assert losses(tiny.make_recipe(tmp_path, output_dir=str(tmp_path / "run"), **options)) == plain
    # A run that reads all it needs from the filled cache.
    assert losses(tiny.make_recipe(tmp_path, output_dir=str(tmp_path / "again"), **options)) == plain


def test_missing_images_are_encoded_once_in_full_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tiny.make_recipe(
        tmp_path,
        data__instance_data_dir=str(tiny.make_images(tmp_path / "photos", 20)),
        **changes(tmp_path),
    )
    parts, sizes = assemble(build_recipe(tree), DistributedContext()), []
    encode = filling_latents.encode_all

    def encode_and_count(cuts: Sequence[np.ndarray], model: DiffusionModel) -> list[dict[str, np.ndarray]]:
        sizes.append(len(cuts))
        return encode(cuts, model)

    monkeypatch.setattr(filling_latents, "encode_all", encode_and_count)
    monkeypatch.setattr(filling_latents, "SHARD_IMAGES", 8)
    steps = 40
    batches = list(parts.feed.stream(0, steps))
    assert len(batches) == steps
    shown = {
        (parts.sets.instances.row(draw.row).sha256, images_of(parts).shown.flips(draw))
        for step in range(steps)
        for draw in parts.feed.plan.draws(step)
    }
    found = cache_of(parts)
    assert {(key.sha256, key.flip) for key in found.entries} == shown
    assert sum(sizes) == len(shown)  # each once
    assert sizes[0] == 8 and len(sizes) <= len(shown) / 8 + 2
    again = [parts.feed.batch(step) for step in range(3)]
    assert all(torch.equal(one["latents"], two["latents"]) for one, two in zip(batches, again, strict=False))


def test_an_undecodable_image_is_replaced_and_not_recorded(tmp_path: Path) -> None:
    folder = tiny.make_images(tmp_path / "photos", 4)
    tree = tiny.make_recipe(
        tmp_path, data__instance_data_dir=str(folder), **{**changes(tmp_path), "data__random_flip": False}
    )
    parts = assemble(build_recipe(tree), DistributedContext())
    (folder / "002.png").write_bytes(b"broken")
    assert len(list(parts.feed.stream(0, 8))) == 8
    assert [Path(bad.uri).name for bad in parts.feed.bad] == ["002.png"]
    assert len(cache_of(parts).entries) == 3


def images_of(parts: Parts) -> FillingLatents:
    images = parts.feed._halves[0][1]  # type: ignore[union-attr]
    assert isinstance(images, FillingLatents)
    return images


def test_a_cache_to_fill_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cache_dir"):
        build_recipe(tiny.make_recipe(tmp_path, data__cache="while_training"))
