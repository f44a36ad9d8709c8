"""Learning rates of a model's layers: which layers are frozen, and the parameter groups of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from dreamfleet.datasets.errors import RecipeError
from dreamfleet.trainers.config.layer_rates import LayerRates, expand_factors
from dreamfleet.trainers.models.family import DiffusionModel
from dreamfleet.trainers.optim.param_group import ParamGroup


class Rate(NamedTuple):
    """The learning rate of a layer: ``factor`` times that of its part of the model, or ``factor`` times ``rate``."""

    factor: float = 1.0
    rate: float | None = None

    @property
    def is_frozen(self) -> bool:
        """Whether the layer is not trained."""
        return self.factor == 0 or self.rate == 0


class RateByLayer:
    """Returns the :class:`Rate` of a layer or parameter by its name, which starts with its part: ``unet.conv_in``.

    Raises RecipeError for a list with another number of values than the model has blocks, ModelError for a model
    without numbered blocks.
    """

    def __init__(self, rates: LayerRates, model: DiffusionModel):
        self.rates, self.model = rates, model
        weights = {"down": rates.down_lr_weight, "mid": rates.mid_lr_weight, "up": rates.up_lr_weight}
        self._factors: dict[tuple[str, int], float] = {}
        self._rates: dict[tuple[str, int], float] = {}
        if rates.block_lr is None and not any(weight is not None for weight in weights.values()):
            return
        counts = model.count_blocks()
        for section, weight in weights.items():
            factors = expand_factors(weight, counts[section])
            if factors is None:
                given = len(weight) if isinstance(weight, list) else 1
                raise RecipeError(
                    f"method.{section}_lr_weight: {given} values, but {model.folder} has {counts[section]} "
                    "such blocks; give as many, or one number"
                )
            self._factors |= {(section, number): factor for number, factor in enumerate(factors)}
        if rates.block_lr is not None:
            blocks = [(section, number) for section, count in counts.items() for number in range(count)]
            if len(rates.block_lr) != len(blocks):
                raise RecipeError(
                    f"method.block_lr: {len(rates.block_lr)} values, but {model.folder} has {len(blocks)} blocks: "
                    + ", ".join(f"{count} {section}" for section, count in counts.items())
                )
            self._rates = dict(zip(blocks, rates.block_lr, strict=True))

    def __call__(self, name: str) -> Rate:
        """Return the learning rate of a layer, or of one of its parameters."""
        if any(matches(name, pattern) for pattern in self.rates.freeze_layers):
            return Rate(0.0)
        factor, rate = 1.0, None
        part, _, layer = name.partition(".")
        if part == self.model.denoiser_name and (self._factors or self._rates):
            block = self.model.block_of(layer)
            factor, rate = self._factors.get(block, 1.0), self._rates.get(block)
        named = [value for pattern, value in self.rates.lr_factors.items() if matches(name, pattern)]
        return Rate(factor * named[-1] if named else factor, rate)

    def check(self, names: Iterable[str]) -> None:
        """Raise RecipeError for a pattern that matches none of the layers, and if all layers are frozen."""
        names = list(names)
        for key, patterns in (
            ("freeze_layers", self.rates.freeze_layers),
            ("lr_factors", self.rates.lr_factors),
        ):
            for pattern in patterns:
                if not any(matches(name, pattern) for name in names):
                    raise RecipeError(
                        f"method.{key}: no trained layer matches {pattern!r}; layers are called {_examples(names)}"
                    )
        if names and all(self(name).is_frozen for name in names):
            raise RecipeError(
                "method: freeze_layers and the factors of learning rates leave no layer to train; free some"
            )

    def groups(self, learning: nn.ModuleDict) -> list[ParamGroup]:
        """Return the trainable parameters of each part: one group for each learning rate, the part's own first."""
        found = []
        for part, module in learning.items():
            by_rate: dict[Rate, dict[str, nn.Parameter]] = {Rate(): {}}
            for name, param in module.named_parameters():
                if param.requires_grad:
                    full = f"{part}.{name}"
                    by_rate.setdefault(self._of_param(part, full), {})[full] = param
            found += [
                ParamGroup(_group_name(part, rate), params, rate.factor, part, rate.rate)
                for rate, params in by_rate.items()
                if params or rate == Rate()
            ]
        return found

    def _of_param(self, part: str, name: str) -> Rate:
        rate = self(name)
        if not name.endswith("lora_B.weight"):
            return rate
        in_unet = part == self.model.denoiser_name
        rates = self.rates
        own = rates.loraplus_unet_lr_ratio if in_unet else rates.loraplus_text_encoder_lr_ratio
        ratio = own or rates.loraplus_lr_ratio or 1.0
        return rate._replace(factor=rate.factor * ratio)


def matches(name: str, pattern: str) -> bool:
    """Return whether a glob pattern matches a layer, or a layer around it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def freeze(learning: nn.ModuleDict, rate_of: Callable[[str], Rate]) -> None:
    """Disable the gradients of the frozen parameters of each part."""
    for part, module in learning.items():
        for name, param in module.named_parameters():
            if rate_of(f"{part}.{name}").is_frozen:
                param.requires_grad_(False)


def _group_name(part: str, rate: Rate) -> str:
    own = "" if rate.rate is None else f"-lr{rate.rate:g}"
    return part + own + ("" if rate.factor == 1 else f"-x{rate.factor:g}")


def _examples(names: list[str]) -> str:
    return ", ".join(names[:: max(1, len(names) // 3)][:3])
