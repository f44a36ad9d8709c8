"""The VAE as an encoder of images, in a process that trains nothing: for `data cache`, and beside a training."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch

from dreamfleet.datasets.errors import ModelError
from dreamfleet.datasets.serve.encoding_actors import EncodingActors
from dreamfleet.trainers.batches.vae_encoding import encode_all
from dreamfleet.trainers.config.model import ModelConfig
from dreamfleet.trainers.distributed.device import ENCODING, explain_out_of_memory, with_index
from dreamfleet.trainers.memory.engine_selection import limit_card
from dreamfleet.trainers.models.family import load_model
from dreamfleet.trainers.recipe import Recipe


class VaeEncoder:
    """Encodes images with a model's VAE, in float32, so that one cache serves runs of every precision.

    Raises ModelError if the VAE's hash is not ``encoder_hash``.
    """

    @explain_out_of_memory(ENCODING)
    def __init__(
        self,
        config: ModelConfig,
        *,
        encoder_hash: str,
        device: str,
        gpu_share: float = 1.0,
        threads: int | None = None,
    ):
        target = with_index(device)
        if target.type == "cuda":
            limit_card(target, None, gpu_share)
        if threads is not None:
            torch.set_num_threads(threads)
        self.model = load_model(config, {"vae"})
        if self.model.encoder_hash != encoder_hash:
            raise ModelError(
                f"{config.pretrained_model_name_or_path} has another VAE here than on the machine that asked; give "
                "every machine the same model"
            )
        self.model.vae.to(target)

    @explain_out_of_memory(ENCODING)
    def __call__(self, cuts: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
        """Encode uint8 images ``[H, W, 3 or 4]`` of any sizes, as ``cut_image`` returns them.

        Returns for each image its arrays by name: ``mean`` and ``std`` ``[C, h, w]``, and ``mask`` if it has
        weights.
        """
        return encode_all(cuts, self.model)


def encoding_actors(recipe: Recipe, encoder_hash: str) -> Callable[[], EncodingActors] | None:
    """Return a function that starts the processes of ``data.cache_resources`` for this worker; None without them."""
    resources = recipe.data.cache_resources
    if resources is None:
        return None

    def start() -> EncodingActors:
        threads = torch.get_num_threads()  # this worker's: on a CPU, the last bits of latents depend on it
        make_encode = functools.partial(
            VaeEncoder,
            recipe.model,
            encoder_hash=encoder_hash,
            device="cuda" if "GPU" in resources else "cpu",
            gpu_share=min(1.0, resources.get("GPU", 1.0)),
            threads=threads,
        )
        return EncodingActors(
            make_encode,
            data=recipe.data,
            count=recipe.data.cache_actors,
            resources=resources,
            environment={"OMP_NUM_THREADS": str(threads)},  # the other variables are those of this worker
        )

    return start
