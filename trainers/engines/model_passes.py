"""The kinds of passes that a training asks for: a micro-batch with gradients, and a measurement without."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from dreamfleet.trainers.engines.base import Engine
from dreamfleet.trainers.methods.base import Batch, Loss
from dreamfleet.trainers.methods.diffusion_method import DiffusionMethod


class Micro(NamedTuple):
    """One prepared micro-batch, for which the loop needs a forward and backward pass of ``engine``.

    ``last``: it is this worker's last one of its step. ``seed``: the seed of the random numbers that the pass draws
    from torch's generator, as dropout does. ``keeps``: gradients of earlier micro-batches of the step are stored in the
    parameters.
    """

    engine: Engine
    batch: Batch
    last: bool
    seed: int
    keeps: bool = False

    def compute(self) -> Loss:
        """Run the pass alone: add its gradients to the parameters, and return the loss."""
        torch.manual_seed(self.seed)
        return self.engine.backward(self.batch, last=self.last)


class Measurement(NamedTuple):
    """One prepared batch, for which a validation round needs the loss of each sample, without gradients.

    Until the losses are sent, the engine's method is a :class:`DiffusionMethod` in eval mode that holds the weights to
    measure, such as the EMA.
    """

    engine: Engine
    batch: Batch

    @torch.no_grad()
    def compute(self) -> Tensor:
        """Run the pass alone, and return the losses ``[N]``."""
        with self.engine.autocast():
            return cast(DiffusionMethod, self.engine.method).sample_losses(self.batch)
