"""The base class of the methods' recipe sections, and the registry of methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from dreamfleet.datasets.config_base import Section
from dreamfleet.datasets.registry import Registry
from dreamfleet.trainers.config.engine import EngineConfig

SearchSpace = Mapping[str, Mapping[str, Any]]


class MethodConfig(Section):
    """Base class of the ``method:`` sections: a method's options, and its properties that are needed without torch.

    To add a method in another package, define a subclass with its ``implementation``, and register it in
    :data:`METHODS` or by an entry point ``NAME = package.module:SectionClass`` in the group ``dreamfleet.methods``.
    """

    #: ``"module:class"`` of the method, a subclass of ``trainers.methods.base.Method``
    implementation: ClassVar[str]
    #: human-readable name; by default the name in recipes, capitalised
    display_name: ClassVar[str] = ""
    #: one or two sentences on what it trains and exports, for `dreamfleet methods` and the recipe reference
    summary: ClassVar[str] = ""
    #: keys of the recipe that must keep their defaults -> the reason, a clause such as "which trains no U-Net"
    refused: ClassVar[Mapping[str, str]] = {}
    #: its own keys that a search must not change -> the reason
    not_searched: ClassVar[Mapping[str, str]] = {}
    #: the spaces that a search without ``search.space`` uses, each with a title for the recipe reference: searched key
    #: -> the fields of its ``Domain``
    search_spaces: ClassVar[Mapping[str, SearchSpace]] = {}
    #: the reason why `dreamfleet plan` cannot estimate its memory; None if it can
    no_plan: ClassVar[str | None] = None
    #: the method that uses this method's exports; None if the exports are used directly
    helper_of: ClassVar[str | None] = None
    #: the artifact kinds that it exports (see ``trainers.artifacts``); the one preferred for sampling comes first
    artifacts: ClassVar[tuple[str, ...]] = ()
    #: keys in ``metrics.jsonl`` that it measures on its own held-out images
    figures: ClassVar[tuple[str, ...]] = ()

    #: whether its trainings can share a process and one copy of the frozen model (see ``trainers.packing``)
    packs: ClassVar[bool] = False

    name: str

    @property
    def search_space(self) -> SearchSpace:
        """The space of a search without ``search.space``; {} if the method has none."""
        return next(iter(self.search_spaces.values()), {})

    @property
    def unpackable(self) -> str | None:
        """The reason why a training with these options cannot share a process with others, a clause; None if it can."""
        return None if self.packs else "does not train parameters beside a shared, frozen model"

    def refused_by_engine(self, engine: EngineConfig) -> str | None:
        """Return the reason why these options cannot be trained by an engine, with the remedy; None if they can.

        It is also asked when ``engine.zero_stage: auto`` has chosen the engine of a run.
        """
        return None

    @property
    def has_dropout(self) -> bool:
        """Whether its trainable parameters use dropout."""
        return False


_SECTIONS = "dreamfleet.trainers.config.methods"


def find_problem(name: str, section: type[MethodConfig]) -> str | None:
    """Return a description of what a method's section lacks, None if it is complete."""
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
    """Return the human-readable name of a method, which need not be installed here."""
    title = METHODS.get(name).display_name if name in METHODS else ""
    return title or name.replace("_", " ").capitalize()
