"""Composes captions from the texts of several models: blocklists, templates, and rules for existing captions."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dreamfleet.datasets.captions import split_tags
from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.tools.tags import Edit, edit_caption

EXISTING = ("ignore", "replace", "append", "prepend")
BEFORE = "caption"  # the field of a template that stands for the existing caption


@dataclass(frozen=True)
class Composition:
    """How an image's caption is made of the texts of models, which are the columns by name.

    ``tags`` names the columns that are lists of tags; others are sentences. ``template``, such as
    ``{blip}, {wd}``, has the columns and the existing ``{caption}`` as fields; without it the texts are joined in
    order. ``block``: tags, and words or phrases of sentences, to remove; `*` stands for any characters of a word.
    ``existing`` decides about images with a caption: `ignore` leaves them unchanged.
    """

    columns: tuple[str, ...]
    tags: frozenset[str] = frozenset()
    template: str = ""
    block: tuple[str, ...] = ()
    existing: str = "ignore"

    def __post_init__(self) -> None:
        if self.existing not in EXISTING:
            raise DataError(f"existing {self.existing!r} does not exist; use one of {', '.join(EXISTING)}")
        for name in self.columns:
            if not re.fullmatch(r"[A-Za-z][\w-]*", name) or name in (BEFORE, "url", "sha256"):
                raise DataError(
                    f"model name {name!r}: use letters, digits, - and _, but not {BEFORE}, url or sha256"
                )
        if len(set(self.columns)) < len(self.columns):
            raise DataError(f"two models have one name: {', '.join(self.columns)}. Write --model NAME=FOLDER")
        fields_of(self.template)

    def cleaned(self, name: str, text: str) -> str:
        """Return the text of a column without what the blocklist names."""
        if not self.block:
            return text
        return edit_caption(text, Edit(remove=self.block)) if name in self.tags else without(text, self.block)

    def caption(self, texts: Mapping[str, str], before: str | None) -> str:
        """Return the caption for the cleaned texts of columns, and the caption before (None without one)."""
        if self.template:
            return fill(self.template, {**texts, BEFORE: before or ""})
        parts = [texts[name] for name in self.columns if texts.get(name)]
        made = ", ".join(parts)
        if self.existing not in ("append", "prepend") or not before or not made:
            return made or before or ""
        if self.tags.issuperset(self.columns):  # tags that are there already are not repeated
            added = tuple(split_tags(made))
            return edit_caption(before, Edit(add=added) if self.existing == "append" else Edit(prepend=added))
        return ", ".join((before, made) if self.existing == "append" else (made, before))


def fields_of(template: str) -> list[str]:
    """Return the fields of a template. Raises DataError unless all are plain names, such as {wd}."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise DataError(f"template {template!r}: {error}. Write such as '{{blip}}, {{wd}}'") from error
    fields = []
    for _, name, form, conversion in parts:
        if name is None:
            continue
        if not re.fullmatch(r"[A-Za-z][\w-]*", name) or form or conversion:
            raise DataError(
                f"template {template!r}: {{{name}}} is not a plain name. Write such as '{{blip}}, {{wd}}'"
            )
        fields.append(name)
    return fields


def fill(template: str, texts: Mapping[str, str]) -> str:
    """Return a template with its fields replaced; the commas around empty fields disappear.

    Raises DataError for a field that is no column.
    """
    if unknown := [name for name in fields_of(template) if name not in texts]:
        raise DataError(f"template {template!r}: no column {unknown[0]!r} among {', '.join(texts)}")
    made = "".join(
        text + (texts[name] or "" if name is not None else "")
        for text, name, _, _ in string.Formatter().parse(template)
    )
    return _tidy(made)


def without(sentence: str, phrases: Sequence[str]) -> str:
    """Return a sentence without phrases, which match whole words in any case."""
    for phrase in phrases:
        words = r"\s+".join(re.escape(word).replace(r"\*", r"\w*") for word in phrase.split())
        sentence = re.sub(rf"(?<!\w){words}(?!\w)", "", sentence, flags=re.IGNORECASE)
    return _tidy(sentence)


def read_blocklist(text: str) -> tuple[str, ...]:
    """Return the entries of a blocklist: one a line, without empty lines and comments after `#`."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return tuple(line for line in lines if line)


def _tidy(text: str) -> str:
    text = re.sub(r"\s+([,.;:!?])", r"\1", re.sub(r"[ \t]+", " ", text))
    text = re.sub(r"(,\s*)+,", ",", text)
    return text.strip(" ,")
