"""Computes the pending passes of several trainings in one pass of a shared frozen model.

Samples of different trainings do not mix: the normalisations of U-Nets and text encoders work within a sample. The sum
of the members' losses has for each member's parameters the gradient of its own loss. So every training has its own
gradient, clipping, optimizer and step count, and a NaN in one does not reach the others.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dreamfleet.datasets.errors import ResourceError
from dreamfleet.trainers.distributed.device import explain_out_of_memory
from dreamfleet.trainers.engines.base import Engine
from dreamfleet.trainers.engines.model_passes import Measurement, Micro
from dreamfleet.trainers.engines.passes import Pass
from dreamfleet.trainers.engines.performance import apply_options
from dreamfleet.trainers.engines.torch_engine import TorchEngine
from dreamfleet.trainers.methods.base import Loss
from dreamfleet.trainers.models.family import DiffusionModel
from dreamfleet.trainers.packing.kinds import Backward, Kind, Measure
from dreamfleet.trainers.packing.member import Member
from dreamfleet.trainers.packing.model import PackedModel

log = logging.getLogger(__name__)


class Pack:
    """The passes of trainings whose methods are built on copies of one model.

    ``model`` is such a copy, for the pack's own use. The trainings have the same precision and the same model options.
    ``recomputes``: with activation checkpointing. ``limit`` is the number of trainings in one pass with gradients: it
    is halved when the device runs out of memory.
    """

    def __init__(self, model: DiffusionModel, *, recomputes: bool = False, limit: int | None = None):
        self.model = PackedModel(model, recomputes=recomputes)
        self._backward, self._measure = Backward(self.model, limit), Measure(self.model)
        self._members: WeakKeyDictionary[Engine, Member] = WeakKeyDictionary()

    @property
    def limit(self) -> int | None:
        """The number of trainings in one pass with gradients; None for no limit."""
        return self._backward.limit

    def compute(self, passes: Sequence[Pass]) -> list[Any]:
        """Compute the pending pass of each training; return the results, or an error in the place of one."""
        micros = [number for number, one in enumerate(passes) if isinstance(one, Micro)]
        others = [number for number, one in enumerate(passes) if isinstance(one, Measurement)]
        results = dict[int, Any]()
        results |= zip(micros, self.backward([cast(Micro, passes[n]) for n in micros]), strict=True)
        results |= zip(others, self.measure([cast(Measurement, passes[n]) for n in others]), strict=True)
        return [results[number] for number in range(len(passes))]

    def backward(self, micros: Sequence[Micro]) -> list[Loss | ResourceError]:
        """Add the gradients of each micro-batch to its training's parameters; return the losses.

        A ResourceError takes the place of a loss if the pass of that training alone exceeds the device's memory.
        """
        for micro in micros:
            self._member(micro.engine).seed(micro.seed)
        return self._compute(self._backward, micros)

    def measure(self, measurements: Sequence[Measurement]) -> list[Tensor | Exception]:
        """Return the losses ``[N]`` of each measurement, or the error that prevented it."""
        return self._compute(self._measure, measurements)

    def _member(self, engine: Engine) -> Member:
        if engine not in self._members:
            if not self._members:
                # The shared parameters are there already; buffers belong to each copy.
                half = engine.dtype if engine.device.type == "cuda" else None
                self.model.model.to(engine.device, half)
                apply_options(self.model.model, engine.config, engine.device)
            self._members[engine] = Member(cast(TorchEngine, engine))
            self.model.admit(self._members[engine])
        return self._members[engine]

    def _compute(self, kind: Kind, passes: Sequence[Micro] | Sequence[Measurement]) -> list[Any]:
        members = [self._member(one.engine) for one in passes]
        results = dict[int, Any]()
        for numbers in _groups(kind, passes):
            found = self._within_memory(kind, [members[n] for n in numbers], [passes[n] for n in numbers])
            results |= dict(zip(numbers, found, strict=True))
        return [results[number] for number in range(len(passes))]

    def _within_memory(self, kind: Kind, members: Sequence[Member], passes: Sequence[Any]) -> list[Any]:
        undo = kind.keep(members, passes)
        try:
            with explain_out_of_memory():
                return kind.run(members, passes)
        except ResourceError as error:
            if len(passes) == 1:
                return [error]
        except Exception as error:
            found = kind.find_own(error, members, passes)
            if found is None:
                raise
            return found
        half = (len(passes) + 1) // 2
        kind.limit = min(kind.limit or half, half)
        log.warning(
            "out of memory with %d %s in one pass: continuing with %d at a time", len(passes), kind.noun, half
        )
        undo()
        gc.collect()
        if members[0].engine.device.type == "cuda":
            torch.cuda.empty_cache()
        first, second = (
            self._within_memory(kind, members[part], passes[part])
            for part in (slice(half), slice(half, None))
        )
        return first + second


def _groups(kind: Kind, passes: Sequence[Micro] | Sequence[Measurement]) -> Iterator[list[int]]:
    """Yield the numbers of the passes to compute together: equal height and width, as many as the kind takes."""

    def shape(number: int) -> tuple[int, ...]:
        return tuple(passes[number].batch["noise"].shape[2:])

    for _, same in groupby(sorted(range(len(passes)), key=shape), key=shape):
        numbers = sorted(same)
        for chosen in kind.split([passes[number] for number in numbers]):
            yield [numbers[k] for k in chosen]
