"""Serialises values to JSON that every parser accepts: NaN and infinities, which JSON does not have, become null."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

_SURROGATE = re.compile("[\ud800-\udfff]")


def json_text(value: Any, *, indent: int | None = None, default: Callable[[Any], Any] | None = None) -> str:
    """Return a value as JSON text that can be encoded as UTF-8; ``default`` converts other types than JSON's.

    NaN and infinities become null. Bytes of a file name that are not UTF-8 (surrogates in a Python string) are escaped
    so that they are read back unchanged.
    """
    text = json.dumps(_finite(value), indent=indent, ensure_ascii=False, default=default, allow_nan=False)
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
