"""Counts the sizes of a run on a model without weights: its tensors, and the memory of its passes."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dreamfleet.datasets.errors import UserError
from dreamfleet.datasets.index.concepts import load_concepts
from dreamfleet.datasets.index.sources import ScanOptions, find_source
from dreamfleet.trainers.batches.feed import REMEMBERED
from dreamfleet.trainers.batches.vae_encoding import encode_batch
from dreamfleet.trainers.config.deepspeed import BUCKET
from dreamfleet.trainers.config.engines import engine_spec
from dreamfleet.trainers.engines.base import DTYPES, move_method
from dreamfleet.trainers.memory.inputs import Counts, Pass
from dreamfleet.trainers.memory.trace import Autocast, fake_mode, trace_inference, trace_step
from dreamfleet.trainers.methods.base import Batch, Method, method_class
from dreamfleet.trainers.methods.build import build_method, check_resolution
from dreamfleet.trainers.methods.diffusion_method import DiffusionMethod
from dreamfleet.trainers.models.family import DiffusionModel, load_shape
from dreamfleet.trainers.recipe import Recipe

PREVIEW_BATCH = 4  # the default of `generate`


def count_run(recipe: Recipe, method: DiffusionMethod, images: int | None) -> Counts:
    """Count the sizes of a run on a method whose model is on the meta device.

    ``images``: number of images, None if unknown.
    """
    train, model = recipe.train, method.model
    trainable = [param for group in method.groups() for param in group.params.values()]
    ids = {id(param) for param in trainable}
    frozen = [tensor for tensor in _tensors(method) if id(tensor) not in ids]
    mixed = train.mixed_precision != "no"
    full, half = trace_passes(recipe, method)
    mode = fake_mode()
    faked = _to_fake(method, mode, torch.float32)
    with mode:
        encoding, class_drawing = _trace_start(recipe, faked)
        drawing = _trace_previews(recipe, faked)
    return Counts(
        learning=tuple(param.numel() for param in trainable),
        frozen=_bytes(frozen),
        passed=sum(
            p.numel() for part in method.loss_parts.values() for p in part.parameters() if id(p) not in ids
        ),
        nvme=recipe.engine.nvme_path is not None,
        model=sum(4 * p.numel() for part in parts_of(method).values() for p in part.parameters()),
        full=full,
        half=half,
        encoding=encoding,
        class_drawing=class_drawing,
        drawing=drawing,
        bucket=BUCKET,
        mixed=mixed,
        optimizer=recipe.optimizer.name,
        options=recipe.optimizer.own_options(),
        shapes=tuple(tuple(param.shape) for param in trainable),
        fused=recipe.optimizer.fused_backward,
        bf16_weights=train.full_bf16,
        average=recipe.engine.use_ema,
        micros=train.gradient_accumulation_steps,
        text_embeddings=_remembered_bytes(recipe, method, images),
        latents=_latent_bytes(recipe, model, images),
    )


def trace_passes(recipe: Recipe, method: DiffusionMethod) -> tuple[Pass, Pass]:
    """Return the memory of a forward and backward pass, with trainable weights in float32 and in 16 bits.

    ``method``: on the meta device. Without mixed precision both are the same.
    """
    mode = fake_mode()
    full, *half = (
        _to_fake(method, mode, dtype)
        for dtype in dict.fromkeys((torch.float32, DTYPES[recipe.train.mixed_precision]))
    )
    with mode:
        passes = [_trace_step(recipe, each) for each in (full, *half)]
    return passes[0], passes[-1]


def method_shape(recipe: Recipe) -> DiffusionMethod:
    """Build a recipe's method on a model without weights, with the dtypes of a GPU run, on the meta device.

    Raises UserError if the method or the engine cannot be planned, RecipeError for a resolution that the
    model cannot compute.
    """
    if recipe.method.no_plan:
        raise UserError(f"plan: {recipe.method.name} {recipe.method.no_plan}")
    engine = engine_spec(recipe.engine)
    if engine.no_plan:
        raise UserError(
            f"plan: {engine.setting(recipe.engine)} {engine.no_plan}; set engine.name: auto to plan for torch and ZeRO"
        )
    method = method_without_weights(recipe)
    if not isinstance(method, DiffusionMethod):
        raise UserError(
            f"plan: the memory of {method.name}, which trains no diffusion model, cannot be computed"
        )
    move_method(method, torch.device("meta"), DTYPES[recipe.train.mixed_precision])
    return method


def method_without_weights(recipe: Recipe) -> Method:
    """Build a recipe's method on a model on the meta device.

    A method that trains another network builds it with weights. Raises UserError for a model of unknown shape.
    """
    model = load_shape(recipe.model, method_class(recipe.method).needs)
    check_resolution(recipe, model)
    return build_method(recipe, model, concepts=())


def count_images(recipe: Recipe, method: DiffusionMethod) -> int | None:
    """Count the images of a recipe, including class images; None if there are none or they cannot be read."""
    found = count_instances(recipe)
    if not found or not method.prior:
        return found
    return found + method.prior.num_class_images * len(load_concepts(recipe.data))


def count_instances(recipe: Recipe) -> int | None:
    """Count the training images in a recipe's folders; None if there are none or they cannot be read."""
    try:
        urls = [concept.instance_data_dir for concept in load_concepts(recipe.data)]
        return sum(find_source(url).count(url, ScanOptions()) for url in urls) or None
    except UserError:
        return None


def parts_of(method: DiffusionMethod) -> dict[str, nn.Module]:
    """Return the model's parts and the method's helpers by name."""
    return {**method.model.modules(), **method.helpers}


def _tensors(method: DiffusionMethod) -> list[Tensor]:
    """Return every tensor of a method, its model and its helpers, each once."""
    every = nn.ModuleList([*parts_of(method).values(), method])
    return [*every.parameters(), *every.buffers()]


def _to_fake(
    method: DiffusionMethod, mode: FakeTensorMode, dtype: torch.dtype | None = None
) -> DiffusionMethod:
    """Copy a method and its model from the meta device to fake CPU tensors.

    ``dtype`` casts the parameters inside the method's module, as DeepSpeed's half-precision modes do.
    """
    inside = {id(param) for param in method.parameters()} if dtype else set()
    copies: dict[int, Any] = {}
    with mode:
        for tensor in _tensors(method):
            made = torch.empty(tensor.shape, dtype=dtype if id(tensor) in inside else tensor.dtype)
            is_param = isinstance(tensor, nn.Parameter)
            copies[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if is_param else made
    # Every reference to a tensor, in a module or elsewhere, becomes one to its copy.
    return copy.deepcopy(method, copies)


def _trace_step(recipe: Recipe, method: DiffusionMethod) -> Pass:
    def compute_loss(autocast: Autocast) -> Tensor:
        batch = make_batch(recipe, method)
        with autocast():
            return method(batch).total

    return trace_step(
        compute_loss,
        params=[param for group in method.groups() for param in group.params.values()],
        known=_tensors(method),
        dtype=DTYPES[recipe.train.mixed_precision],
    )


def make_batch(recipe: Recipe, method: DiffusionMethod) -> Batch:
    """Return a batch with the shapes of a run; if the run caches no latents, images are encoded for it."""
    model, count = method.model, recipe.train.train_batch_size
    num = count * (2 if method.prior else 1)
    shape = (num, *_latent_shape(recipe, model))
    batch: Batch = {
        "latents": torch.empty(shape),
        "noise": torch.empty(shape),
        "timesteps": model.even_timesteps(1).repeat(num),
        "weights": torch.ones(num),
        "num_instances": count,
    }
    if not _caches_latents(recipe) or recipe.data.cache == "while_training":
        with torch.no_grad():
            mean, std = model.encode_images(torch.empty(num, 3, *[recipe.data.resolution] * 2))
            batch["latents"] = mean + std
    entries = model.empty_condition(num).entries()
    if method.trains_text:
        sizes = {name: tensor for name, tensor in entries.items() if name == "time_ids"}
        entries = {"input_ids": method.tokenize([""] * num), **sizes}
    return batch | entries


def _trace_start(recipe: Recipe, method: DiffusionMethod) -> tuple[int, int]:
    """Return the bytes of encoding the images and of generating class images, before the first step."""
    model, side, prior = method.model, recipe.data.resolution, method.prior
    encoding = drawing = 0
    if _caches_latents(recipe) and recipe.data.cache_dir is None:
        num = encode_batch(side * side)  # also for fewer images
        encoding = trace_inference(
            lambda: model.encode_images(torch.empty(num, 3, side, side)),
            known=_tensors(method),
            dtype=torch.float32,
        )
    if prior:
        drawing = _trace_drawing(recipe, method, prior.batch_size, prior.guidance_scale, torch.float32)
    return encoding, drawing


def _trace_previews(recipe: Recipe, method: DiffusionMethod) -> int:
    validation = recipe.validation
    num = min(PREVIEW_BATCH, len(validation.prompts) * validation.num_images)
    if not num:
        return 0
    dtype = DTYPES[recipe.train.mixed_precision]
    return _trace_drawing(recipe, method, num, validation.guidance_scale, dtype)


def _trace_drawing(
    recipe: Recipe, method: DiffusionMethod, num: int, guidance_scale: float, dtype: torch.dtype
) -> int:
    """Return the peak bytes of one sampler step and of the decoder for ``num`` images."""
    model = method.model
    shape, entering = _latent_shape(recipe, model), num * (2 if guidance_scale != 1 else 1)

    def draw() -> None:
        dtype = model.denoiser_dtype
        condition = model.empty_condition(entering)
        condition = condition._replace(context=condition.context.to(dtype))
        noisy = torch.empty(entering, *shape, dtype=dtype)
        model.predict(noisy, model.even_timesteps(1)[0], condition)
        model.decode(torch.empty(num, *shape))

    return trace_inference(draw, known=_tensors(method), dtype=dtype)


def _caches_latents(recipe: Recipe) -> bool:
    data = recipe.data
    return data.center_crop and data.cache_latents and data.source != "stream"


def _latent_shape(recipe: Recipe, model: DiffusionModel) -> tuple[int, int, int]:
    return model.latent_shape(recipe.data.resolution, recipe.data.resolution)


def _latent_bytes(recipe: Recipe, model: DiffusionModel, images: int | None) -> int:
    """Return the host bytes of mean and std of every image's latents, and of the mirrored image's."""
    if not _caches_latents(recipe):
        return 0
    copies = 2 if recipe.data.random_flip else 1
    return (images or 0) * copies * 2 * 4 * math.prod(_latent_shape(recipe, model))


def _remembered_bytes(recipe: Recipe, method: DiffusionMethod, images: int | None) -> int:
    """Return an upper bound of the bytes of cached encoded prompts.

    It is one prompt per image, or the full cache if prompts vary.
    """
    if method.trains_text:
        return 0
    data = recipe.data
    vary = data.shuffle_tags or data.tag_dropout or getattr(recipe.method, "template_file", None)
    return REMEMBERED if vary else min(REMEMBERED, (images or 0) * method.model.empty_condition(1).num_bytes)


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
