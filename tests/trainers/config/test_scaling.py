"""Tests the number of workers as a range, and the resources of its workers."""

from pathlib import Path
from typing import Any

import pytest
import tiny

from dreamfleet.datasets.errors import RecipeError, ResourceError
from dreamfleet.trainers.config.scaling import ScalingConfig, refuse_impossible, worker_resources
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.build import count_units


def scaling(workers: Any, **changes: Any) -> ScalingConfig:
    return ScalingConfig.model_validate({"num_workers": workers, **changes})


@pytest.mark.parametrize(
    ("workers", "smallest", "largest", "pool", "words"),
    [(0, 1, 1, 0, "1"), (3, 3, 3, 3, "3"), ([1, 4], 1, 4, 4, "1 to 4"), ([2, 2], 2, 2, 2, "2")],
)
def test_a_number_and_a_range(workers: Any, smallest: int, largest: int, pool: int, words: str) -> None:
    found = scaling(workers)
    assert (found.min_workers, found.max_workers, found.pool_size, found.words) == (
        smallest,
        largest,
        pool,
        words,
    )
    assert found.is_elastic == (smallest < largest) and found.is_local == (workers == 0)


@pytest.mark.parametrize("workers", [[0, 2], [3, 2], [-1, 2], [1], [1, 2, 3], -1, "many"])
def test_no_range_of_workers(workers: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"scaling.num_workers"):
        build_recipe(tiny.make_recipe(tmp_path, scaling={"num_workers": workers}))


def test_a_recipe_with_a_range_can_be_written_and_read(tmp_path: Path) -> None:
    recipe = build_recipe(tiny.make_recipe(tmp_path, scaling={"num_workers": [1, 3]}))
    again = build_recipe(recipe.model_dump(mode="json"))
    assert again.scaling == recipe.scaling and again.scaling.max_workers == 3


def test_workers_have_the_share_of_the_largest_number_and_need_room_for_the_smallest() -> None:
    nodes = [{"CPU": 8.0}]
    share = worker_resources(scaling([2, 4]), nodes)
    assert share.threads == 2 and share.resources == worker_resources(scaling(4), nodes).resources
    refuse_impossible(scaling([2, 4]), {"CPU": 4.0}, nodes)
    with pytest.raises(ResourceError, match=r"3 to 4 .*room for 2"):
        refuse_impossible(scaling([3, 4]), {"CPU": 4.0}, nodes)
    gpus = [{"CPU": 8.0, "GPU": 2.0}]
    assert worker_resources(scaling([2, 4]), gpus).uses_gpu
    with pytest.raises(ResourceError, match=r"3 to 4 need a GPU each"):
        worker_resources(scaling([3, 4]), gpus)


def test_the_units_of_a_step_do_not_depend_on_the_workers_of_the_moment(tmp_path: Path) -> None:
    changes = {"scaling": {"num_workers": [1, 4]}, "train__gradient_accumulation_steps": 3}
    recipe = build_recipe(tiny.make_recipe(tmp_path, **changes))
    assert {count_units(recipe, DistributedContext(0, world)) for world in (1, 2, 3, 4)} == {12}
