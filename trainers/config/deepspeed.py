"""Reads the user's DeepSpeed JSON file: merges its keys with the ``engine:`` section and reports contradictions."""

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
#: Elements of a communication buffer. DeepSpeed's default of 500 million would use 1 GB of the memory that ZeRO saves.
BUCKET = 50_000_000
#: Elements in host memory at a time, 16 bytes each, if optimizer states are on NVMe. DeepSpeed's default is a billion.
SWAPPED_GROUP = 100_000_000
OFFLOADS = {"offload_optimizer": "offload_optimizer_device", "offload_param": "offload_param_device"}
#: Keys that the recipe sets. They must agree with the recipe, and are not passed on.
OWNED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
)


def read_deepspeed_file(path: str) -> Tree:
    """Read a DeepSpeed JSON file, without "auto" values, which in accelerate refer to the script's own settings.

    Raises RecipeError if it is not a JSON object.
    """
    folder, _, name = path.rpartition("/")
    try:
        tree = json.loads(Storage(folder or "/").read_text(name))
    except (StorageError, ValueError) as error:
        raise RecipeError(f"engine.deepspeed_config: {path} cannot be read as JSON ({error})") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"engine.deepspeed_config: {path} must contain a JSON object")
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
    errors = [
        f"{key}: {found!r} in the file, {name}: {value!r} in the recipe"
        for key, name, value in _recipe_values(train, optimizer, scaling)
        if (found := _at(tree, key)) is not None and found != value
    ]
    # (key in zero_optimization, key in the recipe, value of the recipe that means unset)
    keys: list[tuple[str, str, str | None]] = [("stage", "zero_stage", "auto")]
    for block, name in OFFLOADS.items():
        keys += [(f"{block}.device", name, "none"), (f"{block}.pin_memory", "pin_memory", None)]
        keys.append((f"{block}.nvme_path", "nvme_path", None))
    keys += [(key, key, None) for key in ZERO_KEYS]
    update: Tree = {}
    for key, name, unset in keys:
        found, value = _at(tree, f"zero_optimization.{key}"), getattr(engine, name)
        if found is None or found == value:
            continue
        if value != unset or update.get(name, found) != found:
            errors.append(
                f"zero_optimization.{key}: {found!r} in the file, engine.{name}: {value!r} in the recipe"
            )
        update[name] = found
    if errors:
        raise RecipeError(
            f"engine.deepspeed_config: {path} contradicts the recipe; remove these keys from the file, or set them to "
            f'"auto" there:\n  ' + "\n  ".join(errors)
        )
    try:
        merged = EngineConfig.model_validate({**engine.model_dump(), **update})
    except ValidationError as error:
        reasons = "; ".join(item["msg"].removeprefix("Value error, ") for item in error.errors())
        raise RecipeError(f"engine.deepspeed_config: {path}: {reasons}") from error
    if merged.zero_stage == "auto":
        raise RecipeError(
            f"engine.deepspeed_config: {path} has no zero_optimization.stage, and engine.zero_stage is auto; set one"
        )
    return merged


def passed_on(tree: Mapping[str, Any]) -> Tree:
    """Return the keys of a file that are passed to DeepSpeed unchanged: all except those that the recipe sets."""
    rest = {key: value for key, value in tree.items() if key not in OWNED}
    zero = dict(rest.pop("zero_optimization", {}))
    for key in ("stage", *ZERO_KEYS):
        zero.pop(key, None)
    for block in OFFLOADS:
        if block in zero:
            kept = {k: v for k, v in zero[block].items() if k not in ("device", "pin_memory", "nvme_path")}
            zero[block] = kept
    return {**rest, "zero_optimization": zero}


def merge_trees(under: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """Return ``under`` updated with ``over``, recursively."""
    both = dict(under)
    for key, value in over.items():
        below = both.get(key)
        both[key] = (
            merge_trees(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
        )
    return both


def _recipe_values(
    train: TrainConfig, optimizer: OptimizerConfig, scaling: ScalingConfig
) -> list[tuple[str, str, Any]]:
    """Return (key in the file, key in the recipe, value) of all keys that the recipe sets."""
    workers = scaling.max_workers
    whole = workers * train.train_batch_size * train.gradient_accumulation_steps
    precision = train.mixed_precision
    options = optimizer.options
    betas = list(options.get("betas", [optimizer.adam_beta1, optimizer.adam_beta2]))
    decay = options.get("weight_decay", optimizer.adam_weight_decay)
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
        ("optimizer.type", "optimizer.name", "Lion" if optimizer.name == "lion" else "AdamW"),
        ("optimizer.params.lr", "optimizer.learning_rate", optimizer.learning_rate),
        ("optimizer.params.betas", "optimizer.adam_beta1 and adam_beta2", betas),
        ("optimizer.params.eps", "optimizer.adam_epsilon", optimizer.adam_epsilon),
        ("optimizer.params.weight_decay", "optimizer.adam_weight_decay", decay),
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
