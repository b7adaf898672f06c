"""Errors that a user can mend. The command prints their message without a traceback and exits with status 2.

A run that diverged for good exits with status 3, so that a scheduler can tell it from a mistake in a configuration.
"""

from collections.abc import Sequence
from typing import Any


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


class TrainingDivergedError(LowBitError, RuntimeError):
    """A run in trouble that none of SpikeGuard's measures could help.

    Attributes:
        tried: what was done about it, oldest first.
        checkpoint: the last trusted checkpoint, or None where there is none.
        ledger: the file in which every event is written down.
    """

    def __init__(self, trouble: str, tried: Sequence[str], checkpoint: str | None, ledger: str) -> None:
        self.tried = list(tried)
        self.checkpoint = checkpoint
        self.ledger = ledger
        resume = (
            f"The last trusted checkpoint is {checkpoint!r}: go on from it with --ckpt_path trusted"
            if checkpoint
            else "There is no trusted checkpoint yet"
        )
        done = "; ".join(self.tried) or "nothing, no rung of the ladder answers this"
        super().__init__(f"training diverged: {trouble}. Tried: {done}. {resume}. Every event is in {ledger!r}.")

    def __reduce__(self) -> tuple[Any, ...]:
        """Processes hand errors to each other pickled, which by default calls the class with the message alone."""
        return _rebuilt, (type(self), str(self), self.__dict__)


def _rebuilt(kind: type[TrainingDivergedError], message: str, attributes: dict[str, Any]) -> TrainingDivergedError:
    error = kind.__new__(kind, message)
    error.args = (message,)
    error.__dict__.update(attributes)
    return error
