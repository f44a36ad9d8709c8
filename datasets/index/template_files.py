"""Loads prompt templates: a built-in set by name, or a text file with one template per line."""

from __future__ import annotations

from dreamfleet.datasets.captions import TEMPLATE_SETS
from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.storage.storage import read_text


def load_templates(name: str) -> tuple[str, ...]:
    """Return the prompt templates of a built-in set (object, style_filewords, ...) or of the file ``name``."""
    return TEMPLATE_SETS.get(name) or load_template_file(name)


def load_template_file(path: str) -> tuple[str, ...]:
    """Read a file with one template per line, skipping blank lines. Raises DataError if it has no template."""
    try:
        text = read_text(path)
    except StorageError as error:
        raise DataError(f"template file: {error}") from error
    templates = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not templates:
        raise DataError(
            f"template file {path} is empty: write one template per line, such as 'a photo of [name]'"
        )
    return templates
