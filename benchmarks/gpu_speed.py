"""Measures images per second and model FLOP utilisation of SD 1.5's U-Net on a GPU, also for diffusers' script."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_cases import build_parts, make_recipe, synthetic_batch

BATCHES = (1, 2, 4, 8, 16, 32, 64)
WAYS: dict[str, dict[str, bool]] = {
    "plain": {},
    "channels_last": {"channels_last": True},
    "compiled": {"torch_compile": True},
    "compiled_channels_last": {"torch_compile": True, "channels_last": True},
}
ROUNDS = 3
Step = Callable[[], None]


def wait() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(step: Step, *, steps: int) -> float:
    """Time `steps` consecutive steps; return the seconds per step."""
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return (time.perf_counter() - start) / steps


def matrix_rate(side: int, device: torch.device) -> float:
    """Return the bf16 matrix rate of a device in FLOP/s: the best of several products of square matrices."""
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = [seconds_of(lambda: left @ right, steps=10) for _ in range(6)]
    return 2 * side**3 / min(seconds)


def copy_rates(size: int = 2**30) -> dict[str, Any]:
    """Return the rates of copies between page-locked host memory and the GPU in each direction, in GB/s."""
    if not torch.cuda.is_available():
        return {}
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    card = torch.empty(size, dtype=torch.uint8, device="cuda")
    there = min(seconds_of(lambda: card.copy_(host, non_blocking=True), steps=3) for _ in range(4))
    back = min(seconds_of(lambda: host.copy_(card, non_blocking=True), steps=3) for _ in range(4))
    return {
        "to_gpu_gb_per_s": round(size / there / 1e9, 2),
        "to_host_gb_per_s": round(size / back / 1e9, 2),
    }


def ours(
    batch_size: int, folder: Path, device: torch.device, *, small: bool, **engine: bool
) -> tuple[Step, Any]:
    """Build our training step of the native method on precomputed latents; return the step and the method."""
    recipe = make_recipe("no-offload", folder, small=small)
    recipe = recipe.model_copy(
        update={
            "engine": recipe.engine.model_copy(
                update={"name": "torch", "zero_stage": "auto", "gpu_memory": None, **engine}
            ),
            "train": recipe.train.model_copy(
                update={"gradient_checkpointing": False, "train_batch_size": batch_size}
            ),
        }
    )
    method, trainer, _, _ = build_parts(recipe, device, settle=False)
    batch = synthetic_batch(recipe, method)
    rates = {group.name: 1e-6 for group in trainer.groups}
    done = [0]

    def step() -> None:
        done[0] += 1
        trainer.begin_step(rates, done[0])
        trainer.backward(trainer.to_device(batch))
        trainer.step(rates, done[0])

    return step, method


def theirs(batch_size: int, folder: Path, device: torch.device, *, small: bool, encodes: bool) -> Step:
    """Build the script's step: autocast, AdamW, reading the loss; with ``encodes`` also VAE and text encoder."""
    _, method = ours(batch_size, folder, device, small=small)
    model = method.model
    unet = model.unet.train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-6)
    recipe = make_recipe("no-offload", folder, small=small)
    side = recipe.data.resolution
    pixels = torch.randn(batch_size, 3, side, side).to(model.vae.dtype)
    ids = torch.zeros(batch_size, 77, dtype=torch.long)
    latents = torch.randn(batch_size, model.vae.config.latent_channels, *[side // model.vae_factor] * 2)
    context = torch.randn(batch_size, 77, model.context_width)
    kind = torch.bfloat16

    def step() -> None:
        nonlocal latents, context
        with torch.no_grad():
            if encodes:
                latents = (
                    model.vae.encode(pixels.to(device)).latent_dist.sample() * model.vae.config.scaling_factor
                )
                context = model.text_encoder(ids.to(device))[0]
        ready, encoded = latents.to(device), context.to(device)
        noise = torch.randn_like(ready)
        timesteps = torch.randint(0, 1000, (batch_size,), device=device)
        noisy = model.scheduler.add_noise(ready, noise, timesteps)
        with torch.autocast(device.type, kind):
            predicted = unet(noisy, timesteps, encoded).sample
        loss = F.mse_loss(predicted.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.detach().item()

    return step


def flops_of(step: Step) -> int:
    """Return the floating point operations of a step's matrix products and convolutions."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def best_batch(make: Callable[[int], Step], batches: tuple[int, ...], *, steps: int) -> dict[str, Any]:
    """Find the batch size with the most images per second among those that fit into memory."""
    found: dict[str, Any] = {"batch": 0, "pictures_per_second": 0.0}
    for batch in batches:
        try:
            step = make(batch)
            step()
            step()
            rate = batch / seconds_of(step, steps=steps)
        except torch.cuda.OutOfMemoryError:
            break
        finally:
            step = None  # type: ignore[assignment]  # free its tensors before the next step is built
            _forget()
        if rate > found["pictures_per_second"]:
            found = {"batch": batch, "pictures_per_second": round(rate, 2)}
    return found


def measure_speed(
    *, small: bool, batches: tuple[int, ...] = (), ways: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Measure each variant at its best batch size, then the best variant and diffusers' step alternately.

    ``batches``: batch sizes to try, in ascending order (default: all of `BATCHES`). ``ways``: names of variants.
    """
    from dreamfleet.trainers.distributed.device import best_device

    device = best_device()
    batches, steps = batches or (BATCHES[:2] if small else BATCHES), 1 if small else 10
    chosen_ways = {way: WAYS[way] for way in ways or WAYS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rate = matrix_rate(256 if small else 8192, device)
        flops = flops_of(ours(1, folder, device, small=small)[0])
        found: dict[str, Any] = {}
        for way, options in chosen_ways.items():
            if small and "torch_compile" in options:
                continue  # compiling takes a minute
            found[way] = best_batch(
                lambda batch, chosen=options: ours(batch, folder, device, small=small, **chosen)[0],
                batches,
                steps=steps,
            )
            found[way]["flop_utilisation"] = round(found[way]["pictures_per_second"] * flops / rate, 4)
        best = max(found, key=lambda way: found[way]["pictures_per_second"])
        batch = found[best]["batch"]
        sides: dict[str, Step] = {
            "ours": ours(batch, folder, device, small=small, **WAYS[best])[0],
            "diffusers, same step": theirs(batch, folder, device, small=small, encodes=False),
            "diffusers, encoding": theirs(batch, folder, device, small=small, encodes=True),
        }
        times: dict[str, list[float]] = {side: [] for side in sides}
        for step in sides.values():
            step()
        for _ in range(2 if small else ROUNDS):
            for side, step in sides.items():
                times[side].append(seconds_of(step, steps=steps))
    images = {side: round(batch / statistics.median(one), 2) for side, one in times.items()}
    return {
        "flops_a_picture": flops,
        "matrix_rate_tflops": round(rate / 1e12, 1),
        "ways": found,
        "best": best,
        "batch": batch,
        "pictures_per_second": images,
        "over_diffusers_same_step": round(images["ours"] / images["diffusers, same step"], 3),
        "over_diffusers_encoding": round(images["ours"] / images["diffusers, encoding"], 3),
    }


def _forget() -> None:
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
