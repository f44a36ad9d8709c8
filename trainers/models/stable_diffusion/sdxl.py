"""The SDXL base model, and the function that creates a Stable Diffusion model of the right class from its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dreamfleet.trainers.models.condition import Condition
from dreamfleet.trainers.models.formats.ldm_names import Family
from dreamfleet.trainers.models.stable_diffusion.model import StableDiffusion


@dataclass
class StableDiffusionXL(StableDiffusion):
    """SDXL base: two text encoders, whose outputs are concatenated, and a U-Net that also takes image sizes."""

    uses_time_ids: ClassVar[bool] = True

    text_encoder_2: Any = None
    tokenizer_2: Any = None

    @property
    def family(self) -> Family:
        return "sdxl"

    @property
    def text_encoders(self) -> list[Any]:
        return [encoder for encoder in (self.text_encoder, self.text_encoder_2) if encoder is not None]

    @property
    def tokenizers(self) -> list[Any]:
        return [self.tokenizer, self.tokenizer_2]

    def unread_layers(self) -> list[nn.Module]:
        """Return the skipped last layers and the final norm of the first text encoder.

        All layers of the second one affect the pooled encoding.
        """
        return [*self._skipped_layers(self.clip_skip), self._text_body.final_layer_norm]

    def encode_tokens(self, input_ids: Tensor) -> Condition:
        """Encode token ids ``[B, 2, T]``: one row for each tokenizer, since the two pad differently."""
        ids_BT, ids_2_BT = input_ids.unbind(1)
        context_2, pooled = self._encode_second(ids_2_BT)
        return Condition(torch.cat([self._encode_first(ids_BT), context_2], dim=-1), pooled)

    def _encode_first(self, ids_BT: Tensor) -> Tensor:
        """Encode ids ``[B, T]`` with the first encoder -> ``[B, T, D]``: the last layer but one, without final norm."""
        chunks = ids_BT.reshape(-1, self.tokenizer.model_max_length)
        hidden = self.text_encoder(chunks, output_hidden_states=True).hidden_states
        return hidden[-1 - self.clip_skip].reshape(*ids_BT.shape, -1)

    def _encode_second(self, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Encode ids ``[B, T]`` with the second encoder -> ``[B, T, D]``, and pooled ``[B, P]`` of the first chunk."""
        chunks = ids_BT.reshape(-1, self.tokenizer_2.model_max_length)
        encoder = self.text_encoder_2
        found = encoder.text_model(chunks, output_hidden_states=True)
        # The encoder's own pooled output is not used: with SDXL's config it reads the position of the highest id, which
        # can be a learned word's instead of the end of the text.
        each = len(chunks) // len(ids_BT)
        first, last = chunks[::each], found.last_hidden_state[::each]
        ends = (first == self.tokenizer_2.eos_token_id).int().argmax(dim=-1)
        pooled = encoder.text_projection(last[torch.arange(len(last), device=last.device), ends])
        return found.hidden_states[-1 - self.clip_skip].reshape(*ids_BT.shape, -1), pooled

    def empty_condition(self, num: int) -> Condition:
        context = super().empty_condition(num).context
        pooled = torch.empty(num, self.text_encoder_2.config.projection_dim, dtype=context.dtype)
        return Condition(context, pooled, torch.zeros(num, 6))

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        added = {"text_embeds": condition.pooled, "time_ids": condition.time_ids}
        return self.unet(noisy, timesteps, condition.context, return_dict=False, added_cond_kwargs=added)[0]


def make_model(family: Family, parts: Mapping[str, Any], *, scheduler: Any, name: str) -> StableDiffusion:
    """Return a model of the class of ``family`` from parts and tokenizers by name; missing parts are None."""
    first = {part: parts.get(part) for part in ("tokenizer", "text_encoder", "unet", "vae")}
    common: dict[str, Any] = {**first, "scheduler": scheduler, "folder": name, "content_hash": ""}
    if family != "sdxl":
        return StableDiffusion(**common)
    common |= {part: parts.get(part) for part in ("text_encoder_2", "tokenizer_2")}
    return StableDiffusionXL(**common, zeros_for_empty_prompt=True)
