"""LoRA: a pair of small matrices beside each of a model's own, to train, to draw with, or to fold into the weights.

peft puts them into the parts, around the layers they change; taken out again, the parts are as they came.
Source: Hu et al. 2021 (arXiv 2106.09685); convolutions (LoCon): kohya-ss/sd-scripts, `networks/lora.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from dreamfleet.datasets.errors import ModelError
from dreamfleet.trainers.models.embeddings import lend_embeddings
from dreamfleet.trainers.models.formats.lora import LoraFile, Matrices, read_lora
from dreamfleet.trainers.models.formats.lora_names import STANDARD_LAYERS

if TYPE_CHECKING:
    from dreamfleet.trainers.models.stable_diffusion.model import StableDiffusion


class Strength(NamedTuple):
    """How strongly a LoRA acts on the text encoders, and on the U-Net."""

    text: float = 1.0
    unet: float = 1.0

    def __str__(self) -> str:
        """Write it as in a prompt's tag."""
        return f"{self.unet:g}" if self.text == self.unet else f"{self.text:g}:{self.unet:g}"


Applied = tuple[LoraFile, float | Strength]  # a number is the strength on both

LEARNING = "learning"  # what peft calls the adapter that trains; those for drawing are numbered


def add_adapters(
    model: StableDiffusion,
    layers: Mapping[str, Sequence[str]],
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
) -> nn.ModuleDict:
    """Put matrices that learn beside the modules of each part, adding nothing at first -> what learns, by part.

    What is returned shares its modules with the parts, under diffusers' names (``to_q.lora_A.weight``), so an engine
    that wraps it sees what learns and nothing else. ``lora_A`` starts as in diffusers' scripts: normal, 1 / rank.
    """
    learning = nn.ModuleDict()
    for part, names in layers.items():
        _inject(model.modules()[part], dict.fromkeys(names, (rank, alpha)), adapter=LEARNING, dropout=dropout)
        learning[part] = _adapters_alone(model.modules()[part])
        model.modules()[part].train()  # for drop-out; nothing else in these parts tells the modes apart
    return learning


def learned_layers(model: StableDiffusion) -> dict[str, Matrices]:
    """Return the matrices that learn, as a file holds them."""
    return {
        f"{part}.{_file_name(part, name)}": Matrices(
            layer.lora_A[LEARNING].weight.detach(),
            layer.lora_B[LEARNING].weight.detach(),
            float(layer.lora_alpha[LEARNING]),
        )
        for part, module in model.modules().items()
        for name, layer in adapted(module)
    }


def set_loras(model: StableDiffusion, applied: Sequence[Applied]) -> None:
    """Make a model draw with these LoRAs, in place of those that it had; none: as it came.

    The embeddings in their files are words that it knows for as long. Raises ModelError for a LoRA that changes layers
    which this model has not, or not in these sizes.
    """
    for part in model.modules().values():
        remove_adapters(part)
    for number, (file, by) in enumerate(applied):
        strength = by if isinstance(by, Strength) else Strength(by, by)
        for name_of_part, layers in _by_part(model, file).items():
            module, adapter = model.modules()[name_of_part], f"drawing_{number}"
            _inject(module, {name: (m.rank, m.alpha) for name, m in layers.items()}, adapter=adapter)
            for name, layer in adapted(module):
                if name in layers:
                    _fill(layer, adapter, layers[name])
                    layer.set_scale(adapter, strength.unet if name_of_part == "unet" else strength.text)
    for part in model.modules().values():
        for _, layer in adapted(part):
            layer.set_adapter(list(layer.lora_A), inference_mode=True)
    if model.text_encoder is not None:
        lend_embeddings(model, [embedding for file, _ in applied for embedding in file.embeddings])
    model.loras = tuple(applied)


def load_lora(model: StableDiffusion, path: Path) -> LoraFile:
    """Read a LoRA of either layout. Raises FormatError for no LoRA, ModelError for one of another family of models."""
    layers_per_block = model.unet.config.layers_per_block
    found = read_lora(
        path, layers_per_block=layers_per_block if isinstance(layers_per_block, int) else STANDARD_LAYERS
    )
    _by_part(model, found)  # says what does not fit
    return found


def apply_lora(model: StableDiffusion, path: Path, multiplier: float = 1.0) -> None:
    """Make a model draw with a LoRA file as well. Raises FormatError and ModelError as :func:`load_lora` does."""
    set_loras(model, [*model.loras, (load_lora(model, path), multiplier)])


@contextmanager
def merged(model: StableDiffusion) -> Iterator[None]:
    """Within this context a model's own weights carry its adapters, and its parts are built as they came."""
    undo: list[Callable[[], None]] = []
    try:
        for part in model.modules().values():
            for name, layer in list(adapted(part)):
                undo.append(_fold(part, name, layer))
        yield
    finally:
        for back in reversed(undo):
            back()


def adapted(part: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers of a part that have adapters, by name."""
    if has_adapters(part):
        from peft.tuners.tuners_utils import BaseTunerLayer

        for name, module in part.named_modules():
            if isinstance(module, BaseTunerLayer):
                yield name, module


def has_adapters(part: nn.Module) -> bool:
    """Say whether peft wrapped any of a part's layers."""
    return hasattr(part, "peft_config")


def remove_adapters(part: Any) -> None:
    """Give a part its own layers back, their weights untouched."""
    for name, layer in list(adapted(part)):
        _replace(part, name, layer.get_base_layer())
    if has_adapters(part):
        del part.peft_config


def cast_frozen(part: nn.Module, dtype: torch.dtype) -> None:
    """Cast what does not learn in a part that has adapters; those stay in full precision."""
    for param in part.parameters():
        if not param.requires_grad and param.is_floating_point():
            param.data = param.data.to(dtype)


def _inject(
    part: Any, layers: Mapping[str, tuple[int, float]], *, adapter: str, dropout: float = 0.0
) -> None:
    """Let peft wrap the named modules, each with its rank and alpha."""
    from peft import LoraConfig, inject_adapter_in_model

    if not layers:
        return
    if has_adapters(part):
        del part.peft_config  # peft warns of a second adapter by it, and finds the layers it wrapped without
    rank, alpha = next(iter(layers.values()))
    inject_adapter_in_model(
        LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # a fraction is as good
            lora_dropout=dropout,
            target_modules=list(layers),
            rank_pattern={f"^{name}": r for name, (r, _) in layers.items() if r != rank},
            alpha_pattern={f"^{name}": a for name, (_, a) in layers.items() if a != alpha},
            init_lora_weights="gaussian",
        ),
        part,
        adapter_name=adapter,
    )


def _adapters_alone(part: nn.Module) -> nn.Module:
    """Hang the adapters' modules, drop-out too, into a tree of their own with the part's names."""
    root = nn.Module()
    for name, layer in adapted(part):
        node = root
        for piece in name.split("."):
            if piece not in dict(node.named_children()):
                node.add_module(piece, nn.Module())
            node = node.get_submodule(piece)
        for kind in ("lora_A", "lora_B", "lora_dropout"):
            node.add_module(kind, getattr(layer, kind)[LEARNING])
    return root


def _by_part(model: StableDiffusion, file: LoraFile) -> dict[str, dict[str, Matrices]]:
    """Return a file's layers by part and module of a model, shaped for it. Raises ModelError when it does not fit."""
    found: dict[str, dict[str, Matrices]] = {}
    wrong = []
    for layer, matrices in file.layers.items():
        part, _, name = layer.partition(".")
        holder = model.modules().get(part)
        if holder is not None and part != "unet" and not hasattr(holder, "text_model"):
            name = name.removeprefix("text_model.")  # transformers 5 dropped this level
        module = _find(holder, name)
        fitting = _shaped(matrices, module) if module is not None else None
        if fitting is None:
            wrong.append(layer)
        else:
            found.setdefault(part, {})[name] = fitting
    if wrong:
        raise ModelError(
            f"the LoRA {file.name} changes {len(wrong)} layers that {model.folder} has not, or not in these sizes "
            f"({', '.join(wrong[:3])}): it was made for another family of models"
        )
    return found


def _find(part: nn.Module | None, name: str) -> nn.Module | None:
    try:
        found = part.get_submodule(name) if part is not None else None
    except AttributeError:
        return None
    return getattr(found, "base_layer", found)


def _shaped(matrices: Matrices, module: nn.Module) -> Matrices | None:
    """Return the matrices in the shapes that go with a layer; 1 x 1 convolutions are stored in two ways."""
    down, up, alpha = matrices
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return None
    leaving, entering, *kernel = module.weight.shape
    if down.numel() != len(down) * entering * int(torch.Size(kernel).numel()) or up.shape[0] != leaving:
        return None
    ones = [1] * len(kernel)
    return Matrices(down.reshape(-1, entering, *kernel), up.reshape(leaving, -1, *ones), alpha)


def _fill(layer: Any, adapter: str, matrices: Matrices) -> None:
    with torch.no_grad():
        layer.lora_A[adapter].weight.copy_(matrices.down)
        layer.lora_B[adapter].weight.copy_(matrices.up)


def _fold(part: nn.Module, name: str, layer: Any) -> Callable[[], None]:
    """Put a layer's own module in its place, with the adapters in its weight -> what undoes it."""
    base = layer.get_base_layer()
    weight: Tensor = base.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        for adapter in layer.active_adapters:
            weight.copy_(weight.float() + layer.get_delta_weight(adapter).to(weight.device, torch.float32))
    _replace(part, name, base)

    def back() -> None:
        with torch.no_grad():
            weight.copy_(kept)
        _replace(part, name, layer)

    return back


def _replace(part: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(part.get_submodule(parent), last, module)


def _file_name(part: str, name: str) -> str:
    return name if part == "unet" or name.startswith("text_model.") else f"text_model.{name}"
