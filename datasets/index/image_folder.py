"""Which files of an image folder belong together: each image's caption file and mask, the tables, what is left out.

The one place that knows: the index, captions, tags, masks, labels, `data prepare` and class images all ask it. A file
belongs to the image whose whole name it carries (`x.jpg.txt` to `x.jpg`), else to the images of its stem (`x.txt`).
Endings match in any case, names in either Unicode form.
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
    inside_of,
    is_hidden,
    is_system_file,
    is_utf8,
    printable,
)
from dreamfleet.datasets.index.file_pairing import Pairs, composed, masks_beside
from dreamfleet.datasets.storage.storage import Storage

TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SNIFFED = 256  # files without a known ending that are looked into, at most
HEAD = 32  # bytes of each
ORPHANS_TOLD = 10


class ImageFolder:
    """The files of a folder on disk or in a bucket, sorted into images and what belongs to them.

    ``apart``: addresses of folders that hold something else, and what; where they lie inside, they are passed over.
    ``bad`` are files that should be images and cannot be, ``skipped`` what is passed over rightly, and ``others``
    counts the rest by ending.

    Raises DataError when the folder is not there, is a run itself, or is among ``apart``.
    """

    def __init__(
        self,
        place: Storage | str,
        *,
        recursive: bool = True,
        caption_extension: Sequence[str] = CAPTION_EXTENSIONS,
        mask_dir: str | None = None,
        apart: Mapping[str, str] = MappingProxyType({}),
    ):
        self.storage = _in_its_unicode_form(place if isinstance(place, Storage) else Storage(place))
        self.bad: list[BadFile] = []
        self.skipped: list[Skipped] = []
        self.others: Counter[str] = Counter()
        if not is_utf8(self.storage.url):
            raise DataError(f"folder {printable(self.storage.url)}: {NOT_UTF8}")
        apart = apart if mask_dir is None else {mask_dir: MASKS, **apart}
        names = self._visible(_list(self.storage, recursive, self.bad), apart)
        self._extensions = tuple(extension.lower() for extension in caption_extension)
        images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
        beside = masks_beside(images)
        plain = {name for name in images if name.lower().endswith(MASK_ENDING)}
        # Where no image has such a mask, files that are called so are images.
        lost = plain - beside.keys() if plain & beside.keys() else set()
        reason = "a mask (NAME.mask.png) without its image. Rename it if it is none"
        self.bad += [BadFile(self.storage.path(name), reason) for name in sorted(lost)]
        self.pairs = Pairs(name for name in images if name not in beside and name not in lost)
        self.images = self.pairs.images
        self.masks = self._find_masks(beside, mask_dir)
        self.tables = sorted(
            (name for name in names if name.rpartition("/")[2].lower() in TABLES),
            key=lambda name: (name.count("/"), name),  # deeper ones are nearer to their images: last
        )
        self.unreadable = Pairs(name for name in names if name.lower().endswith(UNREADABLE_SUFFIXES))
        self._captions = self._sort_rest(names, {*images, *self.tables, *self.unreadable.images})

    def caption_file(self, image: str) -> str | None:
        """Return the file that an image's caption is in, by name; None where only a table may have it."""
        found = self._captions.get(image)
        return min(found)[-1] if found else None

    def text_file(self, image: str) -> str:
        """Return the file that a caption of an image is written to: `x.txt`, or `x.jpg.txt` where it shares its stem.

        A caption file that is there, and no other image's, is that file.
        """
        there = self.caption_file(image)
        if there is not None and len(self.readers(there)) == 1:
            return there
        return self.new_text_file(image)

    def new_text_file(self, image: str) -> str:
        """Return the file that a caption of an image is written to in a folder where there is none yet."""
        alone = self.pairs.lone(image) and self._folded_stems[os.path.splitext(image)[0].casefold()] == 1
        return (os.path.splitext(image)[0] if alone else image) + ".txt"

    def readers(self, file: str) -> list[str]:
        """Return the images whose caption is in a file."""
        base = self._base(file)
        owners = self.pairs.owners(base) if base is not None else []
        return [image for image in owners if self.caption_file(image) == file]

    def shared(self) -> dict[str, list[str]]:
        """Return the caption files that several images read, and those images."""
        files: dict[str, list[str]] = {}
        for image in self._captions:
            files.setdefault(str(self.caption_file(image)), []).append(image)
        return {file: images for file, images in files.items() if len(images) > 1}

    # ---- what is in the folder ---------------------------------------------------------------------------------------

    def _visible(self, names: Sequence[str], apart: Mapping[str, str]) -> list[str]:
        """Leave out the folders and files that hold no training images; say so where images may be among them."""
        folders = Folders(names, inside_of(self.storage, apart))
        if made := folders.of_root:
            what = "its samples/ folder" if made == RUN else "a samples/ folder in it"
            raise DataError(
                f"{self.storage.url} is {made}, not a folder of images: name {what} if those are meant"
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
                told = f"folder of {len(files)} files: {NOT_UTF8}"
                self.bad.append(BadFile(printable(self.storage.path(folder)), told))
            elif images:
                self.skipped.append(Skipped(printable(self.storage.path(folder)), reason, len(files)))
            else:
                self.others["hidden and system files"] += len(files)
        return kept

    def _sort_rest(
        self, names: Sequence[str], known: set[str]
    ) -> dict[str, list[tuple[bool, int, bool, str]]]:
        """Sort the files that are neither images nor tables -> image: its caption files, each with its rank."""
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
                f"{os.path.splitext(name)[1]} files cannot be read. Convert it to PNG or JPEG, or move it away",
            )
            for name in self.unreadable.images
        ]
        if orphans:
            some = ", ".join(orphans[:ORPHANS_TOLD]) + (", ..." if len(orphans) > ORPHANS_TOLD else "")
            self.skipped.append(Skipped(self.storage.url, f"captions without an image: {some}", len(orphans)))
        self._look_into(unknown)
        return captions

    def _look_into(self, names: Sequence[str]) -> None:
        """Find images among files of other endings, or of none; count the rest."""
        looked = 0
        for name in names:
            ending = os.path.splitext(name)[1].lower()
            kind = None
            if ending not in OTHER_ENDINGS and looked < SNIFFED:
                looked += 1
                with suppress(StorageError, OSError, ValueError):
                    kind = format_of(self.storage.read_bytes(name, end=HEAD))
            if kind:
                told = f"ending {ending}" if ending else "no ending"
                self.bad.append(
                    BadFile(
                        self.storage.path(name),
                        f"a {kind} image with {told}. Rename it to NAME.{kind.lower()}",
                    )
                )
            else:
                self.others[ending or "no ending"] += 1

    def _base(self, name: str) -> str | None:
        """Return the name without a caption's ending; None for a file that is no caption."""
        for extension in self._extensions:
            if name[-len(extension) :].lower() == extension:
                return name[: -len(extension)]
        return None

    def _rank(self, extension: str) -> int:
        return next(n for n, known in enumerate(self._extensions) if extension.endswith(known))

    @cached_property
    def _folded_stems(self) -> Counter[str]:
        """Count the images by stem as disks do that know no upper case."""
        return Counter(os.path.splitext(image)[0].casefold() for image in self.images)

    def _find_masks(self, beside: Mapping[str, list[str]], mask_dir: str | None) -> dict[str, str]:
        """Say which mask belongs to which image: image's name -> mask's address."""
        masks: dict[str, str] = {}
        for name, owners in beside.items():
            masks |= dict.fromkeys(owners, self.storage.path(name))
        return masks | (self._masks_in(Storage(mask_dir)) if mask_dir is not None else {})

    def _masks_in(self, folder: Storage) -> dict[str, str]:
        """Return the masks in a folder of their own: the image's name or stem, of any format."""
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
        for name in sorted(names, key=closeness):  # the later one stays
            owners = self.pairs.named(name) or self.pairs.owners(os.path.splitext(name)[0])
            found |= dict.fromkeys(owners, folder.path(name))
        if not found:
            raise DataError(
                f"data.mask_dir: none of the {len(names)} images in {folder.url} is called as a training image. "
                "The mask of cat.jpg is cat.png or cat.jpg there, in the same subfolder"
            )
        return found


def _in_its_unicode_form(storage: Storage) -> Storage:
    """Return the folder itself or, where only its name in the other Unicode form is there, that one."""
    if storage.url.isascii() or not is_utf8(storage.url) or storage.exists():
        return storage
    forms = [Storage(unicodedata.normalize(form, storage.url)) for form in ("NFC", "NFD")]
    return next((other for other in forms if other.exists()), storage)


def _list(storage: Storage, recursive: bool, bad: list[BadFile]) -> list[str]:
    """List the names of all files; subfolders that cannot be listed go to ``bad``."""
    try:
        if not storage.exists():
            raise DataError(
                f"folder {storage.url} does not exist. Check the path (relative ones start at the recipe)"
            )
        if storage.is_local and not os.path.isdir(storage.url):
            raise DataError(f"{storage.url} is a file: name the folder of images it is in")
        return storage.list(
            "", recursive, on_error=lambda place, error: bad.append(BadFile(printable(place), str(error)))
        )
    except StorageError as error:
        raise DataError(f"images: {error}") from error
