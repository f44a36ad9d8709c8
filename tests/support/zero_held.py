"""Measures the memory that a process holds under every ZeRO setting, for test_plan_memory.py.

It is a separate process, because importing DeepSpeed changes global state. Prints a JSON object: setting and
precision -> [bytes held, bytes estimated].
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import tiny
from torch import Tensor
from zero_ranks import HAS_LIBAIO

from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.memory.estimate import estimate
from dreamfleet.trainers.memory.profile import count_run, method_shape
from dreamfleet.trainers.memory.strategies import CHOICES, NVME_CHOICES, EngineChoice
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.build import assemble


def held_bytes() -> int:
    """Return the bytes of all tensors that the garbage collector finds in this process, whoever owns them."""
    gc.collect()
    # Use type(), because `isinstance` would import lazy modules.
    tensors = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


DREAMBOOTH = {"method": {"name": "dreambooth", "train_text_encoder": True}}
WORD = {"method": {"name": "textual_inversion", "placeholder_token": "<x>", "initializer_token": "cat"}}
POCKET = {
    "model__pretrained_model_name_or_path": "pocket",
    "data__resolution": 64,
    "train__train_batch_size": 1,
}


def compare(folder: Path, choice: EngineChoice, mixed_precision: str, **changes: Any) -> tuple[int, int]:
    """Take a step under a setting; return the bytes held between steps, and the estimated bytes."""
    engine = {key.removeprefix("engine."): value for key, value in choice.settings.items()}
    if choice.nvme:
        engine["nvme_path"] = str(folder / "nvme")
    recipe = build_recipe(
        tiny.make_recipe(folder, engine=engine, train__mixed_precision=mixed_precision, **changes)
    )
    before = held_bytes()
    parts = assemble(recipe, DistributedContext())
    try:
        parts.engine.backward(parts.prepare(parts.engine.to_device(parts.feed.batch(0))))
        parts.engine.step(dict.fromkeys(parts.rates, 1e-3), 1)
        held = held_bytes() - before
    finally:
        parts.engine.close()
    made = estimate(count_run(recipe, method_shape(recipe), 6), choice)
    lasting = ["weights", "master", "optimizer"]
    if choice.zero_stage == 3:
        lasting += ["gradients", "buffers"]
    on_host = sum(size for line, size in made.host.items() if line != "process")
    # Frozen components that are never sharded, in float32 on a CPU.
    outside = [parts.model.vae, *([] if parts.method.trains_text else [parts.model.text_encoder])]
    whole = sum(4 * tensor.numel() for part in outside for tensor in part.parameters())
    return held, sum(made.gpu[line] for line in lasting) + on_host + whole


if __name__ == "__main__":
    cases = [(choice, DREAMBOOTH) for choice in CHOICES if choice.zero_stage]
    cases += [(choice, WORD) for choice in CHOICES if choice.zero_stage == 3]
    cases += [(choice, POCKET) for choice in NVME_CHOICES if HAS_LIBAIO]
    results = {
        f"{choice.name}, {precision}, {changes}": compare(Path(sys.argv[1]), choice, precision, **changes)
        for choice, changes in cases
        for precision in ("no", "bf16")
    }
    print(json.dumps(results))
