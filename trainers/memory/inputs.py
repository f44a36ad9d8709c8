"""The sizes of a run that a memory plan counts and computes its estimates from."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dreamfleet.trainers.config.optimizers import OPTIMIZERS, Optimizer, OptimizerOptions, state_bytes
from dreamfleet.trainers.memory.strategies import EngineChoice


@dataclass(frozen=True)
class Pass:
    """Bytes that the forward and backward pass of one micro-batch use besides the model.

    ``held``: between forward and backward. ``activations``: the maximum without gradients of weights.
    ``together``: the maximum of activations and gradients, if there are no gradients before: they grow while
    activations are freed. ``casts``: autocast's low-precision copies of the trainable weights, a part of
    ``activations``.
    """

    held: int
    activations: int
    together: int
    casts: int = 0

    def peak(self, gradients: int, share: float, *, accumulates: bool) -> int:
        """Return an upper bound of activations plus the ``share`` of the ``gradients`` that this worker keeps.

        With gradients of an earlier micro-batch (``accumulates``), both have their full size at once. Otherwise
        A + share * G is a mean of A and A + G at every moment, so it stays below the same mean of their maxima.
        """
        if accumulates:
            return self.activations + round(share * gradients)
        return round((1 - share) * self.activations + share * self.together)


@dataclass(frozen=True)
class Counts:
    """Sizes of one worker's run, counted without loading weights; by default in bytes on the GPU.

    ``learning``: elements of each trainable tensor; ``shapes``: their shapes, if an optimizer's states depend on
    them; ``options``: the optimizer's own. ``frozen``: parameters that are not trained, and buffers; ``passed``:
    elements of those frozen parameters that gradients pass through, which stage 3 shards. ``nvme``: whether
    the recipe names a disk for offload. ``full``: a pass with trainable weights in float32; ``half``: in 16 bits, for
    ``mixed`` (DeepSpeed's half-precision modes) and ``bf16_weights``. ``fused``: optimizer steps inside backward.
    ``average``: an average of the weights is kept. ``model``: the whole model in float32, as loaded.
    ``encoding``, ``class_drawing``: encoding the images, generating class images before the first step;
    ``drawing``: generating previews. ``text_embeddings``: cached encoded prompts. ``latents``: resident
    latents on the host. ``bucket``: elements of ZeRO's communication buffers. ``micros``: micro-batches per
    step.
    """

    learning: tuple[int, ...]
    frozen: int
    model: int
    full: Pass
    half: Pass
    bucket: int
    passed: int = 0
    nvme: bool = False
    mixed: bool = False
    optimizer: str = "adamw"
    options: OptimizerOptions | None = None
    shapes: tuple[tuple[int, ...], ...] = ()
    fused: bool = False
    bf16_weights: bool = False
    average: bool = False
    micros: int = 1
    encoding: int = 0
    class_drawing: int = 0
    drawing: int = 0
    text_embeddings: int = 0
    latents: int = 0

    @property
    def total(self) -> int:
        """Number of trainable elements."""
        return sum(self.learning)

    @property
    def kind(self) -> Optimizer:
        """The description of the optimizer."""
        return OPTIMIZERS.get(self.optimizer)

    @property
    def states(self) -> int:
        """Bytes of the optimizer's states of all trainable tensors."""
        shapes = self.shapes or tuple((numel,) for numel in self.learning)
        return state_bytes(shapes, self.optimizer, self.options)

    @property
    def accumulates(self) -> bool:
        """Whether gradients are summed over several micro-batches."""
        return self.micros > 1

    def under(self, choice: EngineChoice) -> Counts:
        """Return the counts with the changes that an engine choice makes to the recipe."""
        return replace(
            self,
            optimizer=choice.optimizer or self.optimizer,
            options=self.options if choice.optimizer in (None, self.optimizer) else None,
            fused=self.fused or choice.fused_backward,
            bf16_weights=self.bf16_weights or choice.bf16_weights,
        )
