"""Parses the webui's prompt syntax: comments, tags, AND, prompt editing, alternation, BREAK, attention weights.

Pure functions on text, independent of any model. The semantics are those of AUTOMATIC1111's webui 1.10, including its
oddities, so that prompts written for it give the same results. `docs/prompts.md` documents them and the differences.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from dreamfleet.trainers.models.prompt_pieces import BREAK, Piece

ROUND, SQUARE = 1.1, 1 / 1.1  # weight factors of `( )` and `[ ]` without a number

Schedule = tuple[tuple[int, str], ...]  # (number of the last step, text), in order


class Part(NamedTuple):
    """One of the texts that AND combines: its weight in the guidance, and its schedule of texts."""

    weight: float
    schedule: Schedule


class Tag(NamedTuple):
    """A tag ``<KIND:NAME:0.8:te=0.5>``: its kind, and the items after it, separated by colons."""

    kind: str
    items: tuple[str, ...]

    @property
    def positional(self) -> list[str]:
        """The items without a name, in order."""
        return [item for item in self.items if item.count("=") != 1]

    @property
    def named(self) -> dict[str, str]:
        """The items of the form ``name=value``."""
        pairs = (item.split("=") for item in self.items if item.count("=") == 1)
        return {name.strip(): value.strip() for name, value in pairs}


def parse_prompt(prompt: str, steps: int, words: Iterable[str] = (), *, plain: bool = False) -> list[Part]:
    """Return the parts of a prompt that AND combines, each with its schedule of texts, without comments and tags.

    ``words`` are kept literally even if they contain syntax, such as the placeholder ``[V]``; with ``plain`` the whole
    prompt is literal. The texts still contain attention weights, which :func:`attention` parses.
    """
    if plain:
        return [Part(1.0, ((steps, escape(prompt)),))]
    prompt, words = _shielded(prompt, words)
    text, _ = split_tags(strip_comments(prompt))
    return [Part(weight, _unshielded(schedule(part, steps), words)) for part, weight in split_and(text)]


def parse_negative(prompt: str, steps: int, words: Iterable[str] = (), *, plain: bool = False) -> Schedule:
    """Return the schedule of a negative prompt, in which AND and tags have no effect, as in the webui."""
    if plain:
        return ((steps, escape(prompt)),)
    prompt, words = _shielded(prompt, words)
    return _unshielded(schedule(strip_comments(prompt), steps), words)


def strip_comments(prompt: str) -> str:
    """Remove comments, from ``#`` to the end of the line."""
    if "#" not in prompt:
        return prompt
    whole_lines = re.sub(r"(?:^|\n)#[^\n]*(?:\n|\Z)", "\n", prompt)
    return re.sub(r"#[^\n]*(?:\n|\Z)", "\n", whole_lines)


def split_tags(prompt: str, kinds: Collection[str] | None = None) -> tuple[str, list[Tag]]:
    """Split ``a cat <lora:NAME:0.8>`` into the text and its tags; only tags of ``kinds``, None for any kind."""
    tags: list[Tag] = []

    def take(match: re.Match[str]) -> str:
        if kinds is not None and match[1] not in kinds:
            return match[0]
        tags.append(Tag(match[1], tuple(match[2].split(":"))))
        return ""

    return re.sub(r"<(\w+):([^>]+)>", take, prompt), tags


def split_and(prompt: str) -> list[tuple[str, float]]:
    """Split a prompt at AND; a part's weight is the number after its last colon, 1 by default."""
    found = []
    for part in re.split(r"\bAND\b", prompt):
        number = re.search(r"\s*:\s*([-+]?(?:\d+\.?|\d*\.\d+))\s*\Z", part)
        weight = float(number[1]) if number else 1.0
        found.append((part[: number.start()], weight) if number else (part.rstrip(), 1.0))
    return found


def schedule(text: str, steps: int) -> Schedule:
    """Resolve prompt editing and alternation: ``a [cat:dog:0.5]`` -> ``((5, "a cat"), (10, "a dog"))`` for 10 steps.

    A text with invalid syntax (a stray ``|`` or a single backslash) is used unchanged.
    """
    try:
        items = _parse_edits(text)
    except _Broken:
        return ((steps, text),)
    ends, waiting = {steps}, list(items)
    while waiting:
        item = waiting.pop()
        if isinstance(item, _Edit):
            ends.add(item.last_step(steps))
            waiting += [*item.before, *item.after]
        elif isinstance(item, _Alternation):
            ends.update(range(1, steps + 1))
            waiting += [inner for option in item.options for inner in option]
    return tuple((end, _at(items, end, steps)) for end in sorted(ends - {0}))


def text_at(texts: Schedule, index: int) -> int:
    """Return the index of the text that a schedule uses at step ``index``, counted from 0.

    The webui compares this index with the last step's number, which counts from 1, so the first text is used for one
    step more than the schedule says.
    """
    return next((number for number, (end, _) in enumerate(texts) if index <= end), 0)


def attention(text: str) -> list[Piece]:
    """Split a text into pieces by attention weight: ``a (cat:1.3)`` -> ``a `` at 1, ``cat`` at 1.3.

    ``( )`` multiplies by 1.1, ``[ ]`` divides by it, a backslash makes brackets literal, and BREAK is a separate piece.
    Unclosed brackets extend to the end.
    """
    found: list[list[str | float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        for piece in found[opened[bracket].pop() :]:
            piece[1] *= factor  # type: ignore[operator]

    for match in _TOKEN.finditer(text):
        token, weight = match[0], _number(match["weight"])
        if token.startswith("\\"):
            found.append([token[1:], 1.0])
        elif token in opened:
            opened[token].append(len(found))
        elif match["weight"] and opened["("]:
            if weight is None:  # (a:1.2.3) has no weight; it is text
                found.append([token[:-1], 1.0])
            close("(", ROUND if weight is None else weight)
        elif token == ")" and opened["("]:
            close("(", ROUND)
        elif token == "]" and opened["["]:
            close("[", SQUARE)
        else:
            first, *others = re.split(r"\s*\bBREAK\b\s*", token)
            found.append([first, 1.0])
            for other in others:
                found += [[*BREAK], [other, 1.0]]
    for bracket, factor in (("(", ROUND), ("[", SQUARE)):
        while opened[bracket]:
            close(bracket, factor)
    return _merged(found)


def escape(text: str) -> str:
    """Escape a text so that the webui and dreamfleet read it literally. ``#`` cannot be escaped."""
    text = re.sub(r"([\\()\[\]|])", r"\\\1", text)
    text = re.sub(r":(\s*)(?=[-+.\d])", r":\1\\", text)
    text = re.sub(r"<(?=\w+:)", r"<\\", text)
    return re.sub(r"\b(?:A(?=ND\b)|B(?=REAK\b))", lambda match: f"{match[0]}\\", text)


def escape_words(prompt: str, words: Iterable[str]) -> str:
    """Escape the words of a prompt that contain syntax, such as ``[V]``, so that the webui reads them literally."""
    shielded, special = _shielded(prompt, words)
    return _unshielded(((1, shielded),), special)[0][1]


def plain_text(prompt: str) -> str:
    """Return the text of a prompt at the last step, without syntax, for comparison with images by CLIP."""
    parts = [part.schedule[-1][1] for part in parse_prompt(prompt, 1)]
    read = ["".join(" " if piece == BREAK else piece.text for piece in attention(part)) for part in parts]
    return ", ".join(" ".join(text.split()) for text in read if text.strip())


_TOKEN = re.compile(
    r"\\[()\[\]\\]?"  # an escaped bracket or backslash; before other characters the backslash is dropped
    r"|[(\[]"
    r"|:\s*(?P<weight>[+-]?[.\d]+)\s*\)"
    r"|[)\]]"
    r"|[^\\()\[\]:]+"
    r"|:"
)
_EDIT_TOKEN = re.compile(r"\\.|[\[\]():|]|[^\\\[\]():|]+")
_STEP = re.compile(r"\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")


class _Broken(Exception):
    """The text is not valid prompt editing syntax."""


class _Edit(NamedTuple):
    before: list[_Item]
    after: list[_Item]
    when: str

    def last_step(self, steps: int) -> int:
        """Return the last step that uses `before`, 0 for none; a number with a point is a fraction of all steps."""
        value = float(self.when) * (steps if "." in self.when else 1)
        return int(max(0.0, min(float(steps), value)))


class _Alternation(NamedTuple):
    options: list[list[_Item]]


_Item = str | _Edit | _Alternation


class _Open:
    """An open bracket during parsing: its parts so far, and the colons or bars between them."""

    def __init__(self, bracket: str):
        self.bracket, self.parts, self.separators = bracket, [[]], ""  # type: ignore[var-annotated]

    def loose(self) -> list[_Item]:
        """Return the content of an unclosed bracket as text. Raises _Broken for a bar, which is not valid in text."""
        if "|" in self.separators:
            raise _Broken
        items: list[_Item] = [self.bracket]
        for number, part in enumerate(self.parts):
            items += [":", *part] if number else part
        return items

    def closed(self) -> list[_Item] | None:
        """Return the items of the closed bracket; None if it is plain text."""
        parts, separators = self.parts, self.separators
        if self.bracket == "(":
            return None if len(separators) > 1 or "|" in separators else [*self.loose(), ")"]
        if not separators:
            return ["[", *parts[0], "]"]
        if set(separators) == {"|"}:
            return [_Alternation(parts)]
        last = "".join(parts[-1]) if all(isinstance(item, str) for item in parts[-1]) else ""
        when = _STEP.fullmatch(last)
        if when is None or len(parts) > 3 or "|" in separators:
            return None
        return [_Edit(parts[0] if len(parts) == 3 else [], parts[-2], when[1])]


def _parse_edits(text: str) -> list[_Item]:
    """Parse prompt editing and alternation in one pass. Raises _Broken for a stray bar or a single backslash.

    Unmatched brackets are treated as text, and so are all open brackets around them.
    """
    items: list[_Item] = []
    stack: list[_Open] = []

    def give_up() -> None:
        for opened in stack:
            items.extend(opened.loose())
        stack.clear()

    end = 0
    for match in _EDIT_TOKEN.finditer(text):
        if match.start() != end:
            raise _Broken
        end, token = match.end(), match[0]
        if token in "([":
            stack.append(_Open(token))
        elif token in ")]":
            whole = stack[-1].closed() if stack and stack[-1].bracket + token in ("()", "[]") else None
            if whole is None:
                give_up()
                whole = [token]
            else:
                stack.pop()
            (stack[-1].parts[-1] if stack else items).extend(whole)
        elif token in ":|" and stack:
            stack[-1].separators += token
            stack[-1].parts.append([])
        elif token == "|":
            raise _Broken
        else:
            (stack[-1].parts[-1] if stack else items).append(token)
    if end != len(text):
        raise _Broken
    give_up()
    return items


def _at(items: Sequence[_Item], step: int, steps: int) -> str:
    """Return the text that parsed items give at ``step``, counted from 1."""
    waiting, texts = list(reversed(items)), []
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            texts.append(item)
        elif isinstance(item, _Edit):
            waiting += reversed(item.before if step <= item.last_step(steps) else item.after)
        else:
            waiting += reversed(item.options[(step - 1) % len(item.options)])
    return "".join(texts)


def _merged(found: Sequence[Sequence[str | float]]) -> list[Piece]:
    """Join neighbouring pieces of equal weight."""
    pieces: list[Piece] = []
    for text, weight in found:
        if pieces and pieces[-1].weight == weight:
            pieces[-1] = Piece(f"{pieces[-1].text}{text}", pieces[-1].weight)
        else:
            pieces.append(Piece(str(text), float(weight)))
    return pieces or [Piece("")]


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


_SYNTAX = re.compile(r"[\\()\[\]|:#<>]|\bAND\b|\bBREAK\b")
_SHIELD = 0xF0000  # first of the private-use characters that replace literal words during parsing


def _shielded(prompt: str, words: Iterable[str]) -> tuple[str, list[str]]:
    special = sorted((word for word in words if _SYNTAX.search(word)), key=len, reverse=True)
    for number, word in enumerate(special):
        prompt = re.sub(re.escape(word), chr(_SHIELD + number), prompt, flags=re.IGNORECASE)
    return prompt, special


def _unshielded(texts: Schedule, special: Sequence[str]) -> Schedule:
    for number, word in enumerate(special):
        texts = tuple((end, text.replace(chr(_SHIELD + number), escape(word))) for end, text in texts)
    return texts
