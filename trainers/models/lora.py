"""LoRA on a model of any family: train one, apply files when sampling, or merge them into the weights.

A layer's adapter adds ``alpha / rank * up @ down`` to its weight (Hu et al. 2021, arXiv 2106.09685); convolutions
(LoCon) as in kohya-ss/sd-scripts, `networks/lora.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from dreamfleet.datasets.errors import ModelError
from dreamfleet.trainers.models.adapters import (
    Strength,
    adapted,
    adapter_tree,
    fill_adapter,
    fit_matrices,
    fold_adapter,
    insert_adapters,
    remove_adapters,
)
from dreamfleet.trainers.models.embeddings import lend_embeddings
from dreamfleet.trainers.models.formats.lora import LoraFile, Matrices

if TYPE_CHECKING:
    from dreamfleet.trainers.models.family import DiffusionModel

Applied = tuple[LoraFile, float | Strength]  # a number is the strength in all parts

TRAINED = "learning"  # peft's name of the adapter that trains; those applied from files are numbered


def add_adapters(
    model: DiffusionModel,
    layers: Mapping[str, Sequence[str]],
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
) -> nn.ModuleDict:
    """Add trainable matrices to layers of each part, with no effect at first; return the trainable modules by part.

    The returned modules are shared with the parts and have diffusers' names (``to_q.lora_A.weight``), so an engine that
    wraps them sees the trainable parameters alone.
    """
    trainable = nn.ModuleDict()
    for part, names in layers.items():
        module = model.modules()[part]
        insert_adapters(module, dict.fromkeys(names, (rank, alpha)), adapter=TRAINED, dropout=dropout)
        trainable[part] = adapter_tree(module, TRAINED)
        module.train()  # for dropout; nothing else in these parts differs between the modes
    return trainable


def trained_layers(model: DiffusionModel) -> dict[str, Matrices]:
    """Return the trained matrices under the names of a LoRA file."""
    return {
        f"{part}.{_file_name(model, part, name)}": Matrices(
            layer.lora_A[TRAINED].weight.detach(),
            layer.lora_B[TRAINED].weight.detach(),
            float(layer.lora_alpha[TRAINED]),
        )
        for part, module in model.modules().items()
        for name, layer in adapted(module)
    }


def set_loras(model: DiffusionModel, applied: Sequence[Applied]) -> None:
    """Apply LoRAs in place of those applied before; an empty sequence restores the model.

    The embeddings in their files are learned words for as long. Raises ModelError for a LoRA whose layers the model
    does not have in these sizes.
    """
    for part in model.modules().values():
        remove_adapters(part)
    for number, (file, by) in enumerate(applied):
        strength = by if isinstance(by, Strength) else Strength(by, by)
        for part_name, layers in _layers_by_part(model, file).items():
            module, adapter = model.modules()[part_name], f"drawing_{number}"
            scale = strength.denoiser if part_name == model.denoiser_name else strength.text
            insert_adapters(module, {name: (m.rank, m.alpha) for name, m in layers.items()}, adapter=adapter)
            for name, layer in adapted(module):
                if name in layers:
                    fill_adapter(layer, adapter, layers[name])
                    layer.set_scale(adapter, scale)
    for part in model.modules().values():
        for _, layer in adapted(part):
            layer.set_adapter(list(layer.lora_A), inference_mode=True)
    lend_embeddings(model, [embedding for file, _ in applied for embedding in file.embeddings])
    model.loras = tuple(applied)


def load_lora(model: DiffusionModel, path: Path) -> LoraFile:
    """Read a LoRA of either layout. Raises FormatError for another kind of file, ModelError if it does not fit."""
    found = model.read_lora(path)
    _layers_by_part(model, found)  # raises if it does not fit
    return found


def apply_lora(model: DiffusionModel, path: Path, multiplier: float = 1.0) -> None:
    """Apply a LoRA file in addition to those applied before. Raises FormatError and ModelError as :func:`load_lora`."""
    set_loras(model, [*model.loras, (load_lora(model, path), multiplier)])


@contextmanager
def merged(model: DiffusionModel) -> Iterator[None]:
    """Within this context the model's own weights include its adapters, and its parts have their own layers."""
    undo: list[Callable[[], None]] = []
    try:
        for part in model.modules().values():
            for name, layer in list(adapted(part)):
                undo.append(fold_adapter(part, name, layer))
        yield
    finally:
        for restore in reversed(undo):
            restore()


def _layers_by_part(model: DiffusionModel, file: LoraFile) -> dict[str, dict[str, Matrices]]:
    """Return a file's matrices by part and layer of a model, in its shapes. Raises ModelError if they do not fit."""
    found: dict[str, dict[str, Matrices]] = {}
    wrong = []
    for layer, matrices in file.layers.items():
        part, _, name = layer.partition(".")
        holder = model.modules().get(part)
        if holder is not None and part != model.denoiser_name and not hasattr(holder, "text_model"):
            name = name.removeprefix("text_model.")  # transformers 5 dropped this level
        module = _find_layer(holder, name)
        fitting = fit_matrices(matrices, module) if module is not None else None
        if fitting is None:
            wrong.append(layer)
        else:
            found.setdefault(part, {})[name] = fitting
    if wrong:
        raise ModelError(
            f"the LoRA {file.name} changes {len(wrong)} layers that {model.folder} does not have, or not in these "
            f"sizes ({', '.join(wrong[:3])}): it was made for another family of models"
        )
    return found


def _find_layer(part: nn.Module | None, name: str) -> nn.Module | None:
    try:
        found = part.get_submodule(name) if part is not None else None
    except AttributeError:
        return None
    return getattr(found, "base_layer", found)


def _file_name(model: DiffusionModel, part: str, name: str) -> str:
    plain = part == model.denoiser_name or name.startswith("text_model.")
    return name if plain else f"text_model.{name}"
