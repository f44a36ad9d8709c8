"""LoRAs in diffusers' and kohya's layouts as artifacts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dreamfleet.trainers.artifacts.kind import ArtifactKind, Usage, Use
from dreamfleet.trainers.models.formats.file_names import DIFFUSERS_LORA

if TYPE_CHECKING:
    from torch import Tensor

    from dreamfleet.trainers.config.method import MethodConfig
    from dreamfleet.trainers.models.family import DiffusionModel


_TITLES = {"lokr": "LoKr", "loha": "LoHa"}


class LoraKind(ArtifactKind):
    """Low-rank updates of a model's weights."""

    name: ClassVar[str] = "lora"
    suffixes: ClassVar[tuple[str, ...]] = (".safetensors", ".pt")
    formats: ClassVar[tuple[str, ...]] = ("diffusers_lora", "kohya_lora")
    option: ClassVar[str] = "lora"
    has_strength: ClassVar[bool] = True

    def matches(self, path: Path) -> bool:
        from dreamfleet.trainers.models.formats.lora import holds_lora

        return path.is_file() and path.suffix.lower() in self.suffixes and holds_lora(path)

    def load_into(
        self,
        model: DiffusionModel,
        path: Path,
        *,
        address: str,
        strength: float | None = None,
        method: MethodConfig | None = None,
    ) -> str:
        """Apply the LoRA to the U-Net and the text encoders."""
        from dreamfleet.trainers.models.lora import apply_lora

        apply_lora(model, path, 1.0 if strength is None else strength)
        return ""

    def exported_names(self, run_name: str, method: Mapping[str, Any]) -> Sequence[str]:
        return (f"{run_name}.safetensors", DIFFUSERS_LORA) if method.get("lora_rank") else ()

    def usage(self, name: str, *, run_name: str, method: Mapping[str, Any]) -> Usage | None:
        diffusers = Use("diffusers", f'`pipe.load_lora_weights("exports", weight_name="{name}")`')
        ours = Use("dreamfleet", f"`dreamfleet sample --model ... --lora exports/{name}:0.8 --prompt ...`")
        what = "A LoRA, small weights added to the base model's, in {} layout."
        if name == DIFFUSERS_LORA:
            return Usage(what.format("diffusers'"), (diffusers, ours))
        if name not in self.exported_names(run_name, method):
            return None
        kind = method.get("lora_type", "lora")
        webui = Use("webui", f"copy to `models/Lora/`, write `<lora:{Path(name).stem}:1>` in the prompt")
        comfy = Use("ComfyUI", "copy to `models/loras/`, open it with Load LoRA")
        if kind != "lora":
            what = f"A {_TITLES.get(kind, kind)}, " + what.removeprefix("A LoRA, ")
            return Usage(what.format("LyCORIS's"), (webui, comfy, ours))
        return Usage(what.format("kohya's"), (webui, comfy, diffusers, ours))

    def read_back(self, path: Path) -> dict[str, Tensor]:
        """Return ``LAYER.down``, ``LAYER.up`` and ``LAYER.alpha``, or LyCORIS's keys, for every layer."""
        import torch

        from dreamfleet.trainers.models.formats.lora import read_lora

        file = read_lora(path)
        found: dict[str, dict[str, Any]] = {layer: one._asdict() for layer, one in file.layers.items()}
        found |= {layer: {**one.tensors, "alpha": one.alpha} for layer, one in file.factors.items()}
        return {
            f"{layer}.{part}": torch.as_tensor(value)
            for layer, parts in found.items()
            for part, value in parts.items()
            if value is not None
        }

    def convert(self, source: Path, target: Path) -> Path:
        """Write the LoRA in the other of the two layouts; a LoKr or LoHa in kohya's again, the only one it has."""
        from dreamfleet.trainers.models.formats.lora import read_lora, write_diffusers_lora, write_kohya_lora

        if target.suffix.lower() != ".safetensors":
            raise self.cannot_become(target, self.suffixes[:1])
        found = replace(read_lora(source), name=target.stem)
        to_diffusers = found.is_kohyas and not found.factors
        return (write_diffusers_lora if to_diffusers else write_kohya_lora)(found, target)
