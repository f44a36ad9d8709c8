"""Checks the names of subjects, which become names of folders and of artifacts on any system."""

from __future__ import annotations

import re
import unicodedata

MAX_BYTES = 120  # a file name may have 255 bytes; artifacts and temporary files add endings
_SEPARATORS = re.compile(r"[/\\]")
_REFUSED = re.compile(r'[<>:"|?*]')
_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


def find_fault(name: str) -> str | None:
    """Return why a name cannot be that of a folder and its artifacts; None if it can."""
    if not name.strip():
        return "the name is empty"
    if _SEPARATORS.search(name):
        return f"the name {name!r} contains a path separator"
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Cf", "Zl", "Zp") for letter in name):
        return f"the name {name!r} contains a control character"
    if name.startswith("."):
        return f"the name {name!r} begins with a dot"
    if name != name.strip() or name.endswith("."):
        return f"the name {name!r} begins or ends with a space, or ends with a dot"
    if found := _REFUSED.search(name):
        return f"the name {name!r} contains {found[0]}, which Windows does not allow in file names"
    if _DEVICES.fullmatch(name):
        return f"the name {name!r} is reserved by Windows"
    if (size := len(name.encode())) > MAX_BYTES:
        return f"the name {name[:20]!r}... has {size} bytes in UTF-8, and at most {MAX_BYTES} are possible"
    return None


def folded(name: str) -> str:
    """Return the form in which names of one folder are equal on disks that ignore case or Unicode forms."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
