"""DINO: computes image features with a self-supervised ViT, which distinguish subjects of the same class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dreamfleet.datasets.errors import ModelError
from dreamfleet.trainers.models.pretrained import first_line, quiet_libraries
from dreamfleet.trainers.models.vision.clip import BATCH, Preprocessing, read_preprocessing


class DinoScorer:
    """A frozen ViT; the features are the class token after the last layer norm (arXiv 2104.14294)."""

    def __init__(self, *, name: str, model: Any, preprocessing: Preprocessing):
        self.name = name
        self._model, self._preprocessing = model.requires_grad_(False).eval(), preprocessing

    def to(self, device: torch.device | str) -> DinoScorer:
        """Move the model to a device and return self."""
        self._model.to(device)
        return self

    @torch.no_grad()
    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the normalised features `[N, D]` of images, float32 on the CPU."""
        device = next(self._model.parameters()).device
        rows = [
            self._model(self._preprocessing(images[start : start + BATCH]).to(device)).last_hidden_state[:, 0]
            for start in range(0, len(images), BATCH)
        ]
        return F.normalize(torch.cat(rows).float(), dim=-1).cpu()


def load_dino(folder: str | Path) -> DinoScorer:
    """Load a ViT from a Hugging Face folder (`facebook/dino-vits16` is the paper's; DINOv2 works too).

    Raises ModelError if the folder does not contain a ViT.
    """
    from transformers import AutoModel

    quiet_libraries()
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        raise ModelError(
            f"{folder} contains no DINO model (config.json not found). Download one where there is a network, such as "
            "facebook/dino-vits16, and pass its folder."
        )
    try:
        model = AutoModel.from_pretrained(path, torch_dtype=torch.float32, local_files_only=True)
        size = int(model.config.image_size)
    except Exception as error:  # each library has its own errors for a damaged or unsuitable folder
        raise ModelError(f"{folder}: not a ViT that can be loaded: {first_line(error)}") from error
    return DinoScorer(name=path.name, model=model, preprocessing=read_preprocessing(path, image_size=size))
