"""Recognises secrets in the settings of other trainers, so that they are neither copied nor shown."""

from __future__ import annotations

import re
from typing import Any

_NAME = re.compile(
    r"(^|[_.\-])(api_?key|hub_token|hf_token|huggingface_token|hugging_face_token|auth_token|access_token|secret\w*"
    r"|password|passwd|access_key\w*|credentials?|(aws_)?session_token)$",
    re.IGNORECASE,
)
_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bAKIA[0-9A-Z]{16}\b|\bsk-[A-Za-z0-9_\-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|://[^/\s:@]+:[^/\s@]+@"
)
_HASH = re.compile(r"\b[0-9a-f]{40}\b")  # a key of W&B, unless it is a commit
_NO_SECRET = re.compile(r"(revision|hash|commit|sha1?)$", re.IGNORECASE)
HIDDEN = "(hidden)"
REASON = "secrets are never copied; set them in the environment, as HF_TOKEN or WANDB_API_KEY"


def is_secret(name: str, value: Any) -> bool:
    """Return whether a setting is a secret, by its name or the form of its value. Empty values are none."""
    if value in (None, "", False) or isinstance(value, bool):
        return False
    if _NAME.search(name):
        return True
    if not isinstance(value, str):
        return False
    return bool(_VALUE.search(value)) or (bool(_HASH.search(value)) and not _NO_SECRET.search(name))
