"""Encodes prompts and negative prompts into the conditions of each sampling step, with weights.

R texts, B images, T tokens, D their width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dreamfleet.trainers.config.image_request import ImageRequest
from dreamfleet.trainers.models.condition import Condition
from dreamfleet.trainers.models.sampling.prompt_syntax import Schedule, parse_negative, parse_prompt, text_at
from dreamfleet.trainers.models.stable_diffusion.prompt_tokens import learned_words, tokenize_weighted

if TYPE_CHECKING:
    from dreamfleet.trainers.models.stable_diffusion.model import StableDiffusion

Encode = Callable[[Sequence[str], Tensor], Condition]  # of texts and their ids


class ScheduledCondition(NamedTuple):
    """A prompt's conditions by step, each of batch size 1."""

    schedule: Schedule
    conditions: Sequence[Condition]  # for each text of the schedule

    def at(self, index: int) -> Condition:
        """Return the condition at a step, counted from 0."""
        return self.conditions[text_at(self.schedule, index)]


class Guide(NamedTuple):
    """The conditions of one image: weighted positive ones, and the negative one (None: no guidance)."""

    positive: Sequence[tuple[float, ScheduledCondition]]
    negative: ScheduledCondition | None

    @property
    def is_plain(self) -> bool:
        """Whether there is one positive condition of weight 1, so that a guidance scale of 1 needs no negative."""
        return len(self.positive) == 1 and self.positive[0][0] == 1


def make_guides(
    model: StableDiffusion, batch: Sequence[ImageRequest], *, encode: Encode | None = None
) -> list[Guide]:
    """Encode the prompts and negative prompts of requests that share their sampling options."""
    words = learned_words(model)
    steps, plain = batch[0].steps, batch[0].plain
    negatives = [request.negative_prompt for request in batch]
    parsed = [parse_prompt(request.prompt, steps, words, plain=plain) for request in batch]
    schedules = [part.schedule for parts in parsed for part in parts]
    found = iter(encode_schedules(model, schedules, encode))
    positives = [_pad_to_longest([(part.weight, next(found)) for part in parts]) for parts in parsed]
    guides = [Guide(each, None) for each in positives]
    guided = [batch[0].guidance_scale != 1 or not guide.is_plain for guide in guides]
    encoded_negatives = {}
    for text in dict.fromkeys(text for text, needed in zip(negatives, guided, strict=True) if needed):
        schedule = parse_negative(text, steps, words, plain=plain)
        encoded_negatives[text] = encode_schedules(model, [schedule], encode)[0]
        if model.zeros_for_empty_prompt and not any(part for _, part in schedule):
            conditions = [condition.map(torch.zeros_like) for condition in encoded_negatives[text].conditions]
            encoded_negatives[text] = ScheduledCondition(
                schedule, conditions
            )  # as in diffusers and the webui
    return [
        guide._replace(negative=encoded_negatives[text]) if needed else guide
        for guide, text, needed in zip(guides, negatives, guided, strict=True)
    ]


def encode_schedules(
    model: StableDiffusion, schedules: Sequence[Schedule], encode: Encode | None = None
) -> list[ScheduledCondition]:
    """Encode the texts of schedules, those of equal length together; all texts of a schedule get one length."""
    read: Encode = encode or model.encode_prompts or (lambda _, ids: model.condition(ids))
    device = next(model.text_encoder.parameters()).device
    texts = [list(dict.fromkeys(text for _, text in schedule)) for schedule in schedules]
    tokens = [tokenize_weighted(model, each, model.num_chunks) for each in texts]
    lengths = [ids.shape[-1] for ids, _ in tokens]
    found: dict[int, ScheduledCondition] = {}
    for length in dict.fromkeys(lengths):
        chosen = [number for number, each in enumerate(lengths) if each == length]
        every = [text for number in chosen for text in texts[number]]
        rows = read(every, torch.cat([tokens[number][0] for number in chosen]).to(device)).rows()
        for number in chosen:
            own, rows = rows[: len(texts[number])], rows[len(texts[number]) :]
            used = [text for _, text in schedules[number]]
            shares = [used.count(text) for text in texts[number]]
            weighted = _weighted(model, own, tokens[number][1], shares)
            of = dict(zip(texts[number], weighted, strict=True))
            found[number] = ScheduledCondition(schedules[number], [of[text] for text in used])
    return [found[number] for number in range(len(schedules))]


def apply_weights(context_RTD: Tensor, weights_RT: Tensor, shares_R: Tensor, *, chunk: int = 77) -> Tensor:
    """Multiply tokens by their weights and restore the mean of each chunk over all texts, as the webui does.

    ``shares_R``: how often each text counts. Chunks without weights are unchanged, bit for bit.
    """
    parts = []
    for part, weights in zip(context_RTD.split(chunk, dim=1), weights_RT.split(chunk, dim=1), strict=True):
        if bool((weights != 1).any()):
            before, wide = part.float(), part.float() * weights[..., None]
            shares = shares_R / shares_R.sum()
            mean, changed = ((each.mean((1, 2)) * shares).sum() for each in (before, wide))
            part = (wide * torch.where(changed == 0, 1.0, mean / changed)).to(part.dtype)
        parts.append(part)
    return torch.cat(parts, dim=1)


def _weighted(
    model: StableDiffusion,
    rows: Sequence[Condition],
    weights: Sequence[Sequence[float]],
    shares: Sequence[int],
) -> list[Condition]:
    """Apply attention weights to one schedule's texts; the means of SDXL's two encoders are restored separately."""
    if all(weight == 1 for row in weights for weight in row):
        return list(rows)
    whole = Condition.cat(rows)
    weights_RT = torch.tensor(weights, device=whole.context.device)
    shares_R = torch.tensor(shares, dtype=torch.float32, device=whole.context.device)
    widths = [encoder.config.hidden_size for encoder in model.text_encoders]
    length = model.tokenizer.model_max_length
    sides = [
        apply_weights(side, weights_RT, shares_R, chunk=length)
        for side in whole.context.split(widths, dim=-1)
    ]
    return whole._replace(context=torch.cat(sides, dim=-1)).rows()


def _pad_to_longest(
    parts: Sequence[tuple[float, ScheduledCondition]],
) -> list[tuple[float, ScheduledCondition]]:
    """Extend all parts of a prompt to the longest by repeating their last token, as the webui does."""
    longest = max(condition.context.shape[1] for _, scheduled in parts for condition in scheduled.conditions)

    def filled(condition: Condition) -> Condition:
        missing = longest - condition.context.shape[1]
        if not missing:
            return condition
        last = condition.context[:, -1:].expand(-1, missing, -1)
        return condition._replace(context=torch.cat([condition.context, last], dim=1))

    return [
        (weight, scheduled._replace(conditions=[filled(each) for each in scheduled.conditions]))
        for weight, scheduled in parts
    ]
