"""The base of the methods' recipe sections, and the registry of methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from dreamfleet.datasets.config_base import Section
from dreamfleet.datasets.registry import Registry


class MethodConfig(Section):
    """Base of the methods' own ``method:`` sections; loads without torch, unlike the method that it configures."""

    #: ``"module:class"`` of the method, a subclass of ``trainers.methods.base.Method``
    implementation: ClassVar[str]
    #: one sentence for `dreamfleet methods` and the recipe reference
    summary: ClassVar[str] = ""
    #: keys of the recipe that must stay at their defaults -> the reason
    refused: ClassVar[Mapping[str, str]] = {}
    #: why `plan` cannot compute the memory; None where it can
    no_plan: ClassVar[str | None] = None
    #: the method that uses what this one trains
    helper_of: ClassVar[str | None] = None
    #: kinds of artifacts that it exports, of ``trainers.artifacts``; the preferred one to generate images with first
    artifacts: ClassVar[tuple[str, ...]] = ()
    #: metrics measured on images that the method itself holds out
    figures: ClassVar[tuple[str, ...]] = ()

    name: str


_SECTIONS = "dreamfleet.trainers.config.methods"
METHODS: Registry[type[MethodConfig]] = Registry(
    "method",
    group="dreamfleet.methods",
    builtin={
        "aesthetic_gradients": f"{_SECTIONS}.aesthetic_gradients:AestheticGradientsConfig",
        "discriminator": f"{_SECTIONS}.discriminator:DiscriminatorConfig",
        "dreambooth": f"{_SECTIONS}.dreambooth:DreamBoothConfig",
        "hypernetwork": f"{_SECTIONS}.hypernetwork:HypernetworkConfig",
        "native": f"{_SECTIONS}.native:NativeConfig",
        "prompt_tuning": f"{_SECTIONS}.prompt_tuning:PromptTuningConfig",
        "textual_inversion": f"{_SECTIONS}.textual_inversion:TextualInversionConfig",
    },
)
