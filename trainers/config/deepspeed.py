"""A DeepSpeed JSON of the user's own, beside the recipe: what it may say, and what the recipe says already."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from dreamfleet.datasets.errors import RecipeError, StorageError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.engine import ZERO_KEYS, EngineConfig
from dreamfleet.trainers.config.optimizer import OptimizerConfig
from dreamfleet.trainers.config.scaling import ScalingConfig
from dreamfleet.trainers.config.train import TrainConfig

Tree = dict[str, Any]
#: Elements of a communication buffer. DeepSpeed's default of 500 million would take 1 GB of the memory to be saved.
BUCKET = 50_000_000
#: With optimizer states on NVMe: elements in host memory at a time, at 16 bytes each. DeepSpeed's default is a billion.
SWAPPED_GROUP = 100_000_000
OFFLOADS = {"offload_optimizer": "offload_optimizer_device", "offload_param": "offload_param_device"}
#: Blocks that the recipe has its own words for; where they agree they need not be handed on.
OWNED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
)


def read_deepspeed_file(path: str) -> Tree:
    """Read a DeepSpeed JSON; what is "auto" there, accelerate's word for "as the script says", is left out.

    Raises RecipeError when it is no JSON object.
    """
    folder, _, name = path.rpartition("/")
    try:
        tree = json.loads(Storage(folder or "/").read_text(name))
    except (StorageError, ValueError) as error:
        raise RecipeError(f"engine.deepspeed_config: {path} is no readable JSON ({error})") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"engine.deepspeed_config: {path} is no config: a JSON object is expected")
    return _without_auto(tree)


def merge_deepspeed_file(
    engine: EngineConfig, *, train: TrainConfig, optimizer: OptimizerConfig, scaling: ScalingConfig
) -> EngineConfig:
    """Return the ``engine:`` section with the stage and the offload settings of its ``deepspeed_config`` file.

    Raises RecipeError naming every key of the file that contradicts the recipe.
    """
    path = engine.deepspeed_config
    if path is None:
        return engine
    tree = read_deepspeed_file(path)
    mistakes = [
        f"{key}: {found!r} there, and {ours}: {value!r} in the recipe"
        for key, ours, value in _wanted(train, optimizer, scaling)
        if (found := _at(tree, key)) is not None and found != value
    ]
    update: Tree = {}
    stage = _at(tree, "zero_optimization.stage")
    places: list[tuple[str, str, str | None, Any]] = [
        ("zero_optimization.stage", "zero_stage", "auto", stage)
    ]
    for block, ours in OFFLOADS.items():
        places.append(
            (
                f"zero_optimization.{block}.device",
                ours,
                "none",
                _at(tree, f"zero_optimization.{block}.device"),
            )
        )
        places += [
            (f"zero_optimization.{block}.{key}", key, None, _at(tree, f"zero_optimization.{block}.{key}"))
            for key in ("pin_memory", "nvme_path")
        ]
    places += [
        (f"zero_optimization.{key}", key, None, _at(tree, f"zero_optimization.{key}")) for key in ZERO_KEYS
    ]
    for key, ours, unset, found in places:
        value = getattr(engine, ours)
        if found is None or found == value:
            continue
        if value != unset or update.get(ours, found) != found:
            mistakes.append(f"{key}: {found!r} there, and engine.{ours}: {value!r} in the recipe")
        update[ours] = found
    if mistakes:
        raise RecipeError(
            f"engine.deepspeed_config: {path} says other than the recipe; leave those keys out of the file, or write "
            f'"auto" there:\n  ' + "\n  ".join(mistakes)
        )
    try:
        settled = EngineConfig.model_validate({**engine.model_dump(), **update})
    except ValidationError as error:
        told = "; ".join(item["msg"].removeprefix("Value error, ") for item in error.errors())
        raise RecipeError(f"engine.deepspeed_config: {path}: {told}") from error
    if settled.zero_stage == "auto":
        raise RecipeError(
            f"engine.deepspeed_config: {path} sets no zero_optimization.stage, and engine.zero_stage is auto: set one"
        )
    return settled


def handed_on(tree: Mapping[str, Any]) -> Tree:
    """Return what of a file goes to DeepSpeed as it is: all but what the recipe decides."""
    rest = {key: value for key, value in tree.items() if key not in OWNED}
    zero = dict(rest.pop("zero_optimization", {}))
    for key in ("stage", *ZERO_KEYS):
        zero.pop(key, None)
    for block in OFFLOADS:
        if block in zero:
            kept = {k: v for k, v in zero[block].items() if k not in ("device", "pin_memory", "nvme_path")}
            zero[block] = kept
    return {**rest, "zero_optimization": zero}


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """Lay one tree over another, block by block."""
    both = dict(under)
    for key, value in over.items():
        below = both.get(key)
        both[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return both


def _wanted(
    train: TrainConfig, optimizer: OptimizerConfig, scaling: ScalingConfig
) -> list[tuple[str, str, Any]]:
    """Return what the recipe decides: the file's key, the recipe's, and its value."""
    workers = max(1, scaling.num_workers)
    whole = workers * train.train_batch_size * train.gradient_accumulation_steps
    precision = train.mixed_precision
    betas = [optimizer.adam_beta1, optimizer.adam_beta2]
    return [
        ("train_batch_size", "workers x train.train_batch_size x train.gradient_accumulation_steps", whole),
        ("train_micro_batch_size_per_gpu", "train.train_batch_size", train.train_batch_size),
        (
            "gradient_accumulation_steps",
            "train.gradient_accumulation_steps",
            train.gradient_accumulation_steps,
        ),
        ("gradient_clipping", "optimizer.max_grad_norm", optimizer.max_grad_norm),
        ("bf16.enabled", "train.mixed_precision == bf16", precision == "bf16"),
        ("fp16.enabled", "train.mixed_precision == fp16", precision == "fp16"),
        ("amp.enabled", "train.mixed_precision (apex)", False),
        ("optimizer.type", "optimizer.name", "AdamW"),
        ("optimizer.params.lr", "optimizer.learning_rate", optimizer.learning_rate),
        ("optimizer.params.betas", "optimizer.adam_beta1 and adam_beta2", betas),
        ("optimizer.params.eps", "optimizer.adam_epsilon", optimizer.adam_epsilon),
        ("optimizer.params.weight_decay", "optimizer.adam_weight_decay", optimizer.adam_weight_decay),
        ("scheduler.type", "optimizer.lr_scheduler", optimizer.lr_scheduler),
    ]


def _at(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _without_auto(tree: Tree) -> Tree:
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in tree.items()
        if value != "auto"
    }
