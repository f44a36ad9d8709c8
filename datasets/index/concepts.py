"""Lists the concepts (subjects, or image sets) that a recipe's `data:` section describes, without reading images."""

from __future__ import annotations

import json

from pydantic import ValidationError

from dreamfleet.datasets.config import Concept, DataConfig
from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.index.set_concepts import concepts_of_sets
from dreamfleet.datasets.index.sources import FOLDER, find_source, one_concept
from dreamfleet.datasets.path_field import resolve_paths
from dreamfleet.datasets.storage.storage import read_text


def load_concepts(data: DataConfig) -> list[Concept]:
    """Return the concepts that a `data:` section describes; the index identifies a concept by its position here.

    Raises DataError for an invalid concepts list.
    """
    if data.sets is not None:
        return concepts_of_sets(data)
    if isinstance(data.concepts_list, str):
        source = find_source(data.concepts_list)
        if source.name != FOLDER:
            return source.concepts(data.concepts_list, data)
        return _read_concepts_file(data.concepts_list)
    if data.concepts_list is not None:
        return list(data.concepts_list)
    if data.train_data_dir is not None:
        return find_source(data.train_data_dir).concepts(data.train_data_dir, data)
    assert data.instance_data_dir is not None  # DataConfig checked it
    return [one_concept(data.instance_data_dir, data)]


def _read_concepts_file(path: str) -> list[Concept]:
    """Read a concepts_list.json (the format of ShivamShrirao's scripts); its paths are relative to its folder."""
    try:
        entries = json.loads(read_text(path))
    except StorageError as error:
        raise DataError(f"concepts_list: {error}") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"concepts_list {path}, line {error.lineno}, column {error.colno}: not JSON "
            f"({error.msg}). Correct the file"
        ) from error
    if not isinstance(entries, list) or not entries:
        raise DataError(
            f"concepts_list {path}: write a list of objects with instance_data_dir and instance_prompt"
        )
    folder = path.rpartition("/")[0] or "/"
    concepts = []
    for number, entry in enumerate(entries):
        try:
            concepts.append(resolve_paths(Concept.model_validate(entry), folder))
        except ValidationError as error:
            details = "; ".join(
                f"{'.'.join(str(part) for part in item['loc']) or 'entry'}: {item['msg']}"
                for item in error.errors()
            )
            raise DataError(f"concepts_list {path}, concept {number}: {details}") from error
    return concepts
