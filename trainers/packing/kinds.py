"""The kinds of passes that several trainings share: micro-batches with gradients, and measurements without."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any, ClassVar

import torch
from torch import Tensor

from dreamfleet.trainers.engines.model_passes import Measurement, Micro
from dreamfleet.trainers.methods.base import Batch, Loss
from dreamfleet.trainers.methods.diffusion_method import DenoiserInputs
from dreamfleet.trainers.models.condition import Condition
from dreamfleet.trainers.packing.member import Member
from dreamfleet.trainers.packing.model import PackedModel

log = logging.getLogger(__name__)

#: Rows of one pass without gradients: more are not faster, and take memory that the trainings may not have left.
MOST_MEASURED = 32


class Kind(ABC):
    """Computes the passes of one kind for several members of a pack.

    ``limit``: the number of members in one pass, halved when the device runs out of memory; None for no limit.
    """

    noun: ClassVar[str]

    def __init__(self, model: PackedModel, limit: int | None = None):
        self.model, self.limit = model, limit

    def split(self, passes: Sequence[Any]) -> Iterator[list[int]]:
        """Yield the numbers of the passes to compute together, at most ``limit``; all have one height and width."""
        size = self.limit or len(passes)
        yield from (list(range(len(passes)))[start : start + size] for start in range(0, len(passes), size))

    @abstractmethod
    def keep(self, members: Sequence[Member], passes: Sequence[Any]) -> Callable[[], None]:
        """Return a function that undoes what an unfinished :meth:`run` has changed."""

    @abstractmethod
    def run(self, members: Sequence[Member], passes: Sequence[Any]) -> list[Any]:
        """Compute the passes in one pass of the model; return their results."""

    def find_own(
        self, error: Exception, members: Sequence[Member], passes: Sequence[Any]
    ) -> list[Any] | None:
        """Return results after an error that is not for want of memory, an error where it belongs.

        None if it ends the whole pack.
        """
        return None

    def predict(
        self, members: Sequence[Member], batches: Sequence[Batch]
    ) -> list[tuple[DenoiserInputs, Tensor]]:
        """Return the denoiser's inputs and output ``[R, C, H, W]`` of each member; prompts are encoded in one pass."""
        ids = [member.method.text_ids(batch) for member, batch in zip(members, batches, strict=True)]
        texts = [(member, own) for member, own in zip(members, ids, strict=True) if own is not None]
        encoded = iter(
            self.encode([member for member, _ in texts], [own for _, own in texts]) if texts else ()
        )
        inputs = [
            member.method.denoiser_inputs(batch, None if own is None else next(encoded))
            for member, batch, own in zip(members, batches, ids, strict=True)
        ]
        noisy, timesteps, conditions = (list(column) for column in zip(*inputs, strict=True))
        return list(zip(inputs, self.model.predict(members, noisy, timesteps, conditions), strict=True))

    def encode(self, members: Sequence[Member], ids: Sequence[Tensor]) -> list[Condition]:
        """Return the encoded token ids ``[R, ..., T]`` of each member."""
        return self.model.encode(members, ids)


class Backward(Kind):
    """Forward and backward passes: the gradients are added to each member's parameters."""

    noun = "trainings"

    def keep(self, members: Sequence[Member], passes: Sequence[Micro]) -> Callable[[], None]:
        """Keep the gradients that earlier micro-batches of unfinished steps have left, and the random numbers."""
        kept = [
            (param, param.grad.clone())
            for micro in passes
            if micro.keeps
            for param in micro.engine.params.values()
            if param.grad is not None
        ]
        states = [member.states for member in members]

        def undo() -> None:
            for micro in passes:
                micro.engine.drop_gradients()
            for param, gradient in kept:
                param.grad = gradient
            for member, state in zip(members, states, strict=True):
                member.states = state

        return undo

    def run(self, members: Sequence[Member], passes: Sequence[Micro]) -> list[Loss]:
        batches = [micro.batch for micro in passes]
        with self.model.serving(members):
            with passes[0].engine.autocast():
                losses = [
                    member.method.loss(batch, *found)
                    for member, batch, found in zip(
                        members, batches, self.predict(members, batches), strict=True
                    )
                ]
            shares = [
                member.engine.objective(loss).float() for member, loss in zip(members, losses, strict=True)
            ]
            torch.stack(shares).sum().backward()
        return [Loss(loss.total.detach(), loss.per_sample.detach(), loss.extras) for loss in losses]


class Measure(Kind):
    """Forward passes of validation rounds: the loss of each sample ``[N]``, with the weights that a member shows."""

    noun = "measurements"

    def split(self, passes: Sequence[Any]) -> Iterator[list[int]]:
        together, rows = list[int](), 0
        for number, one in enumerate(passes):
            num = len(one.batch["noise"])
            if together and (rows + num > MOST_MEASURED or len(together) == self.limit):
                yield together
                together, rows = [], 0
            together.append(number)
            rows += num
        yield together

    def keep(self, members: Sequence[Member], passes: Sequence[Measurement]) -> Callable[[], None]:
        """Return a function that does nothing: a measurement changes nothing."""
        return lambda: None

    @torch.no_grad()
    def run(self, members: Sequence[Member], passes: Sequence[Measurement]) -> list[Tensor]:
        batches = [one.batch for one in passes]
        with self.model.measuring(members), passes[0].engine.autocast():
            found = self.predict(members, batches)
            return [
                member.method.errors(batch, predicted)
                for member, batch, (_, predicted) in zip(members, batches, found, strict=True)
            ]

    def encode(self, members: Sequence[Member], ids: Sequence[Tensor]) -> list[Condition]:
        """Return the encoded token ids of each member; the prompt of an image is encoded once for all timesteps."""
        once = [own.unique(dim=0, return_inverse=True) for own in ids]
        encoded = self.model.encode(members, [different for different, _ in once])
        return [own.map(itemgetter(rows)) for own, (_, rows) in zip(encoded, once, strict=True)]

    def find_own(
        self, error: Exception, members: Sequence[Member], passes: Sequence[Measurement]
    ) -> list[Any] | None:
        """Measure each member by itself. An error of the device would repeat itself, and ends the whole pack."""
        if isinstance(error, torch.AcceleratorError):
            return None
        if len(passes) == 1:
            return [error]
        log.warning("a pass of %d measurements failed; each is made alone", len(passes), exc_info=error)
        results = list[Any]()
        for member, one in zip(members, passes, strict=True):
            try:
                results += self.run([member], [one])
            except torch.AcceleratorError:
                raise
            except Exception as own:  # noqa: BLE001 - thrown into its training
                results.append(own)
        return results
