"""What goes along with a job: the running dreamfleet as a wheel, the resolved recipe, and the local files it names."""

from __future__ import annotations

import base64
import hashlib
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dreamfleet.datasets.errors import RecipeError, StorageError
from dreamfleet.datasets.index.concepts import load_concepts
from dreamfleet.datasets.index.exclusions import is_utf8
from dreamfleet.datasets.index.sets import load_class_images
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.paths import SECTIONS, is_path, is_under, named_paths
from dreamfleet.trainers.driver.preflight import check_inputs
from dreamfleet.trainers.recipe import START_FILES, WEIGHTS, Recipe, build_recipe

MIB = 2**20
# Ray keeps every package in the head's memory and refuses half a GiB; pictures that make more belong in a bucket.
MAX_PARCEL_BYTES = 200 * MIB
RECIPE_FILE = "recipe.yaml"
WHEEL_PACKAGES = ("cluster", "datasets", "trainers", "tune")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same files give the same archive, which Ray then uploads once


@dataclass(frozen=True)
class Parcel:
    """A recipe whose local paths start at the parcel, and the files that lie there: name in it -> file here."""

    recipe: Recipe
    files: dict[str, str]

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(os.path.getsize(file) for file in self.files.values())

    def write(self, folder: Path) -> Path:
        """Write the parcel as a zip into ``folder``."""
        path = folder / "parcel.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(zipfile.ZipInfo(RECIPE_FILE, _EPOCH), self.recipe.to_yaml())
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
    limit: int = MAX_PARCEL_BYTES,
    makes_cache: bool = False,
) -> Parcel:
    """Decide what a recipe's job takes along; reads names and sizes, writes nothing.

    Addresses (``s3://``) and paths under ``shared``, folders that every machine of the cluster sees under the same
    name, stay as they are. Every other local file or folder the recipe names goes along, with what is read beside it;
    with ``resume``, not the file that a run went on from, if it is gone. Raises RecipeError for an ``output_dir``, or a
    cache that the job makes, which the cluster cannot keep, for files that are not here, and for more than ``limit``
    bytes, naming the largest.
    """
    starts = {getattr(recipe.method, name, None) for name in START_FILES} if resume else set()
    gone = {path for path in starts if path and not os.path.exists(path)}

    def stays(path: str) -> bool:
        return is_under(path, shared) or "://" in path or path in gone

    key, kept = (
        ("data.cache_dir", recipe.data.cache_dir) if makes_cache else ("output_dir", recipe.output_dir)
    )
    if kept is not None and not stays(kept):
        raise RecipeError(
            f"{key} {kept} is a folder of this machine, and the job runs on others. Give {key}=s3://BUCKET/PREFIX, or, "
            f"when every machine of the cluster has that folder (NFS, or a cluster of one machine), say so: "
            f"--shared {os.path.dirname(kept)}"
        )
    sections = recipe.model_dump(mode="json")
    concepts = sections["data"]["concepts_list"]
    if isinstance(concepts, str) and not stays(concepts):  # its folders start at the file, which would move
        sections["data"]["concepts_list"] = [c.model_dump(mode="json") for c in load_concepts(recipe.data)]
    loading = _Loading(stays)
    for name in SECTIONS:
        sections[name] = loading.take(sections[name], name)
    loading.refuse_more_than(limit)
    if not makes_cache:
        _refuse_missing_class_images(recipe, stays)
    return Parcel(build_recipe(sections), loading.files)


def check_here(recipe: Recipe, *, makes_cache: bool = False) -> None:
    """Look at pictures and model as a run would, where they are here to be looked at: a job takes minutes to tell."""
    if makes_cache:  # there is none yet
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"cache_dir": None})})
    if all(os.path.exists(path) for paths in named_paths(recipe).values() for path in paths):
        check_inputs(recipe)


def write_wheel(folder: Path) -> Path:
    """Write the dreamfleet that is running, from a checkout or installed, as a wheel into ``folder``.

    Its name carries a hash of the content: Ray takes a wheel it already has under a name for the same. It asks for no
    other packages: Ray installs it with pip into a folder of its own, and pip would put another torch and Ray there.
    """
    files = {name: path.read_bytes() for name, path in _code().items()}
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    number = version("dreamfleet")
    build = f"0{digest.hexdigest()[:12]}"
    info = f"dreamfleet-{number}.dist-info"
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: dreamfleet\nVersion: {number}\n".encode()
    files[f"{info}/WHEEL"] = (
        f"Wheel-Version: 1.0\nGenerator: dreamfleet\nRoot-Is-Purelib: true\nTag: py3-none-any\nBuild: {build}\n"
    ).encode()
    record = [f"{name},sha256={_urlsafe(content)},{len(content)}" for name, content in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()
    path = folder / f"dreamfleet-{number}-{build}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), content, zipfile.ZIP_DEFLATED)
    return path


class _Loading:
    """Collects the local files of a recipe's sections and puts their places in the parcel into the recipe."""

    def __init__(self, stays: Callable[[str], bool]):
        self.stays = stays
        self.files: dict[str, str] = {}
        self._places: dict[str, str] = {}  # path here -> place in the parcel
        self._sizes: dict[str, tuple[int, str]] = {}  # path here -> bytes, key in the recipe

    def take(self, value: Any, key: str) -> Any:
        """Return ``value`` with the local paths in it replaced, as deep as it goes."""
        if isinstance(value, dict):
            return {name: self.take(inner, f"{key}.{name}") for name, inner in value.items()}
        if isinstance(value, list):
            return [self.take(inner, key) for inner in value]
        if not is_path(value, key) or self.stays(value):
            return value
        if value not in self._places:
            self._places[value] = self._load(value, key)
        return self._places[value]

    def _load(self, path: str, key: str) -> str:
        if not os.path.exists(path):
            raise RecipeError(
                f"{key}: there is no {path} here. When it is on the cluster, under the same name on every machine, say "
                f"so: --shared {os.path.dirname(path)}"
            )
        place, number = f"inputs/{os.path.basename(path)}", 1
        while f"./{place}" in self._places.values():
            number += 1
            place = f"inputs/{number}-{os.path.basename(path)}"
        if os.path.isdir(path):
            found = {
                f"{place}/{name}": os.path.join(path, name)
                for name in Storage(path).list(recursive=True)
                if is_utf8(name)  # others are used by no run, and no archive holds them
            }
        else:
            found = {place: path, **_beside(place, path)}
        try:
            self._sizes[path] = (sum(os.path.getsize(file) for file in found.values()), key)
        except OSError as error:
            raise StorageError(
                f"{key}: {error.filename} cannot be read: {error.strerror}. Mend or remove it"
            ) from error
        self.files.update(found)
        return f"./{place}"

    def refuse_more_than(self, limit: int) -> None:
        total = sum(size for size, _ in self._sizes.values())
        if total <= limit:
            return
        path, (size, key) = max(self._sizes.items(), key=lambda item: item[1][0])
        raise RecipeError(
            f"{key}: {path} has {size / MIB:.0f} MiB, and a job takes {limit / MIB:.0f} MiB along at most (here "
            f"{total / MIB:.0f} in all). Put it into a bucket and write its s3:// address, or, when every machine of "
            f"the cluster has it under the same name, say so: --shared {path}"
        )


def _beside(place: str, path: str) -> dict[str, str]:
    """Return what is read beside a file: a model's config, and the optimizer's state of what a run goes on from."""
    (stem, _), (there, suffix) = os.path.splitext(path), os.path.splitext(place)
    pairs = {f"{place}.optim": f"{path}.optim"}
    if suffix in WEIGHTS:
        pairs[f"{there}.yaml"] = f"{stem}.yaml"
    return {name: file for name, file in pairs.items() if os.path.isfile(file)}


def _refuse_missing_class_images(recipe: Recipe, stays: Callable[[str], bool]) -> None:
    """Raise RecipeError where class pictures would be generated into the parcel, which each machine has for itself."""
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
                f"class_data_dir {folder} has {here} pictures, method.num_class_images is {wanted}: the others would "
                "be generated into a copy that ends with the job. Leave class_data_dir out (they then lie beside "
                "output_dir), give an s3:// address, or fewer num_class_images"
            )


def _code() -> dict[str, Path]:
    """Return the files of the running dreamfleet, by their name in a wheel."""
    files = {}
    for package in WHEEL_PACKAGES:
        spec = find_spec(f"dreamfleet.{package}")
        assert spec is not None and spec.submodule_search_locations is not None
        # An editable installation lists a finder beside the folder.
        root = Path(next(place for place in spec.submodule_search_locations if os.path.isdir(place)))
        for path in sorted(root.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                files[f"dreamfleet/{package}/{path.relative_to(root).as_posix()}"] = path
    return files


def _urlsafe(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
