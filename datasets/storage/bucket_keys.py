"""What the keys of a bucket say about files and folders: listings, sizes and existence, with any fsspec file system."""

from __future__ import annotations

from typing import Any


def is_folder(file_system: Any, key: str) -> bool:
    """Return whether a key is a prefix of other keys instead of an object. Raises FileNotFoundError if neither."""
    return bool(file_system.info(key)["type"] == "directory")


def bucket_has(file_system: Any, key: str) -> bool:
    """Return whether a key exists as an object or as a prefix of a file's key."""
    try:
        return not is_folder(file_system, key) or bool(first_file(file_system, key))
    except FileNotFoundError:
        return False


def first_file(file_system: Any, key: str) -> list[str]:
    """Return a list with one file below a key, at any depth, or []. Raises FileNotFoundError if the key is missing."""
    entries = file_system.ls(key, detail=True)
    if files := [entry["name"] for entry in entries if _is_file(entry) and entry["name"] != key]:
        return files[:1]
    return next(
        (found for folder in _folders(entries, key) if (found := first_file(file_system, folder))), []
    )


def bucket_files(file_system: Any, key: str, recursive: bool) -> list[str]:
    """Return the sorted names of the files below a key, relative to it. Raises FileNotFoundError if there are none."""
    if recursive:
        entries = list(file_system.find(key, detail=True).values())
    else:
        entries = file_system.ls(key, detail=True)
    start = len(key) + 1
    found = (entry["name"] for entry in entries if _is_file(entry))
    return sorted(name[start:] for name in found if name.startswith(f"{key}/"))


def bucket_folders(file_system: Any, key: str) -> list[str]:
    """Return the sorted names of direct subfolders that contain files. Raises FileNotFoundError without the key."""
    folders = _folders(file_system.ls(key, detail=True), key)
    return [folder.rsplit("/", 1)[1] for folder in folders if first_file(file_system, folder)]


def bucket_size(file_system: Any, key: str) -> int:
    """Return the size in bytes of an object, or of all objects below a key."""
    info = file_system.info(key)
    if info["type"] != "directory":
        return int(info["size"])
    return sum(int(entry["size"]) for entry in file_system.find(key, detail=True).values())


def bucket_versions(file_system: Any, key: str) -> dict[str, str]:
    """Return name -> size and ETag of an object (name "") or of all objects below a key."""
    info = file_system.info(key)
    if info["type"] != "directory":
        return {"": _version(info)}
    entries = file_system.find(key, detail=True).values()
    start = len(key) + 1
    return {entry["name"][start:]: _version(entry) for entry in entries if _is_file(entry)}


def stamp_of(entry: dict[str, Any]) -> str:
    """Return the size and ETag of a listed object, which change with its content; "" without an ETag."""
    tag = entry.get("ETag") or entry.get("etag")  # by s3fs, and by gcsfs
    return f"{entry['size']} {tag}" if tag else ""


def _version(entry: dict[str, Any]) -> str:
    return stamp_of(entry) or f"{entry['size']} {entry.get('LastModified') or entry.get('updated')}"


def _is_file(entry: dict[str, Any]) -> bool:
    """Return whether a listed object is a file, and not an empty object that consoles or Hadoop create for a folder."""
    return entry["type"] != "directory" and not entry["name"].endswith(("/", "_$folder$"))


def _folders(entries: list[dict[str, Any]], key: str) -> list[str]:
    found = {entry["name"].rstrip("/") for entry in entries if entry["type"] == "directory"}
    return sorted(found - {key})
