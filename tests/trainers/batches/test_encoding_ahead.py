"""Tests of actors that encode the coming images of a run that fills its cache."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from test_filling_latents import cache_of, changes, images_of, losses

from dreamfleet.datasets.errors import ModelError, RecipeError
from dreamfleet.datasets.serve import encoding_actors
from dreamfleet.datasets.serve.cache import Job
from dreamfleet.datasets.serve.encoding_actors import EncodingActor, EncodingActors, Given
from dreamfleet.datasets.serve.latent_files import Key
from dreamfleet.trainers.batches import filling_latents
from dreamfleet.trainers.batches.encoding_ahead import MOST_TRIES, EncodingAhead
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.models.family import DiffusionModel
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.build import Parts, assemble

ACTORS = {"data__cache_resources": {"CPU": 0.5}, "scaling": {"num_workers": 1}}


def job(number: int, *, side: int = 256) -> Job:
    return Job(f"{number:064d}", "", False, side, side, f"{number}.png", "")


class OneActor:
    """Stands for the actors: takes two batches, and encodes a batch when it is asked for results."""

    def __init__(self, *, fails: Sequence[str] = ()) -> None:
        self.given: list[list[Job]] = []
        self.queue: list[list[Job]] = []
        self.fails = fails

    def __contains__(self, key: Key) -> bool:
        return any(one.key == key for batch in self.queue for one in batch)

    @property
    def is_idle(self) -> bool:
        return not self.queue

    def has_room(self) -> bool:
        return len(self.queue) < 2

    def give(self, jobs: list[Job]) -> None:
        self.given.append(jobs)
        self.queue.append(jobs)

    def finished(self) -> Iterator[Given]:
        for jobs in self.queue[:1]:
            del self.queue[0]
            yield Given(
                jobs,
                [None if one.sha256 in self.fails else {"mean": np.zeros(1, np.float32)} for one in jobs],
            )


def numbers(batches: list[list[Job]]) -> list[list[int]]:
    return [[int(one.sha256) for one in batch] for batch in batches]


def test_coming_images_of_one_size_fill_batches_in_order_and_each_is_given_once() -> None:
    actor = OneActor()
    ahead = EncodingAhead(actor, enough=100)  # type: ignore[arg-type]
    done = {job(3).key}
    for number in [0, 100, 1, 1, 2, 3, *range(4, 12), 101, 0, 12]:
        ahead.add(job(number, side=64 if number >= 100 else 256))
    ahead.give(lambda one: one.key in done, is_all=False)
    # The second batch waits: neither size fills one, and the actor has something to do.
    assert numbers(actor.given) == [[0, 1, 2, 4, 5, 6, 7, 8]]
    assert job(8).key in ahead and job(9).key not in ahead
    for number in range(13, 18):
        ahead.add(job(number))
    ahead.give(lambda one: one.key in done, is_all=False)
    assert numbers(actor.given)[1:] == [[9, 10, 11, 12, 13, 14, 15, 16]]
    done |= {one.key for one, _ in ahead.results()}
    assert len(done) == 9
    done |= {one.key for one, _ in ahead.results()}
    ahead.give(lambda one: one.key in done, is_all=True)
    assert numbers(actor.given)[2:] == [[100, 101], [17]]


def test_images_that_an_actor_lost_are_given_again_and_then_left_to_the_worker() -> None:
    actor = OneActor(fails=[job(0).sha256])
    ahead = EncodingAhead(actor, enough=100)  # type: ignore[arg-type]
    ahead.add(job(0))
    ahead.add(job(1))
    found: list[tuple[Job, Any]] = []
    for _ in range(5):
        ahead.give(lambda one: any(one == got for got, _ in found), is_all=True)
        found.extend(ahead.results())
    assert numbers(actor.given) == [[0, 1], *[[0]] * (MOST_TRIES - 1)]
    assert [int(one.sha256) for one, _ in found] == [1]


def test_actors_are_needed_until_an_epoch_is_encoded() -> None:
    ahead = EncodingAhead(OneActor(), enough=3)  # type: ignore[arg-type]
    for number in (0, 1, 2):
        ahead.add(job(number))
    ahead.give(lambda one: True, is_all=False)
    assert not ahead.is_needed
    ahead.add(job(3))
    ahead.give(lambda one: False, is_all=False)
    assert ahead.is_needed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data__cache_resources": {"CPU": 1}}, "without cache: while_training"),
        ({"data__cache_resources": {"CPU": 0}}, "greater than 0"),
        (
            {"data__cache": "while_training", "data__cache_dir": "c", "data__cache_resources": {"CPU": 1}},
            "num_workers: 1",
        ),
    ],
)
def test_recipes_that_cannot_use_the_resources(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_recipe(tiny.make_recipe(tmp_path, **changed))


# ---- on Ray --------------------------------------------------------------------------------------------


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of images of each batch that the training worker encodes itself."""
    sizes: list[int] = []
    encode = filling_latents.encode_all

    def encode_and_count(cuts: Sequence[np.ndarray], model: DiffusionModel) -> list[dict[str, np.ndarray]]:
        sizes.append(len(cuts))
        return encode(cuts, model)

    monkeypatch.setattr(filling_latents, "encode_all", encode_and_count)
    return sizes


def parts_of(folder: Path, **changed: Any) -> Parts:
    photos = str(tiny.make_images(folder / "photos", 40)) if not (folder / "photos").exists() else ""
    tree = tiny.make_recipe(
        folder,
        **{
            **changes(folder),
            **ACTORS,
            "data__instance_data_dir": photos or str(folder / "photos"),
            **changed,
        },
    )
    return assemble(build_recipe(tree), DistributedContext())


def wait_until_loaded(parts: Parts) -> None:
    others = images_of(parts)._others
    assert others is not None
    import ray

    for place in others.actors._places:
        assert ray.get(place.ready, timeout=300) == ""


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_actors_encode_ahead_with_equal_losses_and_a_killed_one_is_replaced(
    tmp_path: Path, two_cpus: None, own: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    plain = losses(tiny.make_recipe(tmp_path, output_dir=str(tmp_path / "plain"), train__max_train_steps=6))
    options = {**changes(tmp_path), **ACTORS, "data__random_flip": False}
    run = tiny.make_recipe(tmp_path, output_dir=str(tmp_path / "run"), **options)
    assert losses(run) == plain

    parts = parts_of(tmp_path, data__cache_dir=str(tmp_path / "other"))
    expected = parts_of(tmp_path, data__cache_dir=str(tmp_path / "expected"), data__cache_resources=None)
    wanted = list(expected.feed.stream(0, 60))
    own.clear()
    stream = parts.feed.stream(0, 60)
    got = [next(stream)]  # not loaded yet: this worker encodes
    assert own
    wait_until_loaded(parts)
    got += [next(stream) for _ in range(8)]
    others = images_of(parts)._others
    assert others is not None
    pid = ray.get(others.actors._places[0].actor.__ray_call__.remote(lambda actor: os.getpid()), timeout=60)
    os.kill(pid, signal.SIGKILL)
    got += list(stream)
    assert all((one["latents"] == two["latents"]).all() for one, two in zip(got, wanted, strict=True))
    assert cache_of(parts).entries.keys() == cache_of(expected).entries.keys()
    assert images_of(parts)._others is None  # ended
    keys = list(cache_of(expected).entries)
    assert sum(own) < len(keys)  # the others were encoded by actors
    pairs = zip(cache_of(parts).read(keys), cache_of(expected).read(keys), strict=True)
    assert all(np.array_equal(one[name], two[name]) for one, two in pairs for name in ("mean", "std"))
    assert images_of(parts).waits["encode"] > 0


def dying(marker: str) -> type[Any]:
    """Return the class of an actor that dies with its first batch, and later encodes every image as zeros."""

    class Dying(EncodingActor):  # local, so that Ray sends the class itself instead of the name of this file
        def load(self) -> str:
            return ""

        def encode(self, jobs: Sequence[Job]) -> list[Any]:
            if not os.path.exists(marker):
                open(marker, "w").close()
                os._exit(1)
            return [{"mean": np.zeros(1, np.float32)} for _ in jobs]

    return Dying


def start(make: Any = dict, **changed: Any) -> EncodingActors:
    options = {"count": 1, "resources": {"CPU": 0.5}, "environment": {}, **changed}
    return EncodingActors(make, data=tiny_data(), **options)


def tiny_data() -> Any:
    from dreamfleet.datasets.config import DataConfig

    return DataConfig(instance_data_dir="photos", resolution=32)


def wait_for_room(actors: EncodingActors) -> None:
    import time

    for _ in range(1200):
        if actors.has_room() or not actors._places:
            return
        time.sleep(0.1)
    raise AssertionError("no actor is loaded")


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_the_images_of_a_dead_actor_come_back_and_another_takes_its_place(
    tmp_path: Path, two_cpus: None, caplog: pytest.LogCaptureFixture
) -> None:
    actors = start(actor=dying(str(tmp_path / "died")))
    wait_for_room(actors)
    batches = [[job(0), job(1)], [job(2)]]
    for batch in batches:
        actors.give(batch)
    assert job(2).key in actors
    actors.wait_for(job(2).key, seconds=300)
    lost = list(actors.finished())
    assert [given.jobs for given in lost] == batches and not any(any(given.latents) for given in lost)
    assert job(2).key not in actors and "started again" in caplog.text
    wait_for_room(actors)
    actors.give(batches[0])
    actors.wait_for(job(0).key, seconds=300)
    (given,) = actors.finished()
    assert all(one is not None for one in given.latents)
    actors.close()


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_without_a_model_or_free_resources_the_worker_encodes(
    two_cpus: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Any:
        raise ModelError("another VAE here")

    actors = start(broken)
    wait_for_room(actors)
    assert not actors.has_room() and "another VAE here" in caplog.text
    actors.close()
    monkeypatch.setattr(encoding_actors, "TOLD_SECONDS", 0.0)
    actors = start(resources={"CPU": 64})
    assert not actors.has_room()
    assert "the training worker encodes until the cluster has CPU: 64 free" in caplog.text
    actors.close()
