"""Parses the conditions of ``data.where``, such as ``aspect < 2 and tags has 'cat'``.

The grammar, from weakest to strongest binding: ``or``, ``and``, ``not``, then one comparison of two values:
``= == != < <= > >=``, ``in (1, 2)``, ``has 'tag'`` (a whole tag of a comma-separated caption), ``contains 'text'``
(both without regard to case), ``is null``, ``is not null``. A value is a column, a number, a text in quotes, true,
false, or a sum, difference, product or quotient of values; parentheses group.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

MAX_LENGTH = 4096  # characters of a condition
MAX_DEPTH = 50  # nested parentheses and negations


class Node(NamedTuple):
    """One operation: its name, and its operands, which are nodes.

    ``column`` and ``value`` have a name and a constant instead of nodes.
    """

    kind: str
    operands: tuple[Any, ...]


_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|\.\d+)|(?P<text>'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")"
    r"|(?P<name>[^\W\d]\w*)|(?P<sign><=|>=|==|!=|<>|[=<>(),+*/-]))"
)
_COMPARISONS = {
    "=": "equal",
    "==": "equal",
    "!=": "not_equal",
    "<>": "not_equal",
    "<": "less",
    "<=": "less_equal",
    ">": "greater",
    ">=": "greater_equal",
}
_WORDS = {"and", "or", "not", "in", "has", "contains", "is", "null", "true", "false"}
_CONSTANTS = {"true": True, "false": False}


class _Token(NamedTuple):
    kind: str  # number, text, name, word, sign or end
    text: str
    start: int


def parse_condition(text: str) -> Node:
    """Parse a condition. Raises ValueError with the position and what was expected there."""
    if len(text) > MAX_LENGTH:
        raise ValueError(f"the condition has {len(text)} characters, at most {MAX_LENGTH} are read")
    return _Parser(text).parse()


def check_condition(text: str) -> str:
    """Return a text that is a condition. Raises ValueError otherwise."""
    parse_condition(text)
    return text


def columns_of(node: Node) -> set[str]:
    """Return the names of the columns that a condition reads."""
    if node.kind == "column":
        return {node.operands[0]}
    return {name for one in node.operands if isinstance(one, Node) for name in columns_of(one)}


class _Parser:
    """Recursive descent over the tokens of one condition."""

    def __init__(self, text: str):
        self.text = text
        self.tokens = self._split()
        self.at = 0
        self.depth = 0

    def parse(self) -> Node:
        found = self._or()
        if self._now.kind != "end":
            raise self._error("and, or, or the end")
        return found

    def _split(self) -> list[_Token]:
        tokens, at = [], 0
        while self.text[at:].strip():
            match = _TOKEN.match(self.text, at)
            if match is None:
                start = at + len(self.text[at:]) - len(self.text[at:].lstrip())
                raise ValueError(f"where: cannot read {self.text[start : start + 20]!r} in {self.text!r}")
            kind = str(match.lastgroup)
            part = match[kind]
            if kind == "name" and part.lower() in _WORDS:
                kind, part = "word", part.lower()
            tokens.append(_Token(kind, part, match.start(match.lastgroup or 0)))
            at = match.end()
        return [*tokens, _Token("end", "", len(self.text))]

    @property
    def _now(self) -> _Token:
        return self.tokens[self.at]

    def _take(self, *texts: str) -> str | None:
        """Return the current word or sign and go on, if it is one of ``texts``."""
        now = self._now
        if now.kind in ("word", "sign") and now.text in texts:
            self.at += 1
            return now.text
        return None

    def _require(self, text: str) -> None:
        if self._take(text) is None:
            raise self._error(repr(text))

    def _error(self, expected: str) -> ValueError:
        found = repr(self._now.text) if self._now.kind != "end" else "the end"
        return ValueError(
            f"where: expected {expected}, found {found} at character {self._now.start + 1} of {self.text!r}"
        )

    def _chain(self, kinds: dict[str, str], part: Callable[[], Node]) -> Node:
        found = part()
        while sign := self._take(*kinds):
            found = Node(kinds[sign], (found, part()))
        return found

    def _or(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError(f"where: more than {MAX_DEPTH} nested parentheses")
        found = self._chain({"or": "or"}, lambda: self._chain({"and": "and"}, self._not))
        self.depth -= 1
        return found

    def _not(self) -> Node:
        negations = 0
        while self._take("not"):
            negations += 1
        found = self._comparison()
        return Node("not", (found,)) if negations % 2 else found

    def _comparison(self) -> Node:
        left = self._sum()
        if sign := self._take(*_COMPARISONS):
            return Node(_COMPARISONS[sign], (left, self._sum()))
        if self._take("is"):
            negated = self._take("not")
            self._require("null")
            found = Node("null", (left,))
            return Node("not", (found,)) if negated else found
        negated = self._take("not")
        if self._take("in"):
            self._require("(")
            values = [self._constant()]
            while self._take(","):
                values.append(self._constant())
            self._require(")")
            found = Node("in", (left, tuple(values)))
        elif word := self._take("has", "contains"):
            value = self._constant()
            if not isinstance(value, str):
                raise ValueError(f"where: {word} needs a text in quotes, not {value!r}, in {self.text!r}")
            found = Node(word, (left, value))
        elif negated:
            raise self._error("in, has or contains")
        else:
            return left
        return Node("not", (found,)) if negated else found

    def _sum(self) -> Node:
        return self._chain(
            {"+": "add", "-": "subtract"}, lambda: self._chain({"*": "multiply", "/": "divide"}, self._value)
        )

    def _value(self) -> Node:
        if self._take("("):
            found = self._or()
            self._require(")")
            return found
        if self._now.kind == "name":
            self.at += 1
            return Node("column", (self.tokens[self.at - 1].text,))
        return Node("value", (self._constant(),))

    def _constant(self) -> float | int | str | bool:
        negative = bool(self._take("-"))
        now = self._now
        self.at += 1
        if now.kind == "number":
            number = int(now.text) if now.text.isdigit() else float(now.text)
            return -number if negative else number
        if now.kind == "text" and not negative:
            return re.sub(r"\\(.)", r"\1", now.text[1:-1])
        if now.text in _CONSTANTS and now.kind == "word" and not negative:
            return _CONSTANTS[now.text]
        self.at -= 1
        raise self._error("a column, a number or a text in quotes")
