"""Textual Inversion embeddings, and the positive and negative embeddings of prompt tuning, as artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.artifacts.kind import ArtifactKind, Usage, Use
from dreamfleet.trainers.artifacts.optimizer_usage import describe_optimizer
from dreamfleet.trainers.models.formats.file_names import EMBEDDING_IMAGES, EMBEDDINGS, NEGATIVE

if TYPE_CHECKING:
    from torch import Tensor

    from dreamfleet.trainers.config.method import MethodConfig
    from dreamfleet.trainers.models.family import DiffusionModel

MAX_BYTES = 16 * 2**20  # largest .safetensors file that may be an embedding; whole models are larger


class EmbeddingKind(ArtifactKind):
    """The vectors of a learned word; the file ``NAME-neg`` beside ``NAME`` contains the word's negative vectors."""

    name: ClassVar[str] = "embedding"
    suffixes: ClassVar[tuple[str, ...]] = EMBEDDINGS
    formats: ClassVar[tuple[str, ...]] = ("pt", "safetensors", "png", "webp", "avif", "jxl", "bin", "kohya")
    is_full_precision: ClassVar[bool] = True
    option: ClassVar[str] = "embedding"

    def matches(self, path: Path) -> bool:
        from dreamfleet.trainers.models.formats.embedding import read_embedding

        suffix = path.suffix.lower()
        if suffix not in self.suffixes or not path.is_file():
            return False
        if suffix == ".safetensors" and path.stat().st_size > MAX_BYTES:
            return False
        read_embedding(path)  # raises FormatError with the reason
        return True

    def load_into(
        self,
        model: DiffusionModel,
        path: Path,
        *,
        address: str,
        strength: float | None = None,
        method: MethodConfig | None = None,
    ) -> str:
        """Add the vectors as the method's placeholder word, or as the file's own name; return the word."""
        from dreamfleet.trainers.models.embeddings import install_embedding, install_negative
        from dreamfleet.trainers.models.formats.embedding import read_embedding

        found = read_embedding(path)
        word = getattr(method, "placeholder_token", "") or found.name
        install_embedding(model, word, found.vectors, found.vectors_2)
        beside = negative_of(address)
        if beside.exists():
            with beside.local_copy() as path:
                negative = read_embedding(path)
            install_negative(model, word, negative.vectors, negative.vectors_2)
        return word

    def usage(self, name: str, *, run_name: str, method: Mapping[str, Any]) -> Usage | None:
        if name == "kohya":
            use = Use("sd-scripts", f"`--textual_inversion_embeddings exports/kohya/{run_name}.safetensors`")
            return Usage(
                "The learned vectors as kohya's sd-scripts write them; the file's name is the word.", (use,)
            )
        if optimizer := describe_optimizer(name):
            return optimizer
        path = Path(name)
        if path.suffix not in self.suffixes:
            return None
        stem = name.removesuffix(path.suffix)
        negative = method.get("name") == "prompt_tuning" and stem.endswith(NEGATIVE)
        word = str(method.get("placeholder_token") or stem) + (NEGATIVE if negative else "")
        where = "negative prompt" if negative else "prompt"
        webui = Use("webui", f"copy to `embeddings/`, write `{stem}` in the {where}")
        what = "The learned vectors for the negative prompt" if negative else "The learned vectors"
        given = f"{stem.removesuffix(NEGATIVE)}{path.suffix}" if negative else name
        both = ", which loads this file too" if negative else ""
        ours = Use(
            "dreamfleet", f"`dreamfleet sample --model ... --embedding exports/{given} --prompt ...`{both}"
        )
        if path.suffix == ".safetensors":
            load = f'`pipe.load_textual_inversion("exports/{name}", token="{word}")`, write `{word}` in the {where}'
            return Usage(f"{what}, for diffusers.", (Use("diffusers", load), ours))
        if path.suffix in EMBEDDING_IMAGES:
            if path.suffix == ".jxl":
                webui = Use("webui", f"{webui.text}, once `pillow_jxl` is imported in it (docs/formats.md)")
            return Usage(f"{what} inside an image; share it as an image file.", (webui, ours))
        return Usage(f"{what}, in the webui's format.", (webui, ours))

    def read_back(self, path: Path) -> dict[str, Tensor]:
        from dreamfleet.trainers.models.formats.embedding import read_embedding

        found = read_embedding(path)
        return {"vectors": found.vectors} | (
            {} if found.vectors_2 is None else {"vectors_2": found.vectors_2}
        )

    def convert(self, source: Path, target: Path) -> Path:
        from dreamfleet.trainers.models.formats.embedding import read_embedding, write_embedding

        found = read_embedding(source)
        if target.suffix.lower() == ".pt" and target.stem != found.name:
            found = read_embedding(source, target.stem)  # the webui uses the file's name as the word
        return write_embedding(found, target)


def negative_of(address: str) -> Storage:
    """Return the address of an embedding's negative, ``NAME-neg`` beside ``NAME``; the file may not exist."""
    stem, dot, suffix = address.rpartition(".")
    return Storage(f"{stem}{NEGATIVE}{dot}{suffix}")
