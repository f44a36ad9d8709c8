"""LoRA for models of any family: adds adapters for training, applies LoRA files for sampling, merges them into weights.

An adapter adds ``alpha / rank * up @ down`` to the weight of its layer (Hu et al. 2021, arXiv 2106.09685). Adapters of
convolutions (LoCon) are those of kohya-ss/sd-scripts, `networks/lora.py`; LoKr and LoHa are LyCORIS's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from dreamfleet.datasets.errors import ModelError
from dreamfleet.trainers.models.adapters import (
    Strength,
    adapted,
    adapter_tree,
    apply_factors,
    fill_adapter,
    fit_matrices,
    fits_layer,
    fold_adapter,
    freeze_adapters,
    insert_adapters,
    insert_factors,
    magnitude_of,
    remove_adapters,
)
from dreamfleet.trainers.models.embeddings import lend_embeddings
from dreamfleet.trainers.models.factor_layers import FactorShape, factors_of
from dreamfleet.trainers.models.formats.lora import LoraFile, Matrices
from dreamfleet.trainers.models.formats.lycoris import Factors

if TYPE_CHECKING:
    from dreamfleet.trainers.models.family import DiffusionModel

Applied = tuple[LoraFile, float | Strength]  # a number is the strength in all parts

TRAINED = "learning"  # name of the trained adapter in peft; adapters applied from files are numbered


def add_adapters(
    model: DiffusionModel,
    layers: Mapping[str, Sequence[str]],
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    use_dora: bool = False,
) -> nn.ModuleDict:
    """Add trainable adapters, initially without effect, to the named layers of each part; return them by part.

    The returned modules are shared with the model and named as in diffusers (``to_q.lora_A.weight``). An engine that
    wraps them sees only the trainable parameters.
    """
    trainable = nn.ModuleDict()
    for part, names in layers.items():
        module = model.modules()[part]
        shapes = dict.fromkeys(names, (rank, alpha))
        insert_adapters(module, shapes, adapter=TRAINED, dropout=dropout, use_dora=use_dora)
        trainable[part] = adapter_tree(module, TRAINED)
        module.train()  # enables dropout; training mode has no other effect in these parts
    return trainable


def add_factors(
    model: DiffusionModel, layers: Mapping[str, Sequence[str]], shape: FactorShape
) -> nn.ModuleDict:
    """Add a trainable LoKr or LoHa, initially without effect, to the named layers; return the factors by part.

    As :func:`add_adapters`; the parameters are called ``to_q.lokr_w1`` and so on.
    """
    trainable = nn.ModuleDict()
    for part, names in layers.items():
        module = model.modules()[part]
        insert_factors(module, dict.fromkeys(names, shape), adapter=TRAINED)
        trainable[part] = adapter_tree(module, TRAINED)
        module.train()
    return trainable


def trained_factors(model: DiffusionModel, *, alpha: float) -> dict[str, Factors]:
    """Return the trained LoKr or LoHa by layer, named as in a LoRA file; empty for a LoRA."""
    return {
        f"{part}.{_file_name(model, part, name)}": found
        for part, module in model.modules().items()
        for name, layer in adapted(module)
        if (found := factors_of(layer, TRAINED, alpha=alpha)) is not None
    }


def trained_layers(model: DiffusionModel) -> dict[str, Matrices]:
    """Return the trained matrices by layer, named as in a LoRA file; empty for a LoKr or LoHa."""
    return {
        f"{part}.{_file_name(model, part, name)}": Matrices(
            layer.lora_A[TRAINED].weight.detach(),
            layer.lora_B[TRAINED].weight.detach(),
            float(layer.lora_alpha[TRAINED]),
            None if (lengths := magnitude_of(layer, TRAINED)) is None else lengths.detach(),
        )
        for part, module in model.modules().items()
        for name, layer in adapted(module)
        if hasattr(layer, "lora_A")
    }


def set_loras(model: DiffusionModel, applied: Sequence[Applied]) -> None:
    """Apply LoRAs, replacing those applied before; an empty sequence restores the model.

    Embeddings bundled in the files are learned words while the LoRAs are applied. Raises ModelError if the layers of a
    LoRA do not exist in the model or have other sizes.
    """
    for part in model.modules().values():
        remove_adapters(part)
    factored: list[Callable[[], None]] = []  # last: a LoKr or LoHa is a layer around peft's LoRA of all files
    for number, (file, by) in enumerate(applied):
        strength = by if isinstance(by, Strength) else Strength(by, by)
        parts = _layers_by_part(model, file)
        for part_name, found in parts.items():
            module, adapter = model.modules()[part_name], f"drawing_{number}"
            scale = strength.denoiser if part_name == model.denoiser_name else strength.text
            factors = {name: one for name, one in found.items() if isinstance(one, Factors)}
            factored.append(partial(apply_factors, module, factors, adapter=adapter, strength=scale))
            layers = {name: one for name, one in found.items() if isinstance(one, Matrices)}
            is_dora = _is_dora(file, layers.values(), scale)
            shapes = {name: (m.rank, m.alpha) for name, m in layers.items()}
            insert_adapters(module, shapes, adapter=adapter, use_dora=is_dora)
            for name, layer in adapted(module):
                if name in layers:
                    fill_adapter(layer, adapter, layers[name])
                    layer.set_scale(adapter, scale)
    for wrap in factored:
        wrap()
    for part in model.modules().values():
        freeze_adapters(part)
    lend_embeddings(model, [embedding for file, _ in applied for embedding in file.embeddings])
    model.loras = tuple(applied)


def load_lora(model: DiffusionModel, path: Path) -> LoraFile:
    """Read a LoRA file of either layout. Raises FormatError if it is not a LoRA, ModelError if it does not fit."""
    found = model.read_lora(path)
    _layers_by_part(model, found)  # raises if it does not fit
    return found


def apply_lora(model: DiffusionModel, path: Path, multiplier: float = 1.0) -> None:
    """Apply a LoRA file after those already applied. Raises FormatError and ModelError as :func:`load_lora`."""
    set_loras(model, [*model.loras, (load_lora(model, path), multiplier)])


@contextmanager
def merged(model: DiffusionModel) -> Iterator[None]:
    """Within this context all adapters are merged into the model's weights, and its parts have no adapter layers."""
    undo: list[Callable[[], None]] = []
    try:
        for part in model.modules().values():
            for name, layer in list(adapted(part)):
                undo.append(fold_adapter(part, name, layer))
        yield
    finally:
        for restore in reversed(undo):
            restore()


def _is_dora(file: LoraFile, layers: Iterable[Matrices], strength: float) -> bool:
    """Return whether layers are those of a DoRA. Raises ModelError if only some are, or the strength is not 1."""
    kinds = {matrices.magnitude is not None for matrices in layers}
    if len(kinds) > 1:
        raise ModelError(f"{file.name}: only some of its layers are those of a DoRA, which cannot be applied")
    if True in kinds and strength != 1:
        raise ModelError(
            f"{file.name} is a DoRA, which scales the weights themselves: its strength must be 1, not {strength:g}"
        )
    return True in kinds


def _layers_by_part(model: DiffusionModel, file: LoraFile) -> dict[str, dict[str, Matrices | Factors]]:
    """Return a file's matrices, reshaped for the model: part -> layer -> matrices. Raises ModelError on a mismatch."""
    found: dict[str, dict[str, Matrices | Factors]] = {}
    wrong = []
    changes: dict[str, Matrices | Factors] = {**file.layers, **file.factors}
    for layer, change in changes.items():
        part, _, name = layer.partition(".")
        holder = model.modules().get(part)
        if holder is not None and part != model.denoiser_name and not hasattr(holder, "text_model"):
            name = name.removeprefix("text_model.")  # transformers 5 removed this level
        module = _find_layer(holder, name)
        fitting = _fit(change, module) if module is not None else None
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


def _fit(change: Matrices | Factors, module: nn.Module) -> Matrices | Factors | None:
    if isinstance(change, Matrices):
        return fit_matrices(change, module)
    return change if fits_layer(change, module) else None


def _find_layer(part: nn.Module | None, name: str) -> nn.Module | None:
    try:
        found: Any = part.get_submodule(name) if part is not None else None
    except AttributeError:
        return None
    while hasattr(found, "base_layer"):
        found = found.base_layer
    return found  # type: ignore[no-any-return]


def _file_name(model: DiffusionModel, part: str, name: str) -> str:
    plain = part == model.denoiser_name or name.startswith("text_model.")
    return name if plain else f"text_model.{name}"
