"""The interface of artifact kinds, and the registry of kinds that all commands use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dreamfleet.datasets.errors import FormatError, UserError
from dreamfleet.datasets.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from dreamfleet.trainers.config.method import MethodConfig
    from dreamfleet.trainers.models.family import DiffusionModel


@dataclass(frozen=True)
class Use:
    """How one program uses an artifact. Code in ``text`` is in backticks."""

    program: str
    text: str


@dataclass(frozen=True)
class Usage:
    """A one-sentence description of an artifact, and how programs use it."""

    what: str
    uses: tuple[Use, ...]


class ArtifactKind:
    """One kind of file or folder that a run exports and that `sample`, `score`, `convert` and `report.html` accept.

    A subclass sets the attributes and implements the methods it needs; the module that defines it must import without
    torch (heavy imports go into the methods). Registered in ``ARTIFACTS``, by the entry-point group
    ``dreamfleet.artifacts`` from other packages; a method's recipe section lists the names of the kinds it exports in
    ``artifacts``.
    """

    #: name in the registry and in messages
    name: ClassVar[str]
    #: endings of its files, in lower case with the dot
    suffixes: ClassVar[tuple[str, ...]] = ()
    #: a file that every folder of this kind contains; None if the kind has no folders
    marker: ClassVar[str | None] = None
    #: its names for ``dreamfleet export --format``
    formats: ClassVar[tuple[str, ...]] = ()
    #: the option of ``dreamfleet sample`` that takes it
    option: ClassVar[str] = "artifact"
    #: whether it can be applied at a strength, as in ``FILE:0.8``
    has_strength: ClassVar[bool] = False
    #: whether it is a whole model, which is loaded instead of a base model
    is_model: ClassVar[bool] = False
    #: whether its files are in float32 whatever ``train.save_precision`` is
    is_full_precision: ClassVar[bool] = False

    def matches(self, path: Path) -> bool:
        """Return whether a local file or folder is of this kind, judged by its content.

        May raise FormatError if the file is clearly meant to be of this kind but is invalid; the message is shown if
        no other kind matches.
        """
        raise NotImplementedError

    def load_into(
        self,
        model: DiffusionModel,
        path: Path,
        *,
        address: str,
        strength: float | None = None,
        method: MethodConfig | None = None,
    ) -> str:
        """Apply the artifact to ``model`` for sampling; return the word that activates it in prompts, or "".

        ``path``: a local copy. ``address``: the artifact's location, on disk or in a bucket. ``strength``: None if not
        given. ``method``: the recipe section of the run that exported it, if known.
        """
        raise UserError(f"{address}: a {self.name} generates no images")

    def usage(self, name: str, *, run_name: str, method: Mapping[str, Any]) -> Usage | None:
        """Return how programs use ``exports/NAME`` of a run; None if a file of that name is not of this kind.

        ``method``: the run's ``method:`` section as written in the recipe file.
        """
        raise NotImplementedError

    def exported_names(self, run_name: str, method: Mapping[str, Any]) -> Sequence[str]:
        """Return the names in a run's ``exports/`` that can be used for sampling, the preferred one first."""
        return [f"{run_name}{suffix}" for suffix in self.suffixes]

    def read_back(self, path: Path) -> dict[str, Tensor]:
        """Return the tensors of an artifact, named as in the state of the method that exports it."""
        raise NotImplementedError

    def convert(self, source: Path, target: Path) -> Path:
        """Write ``source`` in the format that the suffix of ``target`` names. Raises UserError for another suffix."""
        raise self.cannot_become(target, self.suffixes)

    def cannot_become(self, target: Path, suffixes: Sequence[str]) -> UserError:
        """Return the error for a conversion to a suffix that this kind does not support."""
        return UserError(
            f"an artifact of the kind {self.name} cannot become {target.name}: name a file that ends in "
            f"{', '.join(suffixes)}"
        )


_PACKAGE = "dreamfleet.trainers.artifacts"
BUILTIN = {  # tried in this order, after the kinds of other packages
    "hypernetwork": f"{_PACKAGE}.hypernetwork:HypernetworkKind",
    "aesthetic": f"{_PACKAGE}.aesthetic:AestheticKind",
    "lora": f"{_PACKAGE}.lora:LoraKind",
    "embedding": f"{_PACKAGE}.embedding:EmbeddingKind",
    "classifier": f"{_PACKAGE}.classifier:ClassifierKind",
    "checkpoint": f"{_PACKAGE}.checkpoint:CheckpointKind",
}
ARTIFACTS: Registry[type[ArtifactKind]] = Registry(
    "artifact kind", group="dreamfleet.artifacts", builtin=BUILTIN
)


def kinds() -> Iterator[ArtifactKind]:
    """Yield all kinds, those of other packages first, since their ``matches`` are more specific."""
    for name in sorted(ARTIFACTS.names(), key=lambda name: name in BUILTIN):
        yield ARTIFACTS.get(name)()


def detect_kind(path: Path, *, address: str | None = None) -> ArtifactKind:
    """Return the kind of a local file or folder. Raises FormatError naming the known kinds if none matches.

    ``address``: its name in messages, if ``path`` is a copy.
    """
    reasons = []
    for kind in kinds():
        try:
            if kind.matches(path):
                return kind
        except FormatError as error:
            reasons.append(str(error))
    raise FormatError(
        f"{address or path}: no artifact of a known kind ({', '.join(ARTIFACTS.names())})"
        + "".join(f"; {reason}" for reason in reasons[:1])
    )
