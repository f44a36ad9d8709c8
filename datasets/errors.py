"""Exceptions with messages for users: each names what is wrong, where, and the remedy."""


class UserError(ValueError):
    """An error that the user can fix: printed as one message without a traceback, exit code 2."""


class RecipeError(UserError):
    """A recipe, or an override of it, that cannot be run."""


class DataError(UserError):
    """Images or captions that cannot be used."""


class StorageError(UserError):
    """A disk or bucket that cannot be read or written."""


class ModelError(UserError):
    """A model that is missing, lacks a part, or does not fit the method."""


class CheckpointError(UserError):
    """A checkpoint that is incomplete, was modified, or belongs to another run."""


class ResourceError(UserError):
    """The machine or cluster lacks resources that the run needs."""


class FormatError(UserError):
    """A file whose content is not of the expected format."""


class RunFailed(RuntimeError):
    """The run itself failed, such as by a loss of NaN or a worker that keeps dying: exit code 1."""
