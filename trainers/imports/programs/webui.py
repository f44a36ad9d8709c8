"""Imports the settings that the train tab of AUTOMATIC1111's webui saves beside its logs (`settings-*.json`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from dreamfleet.trainers.imports.draft import Draft
from dreamfleet.trainers.imports.importer import Importer
from dreamfleet.trainers.imports.programs.common import WEB, put_length, put_resolution
from dreamfleet.trainers.imports.rules import (
    Effect,
    Table,
    To,
    Untranslatable,
    changes,
    choice,
    ignored,
    joined,
    number,
    to,
)
from dreamfleet.trainers.imports.settings import Document, Settings


def _structure(value: Any) -> Any:
    """Return the widths of a hypernetwork's layers."""
    return value if isinstance(value, list) else [float(part) for part in str(value).strip("[]").split(",")]


def _template(value: Any) -> str:
    """Return a template file; those that the webui ships are built in by name."""
    name = str(value).replace("\\", "/").rpartition("/")[2]
    built_in = {
        f"{known}.txt": known for known in ("style", "subject", "style_filewords", "subject_filewords")
    }
    built_in |= {f"{known}.txt": known for known in ("hypernetwork", "none")}
    return built_in.get(name, str(value))


def _rate(value: Any) -> Any:
    """Return a rate or a schedule string, in which -1 means to the end, as here."""
    text = str(value).strip()
    if not text:
        raise Untranslatable(Effect.CHANGES, "is empty")
    return text


RULES: Table = {
    **ignored(WEB, "datetime", "log_directory", "model_hash", "num_of_dataset_images", "initial_step"),
    **joined("a name in the webui's folder, not a path", "model.pretrained_model_name_or_path", "model_name"),
    "data_root": To("data.instance_data_dir"),
    **joined(
        "w x h there, the side of a square here", "data.resolution", "training_width", "training_height"
    ),
    "batch_size": To("train.train_batch_size"),
    "gradient_step": To("train.gradient_accumulation_steps"),
    **joined("optimizer steps, as here", "train.max_train_steps", "steps"),
    "learn_rate": To("optimizer.learning_rate", _rate),
    **joined("norm; value is not there", "optimizer.max_grad_norm", "clip_grad_mode", "clip_grad_value"),
    "latent_sampling_method": To(
        "data.latent_sampling", choice({"once": "once", "random": "random", "deterministic": "deterministic"})
    ),
    "template_file": To("method.template_file", _template),
    "embedding_name": To("method.placeholder_token"),
    "num_vectors_per_token": To("method.num_vectors"),
    "save_embedding_every": To("train.checkpointing_steps", off=(0,)),
    "save_hypernetwork_every": To("train.checkpointing_steps", off=(0,)),
    "create_image_every": To("validation.steps", off=(0,)),
    **ignored(
        "image embeddings are an export format: train.export_formats", "save_image_with_stored_embedding"
    ),
    **joined("the last part of output_dir", "output_dir", "hypernetwork_name"),
    **to("method", "activation_func", "weight_init", "add_layer_norm", "use_dropout"),
    "layer_structure": To("method.layer_structure", _structure),
    "dropout_structure": To("method.dropout_structure", _structure),
    **changes("transparency weighs the loss with data.alpha_mask", "use_weight"),
    **changes("there is no such option", "varsize", "shuffle_tags", "tag_drop_out"),
    "preview_prompt": To("validation.prompts", lambda value: [str(value)]),
    "preview_negative_prompt": To("validation.negative_prompt"),
    "preview_steps": To("validation.num_inference_steps"),
    "preview_cfg_scale": To("validation.guidance_scale"),
    "preview_seed": To("validation.seed", off=(-1,)),
    **ignored("previews have the size of the images", "preview_width", "preview_height"),
    **ignored("previews have a sampler of their own: validation.scheduler", "preview_sampler_index"),
    **ignored("previews have a sampler of their own: validation.scheduler", "preview_sampler_name"),
    **ignored("previews are of validation.prompts", "preview_from_txt2img"),
}


class WebUI(Importer):
    """Translates the settings of the webui's train tab: embeddings and hypernetworks."""

    name: ClassVar[str] = "webui"
    title: ClassVar[str] = "the webui's train tab"
    version: ClassVar[str] = "1.x"
    kinds: ClassVar[tuple[str, ...]] = ("json",)
    rules: ClassVar[Table] = RULES
    markers: ClassVar[frozenset[str]] = frozenset(
        {"embedding_name", "hypernetwork_name", "data_root", "gradient_step"}
    )
    defaults: ClassVar[Mapping[str, object]] = {}

    def method(self, settings: Settings, documents: Sequence[Document]) -> str:
        return "hypernetwork" if settings.has("hypernetwork_name") else "textual_inversion"

    def finish(self, settings: Settings, draft: Draft) -> None:
        name = settings.get("hypernetwork_name", settings.get("embedding_name", "imported"))
        draft.put(
            "output_dir", f"runs/{name}", source="hypernetwork_name" if draft.method == "hypernetwork" else ""
        )
        put_length(draft, steps=settings.get("steps"), source="steps")
        if settings.has("training_width"):
            sides = [
                settings.get("training_width"),
                settings.get("training_height", settings.get("training_width")),
            ]
            put_resolution(draft, "training_width, training_height", sides)
        model = settings.get("model_name")
        if model is not None:
            reason = "the file is in the webui's models folder: set model.pretrained_model_name_or_path to its path"
            draft.put(
                "model.pretrained_model_name_or_path",
                f"{model}.safetensors" if "." not in str(model) else str(model),
                source="model_name",
                note="a name in the webui; write the path of its file",
            )
            draft.paths.missing.pop("model_name", None)
            draft.leave("model_name", model, Effect.BLOCKS, reason)
        mode = settings.get("clip_grad_mode", "disabled")
        if mode == "norm":
            draft.put(
                "optimizer.max_grad_norm",
                number(settings.get("clip_grad_value", 1)),
                source="clip_grad_value",
            )
        else:
            note = "the webui does not clip gradients unless told so"
            draft.put("optimizer.max_grad_norm", 0, source="clip_grad_mode", note=note)
            if mode == "value":
                reason = "gradients are clipped by their norm only"
                draft.leave("clip_grad_mode", mode, Effect.CHANGES, reason)
