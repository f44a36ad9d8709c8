"""Checks a torch file as AUTOMATIC1111's webui does before it unpickles one (`modules/safe.py`)."""

from __future__ import annotations

import pickletools
import re
import zipfile
from pathlib import Path

NAMES_1_9_4 = r"data\.pkl|version|data/\d+"


NAMES_1_10_1 = NAMES_1_9_4 + r"|byteorder|\.data/serialization_id"


GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_device_tensor_from_numpy",
    "torch float32",
    "torch.nn.modules.container ParameterDict",
    "numpy.core.multiarray scalar",
    "numpy.core.multiarray _reconstruct",
    "numpy dtype",
    "numpy ndarray",
    "_codecs encode",
    "__builtin__ set",
    "pytorch_lightning.callbacks.model_checkpoint ModelCheckpoint",
} | {f"torch {kind}Storage" for kind in ("Float", "Half", "BFloat16", "Double", "Int", "Long", "Byte")}


def objections(path: Path, names: str) -> list[str]:
    """Return the zip entries and globals that a webui with this pattern of zip names would refuse."""
    with zipfile.ZipFile(path) as archive:
        found = [name for name in archive.namelist() if not re.fullmatch(rf"[^/]+/({names})", name)]
        pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
        if len(pickles) != 1:
            return [*found, f"{len(pickles)} data.pkl"]
        stream = archive.read(pickles[0])
    for opcode, argument, _ in pickletools.genops(stream):
        assert opcode.name not in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4")
        if opcode.name == "GLOBAL" and argument not in GLOBALS:
            found.append(str(argument))
    return found


def assert_webui_safe(path: Path) -> None:
    assert objections(path, NAMES_1_9_4) == []
    assert objections(path, NAMES_1_10_1) == []
