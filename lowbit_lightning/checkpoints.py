"""Checkpoints that are never torn: written whole or not at all, and looked at before a run starts from one."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lowbit_lightning.atomic_file import atomic_file
from lowbit_lightning.errors import CheckpointError

KEYWORDS = ("last", "best", "hpc", "trusted")
"""Values of ``--ckpt_path`` that are looked up: the first three by Lightning, the last by LowBitCLI."""


class _ErrorKeepingFile:
    """Remembers why a write failed: ``torch.save`` turns the OSError into a RuntimeError without a cause."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return int(self.file.write(data))
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, with three differences: a full disk leaves nothing torn behind and is reported with
    the file's name; a kill at any instant leaves the previous file of that name whole; and the checkpoint streams to
    the disk instead of being held in memory a second time.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``; remote paths are left to Lightning.

        Raises:
            OSError: The disk is full or the file cannot be written; ``filename`` is ``path``.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as file:
            keeping = _ErrorKeepingFile(file)
            try:
                torch.save(checkpoint, keeping)  # type: ignore[arg-type]
            except Exception:
                if keeping.error is not None:
                    raise keeping.error from None
                raise


def is_local_file(ckpt_path: _PATH | None) -> bool:
    """Whether ``--ckpt_path`` names a file or folder of this machine, rather than nothing, a keyword or a URL."""
    text = str(ckpt_path or "")
    return bool(text) and text not in KEYWORDS and "://" not in text and not text.startswith("registry")


def has_own_folder(trainer: Trainer) -> bool:
    """Whether a ModelCheckpoint has a ``dirpath`` of its own, where Lightning itself finds ``last``."""
    return any(isinstance(saver, ModelCheckpoint) and saver.dirpath for saver in trainer.checkpoint_callbacks)


def last_of_earlier_runs(trainer: Trainer) -> Path | None:
    """The newest ``last.ckpt`` among the logger's versions, for ``--ckpt_path last``.

    Lightning looks only in the folder of the run that is starting, which a logger that counts versions has just made:
    a killed run would silently start from scratch.
    """
    found = (
        path
        for logger in trainer.loggers
        if isinstance(logger, TensorBoardLogger | CSVLogger)
        for path in Path(logger.root_dir).glob("version_*/checkpoints/last*.ckpt")
    )
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def check_readable(path: Path, weights_only: bool = True) -> None:
    """Make sure that ``path`` is a whole Lightning checkpoint. Reads its structure, not its tensors.

    Args:
        path: A file, or the folder of a distributed checkpoint (which is only checked to be one).
        weights_only: Whether it will be loaded without running any code in it.

    Raises:
        CheckpointError: Missing, torn, or something else than a Lightning checkpoint.
    """
    if path.is_dir():
        if not any((path / name).exists() for name in (".metadata", "meta.pt", "checkpoint", "latest")):
            raise CheckpointError(f"--ckpt_path {str(path)!r} is a folder without a distributed checkpoint in it.")
        return
    if not path.exists():
        siblings = sorted(file.name for file in path.parent.glob("*.ckpt"))[:5] if path.parent.is_dir() else []
        there = f" In that folder: {', '.join(siblings)}." if siblings else ""
        raise CheckpointError(f"--ckpt_path {str(path)!r} does not exist.{there}")
    remedy = "Use an older checkpoint, or start without --ckpt_path."
    try:
        whole = zipfile.is_zipfile(path)
    except OSError as error:
        raise CheckpointError(f"--ckpt_path {str(path)!r} cannot be read: {error.strerror}.") from error
    if not whole:
        size = path.stat().st_size
        raise CheckpointError(f"--ckpt_path {str(path)!r} is torn or no checkpoint ({size:,} bytes). {remedy}")
    if not weights_only:
        return
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"--ckpt_path {str(path)!r} holds Python objects, which could run code when loaded."
            " If you trust it, add --weights_only=false."
        ) from error
    except Exception as error:
        raise CheckpointError(f"--ckpt_path {str(path)!r} is torn: {error}. {remedy}") from error
    if not isinstance(content, dict) or "state_dict" not in content or "pytorch-lightning_version" not in content:
        raise CheckpointError(
            f"--ckpt_path {str(path)!r} is not a checkpoint of a Lightning run (no trainer state in it). To start from"
            " weights alone, load them in the model."
        )
