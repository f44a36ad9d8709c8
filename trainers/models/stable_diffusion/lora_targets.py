"""Chooses the layers of Stable Diffusion that get LoRA matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import nn

from dreamfleet.datasets.errors import RecipeError

Targets = Literal["all-linear", "locon"] | Sequence[str] | None

# The default: the attention projections, as in diffusers' training scripts.
_ATTENTION = {
    "unet": ("to_q", "to_k", "to_v", "to_out.0"),
    "text": ("q_proj", "k_proj", "v_proj", "out_proj"),
}


def choose_layers(
    parts: Mapping[str, nn.Module], targets: Targets, *, unread: Sequence[nn.Module] = (), name: str
) -> dict[str, list[str]]:
    """Return, for each part, the names of the layers that get LoRA matrices.

    ``targets`` selects the layers: None for the attention projections; ``all-linear`` for all linear layers and 1 x 1
    convolutions of the blocks; ``locon`` for all linear layers and convolutions of the blocks; or a list of endings of
    layer names. If no ending matches a layer of a text encoder, its attention projections are used. Modules in
    ``unread``, on which the loss does not depend, get no matrices. ``name`` is the model's name in errors. Raises
    RecipeError for an ending that matches no layer.
    """
    skipped = {id(module) for parent in unread for module in parent.modules()}
    chosen: dict[str, list[str]] = {}
    for part, root in parts.items():
        is_unet = part == "unet"
        possible = {
            layer: module
            for layer, module in root.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
            and id(module) not in skipped
            # In a text encoder only its transformer layers: kohya's LoRA files have no name for the projection of
            # SDXL's second encoder.
            and (is_unet or ".layers." in layer)
        }
        usual = _ATTENTION["unet" if is_unet else "text"]
        if isinstance(targets, str):
            inside = {layer: module for layer, module in possible.items() if not is_unet or _in_block(layer)}
            ends = [layer for layer, module in inside.items() if targets == "locon" or _is_linear(module)]
        else:
            own = targets is not None and (is_unet or any(_ends(layer, targets) for layer in possible))
            ends = list(targets if own and targets is not None else usual)
        chosen[part] = [layer for layer in possible if _ends(layer, ends)]
    if targets is not None and not isinstance(targets, str):
        every = [layer for layers in chosen.values() for layer in layers]
        if missing := [end for end in targets if not any(_ends(layer, [end]) for layer in every)]:
            raise RecipeError(
                f"method.lora_target_modules: {name} has no layer whose name ends in {', '.join(missing)}; the usual "
                "ones are to_q, to_k, to_v, to_out.0, others ff.net.0.proj, ff.net.2, proj_in, proj_out, conv1, conv2, "
                "or all-linear, or locon"
            )
    return chosen


def _in_block(name: str) -> bool:
    # conv_in, conv_out and the time and size embeddings are outside of the blocks. kohya's scripts do not adapt them
    # and silently ignore them in a file, as does diffusers 0.32 (kohya-ss/sd-scripts, networks/lora.py, LoRANetwork).
    return name.startswith(("down_blocks.", "mid_block.", "up_blocks."))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or module.kernel_size == (1, 1)


def _ends(name: str, ends: Sequence[str]) -> bool:
    return any(f".{name}".endswith(f".{end}") for end in ends)
