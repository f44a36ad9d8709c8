"""Compares images per second and losses with the training loop of diffusers' train_dreambooth.py.

The baseline performs every operation of that script with accelerate: at every access the image is opened,
rotated, resized and cropped and the prompt is tokenised; at every step the VAE and the text encoder encode,
noise is sampled with randn_like, and the loss is read for the progress bar. The script needs torchvision,
which has no build for a CPU version of torch, so Pillow replaces its transforms. Our loop uses images and
text that were encoded once. Batch 4, 64 px, the pocket model, on the example images (256 px PNG) and, if the
dataset is available, on real photos (640 px JPEG). The two loops alternate.

``unet_step_milliseconds`` is the forward pass, backward pass, clipping and optimizer step of the U-Net alone,
on precomputed latents. No loop with this model can be faster, so ``ratio_at_most`` is the best possible
ratio.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measure import spread, write_result
from PIL import Image, ImageOps

ROOT = Path(__file__).parent.parent
DREAMBENCH = Path(os.environ.get("DREAMBENCH", ROOT.parent / "shared/data/dreambench"))
BLOCKS, STEPS, BATCH, SIDE = int(os.environ.get("BLOCKS", 8)), 15, 4, 64
Block = Callable[[], float]


class Photos(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The script's DreamBoothDataset, with Pillow instead of torchvision."""

    def __init__(self, files: list[str], tokenizer: Any, prompt: str):
        self.files, self.tokenizer, self.prompt = files, tokenizer, prompt

    def __len__(self) -> int:
        return BATCH * STEPS

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        image = ImageOps.exif_transpose(Image.open(self.files[number % len(self.files)])).convert("RGB")
        factor = SIDE / min(image.size)
        image = image.resize(
            (round(image.width * factor), round(image.height * factor)), Image.Resampling.BILINEAR
        )
        left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
        pixels = torch.from_numpy(np.array(image.crop((left, top, left + SIDE, top + SIDE))))
        ids = self.tokenizer(
            self.prompt, truncation=True, padding="max_length", max_length=77, return_tensors="pt"
        ).input_ids[0]
        return {"pixels": (pixels.permute(2, 0, 1).float() / 255 - 0.5) / 0.5, "ids": ids}


def theirs(model: Any, files: list[str], prompt: str) -> Block:
    """Run the script's loop over one block of steps; return images per second."""
    from accelerate import Accelerator
    from diffusers.optimization import get_scheduler

    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.unet.parameters(), lr=0.0, weight_decay=1e-2)
    loader = torch.utils.data.DataLoader(Photos(files, model.tokenizer, prompt), BATCH, shuffle=True)
    unet, optimizer, loader, schedule = accelerator.prepare(
        model.unet, optimizer, loader, get_scheduler("constant", optimizer)
    )

    def block() -> float:
        start = time.perf_counter()
        for batch in loader:
            with accelerator.accumulate(unet):
                latents = model.vae.encode(batch["pixels"]).latent_dist.sample()
                latents = latents * model.vae.config.scaling_factor
                noise = torch.randn_like(latents)
                timesteps = torch.randint(0, model.scheduler.config.num_train_timesteps, (len(latents),))
                noisy = model.scheduler.add_noise(latents, noise, timesteps)
                context = model.text_encoder(batch["ids"])[0]
                target = model.scheduler.get_velocity(latents, noise, timesteps)
                loss = F.mse_loss(unet(noisy, timesteps, context).sample.float(), target.float())
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
            loss.detach().item()
        return BATCH * STEPS / (time.perf_counter() - start)

    return block


def ours(parts: Any, waits: list[float]) -> Block:
    """Run our loop over one block of steps, each time at a new position in the plan; return images per second."""
    from dreamfleet.trainers.engines.passes import drive
    from dreamfleet.trainers.loop import Hooks, Schedule, train

    starts: Iterator[int] = iter(range(0, 10**6, 100))

    def block() -> float:
        first = next(starts)
        stamps: list[float] = []
        outcome = drive(
            train(
                parts.engine,
                parts.feed.stream(first),
                parts.prepare,
                rates={name: lambda step: 0.0 for name in parts.rates},
                schedule=Schedule(
                    total=first + STEPS + 1, save_every=10**9, sample_every=10**9, log_every=10
                ),
                seed=0,
                start_step=first,
                hooks=Hooks(should_stop=lambda: stamps.append(time.perf_counter()) or False),  # type: ignore[func-returns-value]
            )
        )
        waits.append(outcome.figures["data_wait_fraction"])
        return BATCH * STEPS / (time.perf_counter() - stamps[1])

    return block


def unet_alone(parts: Any) -> Block:
    """Run the U-Net's training step on one precomputed batch; return images per second."""
    batch = parts.prepare(parts.feed.batch(0))
    rates = dict.fromkeys(parts.rates, 0.0)

    def block() -> float:
        start = time.perf_counter()
        for step in range(STEPS):
            parts.engine.backward(batch)
            parts.engine.step(rates, step + 1)
        return BATCH * STEPS / (time.perf_counter() - start)

    return block


def same_losses(parts: Any, recipe: Any) -> float:
    """Return the largest difference between the script's loss and ours over five batches with equal noise."""
    from dreamfleet.trainers.batches.vae_encoding import read_pixels

    model, uris = parts.model, parts.sets.instances.column("uri")
    ids = model.tokenize([recipe.data.instance_prompt])
    differences = []
    for step in range(5):
        batch, draws = parts.feed.batch(step), parts.feed.plan.draws(step)
        pixels = torch.stack([torch.from_numpy(read_pixels(uris[draw.row], recipe.data)) for draw in draws])
        with torch.no_grad():
            latents = model.vae.encode(pixels).latent_dist.mode() * model.vae.config.scaling_factor
            noisy = model.scheduler.add_noise(latents, batch["noise"], batch["timesteps"])
            context = model.text_encoder(ids.expand(len(latents), -1))[0]
            target = model.scheduler.get_velocity(latents, batch["noise"], batch["timesteps"])
            loss = F.mse_loss(model.unet(noisy, batch["timesteps"], context).sample, target)
            differences.append(abs(float(loss) - float(parts.method(parts.prepare(batch)).total)))
    return max(differences)


def measure_set(folder: Path) -> dict[str, Any]:
    """Measure both loops on one folder of images, in this process, alternately."""
    from dreamfleet.trainers.distributed.context import DistributedContext
    from dreamfleet.trainers.recipe import load_recipe
    from dreamfleet.trainers.run.build import assemble

    recipe = load_recipe(
        ROOT / "recipes/demo.yaml",
        [
            f"output_dir={tempfile.mkdtemp()}",
            f"data.instance_data_dir={folder}",
            "data.instance_prompt=a sks cat face",
            "data.use_captions=false",
            f"train.train_batch_size={BATCH}",
            "method.with_prior_preservation=false",
            "data.random_flip=false",
            "data.latent_sampling=deterministic",
            "validation.prompts=[]",
        ],
    )
    parts = assemble(recipe, DistributedContext())
    waits: list[float] = []
    files = list(parts.sets.instances.column("uri"))
    sides = {
        "diffusers": theirs(parts.model, files, recipe.data.instance_prompt),
        "ours": ours(parts, waits),
        "unet_alone": unet_alone(parts),
    }
    for block in sides.values():
        block()
    speeds = {name: [] for name in sides}
    for _ in range(BLOCKS):
        for name, block in sides.items():
            speeds[name].append(block())
    pairs = {name: list(zip(speeds[name], speeds["diffusers"], strict=True)) for name in sides}
    return {
        "diffusers_pictures_per_second": spread(speeds["diffusers"]),
        "ours_pictures_per_second": spread(speeds["ours"]),
        "ratio_ours_to_diffusers": spread([a / b for a, b in pairs["ours"]]),
        "ratio_at_most": spread([a / b for a, b in pairs["unet_alone"]]),
        "unet_step_milliseconds": spread([1000 * BATCH / speed for speed in speeds["unet_alone"]]),
        "largest_loss_difference_for_the_same_noise": same_losses(parts, recipe),
        "data_wait_fraction": spread(waits),
        "unet_parameters": sum(p.numel() for p in parts.model.unet.parameters()),
    }


def main() -> None:
    """Measure the available image sets and write the result."""
    sets = {"shipped_256px_png": ROOT / "examples/cat/train"}
    if (DREAMBENCH / "duck_toy").is_dir():
        sets["photos_640px_jpeg"] = DREAMBENCH / "duck_toy"
    write_result(
        "diffusers_loop",
        {
            **{name: measure_set(folder) for name, folder in sets.items()},
            "blocks": f"{BLOCKS} alternating blocks of {STEPS} steps, batch {BATCH}, {SIDE} px",
        },
        how="python benchmarks/diffusers_loop.py",
    )


if __name__ == "__main__":
    main()
