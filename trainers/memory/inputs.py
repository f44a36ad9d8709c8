"""What a run is made of, in numbers and bytes: what a plan counts, and its arithmetic works on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dreamfleet.trainers.memory.strategies import EngineChoice


@dataclass(frozen=True)
class Pass:
    """Bytes that forward and backward of one micro-batch hold, beside the model.

    ``held``: between forward and backward. ``activations``: the most at any moment, gradients of weights aside.
    ``together``: the most of activations and gradients at any moment, when there were no gradients before: these come
    as activations go. ``casts``: of ``activations``, autocast's low-precision copies of the learning weights.
    """

    held: int
    activations: int
    together: int
    casts: int = 0

    def peak(self, gradients: int, share: float, *, accumulates: bool) -> int:
        """Bound activations and the ``share`` of the ``gradients`` that this worker keeps, at their worst moment.

        With gradients left from an earlier micro-batch both are whole at once. Otherwise A + share * G is a mean
        of A and A + G at every moment, so it stays below the same mean of their peaks.
        """
        if accumulates:
            return self.activations + round(share * gradients)
        return round((1 - share) * self.activations + share * self.together)


@dataclass(frozen=True)
class Counts:
    """What one worker's run is made of, counted without loading anything; sizes in bytes, on the GPU unless said.

    ``learning``: elements of each learning tensor; ``factors``: means that Adafactor keeps of all their squares.
    ``frozen``: parts that do not learn, and buffers; ``passed``: elements of those that gradients pass through, which
    stage 3 shards; ``nvme``: whether there is a disk to offload to. ``full``: a pass with the learning weights in
    float32, ``half``: in 16 bits, where ``mixed`` (DeepSpeed's half-precision modes) or ``bf16_weights``. ``fused``:
    steps inside backward. ``model``: the whole model in float32, as it is first loaded. ``encoding``: encoding pictures
    before the first step; ``class_drawing``: drawing class pictures then; ``drawing``: drawing previews. ``latents``:
    resident latents, on the host. ``bucket``: elements of the buffers that ZeRO sends from. ``micros``: batches to a
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
    factors: int = 0
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
        """How many numbers learn."""
        return sum(self.learning)

    @property
    def accumulates(self) -> bool:
        """Whether gradients wait for those of further micro-batches."""
        return self.micros > 1

    def under(self, choice: EngineChoice) -> Counts:
        """Return the counts with what a choice changes of the recipe."""
        return replace(
            self,
            optimizer=choice.optimizer or self.optimizer,
            fused=self.fused or choice.fused_backward,
            bf16_weights=self.bf16_weights or choice.bf16_weights,
        )
