"""What the contract tests train each method with: section, rates, images and batches."""

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
    "aesthetic_gradients": 1.0,  # not used: its steps add up
    "discriminator": 1e-3,
    "dreambooth": 1e-3,
    "hypernetwork": 1e-2,
    "native": 1e-3,
    "prompt_tuning": 5e-2,
    "textual_inversion": 5e-2,
}


# Images to learn from, where one alone teaches nothing.
IMAGES = {"discriminator": "labelled"}


State = dict[str, torch.Tensor]

# The tensors of an exported file, named as its artifact kind reads them back, where the method's state has other names.
EXPORTED: dict[str, Callable[[State, Path], State]] = {
    "aesthetic_gradients": lambda state, path: (
        {"vector": state["features"] / state["count"]} if path.suffix == ".pt" else {}
    ),
    "prompt_tuning": lambda state, path: {
        "vectors": state["negative" if path.stem.endswith("-neg") else "positive"]
    },
}


def fixed_batches(parts: Parts) -> Iterator[dict[str, Any]]:
    # The same draw again and again: the loss of one image with one noise must fall.
    while True:
        yield parts.feed.batch(0)


def snapshot(parts: Parts) -> dict[str, torch.Tensor]:
    found = {}
    for part, module in parts.model.modules().items():
        found |= {f"{part}.{name}": tensor.clone() for name, tensor in module.state_dict().items()}
    return found
