"""Parses pasted command lines: ``accelerate launch --mixed_precision=fp16 train_network.py --network_dim=16 ...``."""

from __future__ import annotations

import re
import shlex
from typing import Any, NamedTuple

from dreamfleet.datasets.errors import UserError

_SCRIPT = re.compile(r"(^|[/\\])(?P<name>[\w\-]+)\.py$")
_ASSIGNMENT = re.compile(r"^(?:export\s+|set\s+|\$env:)?(?P<name>[A-Za-z_]\w*)\s*=\s*(?P<value>.*)$")


class CommandLine(NamedTuple):
    """A parsed command: the script, its options, those of the launcher, and variables that were set before it."""

    script: str
    options: dict[str, Any]
    launcher: dict[str, Any]
    variables: dict[str, str]


def looks_like_command(text: str) -> bool:
    """Return whether text contains a Python script followed by an option."""
    return bool(re.search(r"[\w\-]+\.py[\"']?(\s|\\|`|\^)+(.*\n)*?.*--\w", text)) or (
        text.lstrip().startswith("--")
    )


def parse_command(text: str) -> CommandLine:
    """Parse a pasted command line. Raises UserError if it has unbalanced quotes or several scripts.

    Lines that end with a backslash (sh), a caret (cmd) or a backtick (PowerShell) continue; lines before the command
    may set variables, which replace ``$NAME`` and ``${NAME}`` in it.
    """
    lines = re.sub(r"[ \t]*[\\^`][ \t]*\r?\n", " ", text).splitlines()
    variables: dict[str, str] = {}
    words: list[str] = []
    for line in (line.strip() for line in lines):
        assigned = _ASSIGNMENT.match(line)
        if not line or line.startswith(("#", "```", "cd ", "pip ")):
            continue
        if assigned and ".py" not in line and not words:
            variables[assigned["name"]] = " ".join(_split(assigned["value"]))
            continue
        words += _split(line)
    words = [_substitute(word, variables) for word in words]
    scripts = [number for number, word in enumerate(words) if _SCRIPT.search(word)]
    if len(scripts) > 1:
        names = ", ".join(words[number] for number in scripts)
        raise UserError(f"the text contains several commands ({names}); import one at a time")
    at = scripts[0] if scripts else -1
    found = _SCRIPT.search(words[at]) if scripts else None
    return CommandLine(
        found["name"] if found else "", _options(words[at + 1 :]), _options(words[: max(at, 0)]), variables
    )


def _split(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=False)
    lexer.whitespace_split = True
    lexer.commenters = ""
    lexer.escape = "" if re.search(r"[A-Za-z]:\\", line) else "\\"
    try:
        return list(lexer)
    except ValueError as error:
        raise UserError(f"the command line cannot be read ({error}): {line[:80]}") from error


def _substitute(word: str, variables: dict[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        return variables.get(match[1] or match[2], match[0])

    return re.sub(r"\$(?:\{(\w+)\}|(?:env:)?(\w+))", value, word)


def _options(words: list[str]) -> dict[str, Any]:
    """Return the values of options: True for a switch, a list for several values; of a repeated one, the last."""
    found: dict[str, Any] = {}
    name = ""
    for word in words:
        if re.match(r"^--?[A-Za-z]", word):
            name, equals, value = word.lstrip("-").partition("=")
            name = name.replace("-", "_")
            found[name] = value if equals else True
        elif name:
            before = found[name]
            found[name] = (
                word if before is True else [*(before if isinstance(before, list) else [before]), word]
            )
    return found
