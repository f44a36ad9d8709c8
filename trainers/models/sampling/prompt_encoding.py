"""Encodes what pictures are drawn with: each prompt's conditions by step, weighted, and those of its negative prompt.

R texts, B pictures, T tokens, D their width.
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


class Timed(NamedTuple):
    """A text's conditions, each of one sample, by step."""

    schedule: Schedule
    conditions: Sequence[Condition]  # for each text of the schedule

    def at(self, index: int) -> Condition:
        """Return the condition of the step of this index, from 0."""
        return self.conditions[text_at(self.schedule, index)]


class Guide(NamedTuple):
    """What one picture is drawn with: where to, each with a weight, and what away from (None: no guidance)."""

    towards: Sequence[tuple[float, Timed]]
    away: Timed | None

    @property
    def is_plain(self) -> bool:
        """Whether there is one prompt at full weight, so that a guidance scale of 1 needs no negative prompt."""
        return len(self.towards) == 1 and self.towards[0][0] == 1


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
    towards = [_of_one_length([(part.weight, next(found)) for part in parts]) for parts in parsed]
    guides = [Guide(each, None) for each in towards]
    guided = [batch[0].guidance_scale != 1 or not guide.is_plain for guide in guides]
    away = {}
    for text in dict.fromkeys(text for text, needed in zip(negatives, guided, strict=True) if needed):
        schedule = parse_negative(text, steps, words, plain=plain)
        away[text] = encode_schedules(model, [schedule], encode)[0]
        if model.zeros_for_empty_prompt and not any(said for _, said in schedule):
            conditions = [condition.map(torch.zeros_like) for condition in away[text].conditions]
            away[text] = Timed(schedule, conditions)  # as diffusers and the webui have it
    return [
        guide._replace(away=away[text]) if needed else guide
        for guide, text, needed in zip(guides, negatives, guided, strict=True)
    ]


def encode_schedules(
    model: StableDiffusion, schedules: Sequence[Schedule], encode: Encode | None = None
) -> list[Timed]:
    """Encode the texts of schedules, those of equal length in one go; all texts of a schedule get one length."""
    read: Encode = encode or model.encode_prompts or (lambda _, ids: model.condition(ids))
    device = next(model.text_encoder.parameters()).device
    texts = [list(dict.fromkeys(text for _, text in schedule)) for schedule in schedules]
    tokens = [tokenize_weighted(model, each, model.num_chunks) for each in texts]
    lengths = [ids.shape[-1] for ids, _ in tokens]
    found: dict[int, Timed] = {}
    for length in dict.fromkeys(lengths):
        chosen = [number for number, each in enumerate(lengths) if each == length]
        every = [text for number in chosen for text in texts[number]]
        rows = read(every, torch.cat([tokens[number][0] for number in chosen]).to(device)).rows()
        for number in chosen:
            own, rows = rows[: len(texts[number])], rows[len(texts[number]) :]
            said = [text for _, text in schedules[number]]
            shares = [said.count(text) for text in texts[number]]
            weighted = _weighted(model, own, tokens[number][1], shares)
            of = dict(zip(texts[number], weighted, strict=True))
            found[number] = Timed(schedules[number], [of[text] for text in said])
    return [found[number] for number in range(len(schedules))]


def emphasise(context_RTD: Tensor, weights_RT: Tensor, shares_R: Tensor, *, chunk: int = 77) -> Tensor:
    """Multiply tokens by their weights and restore the mean of each chunk over all texts, as the webui does.

    ``shares_R``: how often each text counts. Chunks without weights stay as they are, bit for bit.
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
    """Apply attention weights to one schedule's texts; SDXL's two encoders each keep a mean of their own."""
    if all(weight == 1 for row in weights for weight in row):
        return list(rows)
    whole = Condition.cat(rows)
    weights_RT = torch.tensor(weights, device=whole.context.device)
    shares_R = torch.tensor(shares, dtype=torch.float32, device=whole.context.device)
    widths = [encoder.config.hidden_size for encoder in model.text_encoders]
    length = model.tokenizer.model_max_length
    sides = [
        emphasise(side, weights_RT, shares_R, chunk=length) for side in whole.context.split(widths, dim=-1)
    ]
    return whole._replace(context=torch.cat(sides, dim=-1)).rows()


def _of_one_length(parts: Sequence[tuple[float, Timed]]) -> list[tuple[float, Timed]]:
    """Give all parts of a prompt the length of the longest, by repeating their last token, as the webui does."""
    longest = max(condition.context.shape[1] for _, timed in parts for condition in timed.conditions)

    def filled(condition: Condition) -> Condition:
        missing = longest - condition.context.shape[1]
        if not missing:
            return condition
        last = condition.context[:, -1:].expand(-1, missing, -1)
        return condition._replace(context=torch.cat([condition.context, last], dim=1))

    return [
        (weight, timed._replace(conditions=[filled(each) for each in timed.conditions]))
        for weight, timed in parts
    ]
