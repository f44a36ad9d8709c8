"""One training in a pack: what it adds to the shared model, and its own random numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dreamfleet.trainers.engines.torch_engine import TorchEngine
from dreamfleet.trainers.methods.diffusion_method import DiffusionMethod
from dreamfleet.trainers.models.adapters import adapted
from dreamfleet.trainers.models.embeddings import SplicedEmbedding, spliced_tables
from dreamfleet.trainers.models.lora import TRAINED
from dreamfleet.trainers.models.stable_diffusion.hypernetwork import Applied, applied_hypernetworks


class Member:
    """One training of a pack: its engine, method, learned words, adapters and hypernetworks.

    ``adapters``: the layers with LoRA matrices by (part, name). ``tables``: the token tables with learned words, one
    per text encoder; [] without learned words.
    """

    def __init__(self, engine: TorchEngine):
        assert isinstance(engine.method, DiffusionMethod)
        self.engine, self.method = engine, engine.method
        model = self.method.model
        self.tables: list[SplicedEmbedding] = spliced_tables(model)
        self.adapters: dict[tuple[str, str], Any] = {
            (part, name): layer for part, module in model.modules().items() for name, layer in adapted(module)
        }
        #: whether LoRA layers draw dropout
        self.has_dropout = any(
            not isinstance(layer.lora_dropout[TRAINED], nn.Identity) for layer in self.adapters.values()
        )
        self.networks: list[Applied] = applied_hypernetworks(model.denoiser)
        self._device = engine.device
        self.states = list[Tensor]()  # of the random number generators
        self.seed(0)

    def seed(self, seed: int) -> None:
        """Start this member's sequence of random numbers, as ``torch.manual_seed`` does for a training alone."""
        devices = [torch.device("cpu"), *([self._device] if self._device.type == "cuda" else [])]
        self.states = [torch.Generator(device).manual_seed(seed).get_state() for device in devices]

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Let torch's default generators continue this member's sequence within this context."""
        kept = self._swap(self.states)
        try:
            yield
        finally:
            self.states = self._swap(kept)

    def _swap(self, states: Sequence[Tensor]) -> list[Tensor]:
        """Set the states of the default generators, and return those before."""
        before = [torch.get_rng_state()]
        torch.set_rng_state(states[0])
        if len(states) > 1:
            before.append(torch.cuda.get_rng_state(self._device))
            torch.cuda.set_rng_state(states[1], self._device)
        return before


class Rows:
    """The members of one pass through a part of the model, and the number of consecutive batch rows of each.

    ``numbers`` are the members' positions in the whole pass, of which some may have no rows here.

    ``cache`` holds what the pass computes once for all layers; None if the layers are computed again in the backward
    pass (activation checkpointing), where a cached tensor would have no graph.
    """

    def __init__(
        self,
        members: Sequence[Member],
        counts: Sequence[int],
        *,
        numbers: Sequence[int] = (),
        caches: bool = True,
    ):
        self.members, self.counts = list(members), list(counts)
        self.numbers = tuple(numbers) or tuple(range(len(self.members)))
        self.is_even = len(set(self.counts)) == 1  # every member has as many rows
        self.cache: dict[Any, Any] | None = {} if caches else None

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Split a tensor ``[N, ...]`` into the rows of each member.

        N may be a multiple of the number of batch rows, if each row was divided (a prompt into chunks of tokens).
        """
        times = len(tensor) // sum(self.counts)
        return list(tensor.split([count * times for count in self.counts]))


class Current:
    """The :class:`Rows` of the pass in progress, which all packed layers of one part of the model read."""

    def __init__(self) -> None:
        self.rows = Rows([], [])
