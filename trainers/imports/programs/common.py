"""Parts that the importers of several programs share: conversions, and helpers for related settings."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from dreamfleet.datasets.errors import UserError
from dreamfleet.trainers.config.optimizers import OPTIMIZERS
from dreamfleet.trainers.imports.draft import Draft
from dreamfleet.trainers.imports.rules import Effect, Untranslatable, is_off, number, plain
from dreamfleet.trainers.imports.settings import Settings

FAMILIES = "dreamfleet trains Stable Diffusion 1.x, 2.x and XL"
ATTENTION = "torch's memory-efficient attention is always used"
SPEED = "concerns speed or memory, not what is trained"
WEB = "names, uploads and logs do not change what is trained"

# Names of optimizers (in lower case) in other programs -> ours, where they differ
_OPTIMIZER_NAMES: Mapping[str, str] = {
    "adamw_bf16": "adamw",
    "adamw_8bit": "adamw8bit",
    "bnb-adamw8bit": "adamw8bit",
    "lion_8bit": "lion8bit",
    "bnb-lion": "lion",
    "bnb-lion8bit": "lion8bit",
    "pagedadamw8bit": "paged_adamw8bit",
    "pagedadamw": "paged_adamw",
    "pagedadamw32bit": "paged_adamw",
    "pagedlion8bit": "paged_lion8bit",
    "adamwschedulefree": "adamw_schedulefree",
    "schedule_free_adamw": "adamw_schedulefree",
    "prodigy_plus_schedule_free": "prodigy_schedulefree",
    "prodigyplus.prodigyplusschedulefree": "prodigy_schedulefree",
    "prodigyplusschedulefree": "prodigy_schedulefree",
}
# Our optimizers whose weight decay is 0 in other programs unless it is given
_NO_DECAY = ("prodigy", "prodigy_schedulefree", "lion", "lion8bit", "paged_lion", "paged_lion8bit", "came")
_ADAM = {
    "weight_decay": "adam_weight_decay",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "eps": "adam_epsilon",
}

# The layers that kohya's LoRA adapts: in transformer blocks linear layers and 1 x 1 convolutions, in the text encoder
# attention and MLP.
BLOCK_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
ATTENTION_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
_TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def optimizer_name(value: Any) -> str:
    """Return our name of an optimizer; whether it exists is checked against the recipe."""
    name = str(value).strip().lower().rpartition("optimizers.")[2]
    return _OPTIMIZER_NAMES.get(name, name)


def put_options(draft: Draft, options: Mapping[str, tuple[str, Any]]) -> None:
    """Write an optimizer's own options: those of AdamW under keys of their own, the others as ``optimizer.options``.

    ``options``: name in the optimizer's library -> (place, value); ``betas`` may be text.
    """
    name = str(draft.get("optimizer.name"))
    if "adamw" in name and "schedule" not in name:
        for key, (where, value) in options.items():
            if key == "betas":
                for beta, each in zip(("beta1", "beta2"), _numbers(value), strict=False):
                    draft.put(f"optimizer.{_ADAM[beta]}", each, source=where)
            elif key in _ADAM:
                draft.put(f"optimizer.{_ADAM[key]}", value, source=where)
            elif not is_off(value, (False,)):
                draft.leave(where, value, Effect.CHANGES, f"{name} has no such option here")
        return
    found = {key: _numbers(value) if key == "betas" else plain(value) for key, (_, value) in options.items()}
    betas = [found.pop(beta, None) for beta in ("beta1", "beta2")]
    if betas != [None, None]:
        found["betas"] = [betas[0] or 0.9, betas[1] or 0.999]
    for key, value in list(found.items()):
        if (problem := _option_problem(name, key, value)) is not None:
            where, given = options.get(key, (key, value))
            draft.leave(where, given, Effect.CHANGES, f"{name} here: {problem}")
            del found[key]
    note = ""
    if name in _NO_DECAY and "weight_decay" not in found:
        found["weight_decay"], note = 0.0, "its weight decay is 0 there"
    if found:
        places = ", ".join(where for where, _ in options.values())
        draft.put("optimizer.options", found, source=places, note=note)


def _option_problem(optimizer: str, key: str, value: Any) -> str | None:
    """Return why an optimizer does not have an option with a value, None if it has."""
    try:
        OPTIMIZERS.get(optimizer).Options.model_validate({key: value})
    except ValidationError as error:
        first = error.errors()[0]
        return "there is no such option" if first["type"] == "extra_forbidden" else str(first["msg"])
    return None


def _numbers(value: Any) -> list[float]:
    texts = value if isinstance(value, list | tuple) else str(value).strip("()[] ").split(",")
    return [number(text) for text in texts]


def options_of(settings: Settings, prefix: str) -> dict[str, tuple[str, Any]]:
    """Return the settings below a prefix, by their last part, as :func:`put_options` expects them."""
    return {
        key.removeprefix(prefix): (items[0].where, items[0].value)
        for key, items in settings.items()
        if key.startswith(prefix)
    }


def put_layers(draft: Draft, layers: Sequence[str], *, source: str, note: str) -> None:
    """Write the layers of a LoRA in the U-Net, and if it is trained those of the text encoder."""
    text = _TEXT_LAYERS if draft.get("method.train_text_encoder") else []
    draft.put("method.lora_target_modules", [*layers, *text], source=source, note=note)


def yes_is(value: Any) -> Any:
    """Return a conversion of a switch: ``value`` if it is on."""

    def convert(given: Any) -> Any:
        return value if plain(given) is True else None

    return convert


def negated(value: Any) -> bool:
    """Return the opposite of a switch."""
    return plain(value) is not True


def as_suffixes(value: Any) -> list[str]:
    """Return a caption extension as a list, with its dot."""
    text = str(value).strip()
    return [text if text.startswith(".") else f".{text}"]


def trackers(value: Any) -> list[str]:
    """Return the names of trackers for `report_to`."""
    names = value if isinstance(value, list) else str(value).lower().split(",")
    names = ["tensorboard", "wandb"] if names == ["all"] else [name.strip() for name in names]
    if unknown := [name for name in names if name not in ("tensorboard", "wandb", "mlflow", "none")]:
        raise Untranslatable(Effect.IGNORED, f"there is no tracker {unknown[0]}; see report_to")
    return [name for name in names if name != "none"]


def key_values(value: Any) -> dict[str, str]:
    """Return ``k=v`` texts, in a list or one text, as a mapping; texts without ``=`` are names with ``true``."""
    texts = value if isinstance(value, list) else re.findall(r'"[^"]*"|\'[^\']*\'|[^\s]+', str(value))
    pairs = (str(text).strip().strip("\"'").partition("=") for text in texts)
    return {
        name.strip(): (found.strip() if equals else "true") for name, equals, found in pairs if name.strip()
    }


def put_resolution(draft: Draft, source: str, value: Any, *, is_default: bool = False) -> None:
    """Write ``data.resolution`` from ``512``, ``"512,768"`` or ``[512, 768]``: the side of a square of equal area."""
    text = value if isinstance(value, list) else re.split(r"[,x]", str(value))
    sides = [number(str(side)) for side in text]
    if len(sides) == 1 or sides[0] == sides[1]:
        draft.put("data.resolution", int(sides[0]), source=source, is_default=is_default)
        return
    side = max(8, round(math.sqrt(sides[0] * sides[1]) / 8) * 8)
    width, height = (int(each) for each in sides[:2])
    note = f"{width} x {height} there; a square of equal area here, or buckets of that area"
    draft.put("data.resolution", side, source=source, note=note)
    if not draft.get("data.enable_bucket"):
        draft.leave(
            source, value, Effect.CHANGES, "images are cropped to squares unless data.enable_bucket is set"
        )


def put_length(
    draft: Draft,
    *,
    steps: Any = None,
    epochs: Any = None,
    source: str,
    note: str = "",
    is_default: bool = False,
) -> None:
    """Write the length of the training: the steps if there are any, else the epochs."""
    if steps:
        draft.put(
            "train.max_train_steps", int(number(steps)), source=source, note=note, is_default=is_default
        )
    elif epochs:
        count = number(epochs)
        draft.put(
            "train.num_train_epochs", int(count) if count == int(count) else count, source=source, note=note
        )


def put_warmup(draft: Draft, source: str, share: float) -> None:
    """Write a warmup given as a share of all steps, which needs their number."""
    if not share:
        return
    if steps := draft.lines.get("train.max_train_steps"):
        count = round(share * steps.value)
        draft.put(
            "optimizer.lr_warmup_steps", count, source=source, note=f"{share:.0%} of {steps.value} steps"
        )
    else:
        reason = (
            "a share of the steps, whose number follows from the images here: set optimizer.lr_warmup_steps"
        )
        draft.leave(source, f"{share:.0%}", Effect.CHANGES, reason)


def put_output(draft: Draft, folder: Any, name: Any, *, source: str) -> None:
    """Write ``output_dir``, whose last part is the name of the artifacts, from a folder and a name."""
    parts = [str(part).replace("\\", "/").rstrip("/") for part in (folder, name) if part not in (None, "")]
    if parts:
        note = "folder and name together" if len(parts) == 2 else ""
        draft.put("output_dir", "/".join(parts), source=source, note=note)


def refuse_family(title: str, key: str, value: Any) -> None:
    """Raise UserError for a model that is not trained here."""
    raise UserError(f"{title}: {key}: {value} blocks the import; {FAMILIES}")
