"""Computes one micro-batch of several trainings in one forward and backward pass of a shared frozen model.

Samples of different trainings do not mix: the normalisations of U-Nets and text encoders work within a sample. The sum
of the members' losses has for each member's parameters the gradient of its own loss. So every training has its own
gradient, clipping, optimizer and step count, and a NaN in one does not reach the others.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dreamfleet.datasets.errors import ResourceError
from dreamfleet.trainers.distributed.device import explain_out_of_memory
from dreamfleet.trainers.engines.base import Engine
from dreamfleet.trainers.engines.performance import apply_options
from dreamfleet.trainers.engines.torch_engine import TorchEngine
from dreamfleet.trainers.loop import Micro
from dreamfleet.trainers.methods.base import Loss
from dreamfleet.trainers.methods.diffusion_method import DenoiserInputs
from dreamfleet.trainers.models.family import DiffusionModel
from dreamfleet.trainers.packing.member import Member
from dreamfleet.trainers.packing.model import PackedModel

log = logging.getLogger(__name__)


class Pack:
    """Forward and backward passes for trainings whose methods are built on copies of one model.

    ``model`` is such a copy, for the pack's own use. The trainings have the same precision and the same model options.
    ``recomputes``: with activation checkpointing. ``limit`` is the number of trainings in one pass: it is halved when
    the device runs out of memory.
    """

    def __init__(self, model: DiffusionModel, *, recomputes: bool = False, limit: int | None = None):
        self.model = PackedModel(model, recomputes=recomputes)
        self.limit = limit
        self._members: WeakKeyDictionary[Engine, Member] = WeakKeyDictionary()

    def backward(self, micros: Sequence[Micro]) -> list[Loss | ResourceError]:
        """Add the gradients of each micro-batch to its training's parameters; return the losses.

        A ResourceError takes the place of a loss if the pass of that training alone exceeds the device's memory.
        """
        members = [self._member(micro.engine) for micro in micros]
        for member, micro in zip(members, micros, strict=True):
            member.seed(micro.seed)
        losses: dict[int, Loss | ResourceError] = {}
        for numbers in self._groups(micros):
            chosen = [micros[n] for n in numbers]
            for number, loss in zip(
                numbers, self._within_memory([members[n] for n in numbers], chosen), strict=True
            ):
                losses[number] = loss
        return [losses[number] for number in range(len(micros))]

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

    def _groups(self, micros: Sequence[Micro]) -> Iterator[list[int]]:
        """Yield the numbers of the micro-batches of each pass: equal height and width, at most ``limit`` together."""

        def shape(number: int) -> tuple[int, ...]:
            return tuple(micros[number].batch["noise"].shape[2:])

        for _, same in groupby(sorted(range(len(micros)), key=shape), key=shape):
            numbers = sorted(same)
            size = self.limit or len(numbers)
            yield from (numbers[start : start + size] for start in range(0, len(numbers), size))

    def _within_memory(
        self, members: Sequence[Member], micros: Sequence[Micro]
    ) -> list[Loss | ResourceError]:
        kept = _kept_gradients(micros)
        states = [member.states for member in members]
        try:
            with explain_out_of_memory():
                return [*self._pass(members, micros)]
        except ResourceError as error:
            if len(micros) == 1:
                return [error]
        half = (len(micros) + 1) // 2
        self.limit = min(self.limit or half, half)
        log.warning(
            "out of memory with %d trainings in one pass: continuing with %d at a time", len(micros), half
        )
        for micro in micros:
            micro.engine.drop_gradients()
        for param, gradient in kept:
            param.grad = gradient
        for member, state in zip(members, states, strict=True):
            member.states = state
        gc.collect()
        if micros[0].engine.device.type == "cuda":
            torch.cuda.empty_cache()
        first, second = (
            self._within_memory(members[part], micros[part]) for part in (slice(half), slice(half, None))
        )
        return first + second

    def _pass(self, members: Sequence[Member], micros: Sequence[Micro]) -> list[Loss]:
        with self.model.serving(members):
            with micros[0].engine.autocast():
                inputs = self._inputs(members, micros)
                noisy, timesteps, conditions = (list(column) for column in zip(*inputs, strict=True))
                predicted = self.model.predict(members, noisy, timesteps, conditions)
                losses = [
                    member.method.loss(micro.batch, given, found)
                    for member, micro, given, found in zip(members, micros, inputs, predicted, strict=True)
                ]
            shares = [
                member.engine.objective(loss).float() for member, loss in zip(members, losses, strict=True)
            ]
            torch.stack(shares).sum().backward()
        return [Loss(loss.total.detach(), loss.per_sample.detach(), loss.extras) for loss in losses]

    def _inputs(self, members: Sequence[Member], micros: Sequence[Micro]) -> list[DenoiserInputs]:
        """Return the denoiser's inputs of each member; the prompts of all members are encoded in one pass."""
        ids = [member.method.text_ids(micro.batch) for member, micro in zip(members, micros, strict=True)]
        texts = [(member, own) for member, own in zip(members, ids, strict=True) if own is not None]
        encoded = iter(
            self.model.encode([member for member, _ in texts], [own for _, own in texts]) if texts else ()
        )
        return [
            member.method.denoiser_inputs(micro.batch, None if own is None else next(encoded))
            for member, micro, own in zip(members, micros, ids, strict=True)
        ]


def _kept_gradients(micros: Sequence[Micro]) -> list[tuple[nn.Parameter, Tensor]]:
    """Return copies of the gradients that earlier micro-batches of unfinished steps have left."""
    return [
        (param, param.grad.clone())
        for micro in micros
        if micro.keeps
        for param in micro.engine.params.values()
        if param.grad is not None
    ]
