"""Pictures per second against the loop of diffusers' train_dreambooth.py, alternating, and the same losses
for one noise.

The other side makes the calls that script makes in every step: pictures are opened, resized and cropped
(its dataset does so
at every access), the VAE encodes them, the text encoder encodes the prompts, noise is drawn with randn_like. The script
itself needs torchvision, which has no build for a CPU torch; there is no accelerate around this loop,
which would only slow it. Ours serves pictures and text from what it encoded once. Batch 4, 64 px, the pocket model.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import spread, write_result

from dreamfleet.datasets.plan import Draw

ROOT = Path(__file__).parent.parent
BLOCKS, STEPS = 8, 15


def main() -> None:
    """Measure both loops in this process, alternating."""
    from dreamfleet.trainers.assemble import Place, assemble
    from dreamfleet.trainers.loop import Hooks, Schedule, train
    from dreamfleet.trainers.pictures import read_pixels
    from dreamfleet.trainers.recipe import load_recipe

    recipe = load_recipe(
        ROOT / "recipes/demo.yaml",
        [
            f"output_dir={tempfile.mkdtemp()}",
            "train.train_batch_size=4",
            "train.snr_gamma=null",
            "method.with_prior_preservation=false",
            "data.random_flip=false",
            "data.latent_sampling=deterministic",
            "validation.prompts=[]",
        ],
    )
    parts = assemble(recipe, Place())
    model = parts.model
    uris = parts.sets.instances.column("uri")

    def open_pictures(draws: list[Draw]) -> torch.Tensor:
        return torch.stack([torch.from_numpy(read_pixels(uris[draw.row], recipe.data)) for draw in draws])

    optimizer = torch.optim.AdamW(model.unet.parameters(), lr=0.0, weight_decay=1e-2)
    ids = model.tokenize([recipe.data.instance_prompt])

    def their_loss(
        pictures: torch.Tensor, noise: torch.Tensor | None, timesteps: torch.Tensor | None
    ) -> torch.Tensor:
        posterior = model.vae.encode(pictures).latent_dist
        latents = (
            posterior.mode() if noise is not None else posterior.sample()
        ) * model.vae.config.scaling_factor
        noise = torch.randn_like(latents) if noise is None else noise
        if timesteps is None:
            timesteps = torch.randint(0, model.scheduler.config.num_train_timesteps, (len(latents),))
        noisy = model.scheduler.add_noise(latents, noise, timesteps)
        context = model.text_encoder(ids.expand(len(latents), -1))[0]
        target = model.scheduler.get_velocity(latents, noise, timesteps)
        return F.mse_loss(model.unet(noisy, timesteps, context).sample.float(), target.float())

    differences = []
    for step in range(5):
        batch = parts.feed.batch(step)
        draws = parts.feed.plan.draws(step)
        with torch.no_grad():
            theirs = their_loss(open_pictures(draws), batch["noise"], batch["timesteps"])
            differences.append(abs(float(theirs) - float(parts.method(parts.prepare(batch)).total)))

    def diffusers_block() -> float:
        start = time.perf_counter()
        for step in range(STEPS):
            loss = their_loss(open_pictures(parts.feed.plan.draws(step)), None, None)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return 4 * STEPS / (time.perf_counter() - start)

    waits = []

    def our_block(first: int) -> float:
        stamps = []
        outcome = train(
            parts.method,
            parts.engine,
            parts.feed.stream(first),
            parts.prepare,
            rates={name: lambda step: 0.0 for name in parts.rates},
            schedule=Schedule(total=first + STEPS + 1, save_every=10**9, sample_every=10**9, log_every=10),
            seed=0,
            start_step=first,
            hooks=Hooks(should_stop=lambda: stamps.append(time.perf_counter()) or False),
        )
        waits.append(outcome.figures["data_wait_fraction"])
        return 4 * STEPS / (time.perf_counter() - stamps[1])

    diffusers_block(), our_block(0)
    theirs, ours = [], []
    for block in range(BLOCKS):
        theirs.append(diffusers_block())
        ours.append(our_block(100 * (block + 1)))
    write_result(
        "diffusers_loop",
        {
            "diffusers_pictures_per_second": spread(theirs),
            "ours_pictures_per_second": spread(ours),
            "ratio_ours_to_diffusers": spread([a / b for a, b in zip(ours, theirs, strict=True)]),
            "largest_loss_difference_for_the_same_noise": max(differences),
            "data_wait_fraction": spread(waits),
            "unet_parameters": sum(p.numel() for p in model.unet.parameters()),
            "blocks": f"{BLOCKS} alternating blocks of {STEPS} steps, batch 4, 64 px",
        },
        how="python benchmarks/diffusers_loop.py",
    )


if __name__ == "__main__":
    main()
