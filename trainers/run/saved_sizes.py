"""Counts the bytes of what a run saves: checkpoints with their optimizer states, and exports in each format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dreamfleet.trainers.artifacts.kind import ARTIFACTS
from dreamfleet.trainers.config.engines import engine_name
from dreamfleet.trainers.config.optimizers import state_bytes
from dreamfleet.trainers.methods.base import Method
from dreamfleet.trainers.models.formats.file_names import EMBEDDING_IMAGES
from dreamfleet.trainers.recipe import Recipe

# Bytes besides the elements, measured on the files of the pocket model's runs: per tensor in a header, per tensor and
# file of torch.save, per exported file, per token of a tokenizer's files, of an embedding's image, of the texts of a
# checkpoint.
HEADER, RECORD, SAVED, EXPORTED, TOKEN, EMBEDDING_IMAGE, CHECKPOINT_TEXT = (
    120,
    270,
    1_700,
    4_800,
    32,
    30_000,
    1_000,
)
PRECISIONS = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class WeightSizes:
    """Sizes of what a run saves: elements of each trained tensor, and bytes of each export by format.

    ``width``: bytes of a trained weight in a checkpoint. ``states``: bytes of the optimizer's states.
    """

    trained: tuple[int, ...]
    width: int
    states: int
    exports: Mapping[str, int]


def measure_weights(recipe: Recipe, method: Method) -> WeightSizes:
    """Return the sizes of what a run of ``recipe`` saves. ``method`` may be on any device, also without weights."""
    trained = [param for group in method.groups() for param in group.params.values()]
    usual = [form for form in method.formats if form not in method.model.unsupported]
    # ZeRO gathers the float32 weights.
    narrow = recipe.train.full_bf16 and engine_name(recipe.engine) == "torch"
    return WeightSizes(
        trained=tuple(param.numel() for param in trained),
        width=2 if narrow else 4,
        states=state_bytes(
            [param.shape for param in trained], recipe.optimizer.name, recipe.optimizer.own_options()
        ),
        exports={
            form: _export_bytes(form, method, PRECISIONS[recipe.train.save_precision])
            for form in recipe.train.export_formats or usual
        },
    )


def checkpoint_bytes(recipe: Recipe, sizes: WeightSizes) -> int:
    """Return the bytes of one checkpoint: weights, optimizer states and EMA."""
    average = 4 * sum(sizes.trained) if recipe.keeps_average else 0
    records = len(sizes.trained) * (3 + recipe.keeps_average)
    return weight_bytes(sizes) + sizes.states + average + records * RECORD + SAVED


def weight_bytes(sizes: WeightSizes) -> int:
    """Return the bytes of the trained weights of one checkpoint."""
    return sizes.width * sum(sizes.trained) + len(sizes.trained) * HEADER + CHECKPOINT_TEXT


def _export_bytes(form: str, method: Method, precision: int) -> int:
    """Return the bytes of an export in one format, by the artifact kind that has the format."""
    kind = next(kind for kind in map(ARTIFACTS.get, method.config.artifacts) if form in kind.formats)
    trained = [param.numel() for group in method.groups() for param in group.params.values()]
    if kind.is_model:
        parts = method.model.modules().values()
        tensors = [
            param.numel() for part in parts for name, param in part.named_parameters() if ".lora_" not in name
        ]
        vocabulary = sum(getattr(getattr(part, "config", None), "vocab_size", 0) for part in parts)
        return precision * sum(tensors) + HEADER * len(tensors) + EXPORTED + TOKEN * vocabulary
    width = 4 if kind.is_full_precision else precision
    image = EMBEDDING_IMAGE if f".{form}" in EMBEDDING_IMAGES else 0
    return width * sum(trained) + HEADER * len(trained) + method.files_per_format * (EXPORTED + image)
