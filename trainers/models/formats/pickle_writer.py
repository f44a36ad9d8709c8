"""Writes `.pt` and `.ckpt` files that the webui accepts, and reads such files without executing code from them.

AUTOMATIC1111's webui checks the entry names in such a file (a zip) and the globals of its pickle, and rejects the file
if one is unknown. Current versions of `torch.save` write entries that it does not know. Therefore the zip is written by
`zip_writer.py`, with only `data.pkl`, `data/N` and `version`, which webui 1.9.4 and later accept.
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
# The dtypes that the webui's checker accepts; it rejects bool, int8 and int16 tensors.
STORABLE_DTYPES = (*FLOAT_DTYPES, torch.int32, torch.int64, torch.uint8)

METADATA_KEY = "dreamfleet"  # key of our metadata in the dicts of files; the webui and diffusers ignore it

_PROTOCOL = 2  # the protocol of torch.save, and the newest that the webui and weights_only read
_BYTEARRAY = b"\nbytearray\n"  # bytearray as a global in a pickle, which torch's safe reader allows
_TENSOR = re.compile(r"/data/\d+$")
_LARGEST_INT = 2**2000  # for larger integers protocol 2 uses an opcode that weights_only does not read


def save_pickle(obj: Any, path: str | os.PathLike[str]) -> Path:
    """Write `obj` as a `.pt`/`.ckpt` that webui 1.9.4 and 1.10.1 accept and torch reads with `weights_only=True`.

    `obj` may contain None, bool, int, float, str, lists, tuples, dicts and dense tensors of `STORABLE_DTYPES`.
    Parameters are written as plain tensors, ordered dicts as plain dicts, tensors on a device as CPU tensors, and views
    without the other elements of their storage. The file is written atomically. Raises FormatError naming the entry
    for any other type, and StorageError if writing fails.
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
    """Read a `.pt`, `.bin` or `.ckpt` (a zip or torch's older format) on the CPU without executing code from it.

    Tensors and plain containers are restored; other objects that older trainers stored (Lightning callbacks, numpy
    numbers) are read as empty objects. Raises FormatError naming the file if it is empty, truncated, of another format,
    or uses a global that is not allowed.
    """
    where = "these bytes" if isinstance(source, bytes) else str(source)
    size = len(source) if isinstance(source, bytes) else _size_of(Path(source))
    if size == 0:
        raise FormatError(f"{where}: the file is empty. Copy or export it again.")
    _require_bounded(source, size, where)
    stream: Any = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    try:
        # torch warns about pickle protocols, which is of no use: unreadable files raise an error below.
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings(action="ignore"):
            return torch.load(stream, map_location="cpu", weights_only=True)
    except OSError as error:
        raise StorageError(f"{where}: cannot be read ({error.strerror or error}).") from error
    except Exception as error:  # a malicious or damaged file can raise any exception
        raise FormatError(_explain(where, error)) from error


def text_entries(value: Any) -> dict[str, str]:
    """Return the text entries in the JSON stored under METADATA_KEY; {} for any other value."""
    try:
        found = json.loads(value) if isinstance(value, str) else {}
    except (ValueError, RecursionError):
        return {}
    return {str(key): str(text) for key, text in found.items()} if isinstance(found, dict) else {}


def replacing(path: str | os.PathLike[str]) -> AbstractContextManager[Path]:
    """Yield a temporary path that is renamed to `path` at the end, so that readers never see a partial file.

    Creates the folder if it is missing. Raises StorageError if writing fails.
    """
    path = Path(path)
    return Storage(path.parent).staging(path.name)


class _Ignored:
    """Placeholder for an object whose content is not needed: accepts any arguments and state, and discards them."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Parameters(_Ignored):
    """Placeholder for torch's ParameterDict, which early Textual Inversion files contain: keeps the tensors."""

    parameters: dict[str, torch.Tensor]

    def __setstate__(self, state: Any) -> None:
        held = state.get("_parameters") or {} if isinstance(state, dict) else {}
        self.parameters = {key: value for key, value in held.items() if isinstance(value, torch.Tensor)}


def parameters_of(value: Any) -> Any:
    """Return the dict of tensors if `load_pickle` read a ParameterDict, and any other value unchanged."""
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
    """Return `value` converted to the types that the webui accepts; `where` is its path of keys, for errors."""
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
        f"{where or 'the object'} is a {kind.__module__}.{kind.__qualname__}, which the webui rejects in a .pt "
        "file. Use plain Python numbers, text, lists, dicts and tensors."
    )


def _to_plain_tensor(value: torch.Tensor, where: str) -> torch.Tensor:
    if value.layout is not torch.strided or value.is_meta or value.is_quantized:
        raise FormatError(f"{where or 'the tensor'} is not an ordinary dense tensor with values.")
    if value.dtype not in STORABLE_DTYPES:
        raise FormatError(
            f"{where or 'the tensor'} has dtype {value.dtype}, which the webui rejects. "
            f"Convert it to one of {', '.join(str(dtype).removeprefix('torch.') for dtype in STORABLE_DTYPES)}."
        )
    plain = value.detach().resolve_neg().cpu().contiguous()
    if plain.untyped_storage().nbytes() != plain.numel() * plain.element_size():
        plain = plain.clone()
    return plain


def is_dense(value: Any) -> TypeGuard[torch.Tensor]:
    """Return whether a value is a dense tensor in memory; torch's safe reader can also return sparse and meta ones."""
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and value.device.type == "cpu"


def is_real(value: Any) -> TypeGuard[torch.Tensor]:
    """Return whether a value is a dense tensor of floating-point numbers."""
    return is_dense(value) and value.dtype in FLOAT_DTYPES


def require_backed(tensors: Iterable[torch.Tensor], path: Path) -> None:
    """Raise FormatError for tensors that are together larger than the file can be.

    A tensor may be an expanded view of a single number, which would fill the memory when it is copied. Since two
    tensors may share a storage, up to twice the file's size is accepted.
    """
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if claimed > 2 * _size_of(path):
        raise FormatError(f"{path}: its tensors claim {claimed} bytes, more than the file has.")


def _require_bounded(source: str | os.PathLike[str] | bytes, size: int, where: str) -> None:
    """Raise FormatError for content that would take far more memory than its size.

    Such content is a zip with compressed or overlapping entries, which torch never writes, or a pickle that creates a
    bytearray of a given length, which torch's safe reader allows.
    """
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            if file.read(4) != b"PK\x03\x04":  # torch's older format
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
    except Exception as error:  # zipfile raises many types for a damaged directory
        raise FormatError(f"{where}: the file is truncated or damaged. Copy or export it again.") from error
    if unpacked > size:
        raise FormatError(
            f"{where}: rejected, because it unpacks to {unpacked} bytes from {size}, as no file of PyTorch does."
        )
    if asks:
        raise FormatError(
            f"{where}: rejected, because it creates a bytearray, as no model or embedding does."
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
            f"{where}: rejected, because reading it would call {name}, which can run code. "
            "Ask its author for a .safetensors file, or for a .pt with tensors only."
        )
    if isinstance(error, EOFError) or "central directory" in text or "zip archive" in text:
        return f"{where}: the file is truncated or damaged. Copy or export it again."
    return f"{where}: not a PyTorch file that can be read safely ({type(error).__name__})."


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror or error}).") from error
