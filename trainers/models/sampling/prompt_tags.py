"""Finds and applies the files that prompts name in tags: ``<hypernet:NAME:0.8>``, ``<lora:NAME:TEXT_ENCODER:UNET>``."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any, ClassVar

from dreamfleet.datasets.errors import UserError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.models.adapters import Strength
from dreamfleet.trainers.models.family import DiffusionModel
from dreamfleet.trainers.models.formats import hypernetwork as hypernetworks
from dreamfleet.trainers.models.formats import lora as loras
from dreamfleet.trainers.models.lora import load_lora, set_loras
from dreamfleet.trainers.models.sampling.prompt_syntax import Tag, split_tags, strip_comments
from dreamfleet.trainers.models.stable_diffusion.hypernetwork import (
    applied_hypernetworks,
    read_network,
    require_fit,
    set_hypernetworks,
)

log = logging.getLogger(__name__)

Named = tuple[str, Strength]  # (name or address of a file, strength)


class TaggedFiles:
    """The files of one kind that apply to every image, and those that prompts can name.

    ``given`` lists the files for every image, as ``FILE`` or ``FILE:MULTIPLIER``, on disk or in a bucket. A name in a
    prompt is looked up among these files, in ``folder``, and in the folders of these files, in this order. Raises
    UserError for a missing file or folder.
    """

    tags: ClassVar[tuple[str, ...]]  # kinds of tags in prompts
    option: ClassVar[str]  # option of `dreamfleet sample`
    suffixes: ClassVar[tuple[str, ...]]

    def __init__(self, given: Sequence[str] = (), folder: str | None = None):
        self.given = [(name, Strength(by, by)) for name, by in map(split_multiplier, given)]
        for address, _ in self.given:
            if not Storage(address).exists():
                raise UserError(f"--{self.option} {address}: there is no such file")
        if folder is not None and not Storage(folder).exists():
            raise UserError(f"--{self.option}-dir {folder}: there is no such folder")
        beside = [address.rpartition("/")[0] or "." for address, _ in self.given]
        self.folders = list(dict.fromkeys([folder, *beside] if folder else beside))
        self._loaded: dict[str, Any] = {}

    def select(self, tags: Sequence[Tag]) -> tuple[Named, ...]:
        """Return the address and strength of every file that applies to a prompt with these tags, in order.

        As in the webui, the strength in the prompt overrides that of a file in ``given``. Raises UserError for a
        missing file, and for a strength that is not a number.
        """
        asked = [(self.find(name), strength) for name, strength in map(read_tag, tags)]
        taken = {address for address, _ in asked}
        return (*(one for one in self.given if one[0] not in taken), *asked)

    def find(self, name: str) -> str:
        """Return the address of the file called ``name``. Raises UserError if there is none."""
        for address, _ in self.given:
            if _stem(address) == name:
                return address
        files = [f"{name}{suffix}" for suffix in self.suffixes]
        for folder in self.folders:
            for file in files if name else ():
                if Storage(folder).exists(file):
                    return Storage(folder).path(file)
        if not self.folders:
            raise UserError(
                f"the prompt names the {self.option} {name!r}: give its file with --{self.option}, or the folder of "
                f"{' or '.join(files)} with --{self.option}-dir"
            )
        present = sorted({_stem(file) for folder in self.folders for file in self._files(folder)})
        raise UserError(
            f"the prompt names the {self.option} {name!r}, and there is no {' or '.join(files)} in "
            f"{', '.join(self.folders)}; there are: {', '.join(present) or 'none'}"
        )

    def load(self, address: str, model: DiffusionModel) -> Any:
        """Return the content of the file at an address, which is read only once. Raises errors as :meth:`read`."""
        if address not in self._loaded:
            with Storage(address).local_copy() as path:
                self._loaded[address] = self.read(path, address, model)
        return self._loaded[address]

    def read(self, path: Path, address: str, model: DiffusionModel) -> Any:
        """Read a file for a model. Raises FormatError for another kind of file, ModelError if it does not fit."""
        raise NotImplementedError

    def _files(self, folder: str) -> list[str]:
        return [file for file in Storage(folder).list() if file.endswith(self.suffixes)]


class HypernetworkFiles(TaggedFiles):
    """The hypernetworks that apply to images."""

    tags, option, suffixes = ("hypernet",), "hypernetwork", (hypernetworks.SUFFIX,)

    def read(self, path: Path, address: str, model: DiffusionModel) -> Any:
        network = read_network(path)
        require_fit(network, model.denoiser, address)
        return network


class LoraFiles(TaggedFiles):
    """The LoRAs that apply to images."""

    tags, option, suffixes = ("lora", "lyco"), "lora", loras.SUFFIXES[:2]

    def read(self, path: Path, address: str, model: DiffusionModel) -> Any:
        return load_lora(model, path)


AppliedFiles = tuple[tuple[Named, ...], tuple[Named, ...]]  # hypernetworks, LoRAs


class PromptFiles:
    """The hypernetworks and the LoRAs that prompts select by their tags."""

    def __init__(self, hypernetworks: HypernetworkFiles, loras: LoraFiles):
        self.hypernetworks, self.loras = hypernetworks, loras

    def select(self, prompt: str, *, plain: bool = False) -> tuple[str, AppliedFiles]:
        """Return a prompt without its tags, and the files that apply. ``plain``: the prompt has no tags."""
        if plain:
            return prompt, self.select("")[1]
        known = (*self.hypernetworks.tags, *self.loras.tags)
        _, tags = split_tags(strip_comments(prompt))
        for kind in dict.fromkeys(tag.kind for tag in tags if tag.kind not in known):
            log.warning("the prompt's <%s:...> is ignored; supported are <lora:...> and <hypernet:...>", kind)
        extras = (
            self.hypernetworks.select([tag for tag in tags if tag.kind in self.hypernetworks.tags]),
            self.loras.select([tag for tag in tags if tag.kind in self.loras.tags]),
        )
        text, found = split_tags(prompt, known)
        return text.strip() if found else prompt, extras

    def bind(self, model: DiffusionModel) -> Callable[[AppliedFiles], None]:
        """Return a function that applies files to a model, in addition to those that are applied now."""
        own, own_loras = applied_hypernetworks(model.denoiser), model.loras

        def apply(extras: AppliedFiles) -> None:
            networks, loras = extras
            loaded = [(self.hypernetworks.load(address, model), by.text) for address, by in networks]
            set_hypernetworks(model.denoiser, [*own, *loaded])
            set_loras(model, [*own_loras, *((self.loras.load(address, model), by) for address, by in loras)])

        return apply


def read_tag(tag: Tag) -> Named:
    """Parse ``<KIND:NAME:TEXT_ENCODER:UNET>`` or ``<KIND:NAME:te=0.5:unet=0.7>``; strengths are 1 by default.

    One number applies to both. Other options, such as the webui's ``dyn``, are ignored. Raises UserError for a strength
    that is not a number.
    """
    name, *numbers = tag.positional or [""]
    text = tag.named.get("te", numbers[0] if numbers else "1")
    unet = tag.named.get("unet", numbers[1] if len(numbers) > 1 else text)
    strengths = [_number(each) for each in (text, unet)]
    if not name.strip() or None in strengths:
        raise UserError(
            f"<{tag.kind}:{':'.join(tag.items)}> in a prompt: write <{tag.kind}:NAME:0.8>, a file's name and a number"
        )
    return name.strip(), Strength(*(each for each in strengths if each is not None))


def split_multiplier(text: str) -> tuple[str, float]:
    """Split ``FILE:0.8`` into file and multiplier; 1 if the text after the last colon is not a number."""
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
