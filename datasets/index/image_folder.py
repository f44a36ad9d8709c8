"""Assigns the files of an image folder: images, their caption files and masks, tables, and files that are left out.

The index, captions, tags, masks, labels, `data prepare` and class images all use this module. A file belongs to the
image whose full name it has (`x.jpg.txt` to `x.jpg`), else to the images of its stem (`x.txt`). Extensions match in any
case, names in either Unicode form.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from types import MappingProxyType

from dreamfleet.datasets.config import CAPTION_EXTENSIONS
from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.images.image_formats import (
    IMAGE_SUFFIXES,
    MASK_ENDING,
    OTHER_ENDINGS,
    UNREADABLE_SUFFIXES,
    format_of,
)
from dreamfleet.datasets.index.exclusions import (
    MASKS,
    NOT_UTF8,
    RUN,
    BadFile,
    Folders,
    Skipped,
    folders_inside,
    is_hidden,
    is_system_file,
    is_utf8,
    printable,
)
from dreamfleet.datasets.index.file_pairing import Pairs, composed, masks_beside
from dreamfleet.datasets.storage.storage import Storage

TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
MAX_SNIFFED = 256  # files of unknown extension whose first bytes are read
HEAD = 32  # bytes of each
LISTED_ORPHANS = 10


class ImageFolder:
    """The images of a folder on disk or in a bucket, and the files that belong to them.

    ``excluded`` are addresses of folders to skip, with their content. ``bad`` are files that should be images but
    cannot be used, ``skipped`` files that are left out on purpose, and ``others`` counts all other files by
    extension.

    Raises DataError when the folder does not exist, is a run or a search, or is itself in ``excluded``.
    """

    def __init__(
        self,
        place: Storage | str,
        *,
        recursive: bool = True,
        caption_extension: Sequence[str] = CAPTION_EXTENSIONS,
        mask_dir: str | None = None,
        excluded: Mapping[str, str] = MappingProxyType({}),
    ):
        self.storage = _existing_unicode_form(place if isinstance(place, Storage) else Storage(place))
        self.bad: list[BadFile] = []
        self.skipped: list[Skipped] = []
        self.others: Counter[str] = Counter()
        if not is_utf8(self.storage.url):
            raise DataError(f"folder {printable(self.storage.url)}: {NOT_UTF8}")
        excluded = excluded if mask_dir is None else {mask_dir: MASKS, **excluded}
        names = self._visible(_list(self.storage, recursive, self.bad), excluded)
        self._extensions = tuple(extension.lower() for extension in caption_extension)
        images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
        beside = masks_beside(images)
        plain = {name for name in images if name.lower().endswith(MASK_ENDING)}
        # If no image has such a mask, files with such names are images.
        lost = plain - beside.keys() if plain & beside.keys() else set()
        reason = "a mask (NAME.mask.png) without its image. Rename it if it is an image"
        self.bad += [BadFile(self.storage.path(name), reason) for name in sorted(lost)]
        self.pairs = Pairs(name for name in images if name not in beside and name not in lost)
        self.images = self.pairs.images
        self.masks = self._find_masks(beside, mask_dir)
        self.tables = sorted(
            (name for name in names if name.rpartition("/")[2].lower() in TABLES),
            key=lambda name: (
                name.count("/"),
                name,
            ),  # deeper tables are nearer to their images, and have priority
        )
        self.unreadable = Pairs(name for name in names if name.lower().endswith(UNREADABLE_SUFFIXES))
        self._captions = self._sort_rest(names, {*images, *self.tables, *self.unreadable.images})

    def caption_file(self, image: str) -> str | None:
        """Return the name of an image's caption file; None if only a table may have the caption."""
        found = self._captions.get(image)
        return min(found)[-1] if found else None

    def text_file(self, image: str) -> str:
        """Return the file to write an image's caption to: `x.txt`, or `x.jpg.txt` if another image has that stem.

        An existing caption file that no other image shares is kept.
        """
        existing = self.caption_file(image)
        if existing is not None and len(self.readers(existing)) == 1:
            return existing
        return self.new_text_file(image)

    def new_text_file(self, image: str) -> str:
        """Return the file to write an image's caption to in a folder without caption files."""
        alone = self.pairs.lone(image) and self._folded_stems[os.path.splitext(image)[0].casefold()] == 1
        return (os.path.splitext(image)[0] if alone else image) + ".txt"

    def readers(self, file: str) -> list[str]:
        """Return the images that take their caption from a file."""
        base = self._base(file)
        owners = self.pairs.owners(base) if base is not None else []
        return [image for image in owners if self.caption_file(image) == file]

    def shared(self) -> dict[str, list[str]]:
        """Return the caption files that several images share, each with these images."""
        files: dict[str, list[str]] = {}
        for image in self._captions:
            files.setdefault(str(self.caption_file(image)), []).append(image)
        return {file: images for file, images in files.items() if len(images) > 1}

    # ---- what is in the folder ---------------------------------------------------------------------------------------

    def _visible(self, names: Sequence[str], excluded: Mapping[str, str]) -> list[str]:
        """Return the names without skipped folders and files; record those that may contain images."""
        folders = Folders(names, folders_inside(self.storage, excluded))
        if made := folders.of_root:
            what = "its samples/ folder" if made == RUN else "a samples/ folder in it"
            raise DataError(
                f"{self.storage.url} is {made}, not a folder of images; to use its samples, name {what}"
            )
        left: dict[tuple[str, str], list[str]] = {}
        kept: list[str] = []
        for name in names:
            folder, _, file = name.rpartition("/")
            outer = folders.why(folder)
            if outer[1]:
                left.setdefault(outer, []).append(file)
            elif is_system_file(file):
                self.others["hidden and system files"] += 1
            elif not is_utf8(file):
                self.bad.append(BadFile(printable(self.storage.path(name)), NOT_UTF8))
            else:
                kept.append(name)
        for (folder, reason), files in left.items():
            images = sum(file.lower().endswith(IMAGE_SUFFIXES) for file in files)
            if reason == NOT_UTF8:
                reason = f"folder of {len(files)} files: {NOT_UTF8}"
                self.bad.append(BadFile(printable(self.storage.path(folder)), reason))
            elif images:
                self.skipped.append(Skipped(printable(self.storage.path(folder)), reason, len(files)))
            else:
                self.others["hidden and system files"] += len(files)
        return kept

    def _sort_rest(
        self, names: Sequence[str], known: set[str]
    ) -> dict[str, list[tuple[bool, int, bool, str]]]:
        """Assign the files that are neither images nor tables: image -> its caption files, each with its priority."""
        captions: dict[str, list[tuple[bool, int, bool, str]]] = {}
        orphans: list[str] = []
        unknown: list[str] = []
        for name in names:
            if name in known:
                continue
            base = self._base(name)
            if base is not None:
                owners = self.pairs.owners(base)
                for image in owners:
                    stem = os.path.splitext(image)[0]
                    rank = self._rank(name[len(base) :].lower())
                    captions.setdefault(image, []).append(
                        (composed(base) == composed(stem), rank, base not in (image, stem), name)
                    )
                if not owners and not self.unreadable.owners(base):
                    orphans.append(name)
            else:
                unknown.append(name)
        self.bad += [
            BadFile(
                self.storage.path(name),
                f"{os.path.splitext(name)[1]} files are not supported. Convert it to PNG or JPEG, or move it away",
            )
            for name in self.unreadable.images
        ]
        if orphans:
            some = ", ".join(orphans[:LISTED_ORPHANS]) + (", ..." if len(orphans) > LISTED_ORPHANS else "")
            self.skipped.append(Skipped(self.storage.url, f"captions without an image: {some}", len(orphans)))
        self._sniff(unknown)
        return captions

    def _sniff(self, names: Sequence[str]) -> None:
        """Find images among files with another extension or without one; count the others."""
        looked = 0
        for name in names:
            ending = os.path.splitext(name)[1].lower()
            kind = None
            if ending not in OTHER_ENDINGS and looked < MAX_SNIFFED:
                looked += 1
                with suppress(StorageError, OSError, ValueError):
                    kind = format_of(self.storage.read_bytes(name, end=HEAD))
            if kind:
                described = f"extension {ending}" if ending else "no extension"
                self.bad.append(
                    BadFile(
                        self.storage.path(name),
                        f"a {kind} image with {described}. Rename it to NAME.{kind.lower()}",
                    )
                )
            else:
                self.others[ending or "no ending"] += 1

    def _base(self, name: str) -> str | None:
        """Return the name without the extension of a caption file; None for other files."""
        for extension in self._extensions:
            if name[-len(extension) :].lower() == extension:
                return name[: -len(extension)]
        return None

    def _rank(self, extension: str) -> int:
        return next(n for n, known in enumerate(self._extensions) if extension.endswith(known))

    @cached_property
    def _folded_stems(self) -> Counter[str]:
        """Count images by stem as case-insensitive file systems compare them."""
        return Counter(os.path.splitext(image)[0].casefold() for image in self.images)

    def _find_masks(self, beside: Mapping[str, list[str]], mask_dir: str | None) -> dict[str, str]:
        """Return the mask of each image: name of the image -> address of the mask."""
        masks: dict[str, str] = {}
        for name, owners in beside.items():
            masks |= dict.fromkeys(owners, self.storage.path(name))
        return masks | (self._masks_in(Storage(mask_dir)) if mask_dir is not None else {})

    def _masks_in(self, folder: Storage) -> dict[str, str]:
        """Return the masks in ``mask_dir``, which have the name or stem of their image, in any format."""
        try:
            if not folder.exists():
                raise DataError(f"data.mask_dir: folder {folder.url} does not exist. Check the path")
            names = [
                name
                for name in folder.list("", True)
                if name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden(name)
            ]
        except StorageError as error:
            raise DataError(f"data.mask_dir: {error}") from error

        def closeness(name: str) -> int:
            return 2 if self.pairs.named(name) else bool(self.pairs.named(os.path.splitext(name)[0]))

        found: dict[str, str] = {}
        for name in sorted(names, key=closeness):  # later ones have priority
            owners = self.pairs.named(name) or self.pairs.owners(os.path.splitext(name)[0])
            found |= dict.fromkeys(owners, folder.path(name))
        if not found:
            raise DataError(
                f"data.mask_dir: none of the {len(names)} images in {folder.url} has the name of a training image. "
                "The mask of cat.jpg is cat.png or cat.jpg there, in the same subfolder"
            )
        return found


def _existing_unicode_form(storage: Storage) -> Storage:
    """Return the folder, under the Unicode form of its name that exists."""
    if storage.url.isascii() or not is_utf8(storage.url) or storage.exists():
        return storage
    forms = [Storage(unicodedata.normalize(form, storage.url)) for form in ("NFC", "NFD")]
    return next((other for other in forms if other.exists()), storage)


def _list(storage: Storage, recursive: bool, bad: list[BadFile]) -> list[str]:
    """Return the names of all files; subfolders that cannot be listed are added to ``bad``."""
    try:
        if not storage.exists():
            raise DataError(
                f"folder {storage.url} does not exist. Check the path (relative ones start at the recipe)"
            )
        if storage.is_local and not os.path.isdir(storage.url):
            raise DataError(f"{storage.url} is a file: give the folder that contains it")
        return storage.list(
            "", recursive, on_error=lambda place, error: bad.append(BadFile(printable(place), str(error)))
        )
    except StorageError as error:
        raise DataError(f"images: {error}") from error
