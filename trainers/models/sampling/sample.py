"""Generates images by sampling with classifier-free guidance; each image depends only on its own request."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Literal

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dreamfleet.datasets.errors import UserError
from dreamfleet.trainers.config.image_request import ImageRequest
from dreamfleet.trainers.config.samplers import plain_sampler
from dreamfleet.trainers.models.condition import Condition, whole_image_ids
from dreamfleet.trainers.models.sampling.prompt_encoding import Encode, Guide, make_guides, negative_for

if TYPE_CHECKING:
    from dreamfleet.trainers.models.family import DiffusionModel

SchedulerName = Literal["ddim", "euler_a", "dpm++"]

# Shapes: B images, C latent channels, h x w latent cells, T tokens, D their width.


@torch.no_grad()
def generate(
    model: DiffusionModel,
    requests: Sequence[ImageRequest],
    *,
    batch_size: int = 4,
    encode: Encode | None = None,
    device: torch.device | str | None = None,
) -> list[Image.Image]:
    """Generate one RGB image for each request, in order; adjacent requests with equal options share a batch.

    An image is the same, within rounding, in any batch and on any number of workers, since its noise comes from a CPU
    generator with its own seed. ``encode`` (texts and token ids -> condition) replaces the model's prompt encoding;
    ``device`` defaults to the model's. Negatives of learned words are added to the negative prompt. SDXL's size
    conditioning is that of an uncropped image of the generated size. Raises UserError for sizes that the model cannot
    generate.
    """
    for request in requests:
        require_size(model, request.width or model.resolution, request.height or model.resolution)
    target = torch.device(device) if device is not None else next(model.denoiser.parameters()).device
    images: list[Image.Image] = []
    for _, group in groupby(requests, key=lambda request: request.batch_key):
        alike = [with_negatives(model, request) for request in group]
        for start in range(0, len(alike), max(1, batch_size)):
            batch = alike[start : start + max(1, batch_size)]
            guides = make_guides(model, batch, encode=encode)
            images += to_images(model.decode(sample_latents(model, guides, batch, device=target)))
    return images


@torch.no_grad()
def sample_latents(
    model: DiffusionModel, guides: Sequence[Guide], batch: Sequence[ImageRequest], *, device: torch.device
) -> Tensor:
    """Run the sampler from each request's initial noise; return scaled latents ``[B, C, h, w]`` in float32.

    ``batch``: requests with equal sampling options. Classifier-free guidance (arXiv 2207.12598) with all parts of a
    prompt (arXiv 2206.01714): e = e_negative + sum over parts of scale * weight * (e_part - e_negative).
    """
    options = batch[0]
    scheduler = model.make_sampler(plain_sampler(options.scheduler))
    scheduler.set_timesteps(options.steps, device=device)
    width, height = options.width or model.resolution, options.height or model.resolution
    generators = [torch.Generator().manual_seed(request.seed) for request in batch]
    shape, dtype = model.latent_shape(height, width), model.denoiser_dtype
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
    latents_BChw = noise * scheduler.init_noise_sigma
    sizes = whole_image_ids(height, width).to(device)
    noise_source = {"generator": generators} if "Ancestral" in type(scheduler).__name__ else {}
    for index, timestep in enumerate(scheduler.timesteps):
        rows = _rows(guides, index)
        outputs: list[Tensor] = [latents_BChw] * len(rows)
        lengths = [condition.context.shape[1] for _, condition in rows]
        for length in dict.fromkeys(lengths):  # one forward pass per prompt length
            chosen = [number for number, each in enumerate(lengths) if each == length]
            condition = Condition.cat([rows[number][1] for number in chosen])
            condition = condition._replace(context=condition.context.to(dtype))
            entered = latents_BChw[[rows[number][0] for number in chosen]]
            entered = scheduler.scale_model_input(entered, timestep).to(dtype)
            if model.uses_time_ids:
                condition = condition.with_sizes(sizes.expand(len(chosen), -1))
            for number, output in zip(
                chosen, model.predict(entered, timestep, condition).float(), strict=True
            ):
                outputs[number] = output
        guided = torch.stack(_guided(guides, outputs, options.guidance_scale))
        latents_BChw = scheduler.step(guided, timestep, latents_BChw, return_dict=False, **noise_source)[0]
    return latents_BChw


def _rows(guides: Sequence[Guide], index: int) -> list[tuple[int, Condition]]:
    """Return the (image number, condition) inputs of the denoiser at a step: all negatives, then all positives."""
    negatives = [
        (number, guide.negative.at(index))
        for number, guide in enumerate(guides)
        if guide.negative is not None
    ]
    positives = [
        (number, timed.at(index)) for number, guide in enumerate(guides) for _, timed in guide.positive
    ]
    return negatives + positives


def _guided(guides: Sequence[Guide], outputs: Sequence[Tensor], scale: float) -> list[Tensor]:
    """Combine the denoiser's outputs for the inputs from :func:`_rows` into one guided output per image."""
    remaining = iter(outputs)
    starts = [None if guide.negative is None else next(remaining) for guide in guides]
    found = []
    for guide, start in zip(guides, starts, strict=True):
        if start is None:
            found.append(next(remaining))
            continue
        total = start
        for weight, _ in guide.positive:
            total = total + scale * weight * (next(remaining) - start)
        found.append(total)
    return found


def to_images(pixels_B3HW: Tensor) -> list[Image.Image]:
    """Convert pixels ``[B, 3, H, W]`` in about [-1, 1] to RGB images."""
    scaled = ((pixels_B3HW.float() / 2 + 0.5).clamp(0, 1) * 255).round()
    return [Image.fromarray(array) for array in scaled.permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()]


def image_grid(
    images: Sequence[Image.Image], columns: int, *, captions: Sequence[str] | None = None, gap: int = 2
) -> Image.Image:
    """Return one image with `images` in rows of `columns` on white, `gap` pixels apart, with captions below them."""
    if not images:
        raise UserError("a grid needs at least one image.")
    columns = max(1, min(columns, len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = max(p.width for p in images), max(p.height for p in images)
    texts = list(captions or [])
    size = max(10, min(18, width // 16))
    font = ImageFont.load_default(size)
    wrapped = [textwrap.wrap(text, max(8, int(width / size * 1.9))) for text in texts]
    band = max((len(lines) for lines in wrapped), default=0) * (size + 4) + (4 if texts else 0)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + band + gap) - gap), "white")
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        left, top = index % columns * (width + gap), index // columns * (height + band + gap)
        sheet.paste(
            image.convert("RGB"),
            (left + (width - image.width) // 2, top + (height - image.height) // 2),
        )
        for line, text in enumerate(wrapped[index] if index < len(wrapped) else []):
            draw.text((left + 2, top + height + 2 + line * (size + 4)), text, fill=(40, 40, 40), font=font)
    return sheet


def with_negatives(model: DiffusionModel, request: ImageRequest) -> ImageRequest:
    """Return the request with the negatives of its prompt's learned words added to the negative prompt."""
    negative = negative_for(
        model, request.prompt, request.negative_prompt, steps=request.steps, plain=request.plain
    )
    return replace(request, negative_prompt=negative)


def require_size(model: DiffusionModel, width: int, height: int) -> None:
    """Raise UserError for a size that the model cannot generate."""
    step = model.size_multiple
    for name, value in (("width", width), ("height", height)):
        if value < step or value % step:
            near = max(step, round(value / step) * step)
            raise UserError(
                f"{name} {value} does not fit this model: use a multiple of {step}, such as {near}."
            )
