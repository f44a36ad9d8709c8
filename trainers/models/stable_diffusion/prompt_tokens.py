"""Converts prompts into token ids in chunks for CLIP, with learned words, and applies attention weights.

A chunk is one input row of the text encoder: start, up to 75 tokens, end, padding; 77 tokens in total.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dreamfleet.trainers.models.learned_words import Words
from dreamfleet.trainers.models.prompt_pieces import BREAK, Piece

BACKTRACK = (
    20  # a full chunk is split after the last comma if it is among its last 20 tokens (the webui's default)
)


class Chunk(NamedTuple):
    """Up to 75 token ids without start and end, and the attention weight of each."""

    ids: list[int]
    weights: list[float]


def tokenize(sides: Sequence[Words], prompts: Sequence[str], num_chunks: int) -> Tensor:
    """Return the ids ``[B, n * 77]`` of prompts without prompt syntax, where n is ``num_chunks``; longer ones are cut.

    ``sides``: the learned words and the tokenizer of each text encoder; for two the shape is ``[B, 2, n * 77]``. As in
    the webui, a learned word that does not fit into a chunk is moved to the next one.
    """
    ids = [_tokenize(side, prompts, num_chunks) for side in sides]
    return torch.stack(ids, dim=1) if len(ids) > 1 else ids[0]


def _tokenize(side: Words, prompts: Sequence[str], num_chunks: int) -> Tensor:
    length = side.tokenizer.model_max_length
    if not side.ids and num_chunks == 1:
        found: Tensor = side.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        return found
    rows = []
    for prompt in prompts:
        chunks = [Chunk([], [])]
        for ids, word in side.read(prompt):
            if word and len(chunks[-1].ids) + len(ids) > length - 2 and len(chunks) < num_chunks:
                chunks.append(Chunk([], []))
            for token in ids:
                if len(chunks[-1].ids) == length - 2:
                    chunks.append(Chunk([], []))
                chunks[-1].ids.append(token)
        rows.append(_row(side.tokenizer, chunks, num_chunks))
    return torch.tensor(rows)


def tokenize_weighted(
    sides: Sequence[Words], texts: Sequence[Sequence[Piece]], least: int = 1
) -> tuple[Tensor, list[list[float]]]:
    """Return the ids of parsed texts, ``[B, n * 77]`` or ``[B, 2, n * 77]``, and each token's weight ``[B][n * 77]``.

    n is the number of chunks of the longest text, at least ``least``. As in the webui, a chunk ends at BREAK, and a
    full one after the last comma near its end.
    """
    every = [[chunk_pieces(side, pieces) for pieces in texts] for side in sides]
    num_chunks = max(least, *(len(chunks) for chunks in every[0]))
    ids = [
        torch.tensor([_row(side.tokenizer, chunks, num_chunks) for chunks in texts_of_side])
        for side, texts_of_side in zip(sides, every, strict=True)
    ]
    length = sides[0].tokenizer.model_max_length
    weights = [
        [weight for chunk in _padded(chunks, num_chunks) for weight in _spread(chunk.weights, length)]
        for chunks in every[0]
    ]
    return torch.stack(ids, dim=1) if len(ids) > 1 else ids[0], weights


def chunk_pieces(side: Words, pieces: Sequence[Piece]) -> list[Chunk]:
    """Return the tokens of weighted pieces of text in chunks of up to 75."""
    size = side.tokenizer.model_max_length - 2
    comma = side.tokenizer.get_vocab().get(",</w>")
    chunks, last_comma = [Chunk([], [])], -1

    def begin(ids: Sequence[int] = (), weights: Sequence[float] = ()) -> None:
        nonlocal last_comma
        chunks.append(Chunk([*ids], [*weights]))
        last_comma = -1

    for piece in pieces:
        if piece == BREAK:
            begin()
            continue
        for ids, word in side.read(piece.text):
            now = chunks[-1]
            if word is None and ids[0] == comma:
                last_comma = len(now.ids)
            elif len(now.ids) == size and last_comma >= 0 and size - last_comma <= BACKTRACK:
                cut = last_comma + 1
                begin(now.ids[cut:], now.weights[cut:])
                del now.ids[cut:], now.weights[cut:]
            if len(chunks[-1].ids) + len(ids) > size:
                begin()
            chunks[-1].ids.extend(ids)
            chunks[-1].weights.extend([piece.weight] * len(ids))
    return chunks if chunks[-1].ids or len(chunks) == 1 else chunks[:-1]


def emphasise(context_BTD: Tensor, weights_BT: Tensor, shares_B: Tensor, *, chunk: int = 77) -> Tensor:
    """Multiply encoded tokens by their weights, then scale each chunk to its previous mean, as the webui does.

    The mean is over all texts, in which text b counts ``shares_B[b]`` times. Chunks in which all weights are 1 stay
    bit-equal.
    """
    parts = []
    for part, weights in zip(context_BTD.split(chunk, dim=1), weights_BT.split(chunk, dim=1), strict=True):
        if bool((weights != 1).any()):
            before, wide = part.float(), part.float() * weights[..., None]
            shares = shares_B / shares_B.sum()
            mean, changed = ((each.mean((1, 2)) * shares).sum() for each in (before, wide))
            part = (wide * torch.where(changed == 0, 1.0, mean / changed)).to(part.dtype)
        parts.append(part)
    return torch.cat(parts, dim=1)


def _padded(chunks: Sequence[Chunk], num_chunks: int) -> list[Chunk]:
    """Return exactly ``num_chunks`` chunks by removing chunks at the end or adding empty ones."""
    return [*chunks[:num_chunks], *[Chunk([], [])] * (num_chunks - len(chunks))]


def _row(tokenizer: Any, chunks: Sequence[Chunk], num_chunks: int) -> list[int]:
    row: list[int] = []
    for chunk in _padded(chunks, num_chunks):
        row += [tokenizer.bos_token_id, *chunk.ids, tokenizer.eos_token_id]
        row += [tokenizer.pad_token_id] * (tokenizer.model_max_length - 2 - len(chunk.ids))
    return row


def _spread(weights: Sequence[float], length: int) -> list[float]:
    return [1.0, *weights, *[1.0] * (length - 1 - len(weights))]
