"""Property tests of file readers with invalid files: no crash, no hang, no memory beyond a limit."""

from __future__ import annotations

import io
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamfleet.datasets.errors import UserError

LARGEST = 2**29  # bytes by which the process may grow
SLOWEST = 20_000  # milliseconds that reading a file may take on a busy machine

DTYPES = st.sampled_from(
    [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64]
)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 4, 16]), max_size=4)
STRETCHED = SHAPES.map(lambda shape: torch.zeros([1] * len(shape)).expand([4096 * size for size in shape]))
SPARSE = SHAPES.map(lambda shape: torch.zeros(shape).to_sparse() if shape else torch.zeros(1).to_sparse())
TENSORS = STRETCHED | SPARSE | st.builds(lambda shape, dtype: torch.ones(shape, dtype=dtype), SHAPES, DTYPES)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
KEYS = st.text(max_size=3) | st.integers(-2, 2000)
VALUES = st.recursive(
    SCALARS | TENSORS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
)


def changed(
    valid: dict[Any, Any], values: st.SearchStrategy[Any] = VALUES
) -> st.SearchStrategy[dict[Any, Any]]:
    """Draw a valid dict with some entries replaced, added or removed."""
    names = st.sampled_from(list(valid))
    return st.builds(
        lambda changes, missing: {
            key: value for key, value in (valid | changes).items() if key not in missing
        },
        st.dictionaries(names | KEYS, values, max_size=3),
        st.frozensets(names, max_size=1) if len(valid) > 1 else st.just(frozenset()),
    )


def torch_files(objects: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    """Draw the bytes of a file to which torch saved one of these objects, as a zip or in the older format."""

    return st.builds(saved, objects, st.booleans())


def saved(value: Any, zipped: bool = True) -> bytes:
    """Return the bytes of a file to which torch saved an object."""
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def damaged(whole: bytes, head: int = 1500) -> st.SearchStrategy[bytes]:
    """Draw a file with changed bytes, most of them in its first `head` bytes; some files are truncated or doubled."""
    return damage(whole, head).map(lambda done: apply_damage(whole, done))


Damage = tuple[list[tuple[int, bytes]], int, str]


def damage(whole: bytes, head: int = 1500) -> st.SearchStrategy[Damage]:
    """Draw the arguments of `apply_damage`."""
    places = st.integers(0, len(whole) - 1) | st.integers(0, min(head, len(whole)) - 1)
    patches = st.lists(st.tuples(places, st.binary(min_size=1, max_size=9)), max_size=4)
    return st.tuples(patches, places, st.sampled_from(["whole", "whole", "cut", "doubled"]))


def apply_damage(whole: bytes, done: Damage) -> bytes:
    """Return a file's content with changed bytes, truncated or doubled."""
    changes, end, how = done
    content = bytearray(whole)
    for place, patch in changes:
        content[place : place + len(patch)] = patch
    return bytes(content[:end] if how == "cut" else content + content if how == "doubled" else content)


def peak_memory() -> int:
    """Return the peak memory of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def assert_survives(
    read: Callable[[Path], object],
    path: Path,
    contents: st.SearchStrategy[Any],
    *,
    make: Callable[[Any], bytes] = bytes,
    examples: int = 60,
    some_are_read: bool = True,
) -> None:
    """Check that each drawn content of the file `path` loads or raises one of our errors that names the file.

    `make` converts the drawn value into the file's bytes, so that large files need not be drawn. At least one
    file must be refused and, with `some_are_read`, at least one must load; otherwise the test would be void.
    """
    before, outcomes = peak_memory(), []

    @settings(max_examples=examples, deadline=SLOWEST, derandomize=True)
    @given(contents)
    def feed(drawn: Any) -> None:
        path.write_bytes(make(drawn))
        refusal = ""
        try:
            read(path)
        except UserError as error:
            refusal = str(error)
        assert not refusal or path.stem in refusal, "an error names the file"
        outcomes.append(not refusal)

    feed()
    assert not all(outcomes), "everything was read"
    assert any(outcomes) or not some_are_read, "nothing was read"
    assert peak_memory() - before < LARGEST
