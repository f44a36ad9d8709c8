"""Test the cache written by actors on a local Ray, from disk and between buckets, and its use in a run."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from servers import S3Server, s3_server  # noqa: F401  (a fixture)

from dreamfleet.datasets.errors import DataError, RunFailed, UserError
from dreamfleet.datasets.index.file_hashes import known_files
from dreamfleet.datasets.index.index import build_index
from dreamfleet.datasets.serve.cache import Pool, encode_shards, jobs_of, make_shards
from dreamfleet.datasets.serve.encoding import encoding_of
from dreamfleet.datasets.serve.latent_files import LatentCache, open_cache, write_manifest
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.driver.build_cache import cache_latents
from dreamfleet.trainers.models.family import load_model
from dreamfleet.trainers.recipe import Recipe, build_recipe
from dreamfleet.trainers.run.run import run_worker
from dreamfleet.trainers.run.vae_encoder import VaeEncoder

pytestmark = [pytest.mark.cluster, pytest.mark.s3]
ONE_CPU = {"scaling": {"num_workers": 2, "resources_per_worker": {"CPU": 1}}}  # one thread, as in the tests


@pytest.fixture(scope="module")
def local_ray(s3_server: S3Server) -> Iterator[Any]:  # noqa: F811
    import ray

    with pytest.MonkeyPatch.context() as patch:
        s3_server.set_environment(patch)  # actors receive these variables, as on a cluster
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield ray
        ray.shutdown()


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    return build_recipe(tiny.make_recipe(folder, data__random_flip=True, **changes))


def opened(recipe: Recipe) -> LatentCache:
    model = load_model(recipe.model, {"vae"})
    return open_cache(Storage(str(recipe.data.cache_dir)), encoding_of(recipe.data, model.encoder_hash))


def losses(recipe: Recipe) -> list[float]:
    run_worker(recipe)
    lines = (Path(recipe.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def same(first: LatentCache, second: LatentCache) -> bool:
    keys = sorted(key for key, entry in first.entries.items() if not entry.reason)
    assert sorted(first.entries) == sorted(second.entries) and keys
    pairs = zip(first.read(keys), second.read(keys), strict=True)
    return all(np.array_equal(one[name], other[name]) for one, other in pairs for name in first.names)


def test_actors_encode_the_same_latents_as_one_process(tmp_path: Path, local_ray: Any) -> None:
    images = tiny.make_images(tmp_path / "pictures", 20)
    (images / "cut.png").write_bytes((images / "001.png").read_bytes()[:200])
    here = recipe_of(tmp_path, data__cache_dir=str(tmp_path / "here"))
    there = recipe_of(tmp_path, data__cache_dir=str(tmp_path / "there"), **ONE_CPU)
    message: list[tuple[int, int]] = []
    made = [cache_latents(here), cache_latents(there, progress=lambda *counts: message.append(counts))]
    assert [(one.encoded, [Path(uri).name for uri in one.left_out]) for one in made] == [
        (40, ["cut.png"])
    ] * 2
    assert message[-1] == (42, 42) and [done for done, _ in message] == sorted(done for done, _ in message)
    assert same(opened(here), opened(there))
    assert cache_latents(there).reused == 40


def test_images_and_cache_in_a_bucket(
    tmp_path: Path,
    local_ray: Any,
    s3_server: S3Server,  # noqa: F811
) -> None:
    root = s3_server.new_folder()
    bucket = Storage(root)
    for image in sorted(tiny.make_images(tmp_path / "pictures", 9).iterdir()):
        bucket.write_bytes(f"pictures/{image.name}", image.read_bytes())
    place = {"data__instance_data_dir": f"{root}/pictures", "data__cache_dir": f"{root}/latents"}
    assert cache_latents(recipe_of(tmp_path, **place, **ONE_CPU)).encoded == 18
    known = known_files(recipe_of(tmp_path, **place).data)
    assert known is not None and known(f"{root}/pictures/000.png") is not None
    bucket.write_bytes("pictures/000.png", bucket.read_bytes("pictures/001.png"))
    known = known_files(recipe_of(tmp_path, **place).data)
    assert known is not None and known(f"{root}/pictures/000.png") is None, "other contents, another tag"
    bucket.write_bytes("pictures/000.png", (tmp_path / "pictures/000.png").read_bytes())
    tiny.make_images(tmp_path / "more", 1, seed=3)
    bucket.write_bytes("pictures/new.png", (tmp_path / "more/000.png").read_bytes())
    with pytest.raises(DataError, match=r"2 of 20 .*new\.png"):
        run_worker(recipe_of(tmp_path, **place, output_dir=str(tmp_path / "early")))
    made = cache_latents(recipe_of(tmp_path, **place, **ONE_CPU))
    assert (made.encoded, made.reused) == (2, 18)
    own = {**place, "data__cache_dir": None}
    runs = [
        losses(recipe_of(tmp_path, **changes, output_dir=str(tmp_path / name)))
        for name, changes in (
            ("own", own),
            ("resident", place),
            ("lazily", {**place, "data__source": "stream"}),
        )
    ]
    assert runs[0] == runs[1] == runs[2]


def test_decoding_by_other_tasks_and_errors_of_actors(tmp_path: Path, local_ray: Any) -> None:
    recipe = recipe_of(tmp_path, data__cache_dir=str(tmp_path / "apart"))
    index = build_index(str(tmp_path / "pictures"))
    shards = make_shards(jobs_of(index, recipe.data), workers=1)
    model = load_model(recipe.model, {"vae"})
    # Ray would fuse stages with equal CPU requests.
    apart = Pool(1, {"CPU": 0.5}, {}, decode_apart=True)
    encoding = encoding_of(recipe.data, model.encoder_hash)
    folder = write_manifest(Storage(str(recipe.data.cache_dir)), encoding)
    asked = functools.partial(VaeEncoder, recipe.model, device="cpu", threads=1)
    encode = functools.partial(asked, encoder_hash=model.encoder_hash)
    done = list(encode_shards(shards, folder, encode, data=recipe.data, pool=apart))
    assert sum(one.encoded for one in done) == 12
    here = recipe_of(tmp_path, data__cache_dir=str(tmp_path / "here"))
    cache_latents(here)
    assert same(opened(here), opened(recipe))

    foreign = functools.partial(asked, encoder_hash="0" * 16)
    with pytest.raises(UserError, match="another VAE"):
        list(encode_shards(shards, folder, foreign, data=recipe.data, pool=apart))
    with pytest.raises(RunFailed, match=r"TypeError.* same command"):
        list(encode_shards(shards, folder, dict, data=recipe.data, pool=apart))
    Path(index.column("uri")[0]).unlink()
    with pytest.raises(UserError, match="does not exist"):
        list(encode_shards(shards, folder, encode, data=recipe.data, pool=apart))
