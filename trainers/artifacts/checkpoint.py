"""Whole models as artifacts: diffusers folders and single files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dreamfleet.datasets.errors import UserError
from dreamfleet.trainers.artifacts.kind import ArtifactKind, Usage, Use
from dreamfleet.trainers.models.formats.file_names import DIFFUSERS_LORA

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "diffusers"  # in a run's exports/
_SAMPLE = "`dreamfleet sample --model exports/{} --prompt ... --out grid.png`"


class CheckpointKind(ArtifactKind):
    """All weights of a model."""

    name: ClassVar[str] = "checkpoint"
    suffixes: ClassVar[tuple[str, ...]] = (".safetensors", ".ckpt")
    marker: ClassVar[str | None] = "model_index.json"
    formats: ClassVar[tuple[str, ...]] = ("diffusers", "safetensors", "ckpt")
    option: ClassVar[str] = "model"
    is_model: ClassVar[bool] = True

    def matches(self, path: Path) -> bool:
        if path.is_dir():
            return (path / str(self.marker)).exists()
        if path.suffix.lower() == ".ckpt":  # as large as a model; reading it twice would take too long
            return True
        if path.suffix.lower() != ".safetensors":
            return False
        from dreamfleet.trainers.models.formats.tensor_files import safetensors_names

        return any(name.startswith("model.diffusion_model.") for name in safetensors_names(path))

    def exported_names(self, run_name: str, method: Mapping[str, Any]) -> Sequence[str]:
        files = () if method.get("lora_rank") else (f"{run_name}.safetensors", f"{run_name}.ckpt")
        return (FOLDER, *files)

    def usage(self, name: str, *, run_name: str, method: Mapping[str, Any]) -> Usage | None:
        if name == FOLDER:
            load = f'`DiffusionPipeline.from_pretrained("exports/{FOLDER}")`, with transformers 4 or 5'
            return Usage(
                "The whole tuned model, as a diffusers folder.",
                (Use("diffusers", load), Use("dreamfleet", _SAMPLE.format(FOLDER))),
            )
        stem, suffix = Path(name).stem, Path(name).suffix
        if suffix == ".yaml":
            use = Use("webui", f"lies beside `{stem}` in `models/Stable-diffusion/`, under the same name")
            return Usage("What the model in one file predicts, which its keys do not show.", (use,))
        is_lora = method.get("lora_rank") and stem == run_name
        if suffix not in self.suffixes or is_lora or name == DIFFUSERS_LORA:
            return None
        return Usage(
            "The whole tuned model in one file, with the keys that Stable Diffusion's own code uses.",
            (
                Use("webui", f"copy to `models/Stable-diffusion/`, select `{stem}` as checkpoint"),
                Use("ComfyUI", "copy to `models/checkpoints/`, open it with Load Checkpoint"),
                Use("dreamfleet", _SAMPLE.format(name)),
            ),
        )

    def read_back(self, path: Path) -> dict[str, Tensor]:
        from dreamfleet.trainers.config.model import ModelConfig
        from dreamfleet.trainers.models.family import load_model

        model = load_model(ModelConfig(pretrained_model_name_or_path=str(path)))
        return {
            f"{part}.{name}": tensor
            for part, module in model.modules().items()
            for name, tensor in module.state_dict().items()
        }

    def convert(self, source: Path, target: Path) -> Path:
        """Write a diffusers folder, or a single file in float32."""
        import torch

        from dreamfleet.trainers.config.model import ModelConfig
        from dreamfleet.trainers.models.family import load_model

        if target.suffix and target.suffix.lower() not in self.suffixes:
            raise UserError(
                f"a model cannot become {target.name}: name a folder (diffusers), a .safetensors or a .ckpt file"
            )
        model = load_model(ModelConfig(pretrained_model_name_or_path=str(source)))
        if target.suffix:
            model.save_file(target, dtype=torch.float32, metadata={})
        else:
            model.save_folder(target)
        return target
