"""The registry of optimizers: what recipes, plans and engines must know about each. Does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

from dreamfleet.datasets.config_base import Section
from dreamfleet.datasets.registry import Registry

Shape = Sequence[int]
Beta = Annotated[float, Field(ge=0, lt=1)]
Pair = tuple[Beta, Beta]


class OptimizerOptions(Section):
    """Base class of the keys of ``optimizer.options``.

    A key of :attr:`shared` that is not set gets the value of the recipe's own key.
    """

    #: A key of the options -> the key, or keys, of the recipe's ``optimizer:`` section that give its default.
    shared: ClassVar[Mapping[str, tuple[str, ...]]] = {"weight_decay": ("adam_weight_decay",)}

    weight_decay: float | None = Field(None, ge=0, description="default: `adam_weight_decay`")

    def with_rates(self, rates: Mapping[str, Any]) -> OptimizerOptions:
        """Return the options for a run whose parameter groups have these learning rates in the recipe."""
        return self


@dataclass(frozen=True)
class Optimizer:
    """One optimizer. Importing it does not import torch.

    ``build`` maps a list of parameter groups (dicts with ``params`` and ``name``) and the options to a
    :class:`torch.optim.Optimizer`, whose groups keep their ``name``. The engine sets the ``lr`` of each group before
    every step.

    ``state_bytes`` maps the shape of a float32 weight and the options to the bytes of its states; ``scratch`` is the
    number of bytes per stepped element that a step needs besides them. ``Options``: the keys of ``optimizer.options``.

    ``steps_alone``: whether a weight can be stepped before the others, as ``optimizer.fused_backward`` does; False if
    the optimizer keeps numbers for all weights of a group, such as a step count or an estimate of the step size.
    ``moments``: names of states with the shape of the weight that are updated element by element, together with a
    ``step``. ZeRO shards them; without any, the optimizer needs the engine torch. ``offloads``: whether DeepSpeed steps
    it in host memory.

    ``average`` maps the optimizer to the weights to evaluate and export, by parameter, where they are not those that
    are trained. ``effective_rate`` maps a parameter group to its learning rate after a step, where it is not ``lr``.
    These two and ``build`` are functions, or ``"module:attribute"`` to import them at their first use.

    ``aliases``: names in other programs; case, underscores and module prefixes are ignored. ``package`` and ``extra``:
    the package that it needs and the extra of dreamfleet that installs it. ``keeps_layout``: whether a step preserves
    the memory format of weights, as ``engine.channels_last`` requires.
    """

    summary: str
    build: Callable[..., Any] | str
    state_bytes: Callable[[Shape, Any], int]
    Options: type[OptimizerOptions] = OptimizerOptions
    scratch: int = 0
    steps_alone: bool = True
    moments: tuple[str, ...] = ()
    offloads: bool = False
    average: Callable[..., Any] | str | None = None
    effective_rate: Callable[..., float] | str | None = None
    aliases: tuple[str, ...] = ()
    package: str | None = None
    extra: str | None = None
    needs_gpu: bool = False
    keeps_layout: bool = True


_BUILTIN = "dreamfleet.trainers.config.builtin_optimizers:"
#: Optimizers by name; an installed package adds one through the entry-point group ``dreamfleet.optimizers``.
OPTIMIZERS: Registry[Optimizer] = Registry(
    "optimizer",
    group="dreamfleet.optimizers",
    builtin={
        name: f"{_BUILTIN}{name.upper()}"
        for name in (
            "adamw",
            "adamw8bit",
            "paged_adamw",
            "paged_adamw8bit",
            "lion",
            "lion8bit",
            "paged_lion",
            "paged_lion8bit",
            "adafactor",
            "came",
            "prodigy",
            "prodigy_schedulefree",
            "adamw_schedulefree",
        )
    },
    find_problem=lambda name, entry: (
        None if isinstance(entry, Optimizer) else f"{entry!r} is no Optimizer of trainers.config.optimizers"
    ),
)


def canonical_name(text: str) -> str:
    """Return the name of the optimizer that ``text`` means: ``AdamW8bit``, ``prodigyopt.Prodigy``, ``LION_8BIT``.

    A text that means no registered optimizer is returned unchanged.
    """
    if text in OPTIMIZERS:
        return text
    wanted = _plain(text)
    for name, entry in OPTIMIZERS.items():
        if wanted in map(_plain, (name, *entry.aliases)):
            return name
    return text


def _plain(text: str) -> str:
    return text.rpartition(".")[2].replace("_", "").replace("-", "").lower()


def sharded_names() -> list[str]:
    """Return the names of the optimizers whose states ZeRO can shard."""
    return [name for name, entry in OPTIMIZERS.items() if entry.moments]


def state_bytes(shapes: Iterable[Shape], name: str, options: OptimizerOptions | None = None) -> int:
    """Return the bytes of an optimizer's states for weights of these shapes; ``options``: None for the defaults."""
    kind = OPTIMIZERS.get(name)
    chosen = options if options is not None else kind.Options()
    return sum(kind.state_bytes(shape, chosen) for shape in shapes)
