"""The base models of a process: each is loaded once, and restored after a training that changed it."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from dreamfleet.trainers.config.model import ModelConfig
from dreamfleet.trainers.models.family import DiffusionModel, load_model

_Key = tuple[str, tuple[str, ...]]


class SharedModels:
    """Lends copies of base models that share the parameters of one loaded model; keeps the model used last."""

    def __init__(self) -> None:
        self._key: _Key | None = None
        self._model: DiffusionModel | None = None
        self._original: dict[str, Tensor] = {}  # parameters before the first training that changes them

    def lend(self, config: ModelConfig, needs: Collection[str]) -> DiffusionModel:
        """Return a copy of a model for a training that leaves the model's own parameters unchanged.

        Raises ModelError for missing or broken parts.
        """
        return self._loaded(config, needs).share()

    def lend_to_train(self, config: ModelConfig, needs: Collection[str]) -> DiffusionModel:
        """Return a copy for the only training in progress, which may change parameters; see :meth:`restore`."""
        model = self._loaded(config, needs)
        if not self._original:
            self._original = {
                f"{part}.{name}": param.detach().to("cpu", copy=True)
                for part, module in model.modules().items()
                if module is not model.vae
                for name, param in module.named_parameters()
            }
        return model.share()

    @torch.no_grad()
    def restore(self) -> None:
        """Give the parameters their values from before :meth:`lend_to_train`, in place; they are frozen again."""
        if self._model is None or not self._original:
            return
        for part, module in self._model.modules().items():
            for name, param in module.named_parameters():
                kept = self._original.get(f"{part}.{name}")
                if kept is None:
                    continue
                if param.dtype == kept.dtype and param.shape == kept.shape:
                    param.copy_(kept)
                else:  # cast for the last training, or sharded
                    param.data = kept.to(param.device, copy=True)
                param.grad = None
        self._model.freeze()

    def clear(self) -> None:
        """Forget the loaded model, so that its copies on a device are freed for trainings of another kind."""
        self._key, self._model, self._original = None, None, {}

    def _loaded(self, config: ModelConfig, needs: Collection[str]) -> DiffusionModel:
        key = config.model_dump_json(), tuple(sorted(needs))
        if self._model is None or key != self._key:
            self.clear()  # its memory is free before the next model is loaded
            self._model, self._key = load_model(config, needs), key
        return self._model
