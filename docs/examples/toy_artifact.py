"""An artifact kind from outside the package: the vectors of a word as a CSV or TSV table."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamfleet.datasets.errors import FormatError
from dreamfleet.trainers.artifacts.kind import ARTIFACTS, ArtifactKind, Usage, Use

if TYPE_CHECKING:  # a kind imports without torch, so that reports and `--help` stay fast
    from torch import Tensor

DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_table(path: Path) -> list[list[float]]:
    """Read one vector per row. Raises FormatError unless all rows are numbers and equally long."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file, delimiter=DELIMITERS[path.suffix]))
    try:
        table = [[float(value) for value in row] for row in rows]
    except ValueError as error:
        raise FormatError(f"{path}: no table of vectors ({error})") from error
    if len({len(row) for row in table}) != 1:
        raise FormatError(f"{path}: no table of vectors (its rows have different lengths)")
    return table


def write_table(table: list[list[float]], path: Path) -> Path:
    """Write one vector per row."""
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=DELIMITERS[path.suffix]).writerows(table)
    return path


class TableKind(ArtifactKind):
    """Vectors of a word, one per row; the file's name is the word."""

    name = "table"
    suffixes = tuple(DELIMITERS)
    formats = ("csv", "tsv")
    has_strength = True

    def matches(self, path: Path) -> bool:
        return path.suffix in DELIMITERS and bool(read_table(path))

    def load_into(
        self, model: Any, path: Path, *, address: str, strength: Any = None, method: Any = None
    ) -> str:
        from dreamfleet.trainers.models.embeddings import install_embedding

        vectors = self.read_back(path)["vectors"] * (1.0 if strength is None else strength)
        word = getattr(method, "placeholder_token", "") or path.stem
        install_embedding(model, word, vectors)
        return word

    def usage(self, name: str, *, run_name: str, method: Mapping[str, Any]) -> Usage | None:
        if not name.endswith(self.suffixes):
            return None
        command = f"`dreamfleet sample --model ... --artifact exports/{name} --prompt ...`"
        return Usage("The learned vectors as a table.", (Use("dreamfleet", command),))

    def read_back(self, path: Path) -> dict[str, Tensor]:
        import torch

        return {"vectors": torch.tensor(read_table(path))}

    def convert(self, source: Path, target: Path) -> Path:
        if target.suffix not in DELIMITERS:
            raise self.cannot_become(target, self.suffixes)
        return write_table(read_table(source), target)


if __name__ == "__main__":  # in a script or a notebook; an installed package uses an entry point instead
    ARTIFACTS.register("table")(TableKind)
