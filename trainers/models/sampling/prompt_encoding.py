"""Encodes prompts and negative prompts into conditions for each sampling step, with attention weights.

Shapes: R texts of one schedule, B images, T tokens, D their width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dreamfleet.trainers.config.image_request import ImageRequest
from dreamfleet.trainers.models.condition import Condition
from dreamfleet.trainers.models.learned_words import learned_negatives, learned_words, words_in
from dreamfleet.trainers.models.sampling.prompt_syntax import (
    Schedule,
    attention,
    parse_negative,
    parse_prompt,
    strip_comments,
    text_at,
)

if TYPE_CHECKING:
    from dreamfleet.trainers.models.family import DiffusionModel

Encode = Callable[[Sequence[str], Tensor], Condition]  # texts and their token ids -> condition


class ScheduledCondition(NamedTuple):
    """The conditions of a prompt, which may change between steps; each has batch size 1."""

    schedule: Schedule
    conditions: Sequence[Condition]  # one for each text of the schedule

    def at(self, index: int) -> Condition:
        """Return the condition at step ``index``, counted from 0."""
        return self.conditions[text_at(self.schedule, index)]


class Guide(NamedTuple):
    """The conditions of one image: (weight, condition) of each prompt part, and the negative (None: no guidance)."""

    positive: Sequence[tuple[float, ScheduledCondition]]
    negative: ScheduledCondition | None

    @property
    def is_plain(self) -> bool:
        """Whether the prompt has a single part of weight 1, so that a guidance scale of 1 needs no negative."""
        return len(self.positive) == 1 and self.positive[0][0] == 1


def make_guides(
    model: DiffusionModel, batch: Sequence[ImageRequest], *, encode: Encode | None = None
) -> list[Guide]:
    """Encode the prompts and negative prompts of requests with equal sampling options; one guide per request.

    ``encode`` replaces the model's own prompt encoding.
    """
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
            )  # zeros, as in diffusers and the webui
    return [
        guide._replace(negative=encoded_negatives[text]) if needed else guide
        for guide, text, needed in zip(guides, negatives, guided, strict=True)
    ]


def encode_schedules(
    model: DiffusionModel, schedules: Sequence[Schedule], encode: Encode | None = None
) -> list[ScheduledCondition]:
    """Encode the texts of schedules in one batch per length; all texts of a schedule are padded to equal length."""
    read: Encode = encode or model.prompt_encoder or (lambda _, ids: model.encode_tokens(ids))
    device = model.text_device
    texts = [list(dict.fromkeys(text for _, text in schedule)) for schedule in schedules]
    tokens = [
        model.tokenize_weighted([attention(text) for text in each], least=model.num_chunks) for each in texts
    ]
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


def _weighted(
    model: DiffusionModel,
    rows: Sequence[Condition],
    weights: Sequence[Sequence[float]],
    shares: Sequence[int],
) -> list[Condition]:
    """Apply attention weights to the encoded texts of one schedule; ``shares``: number of uses of each text."""
    if all(weight == 1 for row in weights for weight in row):
        return list(rows)
    whole = Condition.cat(rows)
    weights_RT = torch.tensor(weights, device=whole.context.device)
    shares_R = torch.tensor(shares, dtype=torch.float32, device=whole.context.device)
    return model.weigh_tokens(whole, weights_RT, shares_R).rows()


def _pad_to_longest(
    parts: Sequence[tuple[float, ScheduledCondition]],
) -> list[tuple[float, ScheduledCondition]]:
    """Pad all parts of a prompt to the length of the longest by repeating their last token, as the webui does."""
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


def negative_for(
    model: DiffusionModel, prompt: str, negative_prompt: str, *, steps: int = 25, plain: bool = False
) -> str:
    """Return the negative prompt, extended by the negatives of the learned words in ``prompt``.

    Negatives that it already contains are not repeated. ``steps``: number of sampling steps. ``plain``: the prompts
    have no prompt syntax.
    """
    negatives = learned_negatives(model)
    if not negatives:
        return negative_prompt
    known = learned_words(model)
    parts = parse_prompt(prompt, steps, known, plain=plain)
    used = words_in(model, _literals(part.schedule for part in parts))
    named = words_in(model, _literals([parse_negative(negative_prompt, steps, known, plain=plain)]))
    missing = [other for word, other in negatives.items() if word in used and other not in named]
    if missing and not plain:
        negative_prompt = strip_comments(negative_prompt).rstrip()  # a comment at its end would include them
    return ", ".join([*([negative_prompt] if negative_prompt.strip() else []), *missing])


def _literals(schedules: Iterable[Schedule]) -> Iterator[str]:
    return (piece.text for texts in schedules for _, text in texts for piece in attention(text))
