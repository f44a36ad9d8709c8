"""One rank of a group that trains the same few steps under every engine, once for all tests of test_zero.py.

Starting a rank takes longer than its training, so all engines run one after the other in the same processes. Rank 0
writes their results to ``results.pt``.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.distributed as dist
from torch import nn

from dreamfleet.trainers.config.engine import EngineConfig
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.distributed.process_group import leave_group
from dreamfleet.trainers.engines.zero_setup import import_deepspeed, zero_config
from dreamfleet.trainers.engines.zero_shards import Shards
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.build import Parts, assemble

STEPS, HALF = 3, 2
HAS_LIBAIO = Path("/usr/include/libaio.h").is_file()
DREAMBOOTH = {"name": "dreambooth", "train_text_encoder": True}
TEXTUAL_INVERSION = {
    "name": "textual_inversion", "placeholder_token": "<x>", "initializer_token": "cat", "num_vectors": 3,
}  # fmt: skip
#: Stage 3 is last: DeepSpeed then replaces torch's linear function permanently, and the last bits may differ.
ENGINES: dict[str, dict[str, Any]] = {
    "torch": {},
    "zero 0": {"zero_stage": 0},
    "zero 1": {"zero_stage": 1},
    "zero 2": {"zero_stage": 2},
    "zero 1 offload": {"zero_stage": 1, "offload_optimizer_device": "cpu"},
    "zero 2 offload": {"zero_stage": 2, "offload_optimizer_device": "cpu"},
    "zero 3": {"zero_stage": 3},
    "zero 3 offload": {"zero_stage": 3, "offload_optimizer_device": "cpu", "offload_param_device": "cpu"},
    # With this threshold every parameter is sharded.
    "zero 3 apart": {"zero_stage": 3, "stage3_param_persistence_threshold": 0},
    "zero 3 lent": {"zero_stage": 3, "stage3_param_persistence_threshold": 0, "offload_param_device": "cpu"},
}
#: On disk, in several files per rank; `make_parts` adds the folder and the DeepSpeed JSON file.
SWAPPED: dict[str, dict[str, Any]] = {
    "zero 3 states on nvme": {"zero_stage": 3, "offload_optimizer_device": "nvme"},
    "zero 3 all on nvme": {
        "zero_stage": 3, "offload_optimizer_device": "nvme", "offload_param_device": "nvme",
    },
}  # fmt: skip
RUNS: list[tuple[str, str]] = [
    *[("dreambooth", name) for name in ENGINES],
    *[("textual_inversion", name) for name in ENGINES],
    *[("lion", name) for name in ("torch", "zero 0", "zero 1", "zero 2", "zero 3", "zero 3 apart")],
    *[("bf16", name) for name in ("torch", "zero 0", "zero 2", "zero 3 offload", "zero 3 apart")],
    *[("bf16 word", name) for name in ("torch", "zero 3 lent")],
    *[("lora", name) for name in ENGINES],
    *[("hypernetwork", name) for name in ("torch", "zero 1 offload", "zero 3 lent")],
    *[("prompt_tuning", name) for name in ("torch", "zero 2", "zero 3 apart")],
    *[("sdxl", name) for name in ("torch", "zero 2", "zero 3")],
    *[("sdxl word", name) for name in ("torch", "zero 3 apart")],
    *[("pocket", name) for name in ("torch", "zero 3 states on nvme")],
    *[("bf16 pocket", name) for name in ("torch", "zero 3 all on nvme")],
    *[("bf16 pocket word", name) for name in ("torch", "zero 3 all on nvme")],
]
#: The tiny model is too small to be moved out of memory.
POCKET = {"model__pretrained_model_name_or_path": "pocket", "data__resolution": 64}
CHANGES: dict[str, dict[str, Any]] = {
    "dreambooth": {"method": DREAMBOOTH},
    "textual_inversion": {"method": TEXTUAL_INVERSION},
    "lion": {
        "method": TEXTUAL_INVERSION,
        "optimizer": {"name": "lion", "learning_rate": 1e-3, "max_grad_norm": 0.5},
    },
    "lora": {"method": {**DREAMBOOTH, "lora_rank": 4, "lora_alpha": 6, "lora_target_modules": "locon"}},
    "bf16": {
        "method": DREAMBOOTH,
        "train__mixed_precision": "bf16",
        "train__gradient_checkpointing": True,
    },
    "bf16 word": {
        "method": TEXTUAL_INVERSION,
        "train__mixed_precision": "bf16",
        "train__gradient_checkpointing": True,
    },
    "hypernetwork": {"method": {"name": "hypernetwork"}},
    "prompt_tuning": {"method": {**TEXTUAL_INVERSION, "name": "prompt_tuning"}},
    "sdxl": {"method": DREAMBOOTH, "model__pretrained_model_name_or_path": "sdxl"},
    "sdxl word": {"method": TEXTUAL_INVERSION, "model__pretrained_model_name_or_path": "sdxl"},
    "pocket": POCKET,
    "bf16 pocket": {**POCKET, "train__mixed_precision": "bf16"},
    "bf16 pocket word": {**POCKET, "method": TEXTUAL_INVERSION, "train__mixed_precision": "bf16"},
}
#: Which DreamBooth run resumes from which checkpoint.
RESUMED = [
    ("zero 0", "zero 0"),
    ("zero 1", "zero 1"),
    ("zero 2", "zero 2"),
    ("zero 2 offload", "zero 2 offload"),
    ("torch", "zero 2 offload"),
    ("zero 1 offload", "torch"),
    ("zero 2", "zero 3"),
    ("zero 3", "zero 3"),
    ("zero 3 offload", "zero 1"),
]


def make_parts(
    folder: Path, engine: dict[str, Any], distributed: DistributedContext, **changes: Any
) -> Parts:
    """Build a run of this group on the tiny model, with accumulation, clipping, two learning rates and EMA."""
    averages = {} if "pocket" in str(changes) else {"use_ema": True, "ema_decay": 0.9}
    if "nvme" in engine.values():
        (folder / "groups.json").write_text('{"zero_optimization": {"sub_group_size": 600000}}')
        engine = {
            **engine,
            "nvme_path": str(folder / "nvme"),
            "deepspeed_config": str(folder / "groups.json"),
        }
    options = {
        "engine": {**averages, **engine},
        "train__train_batch_size": (2 if "pocket" in str(changes) else 4) // distributed.world,
        "train__gradient_accumulation_steps": 2,
        "optimizer": {"learning_rate": 1e-3, "text_encoder_lr": 1e-4, "max_grad_norm": 0.5},
        **changes,
    }
    model = changes.get("model__pretrained_model_name_or_path", "pocket")
    if model != "pocket":
        options["model__pretrained_model_name_or_path"] = str(folder / model)
    return assemble(build_recipe(tiny.make_recipe(folder, **options)), distributed)


def take_steps(parts: Parts, start: int, end: int) -> dict[str, list[float]]:
    """Train as the loop does, including the discarded first batch, and return losses and gradient norms."""
    engine, losses, norms = parts.engine, [], []

    def backward(step: int, micro: int, last: bool) -> torch.Tensor:
        return engine.backward(parts.prepare(parts.feed.batch(step, micro)), last=last).total

    # Gradients of other images, once as the end of a step and once within a step; none of them may remain.
    backward(50, 0, last=True)
    engine.drop_gradients()
    backward(51, 0, last=False)
    engine.drop_gradients()
    for step in range(start, end):
        total = sum(backward(step, unit, unit == engine.units[-1]) for unit in engine.units)
        norm = engine.step({name: rate(step) for name, rate in parts.rates.items()}, step + 1)
        losses.append(float(engine.sum_over_ranks(total / engine.num_units)))
        norms.append(float(norm))
    return {"losses": losses, "norms": norms}


def probe(parts: Parts, distributed: DistributedContext) -> dict[str, Any]:
    """Use the averaged weights in forward passes, as previews and exports do; return the results."""

    def look() -> dict[str, Any]:
        with torch.no_grad(), parts.engine.autocast():
            encoded = parts.method.encode(["a photo of sks cat <x>"]).context.float()
            loss = float(parts.method(parts.prepare(parts.feed.batch(60))).total)
            return {"averaged loss": loss, "encoded": encoded}

    found = parts.engine.evaluate(look) or {}
    with parts.engine.full_weights():
        if distributed.is_main:
            found["whole"] = {name: value.clone() for name, value in parts.method.state().items()}
            found["whole unet"] = {
                n: p.detach().float().clone() for n, p in parts.model.unet.named_parameters()
            }
    found["kept"] = kept_share(parts)
    return found


def kept_share(parts: Parts) -> float:
    """Return the share of the U-Net's weights that this rank holds between two forward passes."""
    params = list(parts.model.unet.parameters())
    kept = sum(getattr(param, "ds_tensor", param).numel() for param in params)
    return kept / sum(getattr(param, "ds_numel", param.numel()) for param in params)


def snapshot(parts: Parts) -> dict[str, Any]:
    """Return a copy of the state that a checkpoint would contain."""
    return copy.deepcopy({"learned": parts.engine.weights(), "state": parts.engine.state()})


def train(
    folder: Path, engine: dict[str, Any], distributed: DistributedContext, **changes: Any
) -> dict[str, Any]:
    """Train from the start with a checkpoint and previews in between; return losses, norms and states."""
    parts = make_parts(folder, engine, distributed, **changes)
    probe(parts, distributed)  # a run samples and evaluates before its first step
    first = take_steps(parts, 0, HALF)
    saved, seen = snapshot(parts), probe(parts, distributed)
    rest = take_steps(parts, HALF, STEPS)
    final = snapshot(parts)
    parts.engine.close()
    return {**{name: first[name] + rest[name] for name in first}, **seen, "saved": saved, "final": final}


def resume(
    folder: Path,
    engine: dict[str, Any],
    distributed: DistributedContext,
    saved: dict[str, Any],
    **changes: Any,
) -> dict[str, Any]:
    """Resume from a checkpoint of rank 0; return losses, norms, the final state and the number of swap files."""
    parts = make_parts(folder, engine, distributed, **(changes or {"method": DREAMBOOTH}))
    found = [copy.deepcopy(saved)]
    dist.broadcast_object_list(found)  # every rank of a run reads it
    parts.engine.load_weights(found[0]["learned"])
    parts.engine.load_state(found[0]["state"])
    figures = take_steps(parts, HALF, STEPS)
    final, swapped = (
        snapshot(parts),
        len(list(folder.glob(f"nvme/*/zero_stage_3/optimizer/rank{distributed.rank}/exp*"))),
    )
    parts.engine.close()
    return {**figures, "final": final, "swapped": swapped}


def round_trip(stage: int) -> dict[str, Any]:
    """Shard parameters of odd sizes, which need padding on two ranks, and gather them; return the results."""
    layer = nn.Linear(5, 3)
    config = EngineConfig(zero_stage=stage)
    settings = zero_config(config, mixed_precision="no", max_grad_norm=0.0, num_micros=1, num_params=18)
    deepspeed = import_deepspeed(torch.device("cpu"))
    params = dict(layer.named_parameters())
    wanted = {name: torch.arange(1.0, 1 + param.numel()).view_as(param) for name, param in params.items()}
    optimizer = torch.optim.AdamW(layer.parameters())
    engine, *_ = deepspeed.initialize(model=layer, optimizer=optimizer, config=settings)
    shards = Shards(engine, params, optimizer, stage=stage)
    for name, value in wanted.items():
        shards.put(name, value)
    shards.publish()
    computed = engine(torch.ones(2, 5)).detach()
    gathered = {name: shards.gather(name) for name in params}
    engine.destroy()
    return {"wanted": wanted, "gathered": gathered, "computed": computed}


def grow(
    folder: Path, distributed: DistributedContext, results: dict[tuple[str, ...], dict[str, Any]]
) -> None:
    """Resume a run of one worker with two workers, and a run of two with one, at the same global batch."""
    alone = DistributedContext()
    one = train(folder, {}, alone, method=DREAMBOOTH) if distributed.is_main else {"saved": {}}
    for name in ("torch", "zero 2"):
        results["grown", name] = {**resume(folder, ENGINES[name], distributed, one["saved"]), "straight": one}
    if distributed.is_main:
        for name in ("torch", "zero 2"):
            source = results["dreambooth", name]
            parts = make_parts(folder, {}, alone, method=DREAMBOOTH)
            saved = copy.deepcopy(source["saved"])
            parts.engine.load_weights(saved["learned"])
            parts.engine.load_state(saved["state"])
            figures = take_steps(parts, HALF, STEPS)
            results["shrunk", name] = {**figures, "final": snapshot(parts), "straight": source}


def main(folder: Path, rank: int, world: int) -> None:
    """Train with every engine, and resume each from checkpoints of the others; rank 0 writes the results."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.set_num_threads(1)
    distributed = DistributedContext(rank, world)
    results: dict[Any, Any] = {}
    for stage_3 in (False, True):
        for method, name in RUNS:
            if stage_3 == ("zero 3" in name) and (HAS_LIBAIO or "nvme" not in name):
                engine = (ENGINES | SWAPPED)[name]
                results[method, name] = train(folder, engine, distributed, **CHANGES[method])
        if not stage_3:
            grow(folder, distributed, results)
        for source, target in RESUMED:
            if stage_3 == ("zero 3" in f"{source} {target}"):
                saved = results["dreambooth", source]["saved"]
                results["resumed", source, target] = resume(folder, ENGINES[target], distributed, saved)
    if HAS_LIBAIO:
        target, engine = next(iter(SWAPPED.items()))
        for source in ("torch", target):
            saved = results["pocket", source]["saved"]
            results["resumed", source, target] = resume(folder, engine, distributed, saved, **POCKET)
        dist.barrier()
        results["left on disk"] = sorted(path.name for path in (folder / "nvme").iterdir())
    for stage in (1, 3):
        results["round trip", str(stage)] = round_trip(stage)
    if distributed.is_main:
        torch.save(results, folder / "results.pt")
    leave_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
