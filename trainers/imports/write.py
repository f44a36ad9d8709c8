"""Writes a translated recipe as YAML with comments, and the report on what changed and what was left out."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from dreamfleet.trainers.imports.draft import LeftOut, Line
from dreamfleet.trainers.imports.rules import Effect

WIDTH = 110
ORDER = ("method", "model", "data", "train", "optimizer", "engine", "validation", "scaling", "tracking", "")
_LONGEST_VALUE = 60


def recipe_text(lines: Sequence[Line], head: Sequence[str]) -> str:
    """Return the YAML of a recipe: ``head`` as comments, then the sections; changed meanings are comments."""
    parts = ["\n".join(f"# {text}".rstrip() for text in head)]
    known = [line for line in lines if line.key.rpartition(".")[0] not in ORDER]
    for section in (*ORDER, *dict.fromkeys(line.key.rpartition(".")[0] for line in known)):
        rows = [line for line in lines if line.key.rpartition(".")[0] == section]
        if rows:
            indent = "  " if section else ""
            body = "\n".join(text for line in _ordered(rows) for text in _rows(line, indent))
            parts.append(f"{section}:\n{body}" if section else body)
    return "\n".join(parts) + "\n"


def report_lines(
    title: str, left: Sequence[LeftOut], defaults: Sequence[Line], missing: Sequence[tuple[str, str]]
) -> list[str]:
    """Return the report: settings without a counterpart by effect, written defaults, and missing paths."""
    found: list[str] = []
    for effect, heading in (
        (Effect.BLOCKS, "No counterpart, and the training cannot run as it was:"),
        (Effect.CHANGES, "No counterpart; changes results:"),
        (Effect.IGNORED, "No counterpart; ignored safely:"),
    ):
        rows = [_wrapped(f"{_named(entry)}: {entry.reason}") for entry in left if entry.effect is effect]
        found += ["", heading, *[line for row in rows for line in row]] if rows else []
    if defaults:
        found += ["", f"Defaults of {title} that differ from ours, written out:"]
        found += [f"  {line.key}: {_shown(line.value)}" for line in defaults]
    if missing:
        found += ["", "Paths that do not exist on this machine (--map OLD=NEW replaces their beginning):"]
        found += [f"  {where}: {path}" for where, path in missing]
    return found


def _named(entry: LeftOut) -> str:
    return entry.key if entry.value is None else f"{entry.key}: {_shown(entry.value)}"


def _shown(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH - 4, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
    )


def _ordered(rows: Sequence[Line]) -> list[Line]:
    """Return rows with the name of the method first."""
    return sorted(rows, key=lambda line: not line.key.endswith(".name"))


def _rows(line: Line, indent: str) -> Iterator[str]:
    """Yield the lines of one value: a short comment after it, a long one above."""
    name = line.key.rpartition(".")[2]
    text = yaml.safe_dump(
        {name: line.value},
        sort_keys=False,
        allow_unicode=True,
        width=10_000,
        default_flow_style=_flow(line.value),
    ).rstrip("\n")
    text = text.removeprefix("{").removesuffix("}") if _flow(line.value) else text
    comment = "; ".join(part for part in (_origin(line), line.note) if part)
    shown = textwrap.indent(text, indent)
    if not comment:
        yield shown
    elif "\n" not in shown and len(shown) + len(comment) + 4 <= WIDTH:
        yield f"{shown}  # {comment}"
    else:
        yield from textwrap.wrap(
            comment,
            WIDTH,
            initial_indent=f"{indent}# ",
            subsequent_indent=f"{indent}# ",
            break_on_hyphens=False,
        )
        yield shown


def _flow(value: Any) -> bool:
    return isinstance(value, list | tuple) and not any(isinstance(item, dict) for item in value)


def _origin(line: Line) -> str:
    """Return where a changed value comes from; an unchanged one needs no comment."""
    if line.is_default:
        return "their default"
    return f"{line.source}" if line.note and line.source else ""
