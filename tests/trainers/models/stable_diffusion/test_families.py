"""Test SD 2.x and SDXL: U-Net inputs against diffusers' pipelines, image sizes, precision, refused models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from drawing import generate
from PIL import Image
from stock_models import load, stock_pipeline
from tiny_models import FAMILIES, WIDTH, WIDTH_2, tiny_family, tiny_text_encoder

from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.errors import ModelError
from dreamfleet.datasets.images.images import fit_image
from dreamfleet.datasets.index.index import build_index
from dreamfleet.datasets.plan import Draw
from dreamfleet.trainers.batches.sources import Shown
from dreamfleet.trainers.models.condition import Condition, whole_image_ids
from dreamfleet.trainers.models.embeddings import install_embedding

PROMPTS = ["a cat, on the sea", "", "zebra " * 40]


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny SDXL in diffusers' layout."""
    folder = tmp_path_factory.mktemp("sdxl") / "model"
    tiny_family("sdxl").save_folder(folder)
    return folder


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_the_sdxl_condition_equals_that_of_the_diffusers_pipeline(sdxl: Path, clip_skip: int) -> None:
    model, pipeline = load(sdxl, clip_skip=clip_skip), stock_pipeline(sdxl, "sdxl")
    context, _, pooled, _ = pipeline.encode_prompt(
        PROMPTS, do_classifier_free_guidance=False, clip_skip=None if clip_skip == 1 else clip_skip - 1
    )
    found = model.encode(PROMPTS)
    assert found.context.shape == (3, 77, WIDTH + WIDTH_2) and found.time_ids is None
    assert torch.equal(found.context, context) and torch.equal(found.pooled, pooled)
    ids = pipeline._get_add_time_ids(
        (48, 40), (0, 0), (48, 40), torch.float32, text_encoder_projection_dim=pooled.shape[-1]
    )
    assert torch.equal(whole_image_ids(48, 40), ids)


def test_the_sdxl_loss_equals_that_of_a_plain_loop(sdxl: Path) -> None:
    model, pipeline = load(sdxl), stock_pipeline(sdxl, "sdxl")
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
    timesteps = torch.tensor([10, 700])
    sizes = torch.tensor([[48.0, 64, 0, 5, 32, 32], [32, 32, 0, 0, 32, 32]])
    context, _, pooled, _ = pipeline.encode_prompt(["a cat", "the sea"], do_classifier_free_guidance=False)
    with torch.no_grad():
        predicted = pipeline.unet(
            model.scheduler.add_noise(latents, noise, timesteps),
            timesteps,
            encoder_hidden_states=context,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes},
        ).sample
        expected = F.mse_loss(predicted, noise, reduction="none").mean((1, 2, 3))
        condition = model.encode(["a cat", "the sea"])
        batch = {"latents": latents, "noise": noise, "timesteps": timesteps, **condition.entries()}
        noisy = model.add_noise(latents, noise, timesteps)
        found = model.loss(model.predict(noisy, timesteps, condition.with_sizes(sizes)), batch)
        moved = model.loss(model.predict(noisy, timesteps, condition.with_sizes(sizes.flip(0))), batch)
    assert torch.allclose(found, expected, rtol=1e-6)
    assert not torch.allclose(moved, expected, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_images_equal_those_of_diffusers_pipelines(tmp_path: Path, family: str) -> None:
    tiny_family(family).save_folder(tmp_path / "model")
    model, pipeline = load(tmp_path / "model"), stock_pipeline(tmp_path / "model", family)
    assert model.modules().keys() == tiny_family(family).modules().keys()
    for negative in ("ugly", None):
        options = {"num_inference_steps": 4, "guidance_scale": 5.0, "height": 48, "width": 32}
        theirs = pipeline(
            "a cat", negative_prompt=negative, generator=torch.Generator().manual_seed(3), **options
        )
        ours = generate(
            model, ["a cat"], seeds=[3], negative_prompt=negative or "", steps=4, guidance_scale=5, height=48
        )
        apart = np.asarray(theirs.images[0]).astype(int) - np.asarray(ours[0]).astype(int)
        assert ours[0].size == (32, 48) and np.abs(apart).max() <= 1, negative


def test_long_prompts_of_sdxl_are_encoded_in_chunks_by_both_encoders(sdxl: Path) -> None:
    long, short = load(sdxl, max_token_length=150), load(sdxl)
    ids = long.tokenize(["a" * 100, "cat"])
    assert ids.shape == (2, 2, 154)
    found = long.encode_tokens(ids)
    assert found.context.shape == (2, 154, WIDTH + WIDTH_2)
    for chunk, text in enumerate(("a" * 100, None)):
        part = ids[:1, :, 77 * chunk : 77 * (chunk + 1)]
        alone = short.encode_tokens(part)
        assert torch.allclose(found.context[0, 77 * chunk : 77 * (chunk + 1)], alone.context[0], atol=1e-6)
        assert torch.allclose(found.pooled[0], alone.pooled[0], atol=1e-6) == (text is not None)


def test_a_learned_word_does_not_change_the_pooled_position(sdxl: Path) -> None:
    # With SDXL's published end id (2), transformers takes the position of the highest id as the end.
    model = load(sdxl)
    old = tiny_text_encoder(second=True, hidden_act="gelu", bos_token_id=0, eos_token_id=2, pad_token_id=1)
    old.load_state_dict(model.text_encoder_2.state_dict())
    plain = model.encode(["a cat"]).pooled
    model.text_encoder_2 = old.eval().requires_grad_(False)
    assert torch.allclose(model.encode(["a cat"]).pooled, plain, atol=1e-6)
    table = old.text_model.embeddings.token_embedding.weight
    known = [model.tokenizer("c", add_special_tokens=False).input_ids[0]]
    first = model.text_encoder.embeddings.token_embedding.weight[known]
    install_embedding(model, "<x>", first, table[known])
    # A word whose vectors are those of a token encodes like the token.
    one, other = model.encode(["a c"]), model.encode(["a <x>"])
    assert torch.allclose(one.pooled, other.pooled, atol=1e-6)
    assert torch.allclose(one.context[:, :4], other.context[:, :4], atol=1e-6)


def test_embeddings_of_another_family_are_refused(sdxl: Path) -> None:
    model = load(sdxl)
    with pytest.raises(ModelError, match=rf"{WIDTH}\D+{WIDTH_2}\D.*another family"):
        install_embedding(model, "<x>", torch.zeros(1, WIDTH))
    with pytest.raises(ModelError, match="another family"):
        install_embedding(model, "<x>", torch.zeros(1, WIDTH), torch.zeros(2, WIDTH_2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_vae_stays_in_float32_in_any_precision(dtype: torch.dtype) -> None:
    for family in FAMILIES:
        model = tiny_family(family).to("cpu", dtype)
        assert model.vae.dtype == torch.float32 and model.unet.dtype == dtype


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_are_encoded_in_float32_under_autocast(family: str) -> None:
    model, pixels = tiny_family(family), torch.rand(1, 3, 32, 32)
    exact = model.encode_images(pixels)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.encode_images(pixels)[0], exact)


@pytest.mark.parametrize(
    "changes", [{}, {"center_crop": False, "random_flip": True}, {"enable_bucket": True}]
)
def test_time_ids_describe_the_crop_of_the_image(tmp_path: Path, changes: dict[str, Any]) -> None:
    # Red increases to the right and green downwards, so that the pixels of a crop show its position.
    width, height = 96, 64
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(width)[None] * 2, np.arange(height)[:, None] * 3
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    buckets = {"min_bucket_reso": 16, "max_bucket_reso": 64, "bucket_reso_steps": 8}
    data = DataConfig.model_validate(
        {"instance_data_dir": str(tmp_path), "resolution": 48, **changes, **buckets}
    )
    shown = Shown(build_index(str(tmp_path)), data, seed=3)
    seen = set()
    for epoch in range(8):
        draw = Draw(0, epoch)
        (ids,) = shown.time_ids([draw]).int().tolist()
        file_height, file_width, top, left, target_height, target_width = ids
        assert (file_height, file_width) == (height, width)
        how = shown.of(draw)
        cut = fit_image(
            Image.fromarray(ramp),
            how.size or 48,
            center=how.crop is None,
            crop_key=how.crop,
            flip=how.flip,
        )
        assert cut.shape[:2] == (target_height, target_width)
        scale = max(target_width / width, target_height / height)
        middle = left + target_width / 2  # crop centre in the resized image, mirrored with the crop
        x = round(width * scale) - middle if how.flip else middle
        red, green = cut[
            target_height // 2 - 1 : target_height // 2 + 1, target_width // 2 - 1 : target_width // 2 + 1
        ][..., :2].mean((0, 1))
        assert red / 2 == pytest.approx(x / scale - 0.5, abs=1)
        assert green / 3 == pytest.approx((top + target_height / 2) / scale - 0.5, abs=1)
        seen.add((top, left))
    assert len(seen) > 1 if changes.get("random_flip") else len(seen) == 1


def test_conditions_are_concatenated_and_split() -> None:
    one = Condition(torch.ones(2, 3, 4), torch.zeros(2, 5))
    both = Condition.cat([one, one.map(lambda tensor: tensor + 1)]).with_sizes(torch.zeros(4, 6))
    assert both.context.shape == (4, 3, 4) and both.time_ids is not None
    rows = both.rows()
    assert len(rows) == 4 and rows[2].pooled.tolist() == [[1.0] * 5]
    assert both.entries().keys() == {"context", "pooled", "time_ids"}
    assert Condition.in_batch(one.entries()) == one


@pytest.mark.parametrize(
    ("changes", "missing", "keyword"),
    [
        ({"in_channels": 9}, "", "inpainting.*SDXL"),
        ({"in_channels": 8}, "", r"InstructPix2Pix"),
        ({"in_channels": 7}, "", "upscaler"),
        ({}, "text_encoder", "refiner"),
        ({}, "text_encoder_2", "'text_encoder_2' is missing"),
        ({}, "tokenizer_2", "'tokenizer_2' is missing"),
        ({"class_embed_type": "projection"}, "", r"projection"),
    ],
)
def test_other_kinds_of_models_are_refused_by_name(
    sdxl: Path, tmp_path: Path, changes: dict[str, Any], missing: str, keyword: str
) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(sdxl, folder)
    if missing:
        shutil.rmtree(folder / missing)
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ModelError, match=keyword):
        load(folder)


def test_empty_negative_prompts_are_zeros_if_the_model_config_says_so(sdxl: Path) -> None:
    model = load(sdxl)
    assert model.zeros_for_empty_prompt
    zeros = generate(model, ["a cat"], seeds=[1], steps=2, guidance_scale=5)[0]
    model.zeros_for_empty_prompt = False
    assert np.abs(
        np.asarray(zeros).astype(int) - generate(model, ["a cat"], seeds=[1], steps=2, guidance_scale=5)[0]
    ).max()


def test_held_out_images_have_their_sizes(tmp_path: Path) -> None:
    from dreamfleet.trainers.evaluation.heldout_loss import HeldOutLoss
    from dreamfleet.trainers.recipe import build_recipe
    from dreamfleet.trainers.run.build import DistributedContext, assemble

    tiny_family("sdxl").save_folder(tmp_path / "model")
    parts = assemble(build_recipe(tiny.make_recipe(tmp_path)), DistributedContext())
    asked = []
    parts.method.model.unet.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(kwargs["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    held = HeldOutLoss(build_index(tmp_path / "pictures"), method=parts.method, data=parts.feed.data, count=2)
    assert np.isfinite(held.measure(parts.engine))
    assert len(asked) == 6 and asked[0].tolist() == [[48, 48, 0, 0, 32, 32]] * 2
