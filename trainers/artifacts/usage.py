"""Says of an exported file what it is and how other programs use it, one line each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dreamfleet.trainers.models.formats.lora import DIFFUSERS_FILE


@dataclass(frozen=True)
class Use:
    """How one program uses a file; code stands in backticks."""

    program: str
    text: str


@dataclass(frozen=True)
class Hint:
    """What an artefact is, and its uses."""

    what: str
    uses: tuple[Use, ...]


def describe(name: str, *, run_name: str, recipe: Mapping[str, Any]) -> Hint:
    """Describe the artefact `name` (a file or folder in `exports/`) of a run."""
    method = recipe.get("method") if isinstance(recipe.get("method"), Mapping) else {}
    kind = str(method.get("name", ""))  # type: ignore[union-attr]
    stem, _, suffix = name.rpartition(".")
    if name == "diffusers":
        return Hint(
            "The whole tuned model, as a diffusers folder.",
            (
                Use(
                    "diffusers",
                    '`DiffusionPipeline.from_pretrained("exports/diffusers")`, with transformers 4 or 5',
                ),
                Use(
                    "dreamfleet", "`dreamfleet sample --model exports/diffusers --prompt ... --out grid.png`"
                ),
            ),
        )
    if found := _beside(name, stem, suffix, run_name):
        return found
    whole_lora = method.get("lora_rank") and name == f"{run_name}.safetensors"  # type: ignore[union-attr]
    if name == DIFFUSERS_FILE or whole_lora:
        return _lora(name, stem)
    if kind in ("textual_inversion", "prompt_tuning"):
        return _embedding(name, stem, suffix, kind, method)  # type: ignore[arg-type]
    if kind == "hypernetwork":
        return _hypernetwork(name, stem, method)  # type: ignore[arg-type]
    if kind == "aesthetic_gradients":
        return Hint(
            "The mean CLIP image vector of the pictures.",
            (
                Use(
                    "webui",
                    "copy to the aesthetic-gradients extension's `aesthetic_embeddings/`, choose it there",
                ),
                Use("dreamfleet", f"`dreamfleet sample --model ... --aesthetic exports/{name} --prompt ...`"),
            ),
        )
    if kind == "discriminator":
        return _discriminator(name, suffix)
    return _single_file(name, stem or run_name)


def _beside(name: str, stem: str, suffix: str, run_name: str) -> Hint | None:
    """Describe what lies beside an artefact for one program's sake, None for anything else."""
    if name == "kohya":
        use = Use("sd-scripts", f"`--textual_inversion_embeddings exports/kohya/{run_name}.safetensors`")
        return Hint(
            "The learned vectors as kohya's sd-scripts write them; the file's name is the word.", (use,)
        )
    if suffix == "optim":
        use = Use(
            "webui",
            f"copy beside `{stem}`; with Settings > Training > Saves Optimizer state on, it trains on",
        )
        return Hint("The optimizer's moments, to go on training in the webui.", (use,))
    if suffix == "yaml":
        use = Use("webui", f"lies beside `{stem}` in `models/Stable-diffusion/`, under the same name")
        return Hint("What the model in one file predicts, which its keys do not tell.", (use,))
    return None


def _single_file(name: str, stem: str) -> Hint:
    return Hint(
        "The whole tuned model in one file, with the keys that Stable Diffusion's own code uses.",
        (
            Use("webui", f"copy to `models/Stable-diffusion/`, choose `{stem}` as checkpoint"),
            Use("ComfyUI", "copy to `models/checkpoints/`, open it with Load Checkpoint"),
            Use("dreamfleet", f"`dreamfleet sample --model exports/{name} --prompt ... --out grid.png`"),
        ),
    )


def _discriminator(name: str, suffix: str) -> Hint:
    ours = Use(
        "dreamfleet", f"`method: {{name: prompt_tuning, discriminator: .../exports/{name}}}` in a recipe"
    )
    if suffix == "pth":
        return Hint(
            "A classifier of pictures, with the names of ConvNeXt's authors, as DreamArtist reads it.",
            (ours,),
        )
    theirs = Use("transformers", f'`ConvNextForImageClassification.from_pretrained("exports/{name}")`')
    return Hint("A classifier of pictures, as a folder.", (ours, theirs))


def _lora(name: str, stem: str) -> Hint:
    diffusers = Use("diffusers", f'`pipe.load_lora_weights("exports", weight_name="{name}")`')
    ours = Use("dreamfleet", f"`dreamfleet sample --model ... --lora exports/{name}:0.8 --prompt ...`")
    if name == DIFFUSERS_FILE:
        return Hint(
            "A LoRA, small weights added to the base model's, in diffusers' layout.", (diffusers, ours)
        )
    webui = Use("webui", f"copy to `models/Lora/`, write `<lora:{stem}:1>` in the prompt")
    comfy = Use("ComfyUI", "copy to `models/loras/`, open it with Load LoRA")
    return Hint(
        "A LoRA, small weights added to the base model's, in kohya's layout.", (webui, comfy, diffusers, ours)
    )


def _hypernetwork(name: str, stem: str, method: Mapping[str, Any]) -> Hint:
    strength = method.get("multiplier", 1)
    return Hint(
        "A hypernetwork: layers before the keys and values of attention.",
        (
            Use(
                "webui",
                f"copy to `models/hypernetworks/`, write `<hypernet:{stem}:{strength}>` in the prompt",
            ),
            Use(
                "diffusers",
                "`from dreamfleet.trainers.models.stable_diffusion.hypernetwork import load_hypernetwork`, "
                f'`load_hypernetwork(pipe, "exports/{name}", multiplier={strength})`',
            ),
            Use(
                "dreamfleet",
                f"`dreamfleet sample --model ... --hypernetwork exports/{name}:{strength} --prompt ...`",
            ),
        ),
    )


def _embedding(name: str, stem: str, suffix: str, kind: str, method: Mapping[str, Any]) -> Hint:
    negative = kind == "prompt_tuning" and stem.endswith("-neg")
    word = str(method.get("placeholder_token") or stem) + ("-neg" if negative else "")
    where = "negative prompt" if negative else "prompt"
    webui = Use("webui", f"copy to `embeddings/`, write `{stem}` in the {where}")
    what = "The learned vectors for the negative prompt" if negative else "The learned vectors"
    given = name.replace("-neg.", ".") if negative else name
    taken = ", which takes this one along" if negative else ""
    ours = Use(
        "dreamfleet", f"`dreamfleet sample --model ... --embedding exports/{given} --prompt ...`{taken}"
    )
    if suffix == "safetensors":
        load = (
            f'`pipe.load_textual_inversion("exports/{name}", token="{word}")`, write `{word}` in the {where}'
        )
        return Hint(f"{what}, for diffusers.", (Use("diffusers", load), ours))
    if suffix in ("png", "webp", "avif", "jxl"):
        if suffix == "jxl":
            webui = Use("webui", f"{webui.text}, once `pillow_jxl` is imported in it (docs/formats.md)")
        return Hint(f"{what} inside a picture; pass it on as a picture.", (webui, ours))
    return Hint(f"{what}, in webui's format.", (webui, ours))
