"""Reads the files of other trainers: JSON, TOML, YAML and pasted command lines."""

from __future__ import annotations

import json
import os
import sys
import tomllib
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from dreamfleet.datasets.errors import UserError
from dreamfleet.trainers.imports.command_line import looks_like_command, parse_command
from dreamfleet.trainers.imports.secrets import is_secret
from dreamfleet.trainers.imports.settings import Document

MOST_BYTES = 20_000_000
_PARSERS: Mapping[str, Callable[[str], Any]] = {
    "json": json.loads,
    "toml": tomllib.loads,
    "yaml": yaml.safe_load,
}


def read_document(path: str) -> Document:
    """Read a file, or the standard input for ``-``. Raises UserError if it is missing or in no known format."""
    text = sys.stdin.read() if path == "-" else _read(path)
    if not text.strip():
        raise UserError(f"{path} is empty; give a config of another trainer or a pasted command line")
    return parse_document(text, path)


def parse_document(text: str, path: str) -> Document:
    """Parse the text of a file, whose format follows from its suffix, else from its content. Raises UserError."""
    text = text.removeprefix("\ufeff")
    suffix = os.path.splitext(path)[1].lower()
    if suffix in (".json", ".toml", ".yaml", ".yml"):
        return _parse(text, path, {".yml": "yaml"}.get(suffix, suffix[1:]))
    if looks_like_command(text):
        command = parse_command(text)
        content = {f"launcher.{name}": value for name, value in command.launcher.items()} | command.options
        # The other variables are filled in where the command uses them.
        content |= {
            f"environment.{name}": value
            for name, value in command.variables.items()
            if is_secret(name, value)
        }
        return Document(path, "command", content, command.script)
    for kind in ("json", "toml", "yaml"):
        try:
            return _parse(text, path, kind)
        except UserError:
            continue
    raise UserError(
        f"{path} is neither JSON, TOML, YAML nor a command line with a script (accelerate launch train_network.py "
        "--...)"
    )


def _read(path: str) -> str:
    try:
        if os.path.getsize(path) > MOST_BYTES:
            raise UserError(
                f"{path} has more than {MOST_BYTES // 1_000_000} MB; it is no config of a trainer"
            )
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text ({error})") from error


def _parse(text: str, path: str, kind: str) -> Document:
    try:
        content = _PARSERS[kind](text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is not {kind.upper()}: {error}") from error
    if not isinstance(content, dict | list) or not content:
        raise UserError(f"{path} has no settings: it must contain a mapping of keys")
    return Document(path, kind, content)
