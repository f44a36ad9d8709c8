"""Test the latent cache: cached latents equal an uncached run's; no stale or incomplete ones are used."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from typer.testing import CliRunner

from dreamfleet.cluster.cli import program
from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.errors import DataError, RecipeError, StorageError, UserError
from dreamfleet.datasets.index.file_hashes import known_files
from dreamfleet.datasets.index.index import build_index
from dreamfleet.datasets.index.set_store import SETS
from dreamfleet.datasets.serve.cache import encode_shards, jobs_of, make_shards
from dreamfleet.datasets.serve.encoding import encoding_of
from dreamfleet.datasets.serve.latent_files import open_cache, write_manifest
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.batches.cached_latents import CachedLatents
from dreamfleet.trainers.batches.plan_share import PlanShare
from dreamfleet.trainers.batches.sources import ResidentLatents
from dreamfleet.trainers.batches.vae_encoding import encode_cuts, to_tensors
from dreamfleet.trainers.config.model import ModelConfig
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.driver.build_cache import CacheMade, cache_latents
from dreamfleet.trainers.launch import fit
from dreamfleet.trainers.models.family import load_model
from dreamfleet.trainers.recipe import Recipe, build_recipe
from dreamfleet.trainers.run.build import assemble
from dreamfleet.trainers.run.run import run_worker

NATIVE = {"method": {"name": "native"}}


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    """Return a recipe whose cache is in the folder; ``data__cache_dir=None`` encodes during the run."""
    return build_recipe(tiny.make_recipe(folder, **{"data__cache_dir": str(folder / "cache"), **changes}))


def losses(recipe: Recipe) -> list[float]:
    run_worker(recipe, resume=True)
    lines = (Path(recipe.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def counts(made: CacheMade) -> tuple[int, int]:
    return made.encoded, made.reused


class Flat:
    """An encoder that maps an image to a constant, the colour of its first pixel, and counts the images."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, cuts: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
        self.seen += len(cuts)
        made = []
        for cut in cuts:
            shape = (3, cut.shape[0] // 4, cut.shape[1] // 4)
            mean = np.broadcast_to(cut[0, 0, :3].astype(np.float32)[:, None, None], shape)
            made.append({"mean": mean, "std": mean / 255})
        return made


# ---- a cached run equals a run that encodes ----------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"data__random_flip": True},
        {**tiny.SHAPES, **NATIVE, "data__random_flip": True, "data__instance_data_dir": "shapes"},
    ],
    ids=["flips", "buckets-masks-flips"],
)
def test_cached_losses_are_equal_bit_for_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    if "data__instance_data_dir" in changes:
        changes = {
            **changes,
            "data__instance_data_dir": str(tiny.make_shapes(tmp_path / "shapes")),
            "train__max_train_steps": 8,
        }
    made = cache_latents(recipe_of(tmp_path, **changes))
    assert made.encoded == 2 * made.pictures and not made.left_out
    sources = {}
    for name, source in (("own", None), ("auto", "auto"), ("stream", "stream")):
        more = {"data__cache_dir": None} if source is None else {"data__source": source}
        sources[name] = losses(recipe_of(tmp_path, output_dir=str(tmp_path / name), **changes, **more))
    assert sources["own"] == sources["auto"] == sources["stream"]
    assert len(set(sources["own"])) == len(sources["own"])


def test_small_sets_are_resident_and_large_ones_read_on_use(tmp_path: Path) -> None:
    cache_latents(recipe_of(tmp_path, data__resolution=64))

    def kind(**changes: Any) -> type:
        parts = assemble(recipe_of(tmp_path, data__resolution=64, **changes), DistributedContext())
        return type(parts.feed._halves[0][1])

    assert kind() is ResidentLatents
    assert kind(data__source="stream") is CachedLatents
    images = tiny.make_images(tmp_path / "many", 150)
    many = {"data__instance_data_dir": str(images), "data__resident_limit_mb": 1}
    cache_latents(recipe_of(tmp_path, data__resolution=64, **many))  # 150 images x 8 KiB of latents
    assert kind(**many) is CachedLatents
    assert kind(**many, data__source="resident") is ResidentLatents


def test_a_run_trains_on_the_cached_latents(tmp_path: Path) -> None:
    """Test that the feed returns the latents of the cache, which are modified here to detect encoding."""
    recipe = recipe_of(tmp_path, data__latent_sampling="deterministic")
    cache_latents(recipe)
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir() and path.name != SETS)
    for shard in (*folder.glob("latents/*"), *folder.glob("keys/*")):
        shard.unlink()
    index = build_index(str(tmp_path / "pictures"))
    list(
        encode_shards(
            make_shards(jobs_of(index, recipe.data), workers=1), Storage(folder), Flat4, data=recipe.data
        )
    )
    for source in ("auto", "stream"):
        changed = recipe.data.model_copy(update={"source": source})
        parts = assemble(recipe.model_copy(update={"data": changed}), DistributedContext())
        scale = parts.model.vae.config.scaling_factor
        assert torch.equal(parts.feed.batch(0)["latents"], torch.full((2, 4, 8, 8), 3.0) * scale)


class Flat4:
    """An encoder that maps every image to latents of the constant 3, shape (4, 8, 8)."""

    def __call__(self, cuts: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
        return [dict.fromkeys(("mean", "std"), np.full((4, 8, 8), 3, np.float32)) for _ in cuts]


@pytest.mark.parametrize("source", ["auto", "stream"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, source: str) -> None:
    cache_latents(recipe_of(tmp_path))
    straight = losses(recipe_of(tmp_path, output_dir=str(tmp_path / "straight"), data__source=source))
    changes = {"output_dir": str(tmp_path / "halves"), "data__source": source}
    losses(recipe_of(tmp_path, **changes, train__max_train_steps=2))
    assert losses(recipe_of(tmp_path, **changes)) == straight


def test_latents_do_not_depend_on_the_rest_of_the_batch() -> None:
    """Test that each image encodes to equal latents in any batch.

    On a CPU, a plain encoder call gives a 64-pixel image different last bits for another batch size.
    """
    model = load_model(ModelConfig(pretrained_model_name_or_path="pocket"), {"vae"})
    cuts = list(np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8))
    together = encode_cuts(cuts, model)
    for name, every in together.items():
        for position, cut in enumerate(cuts):
            assert torch.equal(encode_cuts([cut], model)[name][0], every[position])
    with torch.no_grad():
        pixels = to_tensors(cuts, cell=4)["pixels"]
        assert torch.equal(model.encode_images(pixels)[0], together["mean"])


def test_any_rank_reads_its_share(tmp_path: Path) -> None:
    cache_latents(recipe_of(tmp_path))
    for source in ("auto", "stream"):
        parts = assemble(recipe_of(tmp_path, data__source=source), DistributedContext())
        feed = parts.feed
        whole = feed.batch(0)["latents"]
        shares = []
        for rank in (0, 1):
            feed.share = PlanShare(feed.plan, 2)
            shares.append(feed.batch(0, rank)["latents"])
        assert torch.equal(torch.cat(shares), whole)


def test_half_the_bytes_in_fp16(tmp_path: Path) -> None:
    exact, half = (
        cache_latents(recipe_of(tmp_path)),
        cache_latents(recipe_of(tmp_path, data__cache_precision="fp16")),
    )
    assert exact.encoded == half.encoded and exact.cache != half.cache

    def stored(made: CacheMade) -> int:
        return sum(
            column["total_uncompressed_size"]
            for file in Path(made.cache, "latents").iterdir()
            for column in columns_of(file)
            if column["path_in_schema"] in ("mean", "std")
        )

    assert stored(half) < 0.6 * stored(exact)
    own = losses(recipe_of(tmp_path, data__cache_dir=None, output_dir=str(tmp_path / "own")))
    read = losses(recipe_of(tmp_path, data__cache_precision="fp16", output_dir=str(tmp_path / "read")))
    assert read != own
    assert read == pytest.approx(own, rel=1e-2)


def columns_of(file: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    return [column for group in pq.read_metadata(file).to_dict()["row_groups"] for column in group["columns"]]


def test_class_images_are_cached(tmp_path: Path) -> None:
    tiny.make_images(tmp_path / "class", 4, seed=5)
    prior = {
        "method": {"name": "dreambooth", "with_prior_preservation": True, "num_class_images": 4},
        "data__class_data_dir": str(tmp_path / "class"),
    }
    instances_only = cache_latents(recipe_of(tmp_path))
    early = losses(recipe_of(tmp_path, output_dir=str(tmp_path / "early"), **prior))
    assert counts(cache_latents(recipe_of(tmp_path, **prior))) == (4, instances_only.encoded)
    own = losses(recipe_of(tmp_path, output_dir=str(tmp_path / "own"), data__cache_dir=None, **prior))
    assert losses(recipe_of(tmp_path, output_dir=str(tmp_path / "late"), **prior)) == early == own


# ---- images to encode again -------------------------------------------------------------------------


def test_only_new_and_changed_images_are_encoded(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    assert counts(cache_latents(recipe)) == (6, 0)
    assert counts(cache_latents(recipe)) == (0, 6)
    images = tmp_path / "pictures"
    tiny.make_images(tmp_path / "others", 2, seed=9)
    (tmp_path / "others/000.png").rename(images / "new.png")
    (tmp_path / "others/001.png").replace(images / "003.png")
    with pytest.raises(DataError, match=r"2 of 7 .*(new|003)\.png.*data cache RECIPE"):
        assemble(recipe, DistributedContext())
    assert counts(cache_latents(recipe)) == (2, 5)
    (images / "moved").mkdir()
    (images / "000.png").rename(images / "moved/copy.png")
    assert counts(cache_latents(recipe)) == (0, 7)
    assemble(recipe, DistributedContext())
    assert counts(cache_latents(recipe_of(tmp_path, data__random_flip=True))) == (7, 7)


def test_a_changed_mask_is_encoded_again(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, data__alpha_mask=True)
    Image.new("L", (48, 48), 100).save(tiny.make_images(tmp_path / "pictures", 6) / "000.mask.png")
    assert counts(cache_latents(recipe)) == (6, 0)
    half = Image.new("L", (48, 48), 0)
    half.paste(255, (0, 0, 24, 48))
    half.save(tmp_path / "pictures/000.mask.png")
    with pytest.raises(DataError, match=r"1 of 6 .*000\.png"):
        assemble(recipe, DistributedContext())
    assert counts(cache_latents(recipe)) == (1, 5)


def test_another_model_or_size_is_refused_and_cached_separately(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    first = cache_latents(recipe)
    other = str(tiny.make_tiny_model(tmp_path / "other", seed=1))
    for changes, message in (
        ({"model__pretrained_model_name_or_path": other}, r"vae [0-9a-f]{16} .*[0-9a-f]{16}"),
        ({"data__resolution": 40}, r"resolution 32 .*40"),
        ({"data__alpha_mask": True}, r"alpha_mask False .*True"),
        ({"data__cache_precision": "fp16"}, r"precision float32 .*fp16"),
        (
            {
                "data__enable_bucket": True,
                "data__min_bucket_reso": 16,
                "data__bucket_reso_steps": 16,
                **NATIVE,
            },
            r"buckets none .*min_bucket_reso=16 .*bucket_reso_steps=16",
        ),
    ):
        changed = recipe_of(tmp_path, **changes)
        with pytest.raises(DataError, match=rf"{message}.*data cache RECIPE"):
            assemble(changed, DistributedContext())
        made = cache_latents(changed)
        assert counts(made) == (6, 0) and made.cache != first.cache
        assemble(changed, DistributedContext())
    assert counts(cache_latents(recipe)) == (0, 6)


def test_the_cache_depends_on_the_vae_encoder_only(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    recipe = recipe_of(tmp_path)
    cache_latents(recipe)
    weights = tmp_path / "model/vae/diffusion_pytorch_model.safetensors"

    def change(name: str) -> None:
        tensors = load_file(weights)
        tensors[name] = tensors[name] + 0.001
        save_file(tensors, weights, metadata={"format": "pt"})

    change("decoder.conv_out.bias")
    assert counts(cache_latents(recipe)) == (0, 6)
    change("encoder.conv_out.bias")
    assert counts(cache_latents(recipe)) == (6, 0)


def test_a_renamed_cache_folder_is_refused(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    manifest = Path(cache_latents(recipe).cache) / "manifest.json"
    message = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**message, "vae": "0" * 16}))
    for use in (lambda: assemble(recipe, DistributedContext()), lambda: cache_latents(recipe)):
        with pytest.raises(DataError, match=r"vae 0{16} \(here .*Remove"):
            use()
    manifest.write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json"):
        cache_latents(recipe)


def test_an_interrupted_cache_is_continued(tmp_path: Path) -> None:
    """Test that only the unfinished shard is encoded again, and that all files are complete afterwards."""
    tiny.make_images(tmp_path / "pictures", 30)
    recipe = recipe_of(tmp_path)
    message: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        message.append((done, total))
        if len(message) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_latents(recipe, progress=stop)
    assert message == [(8, 30), (16, 30)]
    assert counts(cache_latents(recipe)) == (14, 16)
    own = losses(recipe_of(tmp_path, data__cache_dir=None, output_dir=str(tmp_path / "own")))
    assert losses(recipe) == own


def test_incomplete_and_missing_files_are_written_again(tmp_path: Path) -> None:
    tiny.make_images(tmp_path / "pictures", 24)
    recipe = recipe_of(tmp_path)
    folder = Path(cache_latents(recipe).cache)
    torn, lost, unmarked = sorted(folder.glob("latents/*"))
    torn.write_bytes(torn.read_bytes()[:-100])
    lost.unlink()
    (folder / "keys" / unmarked.name).unlink()
    with pytest.raises(DataError, match="no latents"):
        assemble(recipe, DistributedContext())
    assert counts(cache_latents(recipe)) == (24, 0)
    assert len(list(folder.glob("latents/*"))) == 3, "the same work is the same files"
    assemble(recipe, DistributedContext())


def test_a_flipped_bit_is_detected(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    (file,) = Path(cache_latents(recipe).cache).glob("latents/*")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(StorageError, match=f"{file.name} .*data cache"):
        assemble(recipe, DistributedContext())
    lazily = assemble(recipe_of(tmp_path, data__source="stream"), DistributedContext())
    with pytest.raises(StorageError, match=f"{file.name} .*data cache"):
        [lazily.feed.batch(step) for step in range(3)]


def test_unreadable_images_are_named_and_left_out(tmp_path: Path) -> None:
    images = tiny.make_images(tmp_path / "pictures", 6)
    own = recipe_of(tmp_path, data__cache_dir=None, output_dir=str(tmp_path / "own"))
    whole = (images / "002.png").read_bytes()
    (images / "cut.png").write_bytes(whole[: len(whole) // 2])
    (images / "note.jpg").write_text("not a picture")
    recipe = recipe_of(tmp_path)
    for encoded in (6, 0):
        made = cache_latents(recipe)
        assert made.encoded == encoded
        assert {Path(uri).name: "truncated" in why for uri, why in made.left_out.items()} == {
            "cut.png": True,
            "note.jpg": False,
        }
    assert losses(recipe) == losses(own)
    summary = json.loads((Path(recipe.output_dir) / "summary.json").read_text())
    assert [Path(bad["uri"]).name for bad in summary["bad_files"]] == ["cut.png", "note.jpg"]


def test_an_image_that_changes_while_encoding_is_an_error(tmp_path: Path) -> None:
    images = tiny.make_images(tmp_path / "pictures", 2)
    data = DataConfig(instance_data_dir=str(images), resolution=32)
    shards = make_shards(jobs_of(build_index(str(images)), data), workers=1)
    (images / "000.png").write_bytes((images / "001.png").read_bytes())
    folder = write_manifest(Storage(tmp_path / "cache"), encoding_of(data, "v"))
    with pytest.raises(UserError, match=r"000\.png changed"):
        list(encode_shards(shards, folder, Flat, data=data))
    (images / "000.png").unlink()
    with pytest.raises(UserError, match="does not exist"):
        list(encode_shards(shards, folder, Flat, data=data))
    assert not folder.list("keys")


def test_unchanged_files_are_not_read_again(tmp_path: Path) -> None:
    """Test that a file with an unchanged stamp is not read again, even if its content has changed."""
    images = tiny.make_images(tmp_path / "pictures", 6)
    Image.new("L", (48, 48), 90).save(images / "001.mask.png")
    for file in images.iterdir():
        os.utime(file, (1_000_000, 1_000_000))
    recipe = recipe_of(tmp_path, data__alpha_mask=True)
    cache_latents(recipe)
    own = assemble(
        recipe_of(tmp_path, data__alpha_mask=True, data__cache_dir=None), DistributedContext()
    ).feed
    for name in ("000.png", "001.mask.png"):
        (images / name).write_bytes(b"x" * (images / name).stat().st_size)
        os.utime(images / name, (1_000_000, 1_000_000))
    read = assemble(recipe, DistributedContext()).feed
    for name in ("latents", "mask"):
        assert all(torch.equal(read.batch(step)[name], own.batch(step)[name]) for step in range(3))
    os.utime(images / "000.png", (1_000_001, 1_000_001))
    parts = assemble(recipe, DistributedContext())
    assert [Path(bad.uri).name for bad in parts.sets.instances.bad] == ["000.png"]
    (tmp_path / "cache/files.parquet").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"files\.parquet .*Remove"):
        assemble(recipe, DistributedContext())


def test_a_file_that_was_just_written_is_read(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    cache_latents(recipe)
    known = known_files(recipe.data)
    assert known is not None and not any(known(str(path)) for path in (tmp_path / "pictures").iterdir())


# ---- the files ---------------------------------------------------------------------------------------------


def test_latents_are_read_in_any_order_from_row_groups(tmp_path: Path) -> None:
    images = tiny.make_images(tmp_path / "pictures", 40, size=200)
    data = DataConfig(instance_data_dir=str(images), resolution=400, random_flip=True)
    cache = Storage(tmp_path / "cache")
    encoding = encoding_of(data, "v")
    jobs = jobs_of(build_index(str(images)), data)
    shards = make_shards(jobs, workers=2)
    encode = Flat()
    done = list(encode_shards(shards, write_manifest(cache, encoding), lambda: encode, data=data))
    assert encode.seen == sum(one.encoded for one in done) == 80
    assert [len(shard) for shard in shards] == [10] * 8
    found = open_cache(cache, encoding)
    assert {rows for _, _, rows in found._shards} == {1}, "240 KB each: a group for each picture"
    assert found.has(jobs[0].key, (400, 400)) and not found.has(jobs[0].key, (400, 392))
    order = np.random.default_rng(0).permutation(80).tolist()
    expected = dict(zip(order, Flat()(cuts_of([jobs[number] for number in order])), strict=True))
    read = found.read([jobs[number].key for number in order])
    every = dict(found.read_all([jobs[number].key for number in order]))
    for position, number in enumerate(order):
        for name in ("mean", "std"):
            assert np.array_equal(read[position][name], expected[number][name])
            assert np.array_equal(every[position][name], expected[number][name])


def cuts_of(jobs: Sequence[Any]) -> list[np.ndarray]:
    from dreamfleet.datasets.images.masks import ImageView, cut_image

    return [
        cut_image(
            Path(job.uri).read_bytes(),
            ImageView(0, None, job.flip, job.size),
            uri=job.uri,
            size=job.size,
            resampling="scaled_lanczos",
        )
        for job in jobs
    ]


def test_shards_are_ordered_by_size_and_limited_in_bytes() -> None:
    from dreamfleet.datasets.serve.cache import Job

    jobs = [Job(f"{n:064d}", "", False, *[(64, 64), (2048, 2048)][n % 2], f"{n}.png", "") for n in range(600)]
    shards = make_shards(jobs, workers=1)
    assert sorted(job for shard in shards for job in shard) == sorted(jobs)
    assert [job.size for shard in shards for job in shard] == [(64, 64)] * 300 + [(2048, 2048)] * 300
    assert max(len(shard) for shard in shards) == 150
    assert max(sum(job.size == (2048, 2048) for job in shard) for shard in shards) == 6


# ---- recipes and the command -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__center_crop": False}, "crop.*latents"),
        ({"data__cache_latents": False}, "cache_dir .*cache_latents: false"),
        ({"method": {"name": "aesthetic_gradients"}}, "data.cache_dir: .*latents"),
        ({"method": tiny.DISCRIMINATOR}, "data.cache_dir: .*latents"),
    ],
)
def test_settings_that_cannot_be_cached_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of(tmp_path, **changes)


def test_a_run_without_its_cache_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no latents.*dreamfleet data cache RECIPE"):
        fit(recipe_of(tmp_path))
    with pytest.raises(RecipeError, match=r"data\.cache_dir"):
        cache_latents(recipe_of(tmp_path, data__cache_dir=None))
    with pytest.raises(RecipeError, match="multiple of 4"):
        cache_latents(recipe_of(tmp_path, data__resolution=34))


def test_the_command(tmp_path: Path) -> None:
    tree = tiny.make_recipe(tmp_path, data__cache_dir="kept/latents")
    path = tiny.write_recipe(tmp_path / "recipe.yaml", tree)

    def run(*words: str) -> Any:
        return CliRunner().invoke(program.app, ["data", "cache", str(path), *words])

    result = run("--json")
    assert result.exit_code == 0, result.output
    message = json.loads(result.stdout)
    assert Path(message["cache"]).parent == tmp_path / "kept/latents"
    assert (message["pictures"], message["encoded"], message["reused"], message["left_out"]) == (6, 6, 0, {})
    assert message["bytes"] == sum(
        file.stat().st_size for file in Path(message["cache"], "latents").iterdir()
    )
    assert message["pictures_per_second"] == pytest.approx(6 / message["seconds"])
    again = run()
    assert again.exit_code == 0 and "reused     6" in again.stdout and "encoded    0" in again.stdout
    wrong = run("data.cache_dir=null")
    assert wrong.exit_code == 2 and wrong.stderr.startswith("dreamfleet: data.cache_dir")
    for image in (tmp_path / "pictures").iterdir():
        image.write_bytes(image.read_bytes()[:60])
    nothing = run()
    assert nothing.exit_code == 2 and " 6 " in nothing.stderr
