"""Writes `.pt` and `.ckpt` files that every webui accepts, and reads any of them without running code.

AUTOMATIC1111's webui lists the names inside such a file (a zip) and the globals of its pickle, and refuses the whole
file on one unknown entry. What `torch.save` writes today has names it does not know, so the zip is written by
`zip_writer.py`, with `data.pkl`, `data/N` and `version` alone: the names that even webui 1.9.4 accepts.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, TypeGuard

import torch

from dreamfleet.datasets.errors import FormatError, StorageError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.models.formats.zip_writer import ZipWriter

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# The storages webui's checker lets through; bool, int8 and int16 tensors are not among them.
STORABLE_DTYPES = (*FLOAT_DTYPES, torch.int32, torch.int64, torch.uint8)

METADATA_KEY = "dreamfleet"  # an extra entry of our files' dicts, which webui and diffusers pass over

_PROTOCOL = 2  # what torch.save uses, and the newest that both checkers and weights_only read
_BYTEARRAY = b"\nbytearray\n"  # as the pickles that torch's safe reader knows name it
_TENSOR = re.compile(r"/data/\d+$")
_LARGEST_INT = 2**2000  # beyond it pickle 2 uses an opcode that weights_only does not read


def save_pickle(obj: Any, path: str | os.PathLike[str]) -> Path:
    """Write `obj` to `path` as a `.pt`/`.ckpt` that webui 1.9.4 and 1.10.1 accept and `weights_only=True` reads.

    `obj` may hold None, bool, int, float, str, lists, tuples, dicts and dense tensors of `STORABLE_DTYPES`.
    Parameters become plain tensors, ordered dicts plain dicts, device tensors CPU tensors, and a view keeps its own
    elements only. The file appears whole or not at all. Raises FormatError for anything else, naming where it is,
    and StorageError when the disk refuses.
    """
    plain = _to_plain(obj, "")
    path = Path(path)
    storages: dict[int, tuple[str, torch.UntypedStorage]] = {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> Any:
            if not isinstance(item, torch.storage.TypedStorage):
                return None
            untyped = item._untyped_storage
            name, _ = storages.setdefault(untyped.data_ptr() or id(untyped), (str(len(storages)), untyped))
            return ("storage", getattr(torch, item._pickle_storage_type()), name, "cpu", item._size())

    data = io.BytesIO()
    Pickler(data, protocol=_PROTOCOL).dump(plain)
    folder = re.sub(r"[^A-Za-z0-9_-]", "_", path.stem) or "archive"
    with replacing(path) as temporary, open(temporary, "wb") as file:
        archive = ZipWriter(file)
        archive.add(f"{folder}/data.pkl", data.getbuffer())
        for name, untyped in storages.values():
            content: Any = torch.empty(0, dtype=torch.uint8).set_(untyped).numpy()  # type: ignore[call-overload]
            archive.add(f"{folder}/data/{name}", memoryview(content))
        archive.add(f"{folder}/version", memoryview(b"3\n"))
        archive.close()
    return path


def load_pickle(source: str | os.PathLike[str] | bytes) -> Any:
    """Read a `.pt`, `.bin` or `.ckpt` (zip or the older stream) on the CPU, running none of its code.

    Tensors and plain containers come back as they were; bookkeeping objects that older trainers left in their files
    (Lightning callbacks, numpy numbers) come back empty. Raises FormatError, naming the file, when it is empty, cut
    short, not such a file, or asks for a global that is not on the list.
    """
    where = "these bytes" if isinstance(source, bytes) else str(source)
    size = len(source) if isinstance(source, bytes) else _size_of(Path(source))
    if size == 0:
        raise FormatError(f"{where}: the file is empty. Copy or export it again.")
    _require_bounded(source, size, where)
    stream: Any = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    try:
        # torch warns of pickle protocols that it may not read; what it does not read is told below.
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings(action="ignore"):
            return torch.load(stream, map_location="cpu", weights_only=True)
    except OSError as error:
        raise StorageError(f"{where}: cannot be read ({error.strerror or error}).") from error
    except Exception as error:  # a hostile or broken stream fails in any way torch's reader can
        raise FormatError(_explain(where, error)) from error


def text_entries(value: Any) -> dict[str, str]:
    """Read the JSON that stands under METADATA_KEY; {} for anything else."""
    try:
        found = json.loads(value) if isinstance(value, str) else {}
    except (ValueError, RecursionError):
        return {}
    return {str(key): str(text) for key, text in found.items()} if isinstance(found, dict) else {}


def replacing(path: str | os.PathLike[str]) -> AbstractContextManager[Path]:
    """Give a temporary path that takes the place of `path` at the end: readers never meet half a file.

    Makes the folder when it is missing. Raises StorageError when the disk is full or refuses.
    """
    path = Path(path)
    return Storage(path.parent).staging(path.name)


class _Ignored:
    """Stands in for an object whose content nobody needs: takes any arguments and any state, keeps none."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Parameters(_Ignored):
    """Stands in for torch's ParameterDict, which the first Textual Inversion files hold: keeps the tensors."""

    parameters: dict[str, torch.Tensor]

    def __setstate__(self, state: Any) -> None:
        held = state.get("_parameters") or {} if isinstance(state, dict) else {}
        self.parameters = {key: value for key, value in held.items() if isinstance(value, torch.Tensor)}


def parameters_of(value: Any) -> Any:
    """Give the dict of tensors inside a ParameterDict that `load_pickle` read; anything else as it is."""
    return value.parameters if isinstance(value, _Parameters) else value


_HARMLESS: list[Any] = [
    (_Parameters, "torch.nn.modules.container.ParameterDict"),
    *(
        (_Ignored, name)
        for name in (
            "argparse.Namespace",
            "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
            "pytorch_lightning.utilities.types._PATH",
            "numpy.core.multiarray.scalar",
            "numpy._core.multiarray.scalar",
            "numpy.dtype",
        )
    ),
    _Ignored,
    _Parameters,
]


def _to_plain(value: Any, where: str) -> Any:
    """Rebuild `value` of the types both checkers know; `where` is the path of keys to it."""
    kind = type(value)
    if value is None or kind in (bool, float, str):
        return value
    if kind is int:
        if abs(value) >= _LARGEST_INT:
            raise FormatError(f"{where or 'the object'} is an integer too large for a .pt file.")
        return value
    if kind in (list, tuple):
        return kind(_to_plain(item, f"{where}[{index}]") for index, item in enumerate(value))
    if kind in (dict, OrderedDict):
        for key in value:
            if type(key) not in (str, int):
                raise FormatError(f"{where}[{key!r}]: a key of a .pt file must be text or an integer.")
        return {key: _to_plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if kind in (torch.Tensor, torch.nn.Parameter):
        return _to_plain_tensor(value, where)
    raise FormatError(
        f"{where or 'the object'} is a {kind.__module__}.{kind.__qualname__}, which webui refuses to read from a .pt "
        "file. Use plain Python numbers, text, lists, dicts and tensors."
    )


def _to_plain_tensor(value: torch.Tensor, where: str) -> torch.Tensor:
    if value.layout is not torch.strided or value.is_meta or value.is_quantized:
        raise FormatError(f"{where or 'the tensor'} is not an ordinary dense tensor with values.")
    if value.dtype not in STORABLE_DTYPES:
        raise FormatError(
            f"{where or 'the tensor'} has dtype {value.dtype}, which webui refuses to read. "
            f"Convert it to one of {', '.join(str(dtype).removeprefix('torch.') for dtype in STORABLE_DTYPES)}."
        )
    plain = value.detach().resolve_neg().cpu().contiguous()
    if plain.untyped_storage().nbytes() != plain.numel() * plain.element_size():
        plain = plain.clone()
    return plain


def is_dense(value: Any) -> TypeGuard[torch.Tensor]:
    """Say whether this is a plain tensor in memory: sparse and meta ones pass torch's safe reader as well."""
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and value.device.type == "cpu"


def is_real(value: Any) -> TypeGuard[torch.Tensor]:
    """Say whether this is a plain tensor of floating-point numbers."""
    return is_dense(value) and value.dtype in FLOAT_DTYPES


def require_backed(tensors: Iterable[torch.Tensor], path: Path) -> None:
    """Refuse tensors that claim more memory than a file can fill.

    One may be a view that says "a million times this number": copied, it would take all memory. Two may share theirs,
    so that a file can honestly give twice its size. Raises FormatError.
    """
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if claimed > 2 * _size_of(path):
        raise FormatError(f"{path}: its tensors claim {claimed} bytes, more than the file has.")


def _require_bounded(source: str | os.PathLike[str] | bytes, size: int, where: str) -> None:
    """Refuse what would take far more memory than its size.

    A zip that unpacks to more: entries that are compressed or overlap; torch writes neither. A pickle that asks for an
    empty bytearray of any length, the one call of that kind that torch's safe reader allows.
    """
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            if file.read(4) != b"PK\x03\x04":  # the older stream
                unpacked, asks = size, _holds_bytearray(file)
            else:
                with zipfile.ZipFile(file) as archive:
                    entries = archive.infolist()
                    unpacked = sum(entry.file_size for entry in entries)
                    asks = unpacked <= size and any(
                        _BYTEARRAY in archive.read(entry)
                        for entry in entries
                        if not _TENSOR.search(entry.filename)
                    )
    except OSError as error:
        raise StorageError(f"{where}: cannot be read ({error.strerror or error}).") from error
    except Exception as error:  # zipfile raises its own zoo of errors for a broken directory
        raise FormatError(f"{where}: the file is cut short or damaged. Copy or export it again.") from error
    if unpacked > size:
        raise FormatError(
            f"{where}: refused, because it unpacks to {unpacked} bytes from {size}, as no file of PyTorch does."
        )
    if asks:
        raise FormatError(
            f"{where}: refused, because it asks for a bytearray, as no model or embedding does."
        )


def _holds_bytearray(file: IO[bytes]) -> bool:
    file.seek(0)
    rest = b""
    while block := file.read(2**20):
        if _BYTEARRAY in rest + block:
            return True
        rest = block[-len(_BYTEARRAY) :]
    return False


def _explain(where: str, error: Exception) -> str:
    text = str(error)
    unsafe = re.search(r"GLOBAL ([\w.]+) was not an allowed|unsupported GLOBAL ([\w.]+)", text)
    if unsafe:
        name = next(group for group in unsafe.groups() if group)
        return (
            f"{where}: refused, because reading it would call {name}, which can run code. "
            "Ask its author for a .safetensors file, or for a .pt with tensors only."
        )
    if isinstance(error, EOFError) or "central directory" in text or "zip archive" in text:
        return f"{where}: the file is cut short or damaged. Copy or export it again."
    return f"{where}: not a PyTorch file that can be read safely ({type(error).__name__})."


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror or error}).") from error
