"""Packages the files of a job: the resolved recipe, and the local files that it names."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from dreamfleet.datasets.errors import RecipeError, StorageError
from dreamfleet.datasets.index.concepts import load_concepts
from dreamfleet.datasets.index.exclusions import is_utf8
from dreamfleet.datasets.index.sets import load_class_images
from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.path_field import MODEL_SUFFIXES, NamedPath, is_under, map_paths
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.driver.preflight import check_inputs
from dreamfleet.trainers.recipe import Recipe

MIB = 2**20
# Ray keeps every package in the head node's memory and refuses 512 MiB; larger image sets belong in a bucket.
MAX_PACKAGE_BYTES = 200 * MIB
RECIPE_FILE = "recipe.yaml"
START_FILE = "start.sh"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # equal files give equal archives, which Ray uploads once


@dataclass(frozen=True)
class Package:
    """A recipe whose local paths are relative to the package, and its files: path in the package -> local path.

    ``texts``: further files by their path in the package, with their content.
    """

    recipe: Recipe
    files: dict[str, str]
    texts: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Total size of the files in bytes."""
        return sum(os.path.getsize(file) for file in self.files.values())

    @property
    def digest(self) -> str:
        """Hash of the recipe, the texts and the content of all files."""
        digest = hashlib.sha256(json_text([self.recipe.to_yaml(), dict(self.texts)]).encode())
        for name, file in sorted(self.files.items()):
            with open(file, "rb") as source:
                digest.update(name.encode() + hashlib.file_digest(source, "sha256").digest())
        return digest.hexdigest()[:16]

    def write(self, folder: Path) -> Path:
        """Write the package as a zip file into ``folder`` and return its path."""
        path = folder / "package.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name, text in {
                RECIPE_FILE: self.recipe.to_yaml(),
                START_FILE: start_script().read_text(),
                **self.texts,
            }.items():
                archive.writestr(zipfile.ZipInfo(name, _EPOCH), text)
            for name, file in sorted(self.files.items()):
                with open(file, "rb") as source, archive.open(zipfile.ZipInfo(name, _EPOCH), "w") as target:
                    while block := source.read(MIB):
                        target.write(block)
        return path


def pack(
    recipe: Recipe,
    *,
    shared: Sequence[str] = (),
    resume: bool = False,
    limit: int = MAX_PACKAGE_BYTES,
    makes_cache: bool = False,
) -> Package:
    """Choose the files that a recipe's job needs; reads names and sizes, writes nothing.

    URLs (``s3://``) and paths under ``shared``, folders that every machine of the cluster mounts under the same name,
    are not changed. Every other local file or folder that the recipe names is packaged, with the files that belong to
    it; with ``resume``, a missing start file is not an error. Raises RecipeError for a local ``output_dir`` (or a local
    cache that the job writes), for missing files, and for more than ``limit`` bytes, naming the largest path.
    """

    def stays(path: str) -> bool:
        return is_under(path, shared) or "://" in path

    key, kept = (
        ("data.cache_dir", recipe.data.cache_dir) if makes_cache else ("output_dir", recipe.output_dir)
    )
    if kept is not None and not stays(kept):
        raise RecipeError(
            f"{key} {kept} is a folder of this machine; the job runs on others. Use {key}=s3://BUCKET/PREFIX, or add "
            f"--shared {os.path.dirname(kept)} if every machine of the cluster has that folder (NFS, or one machine)"
        )
    local = LocalFiles(stays, resume=resume)
    packed = recipe
    if isinstance(recipe.data.concepts_list, str) and not stays(recipe.data.concepts_list):
        # The folders are relative to concepts_list, whose location changes in the package.
        data = recipe.data.model_copy(update={"concepts_list": load_concepts(recipe.data)})
        packed = recipe.model_copy(update={"data": data})
    packed = map_paths(packed, local.take)
    local.refuse_more_than(limit)
    if not makes_cache:
        _refuse_missing_class_images(recipe, stays)
    return Package(packed, local.files)


def start_script() -> Path:
    """Return the path of the script that runs Python in a job."""
    return Path(__file__).with_name(START_FILE)


def check_here(recipe: Recipe, *, makes_cache: bool = False) -> None:
    """Check images and model before the upload if they are on this machine; a job takes minutes to fail."""
    if makes_cache:  # the cache does not exist yet
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"cache_dir": None})})
    if all(os.path.exists(named.path) for named in recipe.paths if not named.field.per_machine):
        check_inputs(recipe)


class LocalFiles:
    """The local files that a recipe names, and their paths in the package; ``start``: files that it has already."""

    def __init__(
        self, stays: Callable[[str], bool], *, resume: bool, start: Mapping[str, str] = MappingProxyType({})
    ):
        self.stays, self.resume = stays, resume
        self.files: dict[str, str] = dict(start)
        self._places: dict[str, str] = {}  # local path -> path in the package
        self._sizes: dict[str, tuple[int, str]] = {}  # local path -> bytes, recipe key

    def take(self, named: NamedPath, *, prefix: str = "") -> str:
        """Return the path in the package for a local path that the job reads; return other paths unchanged.

        ``prefix`` comes before the name; with one, names do not depend on the other files of the package.
        """
        path, field = named.path, named.field
        if field.is_output or field.per_machine or not os.path.isabs(path) or self.stays(path):
            return path
        if self.resume and field.is_start and not os.path.exists(path):
            return path
        if path not in self._places:
            self._places[path] = self._load(path, named.key, prefix)
        return self._places[path]

    def add_beside(self, path: str, endings: Sequence[str]) -> None:
        """Add the existing files with the name of a file that was taken, or its stem, and one of the endings."""
        place = self._places[path].removeprefix("./")
        for ending in endings:
            for here, there in ((path, place), (os.path.splitext(path)[0], os.path.splitext(place)[0])):
                if os.path.isfile(here + ending):
                    self.files[there + ending] = here + ending

    def _load(self, path: str, key: str, prefix: str) -> str:
        if not os.path.exists(path):
            raise RecipeError(
                f"{key}: {path} does not exist on this machine. If every machine of the cluster has it under that "
                f"name, add --shared {os.path.dirname(path)}"
            )
        place, number = f"inputs/{prefix}{os.path.basename(path)}", 1
        while not prefix and f"./{place}" in self._places.values():
            number += 1
            place = f"inputs/{number}-{os.path.basename(path)}"
        if os.path.isdir(path):
            found = {
                f"{place}/{name}": os.path.join(path, name)
                for name in Storage(path).list(recursive=True)
                if is_utf8(name)  # a run ignores other names, and an archive cannot hold them
            }
        else:
            found = {place: path, **_beside(place, path)}
        try:
            self._sizes[path] = (sum(os.path.getsize(file) for file in found.values()), key)
        except OSError as error:
            raise StorageError(
                f"{key}: {error.filename} cannot be read: {error.strerror}. Fix or remove it"
            ) from error
        self.files.update(found)
        return f"./{place}"

    def refuse_more_than(self, limit: int) -> None:
        total = sum(size for size, _ in self._sizes.values())
        if total <= limit:
            return
        path, (size, key) = max(self._sizes.items(), key=lambda item: item[1][0])
        raise RecipeError(
            f"{key}: {path} has {size / MIB:.0f} MiB, and the files of a job may have {limit / MIB:.0f} MiB (this one: "
            f"{total / MIB:.0f}). Copy it to a bucket and use its s3:// URL, or, if all machines have it "
            f"under that name, add --shared {path}"
        )


def _beside(place: str, path: str) -> dict[str, str]:
    """Return the files that belong to a file: the config of a model, and the optimizer state of a start file."""
    (stem, _), (there, suffix) = os.path.splitext(path), os.path.splitext(place)
    pairs = {f"{place}.optim": f"{path}.optim"}
    if suffix in MODEL_SUFFIXES:
        pairs[f"{there}.yaml"] = f"{stem}.yaml"
    return {name: file for name, file in pairs.items() if os.path.isfile(file)}


def _refuse_missing_class_images(recipe: Recipe, stays: Callable[[str], bool]) -> None:
    """Raise RecipeError if class images would be generated inside the package, which each machine copies."""
    elsewhere = isinstance(recipe.data.concepts_list, str) and stays(recipe.data.concepts_list)
    if elsewhere or not getattr(recipe.method, "with_prior_preservation", False):
        return
    wanted = getattr(recipe.method, "num_class_images", 0)
    for concept in load_concepts(recipe.data):
        folder = concept.class_data_dir
        if folder is None or stays(folder):
            continue
        found = load_class_images(folder, recipe.data)
        here = len(found) if found is not None else 0
        if here < wanted:
            raise RecipeError(
                f"class_data_dir {folder} has {here} images, method.num_class_images is {wanted}: the others would be "
                "generated into a copy that is deleted with the job. Remove class_data_dir (the images are then kept "
                "beside output_dir), use an s3:// URL, or reduce num_class_images"
            )
