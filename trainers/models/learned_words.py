"""Finds learned words in prompts, by text and by tokens, and converts prompts with them into token ids."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dreamfleet.trainers.models.embeddings import SplicedEmbedding, spliced_table, spliced_tables

if TYPE_CHECKING:
    from dreamfleet.trainers.models.family import DiffusionModel

# Scripts without spaces between words, by the first word of the Unicode names of their letters.
_UNSPACED = {"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "BOPOMOFO", "YI"}


class Words:
    """The learned words of one text encoder, and its tokenizer.

    ``swap`` maps learned words to the learned words whose ids are used instead.
    """

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
        """Yield the token ids of a text: ``([id], None)`` for a token, ``(ids, word)`` for a learned word."""
        pieces = split_words(text, self.ids) if self.ids else [(text, None)]
        for piece, word in pieces:
            if word is not None:
                yield self.ids[word], word
            elif piece:
                yield from self._in_tokens(self._tokens(piece))

    def _in_tokens(self, tokens: list[int]) -> Iterator[tuple[list[int], str | None]]:
        """Find learned words by their tokens, longest first, as the webui does; also at the end of other words."""
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


def words_of(model: DiffusionModel, swap: Mapping[str, str] | None = None) -> list[Words]:
    """Return the :class:`Words` of each text encoder; ``swap`` is as there."""
    pairs = zip(model.tokenizers, model.text_encoders, strict=True)
    return [Words(tokenizer, encoder, swap) for tokenizer, encoder in pairs]


def learned_words(model: DiffusionModel) -> list[str]:
    """Return all learned words of a model."""
    return [word for table in spliced_tables(model)[:1] for word in table.words]


def learned_negatives(model: DiffusionModel) -> dict[str, str]:
    """Return the learned words that have a negative: word -> the negative's word."""
    return {word: other for table in spliced_tables(model)[:1] for word, other in table.negatives.items()}


def words_in(model: DiffusionModel, texts: Iterable[str]) -> set[str]:
    """Return the learned words that occur in texts without prompt syntax."""
    if not learned_words(model):
        return set()
    side = words_of(model)[0]
    return {word for text in texts for _, word in side.read(text) if word}


def count_tokens(model: DiffusionModel, texts: Sequence[str]) -> list[int]:
    """Return the number of tokens of each text, without start and end; a learned word counts its vectors."""
    side = words_of(model)[0]
    return [sum(len(ids) for ids, _ in side.read(text)) for text in texts]


def place_word(text: str, mark: str, word: str) -> str:
    """Replace a placeholder by a word, with a space where it would merge with a letter: ``[name]s`` -> ``sks s``."""
    head, *rest = text.split(mark)
    for following in rest:
        before = " " if head and _of_one_word(head[-1], word[0]) else ""
        after = " " if following and _of_one_word(word[-1], following[0]) else ""
        head = f"{head}{before}{word}{after}{following}"
    return head


def split_words(text: str, words: Iterable[str]) -> list[tuple[str, str | None]]:
    """Split a text at learned words; return ``(text, None)`` for each piece of text and ``("", word)`` for each word.

    Case is ignored. In scripts with spaces between words, a word next to a letter of the same script is not found.
    """
    # Longest first, so that "cat-neg" is not split into "cat" and "-neg".
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
    """Return whether two adjacent characters belong to the same word for CLIP's tokenizer; digits never do."""
    if not (_is_letter(left) and _is_letter(right)):
        return False
    scripts = {_script(left), _script(right)} - {"COMBINING", "MODIFIER"}
    return len(scripts) < 2 and not scripts & _UNSPACED


def _is_letter(sign: str) -> bool:
    return unicodedata.category(sign)[0] in "LM"


def _script(letter: str) -> str:
    first = unicodedata.name(letter, "").partition(" ")[0]
    return "CJK" if first in ("IDEOGRAPHIC", "KANGXI") else first
