"""File extensions and first bytes of image formats: those that can be read, and those that are only recognised."""

from __future__ import annotations

IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".avif",
    ".apng",
)
MASK_ENDING = ".mask.png"  # ending of the name of a mask beside its image
ATTENTION_ENDING = "_att"  # ending of the stem of a DreamArtist attention map
# Images, raw photographs and videos that cannot be read. They are reported instead of silently ignored.
UNREADABLE_SUFFIXES = (
    ".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".jpx", ".psd", ".psb", ".xcf", ".kra", ".ai", ".eps",
    ".svg", ".tga", ".ico", ".dds", ".exr", ".hdr", ".ppm", ".pgm", ".pbm", ".pnm", ".pcx", ".cr2", ".cr3",
    ".crw", ".nef", ".nrw", ".arw", ".sr2", ".srf", ".dng", ".raw", ".raf", ".rw2", ".orf", ".pef", ".x3f",
    ".srw", ".erf", ".mrw", ".dcr", ".kdc", ".3fr", ".iiq", ".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm",
    ".wmv", ".flv", ".mpg", ".mpeg", ".3gp", ".mts", ".m2ts", ".gifv",
)  # fmt: skip

# Extensions of other files that are common in image folders; their content is not checked.
OTHER_ENDINGS = (
    ".txt", ".caption", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".yaml", ".yml", ".toml", ".ini",
    ".xml", ".html", ".md", ".log", ".py", ".ipynb", ".sh", ".npz", ".npy", ".safetensors", ".ckpt", ".pt",
    ".pth", ".bin", ".onnx", ".zip", ".tar", ".gz", ".7z", ".rar", ".pdf", ".db", ".lock", ".url", ".lnk",
    ".xmp", ".aae", ".wav", ".mp3",
)  # fmt: skip
_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"\0\0\0\x0cJXL ", "JXL"),
)


def format_of(head: bytes) -> str | None:
    """Return the format of an image, given at least the first 16 bytes of its file; None for anything else."""
    for start, kind in _MAGIC:
        if head.startswith(start):
            return kind
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        return {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC"}.get(
            head[8:12]
        )
    return "BMP" if head[:2] == b"BM" and head[6:10] == bytes(4) else None


def holds_embedding(data: bytes) -> bool:
    """Return whether a PNG is a textual inversion embedding in the webui's image format."""
    return data[:4] == b"\x89PNG" and b"sd-ti-embedding" in data[:4096]
