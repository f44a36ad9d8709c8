"""Trains the pocket model's VAE, which encodes 64 px images into latents of 16 x 16 x 4."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from images import open_bank
from subjects import CACHE
from training import load_average, pick_device, train_stage

STEPS = 3700
BATCH = 12
RATE = 1.5e-3
KL_WEIGHT = 5e-6
DECODER_STEPS = 2400
DECODER_RATE = 6e-4


def build_vae() -> AutoencoderKL:
    """Build a VAE with a reduction factor of 4 and about 1.3 million parameters.

    It has no attention, because faces need sharp edges rather than global context.
    """
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=64,
        mid_block_add_attention=False,
    )
    # Start with a small latent variance: with noise as large as the latents, the decoder does not learn for a
    # long time.
    torch.nn.init.constant_(vae.quant_conv.bias[4:].data, -6.0)
    return vae


def to_input(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """Convert uint8 images (n, h, w, 3) to floats in -1..1 (n, 3, h, w)."""
    batch = torch.from_numpy(np.ascontiguousarray(images)).to(device)
    return batch.permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()


def compare_edges(made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the mean absolute difference of the image gradients, a loss that keeps outlines sharp."""
    error = made - wanted
    return (error[..., 1:] - error[..., :-1]).abs().mean() + (
        error[..., 1:, :] - error[..., :-1, :]
    ).abs().mean()


def measure_psnr(vae: AutoencoderKL, images: np.ndarray, batch: int = 50) -> float:
    """Return the mean PSNR in dB (peak 255) of uint8 images after encoding and decoding."""
    device = next(vae.parameters()).device
    found = []
    with torch.no_grad():
        for at in range(0, len(images), batch):
            wanted = to_input(images[at : at + batch], device)
            made = vae.decode(vae.encode(wanted).latent_dist.mode()).sample.clamp(-1, 1)
            error = (made - wanted).div(2).pow(2).flatten(1).mean(1)
            found.append(-10 * error.clamp_min(1e-10).log10())
    return float(torch.cat(found).mean())


def train_vae() -> AutoencoderKL:
    """Run the stage `vae`: train, measure the standard deviation of the latents, and save."""
    folder = CACHE / "folder" / "vae"
    if (folder / "config.json").exists():
        return AutoencoderKL.from_pretrained(folder)
    device = pick_device()
    torch.manual_seed(1)
    vae = build_vae().to(device)
    narrow, wide = open_bank("narrow").images, open_bank("wide").images

    def compute(model: torch.nn.Module, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        wanted = to_input(_draw(step, narrow, wide), device)
        with torch.autocast(device.type, torch.bfloat16):
            latents = model.encode(wanted).latent_dist
            made = model.decode(latents.sample()).sample
        made = made.float()
        error = made - wanted
        kl = latents.kl().float().mean()
        loss = error.abs().mean() + 2 * error.pow(2).mean() + 0.5 * compare_edges(made, wanted)
        psnr = -10 * (error.detach().div(2).pow(2).mean().log10())
        return loss + KL_WEIGHT * kl, {"psnr": psnr.item(), "kl": kl.item()}

    vae = train_stage("vae", vae, compute, STEPS, RATE)
    return save_vae(vae)


def _draw(step: int, narrow: np.ndarray, wide: np.ndarray) -> np.ndarray:
    """Return the images of a step, three quarters of them of the U-Net's subjects: uint8 (n, h, w, 3)."""
    rng = np.random.default_rng([11, step])
    n = BATCH * 3 // 4
    picks = narrow[np.sort(rng.integers(len(narrow), size=n))]
    return np.concatenate([picks, wide[np.sort(rng.integers(len(wide), size=BATCH - n))]])


def tune_decoder() -> AutoencoderKL:
    """Run the stage `decoder`: fine-tune the decoder only, so that the encoded latents remain valid."""
    folder = CACHE / "folder" / "vae_tuned"
    if (folder / "config.json").exists():
        return AutoencoderKL.from_pretrained(folder)
    device = pick_device()
    vae = AutoencoderKL.from_pretrained(CACHE / "folder" / "vae", torch_dtype=torch.float32).to(device)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    narrow, wide = open_bank("narrow").images, open_bank("wide").images

    def compute(model: torch.nn.Module, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        wanted = to_input(_draw(100_000 + step, narrow, wide), device)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                latents = model.encode(wanted).latent_dist.sample()
            made = model.decode(latents).sample
        error = made.float() - wanted
        loss = error.abs().mean() + 2 * error.pow(2).mean() + 0.5 * compare_edges(made.float(), wanted)
        return loss, {"psnr": -10 * (error.detach().div(2).pow(2).mean().log10()).item()}

    vae = train_stage("decoder", vae, compute, DECODER_STEPS, DECODER_RATE)
    vae.save_pretrained(folder)
    print("decoder: PSNR on held-out subjects", measure_psnr(vae, open_bank("held_out").images))
    return vae


def load_vae() -> AutoencoderKL:
    """Load the trained VAE, with the fine-tuned decoder if it exists."""
    tuned = CACHE / "folder" / "vae_tuned"
    source = tuned if (tuned / "config.json").exists() else CACHE / "folder" / "vae"
    return AutoencoderKL.from_pretrained(source, torch_dtype=torch.float32).eval()


def save_vae(vae: AutoencoderKL) -> AutoencoderKL:
    """Set the scaling factor to 1 / standard deviation of 2,000 images' latents, and save the VAE."""
    narrow = open_bank("narrow").images
    picks = np.sort(np.random.default_rng(3).choice(len(narrow), 2000, replace=False))
    device = next(vae.parameters()).device
    with torch.no_grad():
        latents = [
            vae.encode(to_input(narrow[part], device)).latent_dist.mode() for part in np.split(picks, 20)
        ]
    vae.register_to_config(scaling_factor=round(1 / float(torch.cat(latents).std()), 5))
    vae.save_pretrained(CACHE / "folder" / "vae")
    print(
        "vae: PSNR on held-out subjects",
        measure_psnr(vae, open_bank("held_out").images),
        vae.config.scaling_factor,
    )
    return vae


def peek_vae() -> AutoencoderKL:
    """Return the VAE with the averaged weights of the latest saved state."""
    return load_average("vae", build_vae())
