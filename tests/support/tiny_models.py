"""Tiny random Stable Diffusion models for tests: the architecture of each variant with few and narrow layers."""

from __future__ import annotations

from typing import Any

import torch

from dreamfleet.trainers.models.stable_diffusion.model import StableDiffusion
from dreamfleet.trainers.models.stable_diffusion.sdxl import StableDiffusionXL

torch.set_num_threads(1)  # more threads are slower for tiny tensors, especially on a busy machine

WIDTH, WIDTH_2, POOLED = (
    32,
    40,
    24,
)  # widths of the text encoder, of SDXL's second text encoder, and of its pooled output
FAMILIES = ("sd1", "sd2", "sd2-v", "sdxl")


def tiny_tokenizer(**options: Any) -> Any:
    """Return a CLIP tokenizer of single characters with a context of 77 tokens."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.-_<>*!"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77, **options)


def tiny_text_encoder(vocab_size: int = 90, *, second: bool = False, **options: Any) -> Any:
    """Return a text encoder of 3 layers; with ``second``, it has a pooled output like SDXL's second one."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        **{
            "vocab_size": vocab_size,
            "hidden_size": WIDTH_2 if second else WIDTH,
            "intermediate_size": 37,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "projection_dim": POOLED if second else 16,
            "bos_token_id": vocab_size - 2,
            "eos_token_id": vocab_size - 1,
            "pad_token_id": vocab_size - 1,
            **options,
        }
    )
    return CLIPTextModelWithProjection(config) if second else CLIPTextModel(config)


def tiny_model(prediction_type: str = "epsilon", seed: int = 0) -> StableDiffusion:
    """Return an SD 1 for 32 x 32 pixels: U-Net of 3 levels, attention at the inner two; VAE with factor 4."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet, vae = tiny_unet(cross_attention_dim=WIDTH), tiny_vae()
        text_encoder = tiny_text_encoder()
    scheduler = tiny_schedule(prediction_type)
    model = StableDiffusion(tiny_tokenizer(), text_encoder, unet, vae, scheduler, "tiny", "0123456789")
    model.freeze()
    return model


def tiny_family(family: str, seed: int = 0) -> StableDiffusion:
    """Return a model of a variant in `FAMILIES`, with its activations, projections and conditions."""
    if family == "sd1":
        return tiny_model(seed=seed)
    second: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "sdxl":
            unet = tiny_unet(
                cross_attention_dim=WIDTH + WIDTH_2,
                use_linear_projection=True,
                transformer_layers_per_block=(1, 1, 2),
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + POOLED,
            )
            vae = tiny_vae(force_upcast=True, scaling_factor=0.13025)
            tokenizer, text_encoder = tiny_tokenizer(), tiny_text_encoder()
            second = {
                "tokenizer_2": tiny_tokenizer(pad_token="!"),
                "text_encoder_2": tiny_text_encoder(second=True, hidden_act="gelu"),
                "zeros_for_empty_prompt": True,
            }
        else:
            unet = tiny_unet(cross_attention_dim=WIDTH, use_linear_projection=True)
            vae, tokenizer = tiny_vae(), tiny_tokenizer(pad_token="!")
            text_encoder = tiny_text_encoder(hidden_act="gelu")
    scheduler = tiny_schedule("v_prediction" if family == "sd2-v" else "epsilon")
    kind = StableDiffusionXL if second else StableDiffusion
    model = kind(tokenizer, text_encoder, unet, vae, scheduler, family, "0123456789", **second)
    model.freeze()
    return model


def tiny_unet(**options: Any) -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=8,
        **options,
    )


def tiny_vae(**options: Any) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL(
        sample_size=32,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        **options,
    )


def tiny_schedule(prediction_type: str) -> Any:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
