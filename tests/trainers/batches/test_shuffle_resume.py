"""Tests that both orders of an epoch are the same after kills at any step and on any number of workers."""

from __future__ import annotations

import itertools
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from dreamfleet.trainers.batches.plan_share import PlanShare
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.build import Parts, assemble
from dreamfleet.trainers.run.run import run_worker

SHARDS, UNITS, STEPS = 4, 4, 12


def recipe_of(folder: Path, shuffle: str, **changes: Any) -> dict[str, Any]:
    """Return a recipe of 40 images in tar files of ten, with batches of two in four units."""
    shards = folder / "shards"
    if not shards.exists():
        photos = sorted(tiny.make_images(folder / "photos", 40).iterdir())
        shards.mkdir()
        for number in range(SHARDS):
            with tarfile.open(shards / f"{number}.tar", "w") as shard:
                for photo in photos[number * 10 : (number + 1) * 10]:
                    shard.add(photo, photo.name)
    return tiny.make_recipe(
        folder,
        **{
            "data__instance_data_dir": None,
            "data__class_prompt": None,
            "data__instance_prompt": None,
            "data__sets": [
                {"source": str(shards / f"{number}.tar"), "prompt": "a cat"} for number in range(SHARDS)
            ],
            "data__shuffle": shuffle,
            "data__shuffle_window": 4,
            "train__gradient_accumulation_steps": UNITS,
            **changes,
        },
    )


@pytest.fixture(scope="module", params=["full", "shards"])
def parts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    tree = recipe_of(tmp_path_factory.mktemp(request.param), request.param)
    return assemble(build_recipe(tree), DistributedContext(), keeps_files=False)


def order(parts: Parts, start: int, stop: int, *, world: int) -> list[int]:
    """Return the index rows that `world` workers use from one step to another, in the order of the units."""
    rows: dict[tuple[int, int], list[int]] = {}
    for rank in range(world):
        share = PlanShare(parts.feed.plan, UNITS, DistributedContext(rank, world))
        draws = share.all_draws(start, stop)
        for position in share.positions(start, stop):
            rows[position] = [next(draws).row for _ in share.draws(*position)]
    return [row for position in sorted(rows) for row in rows[position]]


def test_kills_at_any_step_and_other_numbers_of_workers_change_nothing(parts: Parts) -> None:
    whole = order(parts, 0, STEPS, world=1)
    assert sorted(whole[:40]) == list(range(40))  # five steps of eight images
    rng = np.random.default_rng(0)
    for _ in range(20):
        kills = sorted({0, STEPS, *rng.integers(1, STEPS, 3).tolist()})
        worlds = rng.integers(1, UNITS + 1, len(kills)).tolist()
        pieces = [
            order(parts, begin, end, world=world)
            for (begin, end), world in zip(itertools.pairwise(kills), worlds, strict=False)
        ]
        assert [row for piece in pieces for row in piece] == whole


def test_the_orders_are_those_of_their_names(parts: Parts) -> None:
    uris = parts.sets.instances.column("uri")
    shards = [uris[row].partition("#")[0] for row in order(parts, 0, 5, world=1)]
    changes = sum(one != two for one, two in itertools.pairwise(shards))
    # Within a window of four, an image leaves its shard's place only near the three borders.
    assert (changes <= 15) == (parts.recipe.data.shuffle == "shards")


@pytest.mark.parametrize("shuffle", ["full", "shards"])
def test_a_run_that_ended_early_continues_with_equal_losses(tmp_path: Path, shuffle: str) -> None:
    def losses(name: str, steps: int) -> list[float]:
        tree = recipe_of(
            tmp_path,
            shuffle,
            output_dir=str(tmp_path / name),
            train__max_train_steps=steps,
            train__checkpointing_steps=1,
        )
        run_worker(build_recipe(tree), resume=True)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    whole = losses("whole", 4)
    assert losses("pieces", 1) == whole[:1]
    assert losses("pieces", 3) == whole[:3]
    assert losses("pieces", 4) == whole
