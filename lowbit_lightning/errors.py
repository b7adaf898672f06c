"""Errors that a user can mend. The command prints their message without a traceback and exits with status 2."""


class LowBitError(Exception):
    """Base of every error whose message names what was wrong and what to do about it."""


class InvalidArgumentError(LowBitError, ValueError):
    """An argument outside its range. The message names the argument, its value and the allowed range."""


class CorpusError(LowBitError):
    """A corpus that is missing, empty, unreadable or too short. The message names the path."""


class CheckpointError(LowBitError, RuntimeError):
    """A checkpoint that is torn, unreadable or of another layout. The message names the file or the entry."""


class WrongLightningError(LowBitError, TypeError):
    """An object built on ``pytorch_lightning``, whose classes are unrelated to those of ``lightning.pytorch``."""
