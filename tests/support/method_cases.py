"""The `method:` section, learning rate, images and batches of each method in the contract tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tiny
import torch

from dreamfleet.trainers.run.build import Parts

SECTIONS: dict[str, dict[str, Any]] = {
    "aesthetic_gradients": {"name": "aesthetic_gradients", "baked_prompts": ["a cat"]},
    "discriminator": tiny.DISCRIMINATOR,
    "dreambooth": {"name": "dreambooth", "train_text_encoder": True},
    "hypernetwork": {
        "name": "hypernetwork",
        "layer_structure": [1, 2, 2, 1],
        "activation_func": "swish",
        "weight_init": "XavierNormal",
        "add_layer_norm": True,
        "activate_output": True,
    },
    "native": {"name": "native", "train_text_encoder": True},
    "prompt_tuning": {
        "name": "prompt_tuning",
        "placeholder_token": "<thing>",
        "initializer_token": "cat",
        "num_vectors": 2,
        "num_vectors_neg": 3,
        "cfg_scale": "1.5-3.0:cos",
        "rec_loss_w": 0.1,
    },
    "textual_inversion": {
        "name": "textual_inversion",
        "placeholder_token": "<thing>",
        "initializer_token": "cat",
        "num_vectors": 3,
    },
}


RATES = {
    "aesthetic_gradients": 1.0,  # not used: the method accumulates features
    "discriminator": 1e-3,
    "dreambooth": 1e-3,
    "hypernetwork": 1e-2,
    "native": 1e-3,
    "prompt_tuning": 5e-2,
    "textual_inversion": 5e-2,
}


# Images for methods that cannot be trained on a single image.
IMAGES = {"discriminator": "labelled"}


State = dict[str, torch.Tensor]

# Method -> tensors that an exported file must contain, if the artifact kind's names differ from the method's
# state.
EXPORTED: dict[str, Callable[[State, Path], State]] = {
    "aesthetic_gradients": lambda state, path: (
        {"vector": state["features"] / state["count"]} if path.suffix == ".pt" else {}
    ),
    "prompt_tuning": lambda state, path: {
        "vectors": state["negative" if path.stem.endswith("-neg") else "positive"]
    },
}


def fixed_batches(parts: Parts) -> Iterator[dict[str, Any]]:
    # Always the same batch: the loss of one image with the same noise must decrease.
    while True:
        yield parts.feed.batch(0)


def snapshot(parts: Parts) -> dict[str, torch.Tensor]:
    found = {}
    for part, module in parts.model.modules().items():
        found |= {f"{part}.{name}": tensor.clone() for name, tensor in module.state_dict().items()}
    return found
