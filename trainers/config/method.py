"""The base class of the methods' recipe sections, and the registry of methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from dreamfleet.datasets.config_base import Section
from dreamfleet.datasets.registry import Registry


class MethodConfig(Section):
    """Base of the ``method:`` sections: a method's options, and what has to be known about it without importing torch.

    A method of another package is a subclass of this with its ``implementation``, registered in :data:`METHODS` or
    named by an entry point ``NAME = package.module:SectionClass`` of the group ``dreamfleet.methods``.
    """

    #: ``"module:class"`` of the method, a subclass of ``trainers.methods.base.Method``
    implementation: ClassVar[str]
    #: the method's name for people; by default its name in recipes with a capital
    display_name: ClassVar[str] = ""
    #: what it trains and what it exports, in a sentence or two for `dreamfleet methods` and the recipe reference
    summary: ClassVar[str] = ""
    #: keys of the recipe that must keep their defaults -> the reason, a clause such as "which trains no U-Net"
    refused: ClassVar[Mapping[str, str]] = {}
    #: its own keys that a search may not change -> the reason
    not_searched: ClassVar[Mapping[str, str]] = {}
    #: why `dreamfleet plan` cannot compute its memory; None if it can
    no_plan: ClassVar[str | None] = None
    #: the method that uses what this one exports; None for methods of their own purpose
    helper_of: ClassVar[str | None] = None
    #: kinds of artifacts that it exports, of ``trainers.artifacts``; the preferred one to generate images with first
    artifacts: ClassVar[tuple[str, ...]] = ()
    #: figures in ``metrics.jsonl`` that it measures on images which it holds out itself
    figures: ClassVar[tuple[str, ...]] = ()

    name: str


_SECTIONS = "dreamfleet.trainers.config.methods"


def find_problem(name: str, section: type[MethodConfig]) -> str | None:
    """Return what a method's section lacks, None if it is complete."""
    if not (isinstance(section, type) and issubclass(section, MethodConfig)):
        return "its section must be a subclass of MethodConfig"
    for part in ("implementation", "summary", "artifacts"):
        if not getattr(section, part, None):
            return f"{section.__name__} does not set {part}"
    default = section.model_fields["name"].default
    if default != name:
        return f'{section.__name__}.name must be Literal["{name}"] = "{name}"'
    return None


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
    find_problem=find_problem,
)


def method_title(name: str) -> str:
    """Return a method's name for people, also for a method that is not installed here."""
    title = METHODS.get(name).display_name if name in METHODS else ""
    return title or name.replace("_", " ").capitalize()
