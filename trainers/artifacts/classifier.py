"""Image classifiers, which prompt tuning uses as discriminators, as artifacts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dreamfleet.trainers.artifacts.kind import ArtifactKind, Usage, Use

if TYPE_CHECKING:
    from torch import Tensor


class ClassifierKind(ArtifactKind):
    """A ConvNeXt image classifier that distinguishes good images from others."""

    name: ClassVar[str] = "classifier"
    suffixes: ClassVar[tuple[str, ...]] = (".pth",)
    marker: ClassVar[str | None] = "preprocessor_config.json"
    formats: ClassVar[tuple[str, ...]] = ("transformers", "pth")
    option: ClassVar[str] = ""

    def matches(self, path: Path) -> bool:
        if path.is_file():
            return path.suffix.lower() in self.suffixes
        config = path / "config.json"
        try:
            found = json.loads(config.read_text("utf-8")) if config.exists() else None
        except ValueError:
            return False
        return isinstance(found, dict) and found.get("model_type") == "convnext"

    def exported_names(self, run_name: str, method: Mapping[str, Any]) -> Sequence[str]:
        return ()

    def usage(self, name: str, *, run_name: str, method: Mapping[str, Any]) -> Usage | None:
        ours = Use(
            "dreamfleet", f"`method: {{name: prompt_tuning, discriminator: .../exports/{name}}}` in a recipe"
        )
        if name.endswith(self.suffixes):
            return Usage(
                "An image classifier, with the names of ConvNeXt's authors, as DreamArtist reads it.", (ours,)
            )
        if name != run_name:
            return None
        theirs = Use("transformers", f'`ConvNextForImageClassification.from_pretrained("exports/{name}")`')
        return Usage("An image classifier, as a folder.", (ours, theirs))

    def read_back(self, path: Path) -> dict[str, Tensor]:
        from dreamfleet.trainers.models.vision.discriminator import load_discriminator

        state: dict[str, Tensor] = load_discriminator(str(path)).network.state_dict()
        return state

    def convert(self, source: Path, target: Path) -> Path:
        """Write a ``.pth`` with the names of ConvNeXt's authors, or a folder that transformers loads, in float32."""
        import torch

        from dreamfleet.trainers.models.formats.convnext import write_convnext
        from dreamfleet.trainers.models.vision.discriminator import load_discriminator, save_network

        if target.suffix and target.suffix.lower() not in self.suffixes:
            raise self.cannot_become(target, (*self.suffixes, "no suffix (a folder)"))
        found = load_discriminator(str(source))
        if target.suffix:
            write_convnext(found.network.state_dict(), target, dtype=torch.float32)
        else:
            size: Any = found.preprocessing.resize
            side = size if isinstance(size, int) else size[0]
            save_network(found.network, target, size=side, dtype=torch.float32, metadata={})
        return target
