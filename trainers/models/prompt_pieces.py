"""The elements of a parsed prompt: pieces of text, each with one attention weight."""

from __future__ import annotations

from typing import NamedTuple


class Piece(NamedTuple):
    """A piece of text with one attention weight."""

    text: str
    weight: float = 1.0


BREAK = Piece("BREAK", -1.0)  # the text that follows starts a new chunk of 75 tokens
