"""Exceptions with messages for users, which state the problem, its place and the remedy."""


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


class RunFailed(RuntimeError):
    """The run itself failed, for example with a NaN loss or repeatedly failing workers. Exit code 1."""


class LeaseLost(RunFailed):
    """Another process has taken over the output_dir, so that this one may not write to it any more."""
