"""Classifies the files of an image folder: images, their caption files and masks, metadata tables, other files.

The index, captions, tags, masks, labels, `data prepare` and class images all use this module. A caption file or mask
belongs to the image whose full name it contains (`x.jpg.txt` to `x.jpg`), otherwise to the images with its stem
(`x.txt`). Extensions match in any case, and names in composed and decomposed Unicode form (NFC, NFD).
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
MAX_SNIFFED = 256  # maximum number of files with an unknown extension whose first bytes are read
HEAD = 32  # bytes read of each of them
LISTED_ORPHANS = 10


class ImageFolder:
    """The images of a folder on disk or in a bucket, and the files that belong to them.

    ``excluded`` maps addresses of folders to skip to a description of their content. ``bad`` lists files that should
    be images but cannot be used, ``skipped`` files that are deliberately left out; ``others`` counts all other files
    by extension.

    Raises DataError if the folder does not exist, is a run or a search, or is itself in ``excluded``.
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
        # NAME.mask.png files are images themselves if none of them matches another image.
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
            ),  # tables in deeper folders come later and override the captions of those above
        )
        self.unreadable = Pairs(name for name in names if name.lower().endswith(UNREADABLE_SUFFIXES))
        self._captions = self._sort_rest(names, {*images, *self.tables, *self.unreadable.images})

    def caption_file(self, image: str) -> str | None:
        """Return the name of an image's caption file; None if it has none (a table may contain its caption)."""
        found = self._captions.get(image)
        return min(found)[-1] if found else None

    def text_file(self, image: str) -> str:
        """Return the name of the file to write an image's caption to.

        That is its existing caption file if no other image shares it, otherwise `x.txt`, or `x.jpg.txt` if another
        image has the same stem.
        """
        existing = self.caption_file(image)
        if existing is not None and len(self.readers(existing)) == 1:
            return existing
        return self.new_text_file(image)

    def new_text_file(self, image: str) -> str:
        """Return the name of an image's caption file in a folder that has no caption files yet."""
        alone = self.pairs.lone(image) and self._folded_stems[os.path.splitext(image)[0].casefold()] == 1
        return (os.path.splitext(image)[0] if alone else image) + ".txt"

    def readers(self, file: str) -> list[str]:
        """Return the images whose caption is read from a file."""
        base = self._base(file)
        owners = self.pairs.owners(base) if base is not None else []
        return [image for image in owners if self.caption_file(image) == file]

    def shared(self) -> dict[str, list[str]]:
        """Return the caption files that several images share: name of the file -> names of the images."""
        files: dict[str, list[str]] = {}
        for image in self._captions:
            files.setdefault(str(self.caption_file(image)), []).append(image)
        return {file: images for file, images in files.items() if len(images) > 1}

    # ---- classification of the folder's files ------------------------------------------------------------------------

    def _visible(self, names: Sequence[str], excluded: Mapping[str, str]) -> list[str]:
        """Return the names outside of skipped folders; record the skipped folders and files that may be images."""
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
        """Classify the files that are neither images nor tables; return image -> its caption files with priorities.

        The lowest tuple has the highest priority; its last item is the name of the caption file.
        """
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
        """Report images with a wrong or missing extension as bad files; count all other files."""
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
        """Number of images per stem, compared as on a case-insensitive file system."""
        return Counter(os.path.splitext(image)[0].casefold() for image in self.images)

    def _find_masks(self, beside: Mapping[str, list[str]], mask_dir: str | None) -> dict[str, str]:
        """Return the masks: name of the image -> address of its mask."""
        masks: dict[str, str] = {}
        for name, owners in beside.items():
            masks |= dict.fromkeys(owners, self.storage.path(name))
        return masks | (self._masks_in(Storage(mask_dir)) if mask_dir is not None else {})

    def _masks_in(self, folder: Storage) -> dict[str, str]:
        """Return the masks in ``mask_dir``: images of any format with the name or stem of the image they mask.

        Raises DataError if the folder does not exist or none of its images matches.
        """
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
    """Return the folder with its name in the Unicode form (NFC or NFD) that exists on disk or in the bucket."""
    if storage.url.isascii() or not is_utf8(storage.url) or storage.exists():
        return storage
    forms = [Storage(unicodedata.normalize(form, storage.url)) for form in ("NFC", "NFD")]
    return next((other for other in forms if other.exists()), storage)


def _list(storage: Storage, recursive: bool, bad: list[BadFile]) -> list[str]:
    """Return the names of all files; add subfolders that cannot be listed to ``bad``. Raises DataError."""
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
