"""Writes the LoRA of kohya-ss/sd-scripts, or of LyCORIS, which those scripts load."""

from __future__ import annotations

from typing import Any

from dreamfleet.trainers.imports.draft import Draft
from dreamfleet.trainers.imports.programs.common import BLOCK_LAYERS, put_layers
from dreamfleet.trainers.imports.rules import Effect, is_off, number
from dreamfleet.trainers.imports.settings import Settings


def write_lora(settings: Settings, draft: Draft, rank: Any) -> None:
    """Write rank, alpha and layers; without a rank it is 4, and without an alpha it is 1."""
    module, algo = (
        str(settings.get("network_module", "")),
        str(settings.get("network_args.algo", "lora")).lower(),
    )
    if "lycoris" in module and algo not in ("lora", "locon"):
        draft.put("method.lora_type", algo, source="network_args.algo", shown=algo)
    elif module and "lycoris" not in module and module not in ("networks.lora", "networks.lora_fa"):
        draft.leave("network_module", module, Effect.CHANGES, "there is no such network; a LoRA is trained")
    draft.put("method.lora_rank", int(number(rank or 4)), source="network_dim", is_default=not rank)
    alpha = settings.get("network_alpha", 1)
    draft.put(
        "method.lora_alpha",
        number(alpha),
        source="network_alpha",
        is_default=not settings.has("network_alpha"),
    )
    conv = settings.get("network_args.conv_dim")
    if "lycoris" in module and not conv and algo in ("lokr", "loha"):
        note = "LyCORIS adapts convolutions too, with the same rank"
        draft.put("method.lora_target_modules", "locon", source="network_module", note=note)
    elif conv and not is_off(conv, (False, 0)):
        draft.put("method.lora_target_modules", "locon", source="network_args.conv_dim")
        for key, ours in (("network_args.conv_dim", rank or 4), ("network_args.conv_alpha", alpha)):
            if (given := settings.get(key)) is not None and number(given) != number(ours):
                draft.leave(key, given, Effect.CHANGES, f"all layers have the same: {ours} is used")
    else:
        note = "the layers of kohya's LoRA; ours adapts only attention by default"
        put_layers(draft, BLOCK_LAYERS, source="network_module", note=note)
