"""Exceptions with messages for users, which state the problem, its place and the remedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class UserError(ValueError):
    """Base class of errors that the user can fix. Printed as one message without a traceback; exit code 2."""


class RecipeError(UserError):
    """A recipe, or an override of it, is invalid."""


class DataError(UserError):
    """Images or captions cannot be used."""


class StorageError(UserError):
    """A file on disk or in a bucket cannot be read or written."""


class ModelError(UserError):
    """A model is missing, lacks a part, or does not fit the method."""


class CheckpointError(UserError):
    """A checkpoint is incomplete, was modified, or belongs to another run."""


class ResourceError(UserError):
    """The machine or cluster lacks resources that the run needs."""


class FormatError(UserError):
    """The content of a file does not have the expected format."""


class Together(UserError):
    """Several errors of different places, which one message lists."""

    def __init__(self, errors: Sequence[UserError]):
        self.errors = errors
        lines = [str(error).replace("\n", "\n  ") for error in errors]
        super().__init__(f"{len(errors)} errors, nothing was started:\n  " + "\n  ".join(lines))


class Errors:
    """Collects the UserErrors of checks that do not depend on each other, to raise all of them at once."""

    def __init__(self) -> None:
        self.found: list[UserError] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Keep a UserError that ends this context."""
        try:
            yield
        except Together as error:
            self.found += error.errors
        except UserError as error:
            self.found.append(error)

    def has(self, key: str) -> bool:
        """Return whether an error of a recipe key was collected, which need not be checked further."""
        return any(
            line.strip().startswith(f"{key}:") for error in self.found for line in str(error).splitlines()
        )

    def refuse(self) -> None:
        """Raise what was collected: the error itself if it is the only one, Together for several."""
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            raise Together(self.found)


class RunFailed(RuntimeError):
    """The run itself failed, for example with a NaN loss or repeatedly failing workers. Exit code 1."""


class LeaseLost(RunFailed):
    """Another process has taken over the output_dir, so that this one may not write to it any more."""
