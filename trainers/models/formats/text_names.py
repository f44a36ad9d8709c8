"""Maps text encoder parameters to their names in single files: transformers' without `text_model.`, or OpenCLIP's."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from dreamfleet.datasets.errors import FormatError

_TOP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_INSIDE = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_THIRDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.([\w.]+)\.(weight|bias)")


@dataclass(frozen=True)
class Place:
    """The place of a parameter in a single file: a tensor's `name`; it may be `transposed`, or one `third` of it."""

    name: str
    third: int | None = None
    transposed: bool = False

    def under(self, prefix: str) -> Place:
        """Return the place with a prefix added to its name."""
        return replace(self, name=prefix + self.name)


def clip_place(key: str) -> Place:
    """Return the place of a parameter in CLIP's layout, relative to the prefix that the webui and LDM expect.

    Raises FormatError for a parameter without a name there.
    """
    plain = plain_text_key(key)
    if not plain.startswith(("embeddings.", "encoder.", "final_layer_norm.")):
        raise FormatError(f"the text encoder's parameter {key!r} has no name in single files.")
    return Place(plain)


def openclip_place(key: str) -> Place:
    """Return the place of a parameter in OpenCLIP's layout, where queries, keys and values are one joined tensor.

    Raises FormatError for a parameter without a name there.
    """
    plain = plain_text_key(key)
    if plain == "text_projection.weight":
        return Place("text_projection", transposed=True)
    if plain in _TOP:
        return Place(_TOP[plain])
    if match := _LAYER.fullmatch(plain):
        block = f"transformer.resblocks.{match[1]}"
        if match[2] in _THIRDS:
            return Place(f"{block}.attn.in_proj_{match[3]}", third=_THIRDS.index(match[2]))
        if match[2] in _INSIDE:
            return Place(f"{block}.{_INSIDE[match[2]]}.{match[3]}")
    raise FormatError(f"the text encoder's parameter {key!r} has no name in OpenCLIP's layout.")


def plain_text_key(key: str) -> str:
    """Return a parameter's name without transformers' `text_model.` and without the wrapper for learned words."""
    return key.removeprefix("text_model.").replace("token_embedding.table.", "token_embedding.")
