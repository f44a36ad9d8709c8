"""The errors a user can meet: each names what, where and the way out."""


class UserError(ValueError):
    """Something the user can mend: printed as one message without a traceback, exit code 2."""


class RecipeError(UserError):
    """A recipe, or an override of it, says something that cannot be run."""


class DataError(UserError):
    """Pictures or captions that cannot be used."""


class StorageError(UserError):
    """A disk or bucket that cannot be read or written."""


class ModelError(UserError):
    """A model that is missing, lacks a part, or does not fit the method."""


class CheckpointError(UserError):
    """A checkpoint that is torn, tampered with, or belongs to another run."""


class ResourceError(UserError):
    """The machine or cluster cannot give what the run asks for."""


class FormatError(UserError):
    """A file of the right name with the wrong inside."""


class RunFailed(RuntimeError):
    """The run itself failed (the loss became NaN, a worker kept dying): exit code 1."""
