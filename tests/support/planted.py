"""Secrets that tests set in the environment, and a search for them in Ray's files and processes."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

PLANTED = f"planted-{uuid.uuid4().hex[:12]}"  # unique for this process: other test processes use secrets too
SECRETS = {
    "AWS_ACCESS_KEY_ID": PLANTED,
    "AWS_SECRET_ACCESS_KEY": PLANTED,
    "AWS_SESSION_TOKEN": PLANTED,
    "AWS_SECURITY_TOKEN": PLANTED,
    "AWS_ENDPOINT_URL_S3": f"http://me:{PLANTED}@127.0.0.1:9",
    "HF_TOKEN": PLANTED,
    "WANDB_API_KEY": PLANTED,
    "HTTPS_PROXY": f"http://me:{PLANTED}@proxy.invalid:3128",
    "https_proxy": f"http://me:{PLANTED}@proxy.invalid:3128",
}


def find_planted(*folders: Path) -> list[str]:
    """Return the files in folders, and the command lines and environments of processes, that contain a secret."""
    needle, found = PLANTED.encode(), []
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) != os.getpid() and not _is_own_child(process):
            files += [process / "cmdline", process / "environ"]
    for file in files:
        try:
            if needle in file.read_bytes():
                found.append(_told(file))
        except OSError:  # a process that has ended or belongs to another user
            continue
    return found


def _is_own_child(process: Path) -> bool:
    """Return whether this process, not Ray, started a process such as ``git``, which inherits the environment."""
    try:
        status, command = (process / "status").read_text(), (process / "cmdline").read_bytes()
    except OSError:
        return True
    return f"\nPPid:\t{os.getpid()}\n" in status and b"ray" not in command


def _told(file: Path) -> str:
    """Return the path of a file, for a file of a process together with its command."""
    if file.parent.parent != Path("/proc"):
        return str(file)
    try:
        words = [(file.parent / name).read_bytes().replace(b"\0", b" ") for name in ("cmdline", "stat")]
    except OSError:
        return f"{file} (ended)"
    return f"{file}: {words!r}"
