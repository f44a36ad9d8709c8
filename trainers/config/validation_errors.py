"""Explains validation errors in terms of the recipe: key, problem, remedy."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import AliasChoices, BaseModel, ValidationError

_ALWAYS = "torch's memory-efficient attention is always used; leave it out"
_NAMED = "the last part of output_dir is the name of the artifacts"
_RESUMED = "continue a run with --resume on the command line; checkpoints contain everything that it needs"
_EPOCHS = "use validation.steps, which counts optimizer steps"
# Keys of diffusers' and kohya's scripts without an equivalent key here -> what to do instead.
ELSEWHERE = {
    "enable_xformers_memory_efficient_attention": _ALWAYS,
    "xformers": _ALWAYS,
    "sdpa": _ALWAYS,
    "mem_eff_attn": _ALWAYS,
    "set_grads_to_none": "gradients are always freed after each step; leave it out",
    "use_8bit_adam": "write optimizer.name: adamw8bit",
    "output_name": _NAMED,
    "logging_dir": "TensorBoard files are written to output_dir/tensorboard; leave it out",
    "resume_from_checkpoint": _RESUMED,
    "resume": _RESUMED,
    "save_state": _RESUMED,
    "validation_epochs": _EPOCHS,
    "sample_every_n_epochs": _EPOCHS,
    "validation_split": "set validation.holdout to a folder of images that are not trained on",
    "is_reg": "class images have a folder of their own: data.class_data_dir",
}


def explain(
    error: ValidationError, root: type[BaseModel], *, homes: Mapping[str, str], prefix: str = ""
) -> list[str]:
    """Return one line for each error. ``homes``: key -> the section it belongs to; ``prefix``: the key of ``root``."""
    lines = []
    for item in error.errors(include_url=False):
        where = ".".join([*([prefix] if prefix else []), *[str(part) for part in item["loc"]]])
        if item["type"] == "extra_forbidden":
            name, path = str(item["loc"][-1]), [str(part) for part in item["loc"][:-1]]
            known = keys_at(root, item["loc"][:-1])
            lines.append(f"{where}: {_unknown(name, known, homes, section='.'.join(path) or prefix)}")
        elif item["type"] == "missing":
            lines.append(f"{where}: missing")
        else:
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{where}: {message}{_shown(item)}" if where else message)
    return lines


def keys_at(root: type[BaseModel], path: Sequence[Any]) -> dict[str, list[str]]:
    """Return the keys of the section at a path: any name of a key -> all names of this key."""
    model: type[BaseModel] | None = root
    names_are_free = False
    for part in path:
        field = model.model_fields.get(str(part)) if model else None
        if names_are_free or isinstance(part, int):  # a key of a mapping, or an index of a list
            names_are_free = False
        elif field is not None:
            model = _section_in(field.annotation)
            names_are_free = typing.get_origin(field.annotation) is dict
        else:
            return {}
    keys: dict[str, list[str]] = {}
    for name, field in (model.model_fields if model else {}).items():
        alias = field.validation_alias
        others = [str(choice) for choice in alias.choices] if isinstance(alias, AliasChoices) else []
        names = list(dict.fromkeys([name, *others]))
        keys |= dict.fromkeys(names, names)
    return keys


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean NAME?" for the most similar known name, "" if none is similar."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _unknown(name: str, known: Mapping[str, list[str]], homes: Mapping[str, str], *, section: str) -> str:
    if name in known:
        return f"another name of {known[name][0]!r}, and both are given; keep one"
    if homes.get(name, section) != section:
        home = homes[name]
        return f"unknown key here; {'it belongs outside the sections' if home == name else f'it belongs to {home}:'}"
    if name in ELSEWHERE:
        return f"unknown key; {ELSEWHERE[name]}"
    return f"unknown key{nearest(name, known)}"


def _shown(item: Any) -> str:
    value = item["input"]
    if isinstance(value, str | int | float | bool | None):
        return f" (got {value!r})"
    if item["type"] != "string_type":
        return ""
    if isinstance(value, list) and len(value) == 1:  # YAML reads [filewords] as a list
        return f" (got a list; in quotes it is text: '[{value[0]}]')"
    return " (got a mapping; text with a colon needs quotes)" if isinstance(value, dict) else ""


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        for inner in typing.get_args(annotation):
            if found := _section_in(inner):
                return found
    return None
