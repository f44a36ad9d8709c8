"""Test sampling: equal images for any batch size, agreement with diffusers, guidance, grids, class images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawing import generate
from PIL import Image
from tiny_models import tiny_model

from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.errors import UserError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.batches.class_image_drawing import class_image_key, generate_class_images
from dreamfleet.trainers.batches.class_images import find_missing
from dreamfleet.trainers.config.image_request import ImageRequest
from dreamfleet.trainers.models.condition import Condition
from dreamfleet.trainers.models.sampling.sample import image_grid

SCHEDULERS = ["ddim", "euler_a", "dpm++"]
PROMPTS = ["a cat", "two dogs", "a red apple", "the sea", "a cat"]
SEEDS = [3, 5, 7, 2**62 + 1, 3]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def difference(one: Image.Image, two: Image.Image) -> int:
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(two).astype(int)).max())


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_an_image_depends_on_its_request_only(scheduler: str, prediction_type: str) -> None:
    model = tiny_model(prediction_type)
    options: dict[str, Any] = {"steps": 4, "scheduler": scheduler}
    together = generate(model, PROMPTS, seeds=SEEDS, batch_size=5, **options)
    pairs = generate(model, PROMPTS, seeds=SEEDS, batch_size=2, **options)
    alone = [
        generate(model, [p], seeds=[s], **options)[0] for p, s in zip(PROMPTS[1:4], SEEDS[1:4], strict=True)
    ]
    assert all(difference(a, b) <= 1 for a, b in zip(together, pairs, strict=True))
    assert all(difference(a, b) <= 1 for a, b in zip(together[1:4], alone, strict=True))
    assert difference(together[0], together[4]) <= 1
    assert difference(together[0], together[1]) > 5
    assert all(image.size == (32, 32) and image.mode == "RGB" for image in together)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_images_equal_those_of_the_diffusers_pipeline(prediction_type: str) -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    model = tiny_model(prediction_type)
    pipeline = StableDiffusionPipeline(
        **model.modules(),
        tokenizer=model.tokenizer,
        scheduler=DDIMScheduler.from_config(model.scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    for guidance in (1.0, 6.0):
        theirs = pipeline(
            ["a cat", "the sea"],
            negative_prompt=["ugly", "ugly"],
            num_inference_steps=5,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        ).images
        ours = generate(
            model,
            ["a cat", "the sea"],
            seeds=[1, 2],
            negative_prompt="ugly",
            steps=5,
            guidance_scale=guidance,
        )
        assert max(difference(a, b) for a, b in zip(ours, theirs, strict=True)) <= 1


def test_a_guidance_scale_of_1_runs_the_unet_once_per_image(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    forward = type(model.unet).forward

    def counted(self: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(sample))
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(type(model.unet), "forward", counted)
    generate(model, ["a", "b"], seeds=[1, 2], steps=2, guidance_scale=1)
    generate(model, ["a", "b"], seeds=[1, 2], steps=2, guidance_scale=2)
    assert sizes == [2, 2, 4, 4]


def test_encoder_sizes_and_negative_prompts(model: Any) -> None:
    asked: list[list[str]] = []

    def encode(prompts: Sequence[str], ids: torch.Tensor) -> Condition:
        asked.append(list(prompts))
        assert torch.equal(ids, model.tokenize(prompts))
        return model.encode(["x"] * len(prompts))

    wide = generate(model, ["a", "b"], seeds=[1, 1], steps=2, width=64, height=48, encode=encode)
    assert [image.size for image in wide] == [(64, 48)] * 2
    assert difference(*wide) <= 1
    assert asked == [["a", "b"], [""]]
    each = generate(model, ["a", "a"], seeds=[1, 1], steps=2, negative_prompt=["", "zebra"])
    assert difference(*each) > 0
    assert not any(p.requires_grad for p in model.unet.parameters())


def test_half_precision_images_are_close(model: Any) -> None:
    exact = generate(model, ["a cat"], seeds=[1], steps=3, guidance_scale=3)[0]
    half = generate(tiny_model().to("cpu", torch.bfloat16), ["a cat"], seeds=[1], steps=3, guidance_scale=3)[
        0
    ]
    assert np.abs(np.asarray(exact).astype(int) - np.asarray(half).astype(int)).mean() < 6


def test_invalid_requests_are_errors(model: Any) -> None:
    for options, message in [
        ({"width": 40}, "multiple of 16"),
        ({"height": 0, "width": 8}, "multiple of 16"),
        ({"scheduler": "plms"}, "ddim, euler_a"),
        ({"steps": 0}, "at least 1"),
    ]:
        with pytest.raises(UserError, match=message):
            generate(model, ["a"], **{"seeds": [1], "steps": 1, **options})


def test_grid_places_every_image() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9), (99, 0, 0)]
    images = [Image.new("RGB", (20, 10), colour) for colour in colours]
    grid = image_grid(images, 3)
    assert grid.size == (3 * 22 - 2, 2 * 12 - 2)
    assert [grid.getpixel((index % 3 * 22, index // 3 * 12)) for index in range(5)] == colours
    assert grid.getpixel((2 * 22, 12)) == (255, 255, 255)
    labelled = image_grid(images, 2, captions=["a long caption of many words"] * 5)
    assert labelled.height > 3 * 30
    assert image_grid(images[:1], 4).size == (20, 10)
    with pytest.raises(UserError, match="at least one"):
        image_grid([], 2)


def test_a_class_image_depends_on_its_number_only(model: Any, tmp_path: Path) -> None:
    request = ImageRequest("a cat", seed=1, steps=2, plain=True)
    one, two = Storage(tmp_path / "one"), Storage(tmp_path / "two")
    generate_class_images(model, request, numbers=range(5), storage=one, batch_size=2)
    for numbers in ([0, 1, 4], [2, 3]):  # two ranks generate the same batches
        generate_class_images(model, request, numbers=numbers, storage=two, batch_size=2)
    names = [f"{i:06d}.png" for i in range(5)]
    assert one.list() == two.list() == names
    assert all(one.read_bytes(name) == two.read_bytes(name) for name in names)
    assert difference(Image.open(one.path(names[0])), Image.open(one.path(names[1]))) > 2


def test_existing_class_images_are_counted(tmp_path: Path) -> None:
    folder, storage = tmp_path / "class", Storage(tmp_path / "class")
    data = DataConfig(
        instance_data_dir=str(tmp_path / "subject"), class_data_dir=str(folder), class_prompt="a cat"
    )
    assert find_missing(storage, 3, data) == [0, 1, 2]
    (folder / "sub").mkdir(parents=True)
    for number, name in enumerate(("000000.png", "000002.png", "mine.JPG", "scan.tif", "sub/deep.webp")):
        Image.new("RGB", (8, 8), (number, 60, 90)).save(folder / name)
    assert find_missing(storage, 5, data) == []
    assert find_missing(storage, 7, data) == [1, 3]
    for name in ("notes.txt", "._000000.png", "broken.png", "000001.png"):  # none of these is a class image
        (folder / name).write_bytes(b"does not count")
    assert find_missing(storage, 7, data) == [3, 4]  # the damaged 000001.png is not replaced
    (folder / "subject").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "subject" / "a.png")  # allowed inside the class folder
    inside = data.model_copy(update={"instance_data_dir": str(folder / "subject")})
    assert find_missing(storage, 6, inside) == [3]


def test_the_folder_key_depends_on_all_options() -> None:
    base = ImageRequest("a Photo of a cat!", guidance_scale=5.0, width=64, height=64)
    first = class_image_key("abc", base)
    assert first.startswith("a-photo-of-a-cat-")
    assert first == class_image_key("abc", replace(base, guidance_scale=5))
    changes: list[dict[str, Any]] = [
        {"seed": 1},
        {"steps": 5},
        {"width": 32, "height": 32},
        {"prompt": "a photo of a cat"},
    ]
    keys = {class_image_key("abc", replace(base, **change)) for change in changes}
    keys.add(class_image_key("abd", base))
    assert len(keys | {first}) == 6
    assert class_image_key("abc", replace(base, prompt="猫")).startswith("class-")
