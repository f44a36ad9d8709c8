"""Removes the options that the imported kind of LoRA does not have, and reports them."""

from __future__ import annotations

from dreamfleet.trainers.imports.draft import Draft
from dreamfleet.trainers.imports.rules import Effect

_OF_LOKR = ("lokr_factor", "lokr_decompose_both", "lokr_full_matrix")
#: Option of a LoRA's two matrices -> the effect of leaving it out of a LoKr or LoHa, and why it has none.
_OF_LORA = {
    "lora_dropout": (Effect.IGNORED, "LyCORIS has no such dropout either"),
    "neuron_dropout": (Effect.IGNORED, "LyCORIS has no such dropout either"),
    "rank_dropout": (Effect.CHANGES, "a LoKr or LoHa has no dropout of rows here"),
    "use_dora": (Effect.CHANGES, "a LoKr or LoHa has no lengths of weights here"),
    "scale_weight_norms": (Effect.CHANGES, "the norm of a LoKr or LoHa has no limit here"),
    **{
        f"loraplus_{part}lr_ratio": (Effect.CHANGES, "a LoKr or LoHa has no up matrices")
        for part in ("", "unet_", "text_encoder_")
    },
}


def fit_lora_type(draft: Draft) -> None:
    """Leave out what does not exist with the draft's ``method.lora_type``."""
    kind = draft.get("method.lora_type")
    gone = dict.fromkeys(_OF_LOKR, (Effect.IGNORED, "only for LoKr")) if kind != "lokr" else {}
    gone |= _OF_LORA if kind in ("lokr", "loha") else {}
    for name, (effect, reason) in gone.items():
        line = draft.lines.get(f"method.{name}")
        if line is not None:
            draft.drop(line.key)
            if not line.is_default:
                draft.leave(line.source, line.value, effect, reason)
