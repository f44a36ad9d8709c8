"""DreamArtist's discriminator: creates, loads and saves a ConvNeXt image classifier, and computes with gradients.

Shape suffixes: N images, 3 colours, H W height and width, K classes.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dreamfleet.datasets.errors import ModelError
from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.storage.node_cache import node_copy
from dreamfleet.trainers.config.methods.discriminator import INPUT_SIZE
from dreamfleet.trainers.models.formats.convnext import SUFFIXES, read_convnext
from dreamfleet.trainers.models.pretrained import first_line, quiet_libraries, save_part
from dreamfleet.trainers.models.vision.clip import Preprocessing

HEAD_SCALE = 1e-3  # scale of the initial weights of a new head, as in the authors' fine-tuning
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
_PREPROCESSOR = "preprocessor_config.json"


class Discriminator:
    """A frozen image classifier that returns class probabilities; gradients flow to the images."""

    def __init__(self, network: Any, preprocessing: Preprocessing, *, name: str):
        self.network, self.preprocessing, self.name = (
            network.requires_grad_(False).eval(),
            preprocessing,
            name,
        )

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return int(self.network.config.num_labels)

    def probabilities(self, pixels_N3HW: Tensor) -> Tensor:
        """Return the probability of each class ``[N, K]``, float32, for pixels in about [-1, 1].

        As in DreamArtist, the whole image is resized bicubically with aligned corners.
        """
        size, mean, std = self.preprocessing.resize, self.preprocessing.mean, self.preprocessing.std
        resized_N3SS = F.interpolate(pixels_N3HW.float(), size=size, mode="bicubic", align_corners=True)
        # Per channel with Python numbers, since tensors of mean and std would be copied to the device at every step.
        planes = zip(resized_N3SS.unbind(1), mean, std, strict=True)
        entering = torch.stack([(plane * 0.5 + 0.5 - m) / s for plane, m, s in planes], dim=1)
        return self.network(pixel_values=entering).logits.float().softmax(dim=-1)


def make_preprocessing(size: int) -> Preprocessing:
    """Return the preprocessing of image files: a bicubic resize of the whole image to a square, ImageNet's mean, std.

    ``size`` is the side of the square in pixels.
    """
    return Preprocessing(resize=(size, size), crop=None, mean=_MEAN, std=_STD)


def make_network(
    *, depths: Sequence[int], hidden_sizes: Sequence[int], classes: Sequence[str], drop_path: float
) -> Any:
    """Return a ConvNeXt with random weights (from torch's global generator) and a head for the classes."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(
        depths=list(depths),
        hidden_sizes=list(hidden_sizes),
        num_stages=len(depths),
        drop_path_rate=drop_path,
        layer_norm_eps=1e-6,
        **_labels(classes),
    )
    return _with_small_head(ConvNextForImageClassification(config))


def adapt_network(network: Any, *, classes: Sequence[str], drop_path: float) -> Any:
    """Return a copy of a network with the given drop path rate, and with a new head unless it has these classes."""
    from transformers import ConvNextForImageClassification

    config = copy.deepcopy(network.config)
    known = [config.id2label[number] for number in sorted(config.id2label)]
    config.update({"drop_path_rate": drop_path, **_labels(classes)})
    adapted, state = ConvNextForImageClassification(config), network.state_dict()
    if known == list(classes):
        adapted.load_state_dict(state)
        return adapted
    body = {name: tensor for name, tensor in state.items() if not name.startswith("classifier.")}
    adapted.load_state_dict(body, strict=False)
    return _with_small_head(adapted)


def load_discriminator(name: str) -> Discriminator:
    """Load a classifier from a transformers folder, a file (the authors' or timm's), the hub, or a bucket.

    Raises ModelError if it does not exist or is not a ConvNeXt, FormatError for an incomplete file.
    """
    quiet_libraries()
    if "://" in name:
        with node_copy(name) as path:
            return _load(path, name)
    path = Path(name).expanduser()
    if not path.exists() and (os.path.isabs(name) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name)):
        raise ModelError(f"{name}: no such discriminator; give a folder, a .pth file, or a hub name.")
    return _load(path, name)


def save_network(
    network: Any, folder: Path, *, size: int, dtype: torch.dtype, metadata: dict[str, str]
) -> None:
    """Write a folder that transformers' AutoModelForImageClassification and AutoImageProcessor load."""
    save_part(network, folder, dtype=dtype, header=metadata, more={"image_size": size})
    how = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": int(Image.Resampling.BICUBIC),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _MEAN,
        "image_std": _STD,
    }
    (folder / _PREPROCESSOR).write_text(json_text(how, indent=1) + "\n", encoding="utf-8")


def _load(path: Path, name: str) -> Discriminator:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise ModelError(f"{name}: no discriminator; its files end in {', '.join(SUFFIXES)}.")
        found = read_convnext(path)
        network = ConvNextForImageClassification(ConvNextConfig(**found.config))
        network.load_state_dict(found.state)
        return Discriminator(network, make_preprocessing(INPUT_SIZE), name=name)
    source: Any = path if path.is_dir() else name
    try:
        config, _ = ConvNextConfig.get_config_dict(source)
        network, report = ConvNextForImageClassification.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # the library's many error classes, and network errors
        raise ModelError(f"{name}: not a discriminator that can be loaded: {first_line(error)}") from error
    missing = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if config.get("model_type") != "convnext" or missing:
        why = (
            f"{missing[0]} does not fit or is missing"
            if missing
            else f"a {config.get('model_type')}, not a ConvNeXt"
        )
        raise ModelError(f"{name}: not a discriminator that can be loaded: {why}")
    return Discriminator(network, _read_preprocessing(path, name), name=name)


def _read_preprocessing(path: Path, name: str) -> Preprocessing:
    if not path.is_dir():
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(name, _PREPROCESSOR)).parent
    try:
        config = (
            json.loads((path / _PREPROCESSOR).read_text("utf-8")) if (path / _PREPROCESSOR).exists() else {}
        )
        size = config.get("size", INPUT_SIZE)
        side = size if isinstance(size, int) else size.get("shortest_edge") or size["height"]
        plain = make_preprocessing(int(side))
        mean, std = (
            tuple(map(float, config.get(f"image_{k}", v))) for k, v in (("mean", _MEAN), ("std", _STD))
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{name}: {_PREPROCESSOR} cannot be read ({error!r})") from error
    return Preprocessing(resize=plain.resize, crop=None, mean=mean, std=std)


def _labels(classes: Sequence[str]) -> dict[str, Any]:
    return {
        "id2label": dict(enumerate(classes)),
        "label2id": {name: number for number, name in enumerate(classes)},
    }


def _with_small_head(network: Any) -> Any:
    with torch.no_grad():
        for param in network.classifier.parameters():
            param.mul_(HEAD_SCALE)
    return network
