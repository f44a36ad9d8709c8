"""CLIP: computes unit-length features of images and texts in a joint space."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dreamfleet.datasets.errors import ModelError
from dreamfleet.datasets.images.vision_transform import Fitting
from dreamfleet.trainers.config.model import POCKET
from dreamfleet.trainers.models.pretrained import first_line, pocket_folder, quiet_libraries

BATCH = 32
TEXT_PROJECTION = "text_projection.safetensors"  # file beside the encoders in the pocket model's layout
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocessing:
    """The image preprocessing of a vision model, as in its `preprocessor_config.json`, with Pillow and numpy.

    `resize` is the short side (int) or an exact (height, width); `crop` is the (height, width) of the central crop. All
    are in pixels.
    """

    resize: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int = int(Image.Resampling.BICUBIC)

    @property
    def fit(self) -> Fitting:
        """Return the resizing and cropping without the normalisation."""
        return Fitting(self.resize, self.crop, self.resample)

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Return normalised pixels `[N, 3, H, W]`."""
        arrays = np.stack([np.asarray(self.fit(image)) for image in images])
        pixels_NHW3 = (arrays.astype(np.float32) / 255 - np.array(self.mean, np.float32)) / np.array(
            self.std, np.float32
        )
        return torch.from_numpy(np.ascontiguousarray(pixels_NHW3.transpose(0, 3, 1, 2)))


def read_preprocessing(folder: Path, *, image_size: int) -> Preprocessing:
    """Read a folder's `preprocessor_config.json`; without one, return CLIP's defaults at `image_size` pixels."""
    path = folder / "preprocessor_config.json"
    try:
        config = json.loads(path.read_text("utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ModelError(f"{path} is not readable JSON ({error}).") from error
    crop = None
    if config.get("do_center_crop", "crop_size" in config or not config):
        crop = _pair(config.get("crop_size", image_size))
    return Preprocessing(
        resize=_resize_of(config.get("size", image_size), path, cropped=crop is not None)
        if config.get("do_resize", True)
        else None,
        crop=crop,
        mean=tuple(config.get("image_mean", _CLIP_MEAN)),
        std=tuple(config.get("image_std", _CLIP_STD)),
        resample=int(config.get("resample", Image.Resampling.BICUBIC)),
    )


class ClipScorer:
    """A frozen CLIP: image encoder and text encoder. `logit_scale` is the inverse of its trained temperature."""

    def __init__(
        self,
        *,
        name: str,
        vision: nn.Module,
        text: nn.Module,
        text_projection: Tensor,
        tokenizer: Any,
        preprocessing: Preprocessing,
        logit_scale: float = 100.0,
    ):
        self.name, self.logit_scale = name, logit_scale
        self._vision, self._text = vision.requires_grad_(False).eval(), text.requires_grad_(False).eval()
        self._text_projection_PD = text_projection.detach().float()
        self._tokenizer, self.preprocessing = tokenizer, preprocessing

    def to(self, device: torch.device | str) -> ClipScorer:
        """Move both encoders to a device and return self."""
        self._vision.to(device)
        self._text.to(device)
        self._text_projection_PD = self._text_projection_PD.to(device)
        return self

    @torch.no_grad()
    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the normalised features `[N, P]` of images, float32 on the CPU."""
        rows = [
            self.embed(self.preprocessing(images[start : start + BATCH]).to(_device_of(self._vision)))
            for start in range(0, len(images), BATCH)
        ]
        return F.normalize(torch.cat(rows), dim=-1).cpu()

    @torch.no_grad()
    def embed(self, pixels_N3HW: Tensor) -> Tensor:
        """Return the unnormalised features `[N, P]`, float32, of pixels that `preprocessing` returned."""
        return self._vision(pixels_N3HW).image_embeds.float()

    @property
    def text_projection(self) -> Tensor:
        """The projection `[P, D]`, float32, of the text encoder's output at the end token `[D]` to the joint space."""
        return self._text_projection_PD

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Return the normalised features `[N, P]` of texts, float32 on the CPU; texts are cut at 77 tokens."""
        rows = []
        for start in range(0, len(texts), BATCH):
            tokens = self._tokenizer(
                list(texts[start : start + BATCH]),
                padding="max_length",
                truncation=True,
                max_length=self._length,
                return_tensors="pt",
            )
            pooled = self._text(tokens.input_ids.to(_device_of(self._text))).pooler_output
            rows.append(pooled.float() @ self._text_projection_PD.T)
        return F.normalize(torch.cat(rows), dim=-1).cpu()

    @property
    def _length(self) -> int:
        config: Any = self._text.config
        return min(self._tokenizer.model_max_length, config.max_position_embeddings)


def load_clip(name: str | Path | None = None) -> ClipScorer:
    """Load a CLIP from a folder or the hub, or the bundled one ("pocket" or None).

    A folder is a Hugging Face CLIPModel, or has the pocket model's layout: `image_encoder/`, `text_encoder/`,
    `tokenizer/` and `text_projection.safetensors`. Raises ModelError naming the missing part.
    """
    quiet_libraries()
    name = str(name or POCKET)
    folder = pocket_folder() if name == POCKET else Path(name).expanduser()
    if (folder / TEXT_PROJECTION).is_file() or name == POCKET:
        return _load_towers(folder, name)
    if not folder.is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ModelError(f"{name}: no such CLIP; give 'pocket', a folder, or a hub name.")
    return _load_whole(folder, name)


def _load_towers(folder: Path, name: str) -> ClipScorer:
    from safetensors.torch import load_file
    from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

    try:
        vision = CLIPVisionModelWithProjection.from_pretrained(
            folder / "image_encoder", local_files_only=True
        )
        text = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True)
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        extra = load_file(folder / TEXT_PROJECTION)
        projection, scale = (
            extra["text_projection.weight"],
            float(extra.get("logit_scale", torch.tensor(4.6052))),
        )
    except Exception as error:  # each library has its own errors for a damaged or missing file
        raise ModelError(f"{name}: its CLIP cannot be loaded from {folder}: {first_line(error)}") from error
    preprocessing = read_preprocessing(folder / "image_encoder", image_size=_image_size(vision.config))
    return ClipScorer(
        name=name,
        vision=vision.float(),
        text=text.float(),
        text_projection=projection,
        tokenizer=tokenizer,
        preprocessing=preprocessing,
        logit_scale=float(np.exp(scale)),
    )


class _Vision(nn.Module):
    """The image encoder of a CLIPModel, with the interface of CLIPVisionModelWithProjection."""

    def __init__(self, model: Any):
        super().__init__()
        self.tower, self.projection = model.vision_model, model.visual_projection

    def forward(self, pixels_N3HW: Tensor) -> Any:
        from transformers.models.clip.modeling_clip import CLIPVisionModelOutput

        return CLIPVisionModelOutput(image_embeds=self.projection(self.tower(pixels_N3HW).pooler_output))


def _load_whole(folder: Path, name: str) -> ClipScorer:
    from transformers import CLIPModel, CLIPTokenizer

    source = folder if folder.is_dir() else name
    try:
        model = CLIPModel.from_pretrained(source, torch_dtype=torch.float32)
        tokenizer = CLIPTokenizer.from_pretrained(source)
    except Exception as error:  # as above, and network errors
        raise ModelError(f"{name}: not a CLIP that can be loaded: {first_line(error)}") from error
    if not folder.is_dir():
        from huggingface_hub import hf_hub_download

        folder = Path(hf_hub_download(name, "preprocessor_config.json")).parent
    return ClipScorer(
        name=name,
        vision=_Vision(model),
        text=model.text_model,
        text_projection=model.text_projection.weight,
        tokenizer=tokenizer,
        preprocessing=read_preprocessing(folder, image_size=_image_size(model.config.vision_config)),
        logit_scale=float(model.logit_scale.detach().exp()),
    )


def _resize_of(size: Any, path: Path, *, cropped: bool) -> int | tuple[int, int]:
    if isinstance(
        size, int
    ):  # older files contain a number: the short side if the image is cropped (CLIP), otherwise a square (ViT)
        return size if cropped else (size, size)
    if "shortest_edge" in size:
        return int(size["shortest_edge"])
    if "height" in size:
        return _pair(size)
    raise ModelError(f"{path}: size {size!r} is not understood; expected shortest_edge, or height and width.")


def _image_size(config: Any) -> int:
    return int(config.image_size)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size["height"]), int(size["width"]))


def _device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
