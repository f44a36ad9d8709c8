"""Which layers of a model get LoRA's matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from torch import nn

from dreamfleet.datasets.errors import RecipeError

if TYPE_CHECKING:
    from dreamfleet.trainers.models.stable_diffusion.model import StableDiffusion

Targets = Literal["all-linear", "locon"] | Sequence[str] | None

# The projections of attention: what diffusers' scripts adapt.
_ATTENTION = {
    "unet": ("to_q", "to_k", "to_v", "to_out.0"),
    "text": ("q_proj", "k_proj", "v_proj", "out_proj"),
}


def choose_layers(
    model: StableDiffusion, targets: Targets, *, parts: Sequence[str], unread: Sequence[nn.Module] = ()
) -> dict[str, list[str]]:
    """Choose the modules of each part that get matrices, by name.

    ``targets``: None for the projections of attention; ``all-linear`` for every linear layer and 1 x 1 convolution of
    the blocks, ``locon`` for every convolution there too; or the ends of names, which leave the text encoders their
    projections unless they name some of theirs. ``unread`` modules, which no loss depends on, get none. Raises
    RecipeError for an end that no name has.
    """
    skipped = {id(module) for parent in unread for module in parent.modules()}
    chosen: dict[str, list[str]] = {}
    for part in parts:
        possible = {
            name: module
            for name, module in model.modules()[part].named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
            and id(module) not in skipped
            # Of a text encoder only its layers: the second one's last projection is no layer of a LoRA of kohya's.
            and (part == "unet" or ".layers." in name)
        }
        usual = _ATTENTION["unet" if part == "unet" else "text"]
        if isinstance(targets, str):
            inside = {name: module for name, module in possible.items() if part != "unet" or _in_block(name)}
            ends = [name for name, module in inside.items() if targets == "locon" or _is_linear(module)]
        else:
            own = targets is not None and (part == "unet" or any(_ends(name, targets) for name in possible))
            ends = list(targets if own and targets is not None else usual)
        chosen[part] = [name for name in possible if _ends(name, ends)]
    if targets is not None and not isinstance(targets, str):
        every = [name for names in chosen.values() for name in names]
        if missing := [end for end in targets if not any(_ends(name, [end]) for name in every)]:
            raise RecipeError(
                f"method.lora_target_modules: {model.folder} has no layer whose name ends in {', '.join(missing)}; the "
                "usual ones are to_q, to_k, to_v, to_out.0, others ff.net.0.proj, ff.net.2, proj_in, proj_out, conv1, "
                "conv2, or all-linear, or locon"
            )
    return chosen


def _in_block(name: str) -> bool:
    # Around the blocks lie conv_in, conv_out and the embeddings of time and sizes: kohya's scripts adapt none of these,
    # and drop them from a file in silence, as diffusers 0.32 does (kohya-ss/sd-scripts, networks/lora.py, LoRANetwork).
    return name.startswith(("down_blocks.", "mid_block.", "up_blocks."))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or module.kernel_size == (1, 1)


def _ends(name: str, ends: Sequence[str]) -> bool:
    return any(f".{name}".endswith(f".{end}") for end in ends)
