"""Hypernetworks by name: the webui's ``<hypernet:NAME:0.8>`` in prompts, and the files that names stand for."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from dreamfleet.datasets.errors import UserError
from dreamfleet.datasets.storage import Storage
from dreamfleet.trainers.sd.formats.hypernetwork import SUFFIX, read_hypernetwork
from dreamfleet.trainers.sd.hypernetwork import Hypernetwork, require_fit

Named = tuple[str, float]  # a name or an address, and a multiplier

_TAG = re.compile(r"<hypernet:([^<>]*)>")


class Shelf:
    """The hypernetworks at hand: files that every picture is drawn with, and those that prompts name.

    ``given``: ``FILE`` or ``FILE:MULTIPLIER``, on disk or in a bucket. A prompt's names are looked for among these
    files, in ``folder`` and beside these files, in this order. Raises UserError for a file that is not there.
    """

    def __init__(self, given: Sequence[str] = (), folder: str | None = None):
        self.given = [split_multiplier(text) for text in given]
        for address, _ in self.given:
            if not Storage(address).exists():
                raise UserError(f"--hypernetwork {address}: there is no such file")
        if folder is not None and not Storage(folder).exists():
            raise UserError(f"--hypernetwork-dir {folder}: there is no such folder")
        beside = [address.rpartition("/")[0] or "." for address, _ in self.given]
        self.folders = list(dict.fromkeys([folder, *beside] if folder else beside))
        self._loaded: dict[str, Hypernetwork] = {}

    def arrange(self, prompt: str) -> tuple[str, tuple[Named, ...]]:
        """Return a prompt without its tags, and what it is drawn with: address and multiplier, in order.

        A file of ``given`` that the prompt names itself has the prompt's multiplier, as in the webui.
        """
        text, named = split_tags(prompt)
        asked = [(self.find(name), multiplier) for name, multiplier in named]
        taken = {address for address, _ in asked}
        return text, (*(one for one in self.given if one[0] not in taken), *asked)

    def find(self, name: str) -> str:
        """Return the address of the hypernetwork called ``name``. Raises UserError when there is none."""
        for address, _ in self.given:
            if _stem(address) == name:
                return address
        for folder in self.folders:
            if name and Storage(folder).exists(f"{name}{SUFFIX}"):
                return Storage(folder).path(f"{name}{SUFFIX}")
        if not self.folders:
            raise UserError(
                f"the prompt asks for the hypernetwork {name!r}: give its file with --hypernetwork, or the folder of "
                f"{name}{SUFFIX} with --hypernetwork-dir"
            )
        there = sorted({_stem(file) for folder in self.folders for file in _files(folder)})
        raise UserError(
            f"the prompt asks for the hypernetwork {name!r}, and there is no {name}{SUFFIX} in "
            f"{', '.join(self.folders)}; there are: {', '.join(there) or 'none'}"
        )

    def load(self, address: str, unet: Any) -> Hypernetwork:
        """Read the hypernetwork at an address, once. Raises ModelError when it does not go with the U-Net."""
        if address not in self._loaded:
            with Storage(address).local_copy() as path:
                network = read_hypernetwork(path).network
            require_fit(network, unet, address)
            self._loaded[address] = network
        return self._loaded[address]


def split_tags(prompt: str) -> tuple[str, list[Named]]:
    """Split ``a cat <hypernet:NAME:0.8>`` into its text and the names with multipliers, 1 when left out.

    Raises UserError for a multiplier that is no number.
    """
    found = []
    for tag in _TAG.finditer(prompt):
        name, colon, number = tag[1].partition(":")
        multiplier = _number(number) if colon else 1.0
        if not name.strip() or multiplier is None:
            raise UserError(f"{tag[0]} in a prompt: write <hypernet:NAME:0.8>, a file's name and a number")
        found.append((name.strip(), multiplier))
    return (_TAG.sub("", prompt).strip(), found) if found else (prompt, found)


def split_multiplier(text: str) -> Named:
    """Split ``FILE:0.8`` into file and multiplier; a text without one, or with another colon, is a file at 1."""
    head, _, tail = text.rpartition(":")
    multiplier = _number(tail) if head else None
    return (text, 1.0) if multiplier is None else (head, multiplier)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _stem(address: str) -> str:
    return PurePath(address).stem


def _files(folder: str) -> list[str]:
    return [file for file in Storage(folder).list() if file.endswith(SUFFIX)]
