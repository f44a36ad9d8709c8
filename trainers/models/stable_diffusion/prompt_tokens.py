"""Turns prompts into token ids: learned words wherever they stand, in chunks of 75, for training and for drawing."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dreamfleet.trainers.models.embeddings import SplicedEmbedding, spliced_table
from dreamfleet.trainers.models.sampling.prompt_syntax import (
    BREAK,
    Piece,
    attention,
    parse_negative,
    parse_prompt,
    strip_comments,
)

if TYPE_CHECKING:
    from dreamfleet.trainers.models.stable_diffusion.model import StableDiffusion

BACKTRACK = (
    20  # a chunk that is full ends after a comma which lies at most so many tokens back (the webui's default)
)
# Scripts that write no spaces between words, by the first word of their letters' names.
_UNSPACED = {"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "BOPOMOFO", "YI"}


class Chunk(NamedTuple):
    """Up to 75 tokens between start and end, and the attention weight of each."""

    ids: list[int]
    weights: list[float]


class Words:
    """The learned words of one text encoder, and its tokenizer."""

    def __init__(self, tokenizer: Any, text_encoder: Any, swap: Mapping[str, str] | None = None):
        self.tokenizer, spliced = tokenizer, spliced_table(text_encoder)
        known = list(spliced.words) if isinstance(spliced, SplicedEmbedding) else []
        swap = swap or {}
        self.ids = {word: list(spliced.ids(swap.get(word, word))) for word in known}
        self._by_first: dict[int, list[tuple[list[int], str]]] = {}
        for word in known:
            name = self._tokens(word)
            if name and tokenizer.unk_token_id not in name:
                self._by_first.setdefault(name[0], []).append((name, word))
        for names in self._by_first.values():
            names.sort(key=lambda name: len(name[0]), reverse=True)

    def read(self, text: str) -> Iterator[tuple[list[int], str | None]]:
        """Yield a text's token ids, those of a learned word together and with the word."""
        pieces = split_words(text, self.ids) if self.ids else [(text, None)]
        for piece, word in pieces:
            if word is not None:
                yield self.ids[word], word
            elif piece:
                yield from self._in_tokens(self._tokens(piece))

    def _in_tokens(self, tokens: list[int]) -> Iterator[tuple[list[int], str | None]]:
        """Find words by their tokens as well, the longest first, as the webui does: at the end of other words too."""
        position = 0
        while position < len(tokens):
            for name, word in self._by_first.get(tokens[position], ()):
                if tokens[position : position + len(name)] == name:
                    yield self.ids[word], word
                    position += len(name)
                    break
            else:
                yield [tokens[position]], None
                position += 1

    def _tokens(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return found


def tokenize(model: StableDiffusion, prompts: Sequence[str], swap: Mapping[str, str] | None = None) -> Tensor:
    """Turn literal prompts into ids ``[B, n * 77]``: n chunks of start, up to 75 tokens and learned ids, end, padding.

    n is 1 for every 75 of ``model.max_token_length``; what goes beyond is cut. A learned word that would lie across the
    end of a chunk begins the next one, as in the webui. ``swap``: words to read as others. For SDXL ``[B, 2, n * 77]``:
    its tokenizers pad differently.
    """
    sides = [_tokenize(side, prompts, model.num_chunks) for side in _sides(model, swap)]
    return torch.stack(sides, dim=1) if len(sides) > 1 else sides[0]


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
    model: StableDiffusion, texts: Sequence[str], least: int = 1
) -> tuple[Tensor, list[list[float]]]:
    """Turn texts with attention weights into ids ``[B, n * 77]`` and weights, in as many chunks as the longest needs.

    ``[B, 2, n * 77]`` for SDXL. As the webui: a chunk ends at BREAK, or after the last comma near its end.
    """
    every = [[chunk_pieces(side, attention(text)) for text in texts] for side in _sides(model)]
    num_chunks = max(least, *(len(chunks) for chunks in every[0]))
    tokenizers = (model.tokenizer, model.tokenizer_2)
    ids = [
        torch.tensor([_row(tokenizer, chunks, num_chunks) for chunks in texts_of_side])
        for tokenizer, texts_of_side in zip(tokenizers, every, strict=False)
    ]
    length = model.tokenizer.model_max_length
    weights = [
        [weight for chunk in _filled(chunks, num_chunks) for weight in _spread(chunk.weights, length)]
        for chunks in every[0]
    ]
    return torch.stack(ids, dim=1) if len(ids) > 1 else ids[0], weights


def chunk_pieces(side: Words, pieces: Sequence[Piece]) -> list[Chunk]:
    """Lay the tokens of weighted pieces out in chunks of 75."""
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


def count_tokens(model: StableDiffusion, texts: Sequence[str]) -> list[int]:
    """Count the tokens of literal texts, learned words by their vectors, without start and end."""
    side = _sides(model)[0]
    return [sum(len(ids) for ids, _ in side.read(text)) for text in texts]


def words_in(model: StableDiffusion, texts: Iterable[str]) -> set[str]:
    """Return the learned words that stand in literal texts."""
    side = _sides(model)[0]
    return {word for text in texts for _, word in side.read(text) if word} if side.ids else set()


def learned_words(model: StableDiffusion) -> list[str]:
    """Return the words that a model was taught."""
    spliced = spliced_table(model.text_encoder)
    return list(spliced.words) if isinstance(spliced, SplicedEmbedding) else []


def negative_for(
    model: StableDiffusion, prompt: str, negative_prompt: str, *, steps: int = 25, plain: bool = False
) -> str:
    """Return the negative prompt with the negatives of the words in ``prompt`` that it does not name itself.

    ``steps``: in which the picture is drawn; ``plain``: both prompts are literal.
    """
    spliced = spliced_table(model.text_encoder)
    if not isinstance(spliced, SplicedEmbedding) or not spliced.negatives:
        return negative_prompt
    known = list(spliced.words)
    parts = parse_prompt(prompt, steps, known, plain=plain)
    used = words_in(model, _literals(part.schedule for part in parts))
    named = words_in(model, _literals([parse_negative(negative_prompt, steps, known, plain=plain)]))
    missing = [other for word, other in spliced.negatives.items() if word in used and other not in named]
    if missing and not plain:
        negative_prompt = strip_comments(negative_prompt).rstrip()  # one at its end would swallow them
    return ", ".join([*([negative_prompt] if negative_prompt.strip() else []), *missing])


def place_word(text: str, mark: str, word: str) -> str:
    """Put a word in place of a mark, with spaces where letters beside it would hide it: ``[name]s`` -> ``sks s``."""
    head, *rest = text.split(mark)
    for following in rest:
        before = " " if head and _of_one_word(head[-1], word[0]) else ""
        after = " " if following and _of_one_word(word[-1], following[0]) else ""
        head = f"{head}{before}{word}{after}{following}"
    return head


def split_words(text: str, words: Iterable[str]) -> list[tuple[str, str | None]]:
    """Split a text at the learned words in it: pieces of text, and ``("", word)``.

    A word is found, in upper or lower case, unless letters of its own script go on beside it, in a script that puts
    spaces between words.
    """
    # Longest first, so that "cat-neg" is not read as "cat" and "-neg".
    ordered = sorted(words, key=len, reverse=True)
    normal = unicodedata.normalize("NFC", text)
    pattern = re.compile(
        "|".join(f"({re.escape(unicodedata.normalize('NFC', word.strip()))})" for word in ordered),
        re.IGNORECASE,
    )
    pieces: list[tuple[str, str | None]] = []
    end = position = 0
    while match := pattern.search(normal, position):
        start, stop = match.span()
        if (start and _of_one_word(normal[start - 1], match[0][0])) or (
            stop < len(normal) and _of_one_word(match[0][-1], normal[stop])
        ):
            position = start + 1
            continue
        if before := normal[end:start].strip():
            pieces.append((before, None))
        pieces.append(("", ordered[(match.lastindex or 1) - 1]))
        end = position = stop
    if rest := normal[end:].strip():
        pieces.append((rest, None))
    return pieces


def _of_one_word(left: str, right: str) -> bool:
    """Say whether two neighbours are letters of one word, as CLIP's tokenizer sees words: digits never are."""
    if not (_is_letter(left) and _is_letter(right)):
        return False
    scripts = {_script(left), _script(right)} - {"COMBINING", "MODIFIER"}
    return len(scripts) < 2 and not scripts & _UNSPACED


def _is_letter(sign: str) -> bool:
    return unicodedata.category(sign)[0] in "LM"


def _script(letter: str) -> str:
    first = unicodedata.name(letter, "").partition(" ")[0]
    return "CJK" if first in ("IDEOGRAPHIC", "KANGXI") else first


def _literals(schedules: Iterable[Sequence[tuple[int, str]]]) -> Iterator[str]:
    return (piece.text for texts in schedules for _, text in texts for piece in attention(text))


def _sides(model: StableDiffusion, swap: Mapping[str, str] | None = None) -> list[Words]:
    tokenizers = (model.tokenizer, model.tokenizer_2)
    return [Words(*side, swap) for side in zip(tokenizers, model.text_encoders, strict=False)]


def _filled(chunks: Sequence[Chunk], num_chunks: int) -> list[Chunk]:
    """Return as many chunks as asked for: what is too much is cut, what is missing is empty."""
    return [*chunks[:num_chunks], *[Chunk([], [])] * (num_chunks - len(chunks))]


def _row(tokenizer: Any, chunks: Sequence[Chunk], num_chunks: int) -> list[int]:
    row: list[int] = []
    for chunk in _filled(chunks, num_chunks):
        row += [tokenizer.bos_token_id, *chunk.ids, tokenizer.eos_token_id]
        row += [tokenizer.pad_token_id] * (tokenizer.model_max_length - 2 - len(chunk.ids))
    return row


def _spread(weights: Sequence[float], length: int) -> list[float]:
    return [1.0, *weights, *[1.0] * (length - 1 - len(weights))]
