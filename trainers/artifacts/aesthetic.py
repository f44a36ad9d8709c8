"""Aesthetic vectors as artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dreamfleet.trainers.artifacts.kind import ArtifactKind, Usage, Use

if TYPE_CHECKING:
    from torch import Tensor

    from dreamfleet.trainers.config.method import MethodConfig
    from dreamfleet.trainers.models.family import DiffusionModel


class AestheticKind(ArtifactKind):
    """The mean CLIP vector of a set of images; prompts are tuned towards it."""

    name: ClassVar[str] = "aesthetic"
    suffixes: ClassVar[tuple[str, ...]] = (".pt",)
    formats: ClassVar[tuple[str, ...]] = ("pt",)
    is_full_precision: ClassVar[bool] = True
    option: ClassVar[str] = "aesthetic"

    def matches(self, path: Path) -> bool:
        from dreamfleet.trainers.models.formats.aesthetic import holds_aesthetic

        return path.is_file() and holds_aesthetic(path)

    def load_into(
        self,
        model: DiffusionModel,
        path: Path,
        *,
        address: str,
        strength: float | None = None,
        method: MethodConfig | None = None,
    ) -> str:
        """Tune prompts towards the vector, with the run's settings or the webui extension's defaults."""
        from dreamfleet.trainers.config.methods.aesthetic_gradients import AestheticGradientsConfig
        from dreamfleet.trainers.models.stable_diffusion.aesthetic import apply_aesthetic, settings_of

        if isinstance(method, AestheticGradientsConfig):
            apply_aesthetic(model, path, settings_of(method), method.clip)
        else:
            apply_aesthetic(model, path)
        return ""

    def usage(self, name: str, *, run_name: str, method: Mapping[str, Any]) -> Usage | None:
        if not name.endswith(self.suffixes):
            return None
        return Usage(
            "The mean CLIP image vector of the training images.",
            (
                Use(
                    "webui",
                    "copy to the aesthetic-gradients extension's `aesthetic_embeddings/` and select it there",
                ),
                Use("dreamfleet", f"`dreamfleet sample --model ... --aesthetic exports/{name} --prompt ...`"),
            ),
        )

    def read_back(self, path: Path) -> dict[str, Tensor]:
        from dreamfleet.trainers.models.formats.aesthetic import read_aesthetic

        return {"vector": read_aesthetic(path)}

    def convert(self, source: Path, target: Path) -> Path:
        """Write the vector as ``[1, P]`` in float32, which the extension's slerp needs, from any published form."""
        from dreamfleet.trainers.models.formats.aesthetic import read_aesthetic, write_aesthetic

        return write_aesthetic(read_aesthetic(source), target)
