"""Hypernetwork: trains MLPs that transform the inputs of attention's keys and values; the model is frozen.

Source: AUTOMATIC1111's webui, `modules/hypernetworks/hypernetwork.py`, after NovelAI's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dreamfleet.datasets import captions
from dreamfleet.datasets.errors import RecipeError
from dreamfleet.datasets.index import template_files
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.methods.hypernetwork import HypernetworkConfig
from dreamfleet.trainers.methods.base import Sample, Setting
from dreamfleet.trainers.methods.diffusion_method import DiffusionMethod
from dreamfleet.trainers.methods.export_request import Export
from dreamfleet.trainers.models.family import DiffusionModel
from dreamfleet.trainers.models.formats.hypernetwork import read_hypernetwork, write_hypernetwork
from dreamfleet.trainers.models.formats.optimizer_file import AdamState, file_hash, moments_beside
from dreamfleet.trainers.models.stable_diffusion.hypernetwork import (
    Hypernetwork,
    context_widths,
    set_hypernetworks,
)
from dreamfleet.trainers.optim.param_group import ParamGroup


class HypernetworkMethod(DiffusionMethod):
    """Train MLPs before attention's key and value layers on a style; the model is frozen.

    Exports megabytes, used at any strength.
    """

    formats = ("pt",)

    def __init__(self, config: HypernetworkConfig, model: DiffusionModel, setting: Setting):
        super().__init__(config, model, setting)
        there = context_widths(model.denoiser)
        widths = config.enable_sizes or there
        if missing := sorted(set(widths) - set(there)):
            raise RecipeError(
                f"method.enable_sizes: {model.folder} has no contexts of {missing}, only of {there}"
            )
        self.network = Hypernetwork(widths, config.structure())
        set_hypernetworks(model.denoiser, [(self.network, config.multiplier)])
        self._templates = load_templates(config.template_file)

    def start(self) -> dict[str, AdamState]:
        """Load ``initial_hypernetwork`` and its steps; return Adam's moments if their file is beside it."""
        if self.config.initial_hypernetwork is None:
            return {}
        self.steps_before, moments = _go_on(self.network, self.config.initial_hypernetwork)
        return moments

    def groups(self) -> list[ParamGroup]:
        return [ParamGroup("hypernetwork", dict(self.network.named_parameters()))]

    def prompt(self, sample: Sample, rng: np.random.Generator, data: Any) -> str:
        """Return a random template, filled; without templates, the caption or the concept's prompt."""
        if not self._templates:
            return super().prompt(sample, rng, data)
        template = captions.choose_template(self._templates, rng)
        return captions.make_caption(
            sample.caption,
            template=template,
            prompt=self.setting.concepts[sample.concept].instance_prompt,
            file_name=sample.file_name,
            rng=rng,
            config=data,
        )

    def write(self, order: Export) -> list[Path]:
        """Write ``NAME.pt`` as the webui does: always in full precision."""
        file = self.network.to_file(
            order.name,
            step=self.steps_before + order.step,
            sd_checkpoint=self.model.short_hash(),
            sd_checkpoint_name=self.model.short_name,
            metadata=order.metadata,
        )
        return [write_hypernetwork(file, order.folder / f"{order.name}.{form}") for form in order.formats]


def _go_on(network: Hypernetwork, path: str) -> tuple[int, dict[str, AdamState]]:
    """Load a file's weights; return their trained steps, and the moments beside the file by parameter.

    Raises RecipeError if the structure in the file differs from the network's.
    """
    with Storage(path).local_copy() as local:
        found, digest = read_hypernetwork(local), file_hash(local)
    theirs, ours = found.structure, network.structure
    differences = [
        f"{name}: {getattr(theirs, name)}"
        for name in ("layer_structure", "activation_func", "add_layer_norm", "activate_output")
        if getattr(theirs, name) != getattr(ours, name)
    ]
    if (widths := sorted(found.weights)) != network.widths:
        differences.append(f"enable_sizes: {widths}")
    if differences:
        raise RecipeError(
            f"method.initial_hypernetwork: {path} has a different structure than this run's hypernetwork; set "
            + ", ".join(differences)
        )
    network.load_state_dict(Hypernetwork.from_file(found).state_dict())
    ours_named = dict(network.named_parameters())
    # The webui's optimizer lists the parameters in the order of the file.
    names = [name for width in found.weights for name in ours_named if name.startswith(f"layers.{width}.")]
    moments = moments_beside(path, fits=digest, shapes=[list(ours_named[name].shape) for name in names])
    return found.step, dict(zip(names, moments, strict=True)) if moments else {}


def load_templates(name: str | None) -> tuple[str, ...]:
    """Return the prompt templates of a set or a file; empty without a name.

    Raises RecipeError for a template with ``[name]``, because a hypernetwork has no placeholder token.
    """
    if name is None:
        return ()
    templates = template_files.load_templates(name)
    if asking := [template for template in templates if "[name]" in template]:
        raise RecipeError(
            f"method.template_file {name}: {asking[0]!r} contains [name], but a hypernetwork has no placeholder "
            "token; use [filewords], or the template set hypernetwork"
        )
    return templates
