"""The built-in source of images that are named one by one: ``list://["/data/a.png", "s3://bucket/b.png"]``."""

from __future__ import annotations

import json
from collections.abc import Sequence

from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.index.caption_files import Captions
from dreamfleet.datasets.index.exclusions import BadFile
from dreamfleet.datasets.index.file_pairing import composed
from dreamfleet.datasets.index.image_folder import ImageFolder
from dreamfleet.datasets.index.sources import Listing, ScanOptions, Source, SourceImage
from dreamfleet.datasets.json_text import json_text

SCHEME = "list"


class ListSource(Source):
    """Reads images from any folders and buckets, in the order of the list, with the captions and masks beside them."""

    def matches(self, url: str) -> bool:
        """Return False: only ``list://`` URLs are lists."""
        return False

    def scan(self, url: str, options: ScanOptions) -> Listing:
        """List the images with their captions and masks; images that do not exist are reported as bad.

        Raises DataError if the URL is not a list, or if a folder or a caption cannot be read.
        """
        found: dict[str, SourceImage | str] = dict.fromkeys(read_list(url), "it does not exist")
        by_folder: dict[str, list[str]] = {}
        for uri in found:
            by_folder.setdefault(uri.rpartition("/")[0] or "/", []).append(uri)
        for folder, uris in by_folder.items():
            try:
                files = ImageFolder(
                    folder,
                    recursive=False,
                    caption_extension=options.caption_extension,
                    mask_dir=options.mask_dir,
                    excluded=options.excluded,
                )
            except (DataError, StorageError) as error:
                found |= dict.fromkeys(uris, str(error))
            else:
                found |= _find(files, uris, options)
        return Listing(
            images=[image for image in found.values() if isinstance(image, SourceImage)],
            bad=[BadFile(uri, reason) for uri, reason in found.items() if isinstance(reason, str)],
        )

    def count(self, url: str, options: ScanOptions) -> int:
        """Return the number of images in the list; none of them is looked for."""
        return len(read_list(url))


def list_url(uris: Sequence[str]) -> str:
    """Return the URL of images given by absolute paths and addresses, for ``data.instance_data_dir``."""
    return f"{SCHEME}://{json_text(list(uris))}"


def read_list(url: str) -> list[str]:
    """Return the images of a ``list://`` URL, each once. Raises DataError if it does not hold a list of addresses."""
    text = url.removeprefix(f"{SCHEME}://")
    try:
        uris = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{url}: not a JSON list ({error}). Write {list_url(['/data/a.png'])}") from error
    if not isinstance(uris, list) or not uris or not all(isinstance(uri, str) and uri for uri in uris):
        raise DataError(
            f"{url}: not a list of images. Write {list_url(['/data/a.png', 's3://bucket/b.png'])}"
        )
    if relative := [uri for uri in uris if "://" not in uri and not uri.startswith("/")]:
        raise DataError(f"{url}: {relative[0]} is a relative path. Write absolute paths and addresses")
    return list(dict.fromkeys(uris))


def _find(files: ImageFolder, uris: Sequence[str], options: ScanOptions) -> dict[str, SourceImage | str]:
    """Return the image, or the reason why it cannot be used, of each URI in a folder."""
    names = {composed(name): name for name in files.images}
    bad = {bad.uri: bad.reason for bad in files.bad}
    wanted = {uri: names.get(composed(uri.rpartition("/")[2])) for uri in uris}
    present = [name for name in wanted.values() if name is not None]
    captions = dict(zip(present, Captions(files, options.caption_column).of_all(present), strict=True))
    missing = "it does not exist, or is not an image. Check the path"
    return {
        uri: bad.get(uri, missing)
        if name is None
        else SourceImage(files.storage.path(name), captions[name], mask=files.masks.get(name))
        for uri, name in wanted.items()
    }
