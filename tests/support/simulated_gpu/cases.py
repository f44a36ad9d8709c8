"""The cases for the simulated GPU, derived from the registries; importing this module does not simulate a GPU.

A row is a complete run with one method, model family and precision. Options (every boolean and enumerated key
of the recipe's sections and the methods' sections) and engine choices are distributed over rows that accept
them. New methods, families, precisions, options and engines are therefore covered automatically; exceptions
are in ``LEFT_OUT``.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import tiny
from method_cases import IMAGES, RATES, SECTIONS
from tiny_models import FAMILIES

from dreamfleet.datasets.config_base import Section
from dreamfleet.datasets.errors import UserError
from dreamfleet.trainers.config.method import METHODS
from dreamfleet.trainers.config.optimizers import OPTIMIZERS
from dreamfleet.trainers.memory.strategies import ALTERING, CHOICES
from dreamfleet.trainers.methods.base import method_class
from dreamfleet.trainers.recipe import Recipe, build_recipe

STEPS = 4
Values = dict[str, Any]  # by dotted key

#: Keys, or pairs of key and value, that are not run -> reason.
LEFT_OUT: dict[Any, str] = {
    "scaling": "workers are the business of the ranks and of Ray",
    "train.mixed_precision": "a row's precision",
    "train.full_bf16": "a row's precision",
    "train.export": "a row's exports are checked",
    "engine.zero_stage": "engine choices",
    "engine.offload_optimizer_device": "engine choices; nvme needs libaio and CUDA's compiler",
    "engine.offload_param_device": "engine choices",
    "engine.dynamo_backend": "comes with engine.torch_compile; inductor needs CUDA's compiler",
    "engine.zero_quantized_weights": "DeepSpeed compiles CUDA kernels for it",
    "engine.zero_quantized_gradients": "DeepSpeed compiles CUDA kernels for it",
    "method.lora_type": "KINDS_OF_LORA, the last options of all",
    "method.lokr_decompose_both": "other sizes of the same factors",
    "method.lokr_full_matrix": "other sizes of the same factors",
    ("data.source", "stream"): "Ray tasks stream on CPUs",
    ("validation.metrics", "dino"): "needs the weights of a DINO",
    ("model.prediction_type", "sample"): "no samplers draw it",
}
#: Bucket sizes that every family's tiny model supports.
BUCKETS: Values = {
    "data.enable_bucket": True,
    "data.min_bucket_reso": 16,
    "data.max_bucket_reso": 64,
    "data.bucket_reso_steps": 16,
}
#: Key, or pair of key and value -> further keys that it needs; FOLDER means the folder of models and images.
NEEDS: dict[Any, Values] = {
    "engine.torch_compile": {"engine.dynamo_backend": "eager"},
    "engine.pin_memory": {"engine.zero_stage": 2, "engine.offload_optimizer_device": "cpu"},
    "engine.overlap_comm": {"engine.zero_stage": 2},
    "optimizer.fused_backward": {"optimizer.max_grad_norm": 0},
    "data.enable_bucket": BUCKETS,
    "data.bucket_no_upscale": BUCKETS,
    "model.rescale_betas_zero_snr": {"model.prediction_type": "v_prediction"},
    "train.huber_schedule": {"train.loss_type": "huber"},
    "train.scale_v_pred_loss_like_noise_pred": {"model.prediction_type": "v_prediction"},
    "train.noise_offset_random_strength": {"train.noise_offset": 0.1, "train.multires_noise_iterations": 4},
    "train.ip_noise_gamma_random_strength": {"train.ip_noise_gamma": 0.1},
    "method.with_prior_preservation": {"method.num_class_images": 2},
    "method.use_dora": {"method.lora_rank": 4},
    "method.lora_target_modules": {"method.lora_rank": 4, "method.lora_dropout": 0.1},
    "method.aesthetic_text_negative": {"method.aesthetic_text": "a dog"},
    "method.discriminator_replaces": {"method.discriminator": "FOLDER/judge", "method.rec_loss_w": 0.0},
    "method.use_dropout": {"method.dropout_structure": [0.0, 0.3, 0.3, 0.0]},
    ("validation.metrics", "clip_i"): {"validation.metrics": ["loss", "clip_i", "clip_t"]},
    ("validation.metrics", "clip_t"): {"validation.metrics": ["loss", "clip_i", "clip_t"]},
}
#: Values of keys that are neither boolean nor enumerated, but change the operations on a GPU.
FURTHER: list[Values] = [
    # 8-bit and paged optimizers need bitsandbytes, an extra
    *(
        {"optimizer.name": name}
        for name, kind in OPTIMIZERS.items()
        if kind.package is None and name != "adamw"
    ),
    {"train.snr_gamma": 5.0},
    {"train.noise_offset": 0.1},
    {
        "train.loss_type": "smooth_l1",
        "train.v_pred_like_loss": 0.5,
        "model.prediction_type": "epsilon",
        "train.timestep_sampling": "cosmap",
    },
    {"method.lora_rank": 4, "method.scale_weight_norms": 0.01, "method.rank_dropout": 0.3},
    {"method.lora_rank": 4, "method.module_dropout": 0.2, "method.loraplus_lr_ratio": 4.0},
    {"train.gradient_accumulation_steps": 2},
    {"optimizer.max_grad_norm": 0},
    {"model.clip_skip": 2},
    {"data.cache_dir": "FOLDER/latents"},
    {"data.caption_dropout": 0.5},
]
KINDS_OF_LORA: list[Values] = [
    {"method.lora_rank": 4, "method.lora_type": kind, "method.module_dropout": 0.2}
    for kind in ("lokr", "loha")
]
#: Keys that need the images of `make_shapes` instead of the default images.
SHAPES = ("data.alpha_mask", "data.enable_bucket", "data.bucket_no_upscale")


class Row(NamedTuple):
    """One run: its method, family and precision, and the options added to it."""

    method: str
    family: str
    precision: str
    options: Values = {}  # noqa: RUF012 - never modified

    @property
    def name(self) -> str:
        """Name of the row; it does not depend on the options."""
        return f"{self.method}-{self.family}-{self.precision}"


def precisions() -> dict[str, Values]:
    """Return the recipe keys of every precision by its name."""
    train: Any = Recipe.model_fields["train"].annotation
    known = get_args(train.model_fields["mixed_precision"].annotation)
    full = {"train.mixed_precision": "bf16", "train.full_bf16": True}
    return {**{name: {"train.mixed_precision": name} for name in known}, "full_bf16": full}


def refused(row: Row) -> bool:
    """Return whether the project refuses a combination by design."""
    return row.method == "aesthetic_gradients" and (row.family != "sd1" or row.precision == "full_bf16")


def all_rows() -> list[Row]:
    """Return every valid combination of method, family and precision."""
    rows = []
    for name in METHODS.names():
        families = (
            FAMILIES if method_class(name).needs else FAMILIES[:1]
        )  # a method that loads no Stable Diffusion has no family
        rows += [Row(name, *rest) for rest in itertools.product(families, precisions())]
    return [row for row in rows if not refused(row)]


def chosen_rows() -> list[Row]:
    """Return a small set of rows that covers every valid pair of method, family and precision."""
    rows = all_rows()

    def pairs(row: Row) -> set[Any]:
        return set(itertools.combinations(zip(Row._fields[:3], row[:3], strict=True), 2))

    open_pairs, chosen = set().union(*map(pairs, rows)), []
    while open_pairs:
        best = max(rows, key=lambda row: len(pairs(row) & open_pairs))
        open_pairs -= pairs(best)
        chosen.append(best)
    return chosen


def with_options(rows: list[Row], folder: Path) -> list[Row]:
    """Add every option to one row that accepts it. Raises AssertionError for an option that no row accepts."""
    rows = [row._replace(options=_every_format(row, rows[:number])) for number, row in enumerate(rows)]
    turn = 0
    for option in [*map(_engine_values, [*CHOICES[1:], *ALTERING]), *FURTHER, *options(), *KINDS_OF_LORA]:
        order = [(turn + step) % len(rows) for step in range(len(rows))]
        place = next((number for number in order if _goes_with(option, rows[number], folder)), None)
        assert place is not None, f"no row can have {option}: name it in LEFT_OUT, or what it needs in NEEDS"
        rows[place] = rows[place]._replace(options={**rows[place].options, **option})
        turn = place + 1
    return rows


def options() -> Iterator[Values]:
    """Yield every value of the boolean and enumerated keys, with the keys that it needs."""
    sections: dict[str, list[type[Section]]] = {
        name: [field.annotation]
        for name, field in Recipe.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }
    sections["method"] = [method for _, method in METHODS.items()]
    seen = []
    for section, configs in sections.items():
        for name, field in [field for config in configs for field in config.model_fields.items()]:
            key = f"{section}.{name}"
            default = (field.default or [None])[0] if isinstance(field.default, list) else field.default
            for value in _values(field.annotation):
                is_left_out = {section, key, (key, value)} & LEFT_OUT.keys()
                if value == default or is_left_out or name == "name" or (key, value) in seen:
                    continue
                seen.append((key, value))
                wanted = [value] if isinstance(field.default, list) else value
                yield {key: wanted, **NEEDS.get(key, {}), **NEEDS.get((key, value), {})}


def tree_of(row: Row, folder: Path, **changes: Any) -> dict[str, Any]:
    """Return the recipe of a row on the tiny models and images under ``folder``."""
    method = method_class(row.method)
    images = "shapes" if row.options.keys() & set(SHAPES) else IMAGES.get(row.method, "pictures")
    tree: dict[str, Any] = {
        "optimizer__learning_rate": RATES[row.method],
        "data__instance_data_dir": str(folder / images),
        "train__max_train_steps": STEPS,
        "train__log_steps": 100,
        "output_dir": str(folder / "runs" / row.name),
        **{key.replace(".", "__"): value for key, value in precisions()[row.precision].items()},
    }
    if method.needs:
        tree |= {
            "validation__prompts": ["a cat"],
            "validation__num_images": 1,
            "validation__num_inference_steps": 2,
            "validation__holdout": str(folder / "held"),
            "validation__holdout_timesteps": 2,
        }
    placed = {
        key: value.replace("FOLDER", str(folder)) if isinstance(value, str) else value
        for key, value in row.options.items()
    }
    own = {key.removeprefix("method."): value for key, value in placed.items() if key.startswith("method.")}
    others = {key.replace(".", "__"): v for key, v in placed.items() if not key.startswith("method.")}
    return tiny.make_recipe(folder, **tree, **others, **changes, method=SECTIONS[row.method] | own)


def _every_format(row: Row, before: Iterable[Row]) -> Values:
    """Return the option that lets the first row of a method export in every format.

    Methods that train a whole model or a LoRA are left out: an option of the row decides on their formats.
    """
    section = METHODS.get(row.method).model_validate(SECTIONS[row.method])
    formats_of = method_class(row.method).all_formats.fget  # needs the section alone
    formats = () if hasattr(section, "lora_rank") else formats_of(types.SimpleNamespace(config=section))
    is_first = row.method not in {other.method for other in before}
    return {"train.export_formats": list(formats)} if formats and is_first else {}


def _engine_values(choice: Any) -> Values:
    # The row determines the precision: a choice with 16-bit weights is added to a row that has them.
    return {key: value for key, value in choice.settings.items() if not key.startswith("train.")}


def _goes_with(option: Values, row: Row, folder: Path) -> bool:
    """Return whether a row accepts an option: no duplicate key, and a valid recipe."""
    taken = row.options
    if any(key in taken and taken[key] != value for key, value in option.items()):
        return False
    own = [key.removeprefix("method.") for key in option if key.startswith("method.")]
    if not set(own) <= METHODS.get(row.method).model_fields.keys():
        return False
    both = {**taken, **option}
    if both.get("data.enable_bucket") and both.get("method.with_prior_preservation"):
        return False
    if row.method == "aesthetic_gradients" and any(
        key.startswith(("engine.", "optimizer.")) for key in option
    ):
        return False
    try:
        build_recipe(tree_of(row._replace(options=both), folder))
    except UserError:
        return False
    return True


def _values(annotation: Any) -> list[Any]:
    """Return the values of a boolean or enumerated type, or of a list of them; an empty list for other types."""
    if annotation is bool:
        return [True, False]
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType, list) or hasattr(annotation, "__metadata__"):
        found = [value for part in get_args(annotation) for value in _values(part)]
        return list(dict.fromkeys(found))
    return []
