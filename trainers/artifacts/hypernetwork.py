"""Hypernetworks in the webui's format as artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dreamfleet.trainers.artifacts.kind import ArtifactKind, Usage, Use
from dreamfleet.trainers.artifacts.optimizer_usage import describe_optimizer

if TYPE_CHECKING:
    from torch import Tensor

    from dreamfleet.trainers.config.method import MethodConfig
    from dreamfleet.trainers.models.family import DiffusionModel


class HypernetworkKind(ArtifactKind):
    """MLPs applied to the contexts of attention's keys and values."""

    name: ClassVar[str] = "hypernetwork"
    suffixes: ClassVar[tuple[str, ...]] = (".pt",)
    formats: ClassVar[tuple[str, ...]] = ("pt",)
    is_full_precision: ClassVar[bool] = True
    option: ClassVar[str] = "hypernetwork"
    has_strength: ClassVar[bool] = True

    def matches(self, path: Path) -> bool:
        from dreamfleet.trainers.models.formats.hypernetwork import holds_hypernetwork

        return path.is_file() and holds_hypernetwork(path)

    def load_into(
        self,
        model: DiffusionModel,
        path: Path,
        *,
        address: str,
        strength: float | None = None,
        method: MethodConfig | None = None,
    ) -> str:
        """Apply the file after the hypernetworks that the model has, at the run's ``multiplier`` by default."""
        from dreamfleet.trainers.models.stable_diffusion.hypernetwork import load_hypernetwork

        load_hypernetwork(model, path, getattr(method, "multiplier", 1.0) if strength is None else strength)
        return ""

    def usage(self, name: str, *, run_name: str, method: Mapping[str, Any]) -> Usage | None:
        if not name.endswith(self.suffixes):
            return describe_optimizer(name)
        strength = method.get("multiplier", 1)
        module = "dreamfleet.trainers.models.stable_diffusion.hypernetwork"
        return Usage(
            "A hypernetwork: layers before the keys and values of attention.",
            (
                Use(
                    "webui",
                    f"copy to `models/hypernetworks/`, write `<hypernet:{Path(name).stem}:{strength}>` in the prompt",
                ),
                Use(
                    "diffusers",
                    f"`from {module} import load_hypernetwork`, "
                    f'`load_hypernetwork(pipe, "exports/{name}", multiplier={strength})`',
                ),
                Use(
                    "dreamfleet",
                    f"`dreamfleet sample --model ... --hypernetwork exports/{name}:{strength} --prompt ...`",
                ),
            ),
        )

    def read_back(self, path: Path) -> dict[str, Tensor]:
        from dreamfleet.trainers.models.stable_diffusion.hypernetwork import read_network

        return read_network(path).state_dict()

    def convert(self, source: Path, target: Path) -> Path:
        """Write the current form of the file, which every version of the webui reads, also from the older forms."""
        from dreamfleet.trainers.models.formats.hypernetwork import read_hypernetwork, write_hypernetwork

        return write_hypernetwork(replace(read_hypernetwork(source), name=target.stem), target)
