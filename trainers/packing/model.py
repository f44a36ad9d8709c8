"""The model that the members of a pack share: frozen layers, and layers that add what each member trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from dreamfleet.trainers.models.condition import Condition
from dreamfleet.trainers.models.embeddings import replace_table
from dreamfleet.trainers.models.family import DiffusionModel
from dreamfleet.trainers.models.stable_diffusion.hypernetwork import set_hypernetworks
from dreamfleet.trainers.packing.adapter_bank import AdapterBank, Place, Stacked
from dreamfleet.trainers.packing.layers import PackedAdapter, PackedEmbedding, PackedHypernetworks
from dreamfleet.trainers.packing.member import Current, Member, Rows


class PackedModel:
    """Runs the text encoders and the denoiser of one model for the rows of several members.

    ``model`` is a copy (:meth:`DiffusionModel.share`) whose layers are replaced as members need it. ``recomputes``:
    layers are computed again in the backward pass (activation checkpointing).
    """

    def __init__(self, model: DiffusionModel, *, recomputes: bool = False):
        self.model, self.recomputes = model, recomputes
        self._text, self._denoiser = Current(), Current()
        self._adapted: set[tuple[str, str]] = set()
        self._has_words = self._has_networks = False
        self._bank, self._banked = AdapterBank([]), tuple[Member, ...]()

    def admit(self, member: Member) -> None:
        """Replace the layers that a member changes and no earlier member did."""
        if member.tables and not self._has_words:
            self._has_words = True
            for side in range(len(self.model.text_encoders)):
                replace_table(self.model, side, partial(PackedEmbedding, current=self._text, side=side))
        parts = self.model.modules()
        for place in member.adapters.keys() - self._adapted:
            self._adapted.add(place)
            part, name = place
            current = self._denoiser if part == self.model.denoiser_name else self._text
            parent, _, last = name.rpartition(".")
            holder = parts[part].get_submodule(parent)
            setattr(holder, last, PackedAdapter(getattr(holder, last), current, place, self._stacked))
        if member.networks and not self._has_networks:
            self._has_networks = True
            set_hypernetworks(self.model.denoiser, [(PackedHypernetworks(self._denoiser), 1.0)])

    @contextmanager
    def serving(self, members: Sequence[Member]) -> Iterator[None]:
        """Within this context, run the passes of these members, backward pass included; then add their gradients."""
        if self._banked != tuple(members):
            self._bank, self._banked = AdapterBank(members), tuple(members)
        self._bank.fill()
        yield
        self._bank.empty()

    @contextmanager
    def measuring(self, members: Sequence[Member]) -> Iterator[None]:
        """Within this context, run forward passes of these members without gradients.

        The matrices of the members that train together are kept for their next pass.
        """
        kept = self._bank, self._banked
        if self._banked != tuple(members):
            self._bank, self._banked = AdapterBank(members), tuple(members)
        self._bank.fill()
        try:
            yield
        finally:
            self._bank, self._banked = kept

    def _stacked(self, place: Place) -> Stacked | None:
        return self._bank.layer(place)

    def encode(self, members: Sequence[Member], ids: Sequence[Tensor]) -> list[Condition]:
        """Encode the token ids ``[R, ..., T]`` of each of some :meth:`serving` members."""
        counts, numbers = list(map(len, ids)), [self._banked.index(member) for member in members]
        self._text.rows = Rows(members, counts, numbers=numbers, caches=not self.recomputes)
        encoded = self.model.encode_tokens(torch.cat(list(ids)))
        each = [tensor.split(counts) if tensor is not None else [None] * len(counts) for tensor in encoded]
        return [Condition(*of_one) for of_one in zip(*each, strict=True)]

    def predict(
        self,
        members: Sequence[Member],
        noisy: Sequence[Tensor],
        timesteps: Sequence[Tensor],
        conditions: Sequence[Condition],
    ) -> list[Tensor]:
        """Return the denoiser's output ``[R, C, H, W]`` for each member; all inputs have one height and width."""
        counts = list(map(len, noisy))
        self._denoiser.rows = Rows(members, counts, caches=not self.recomputes)
        predicted = self.model.predict(
            torch.cat(list(noisy)), torch.cat(list(timesteps)), Condition.cat(list(conditions))
        )
        return list(predicted.split(counts))
