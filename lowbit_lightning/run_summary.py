"""What is printed when a training run has ended: what was trained, what the optimizer took, where to look."""

import shlex
import shutil
import sys
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from lowbit_lightning.optim import state_bytes
from lowbit_lightning.optim.sharding import local

ADAMW_BYTES_PER_PARAMETER = 8
"""Two fp32 moments: what torch.optim.AdamW keeps for a parameter in fp32."""


def summary(trainer: Trainer, module: LightningModule, seconds: float) -> str:
    """The text printed after ``fit``; its last line is the validation result.

    Args:
        trainer: After the run.
        module: What was trained.
        seconds: Wall-clock time of the run.
    """
    trainable = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    rows = [
        (
            "trained",
            f"{type(module).__name__}{_data(trainer)}, {trainable:,} trainable parameters,"
            f" {trainer.global_step:,} steps in {seconds:.1f} s",
        )
    ]
    if trainer.optimizers:
        names = ", ".join(dict.fromkeys(type(optimizer).__name__ for optimizer in trainer.optimizers))
        taken = sum(state_bytes(optimizer) for optimizer in trainer.optimizers)
        # Of a sharded model the states are those of this process, and so is what they are compared with.
        owned = sum(local(parameter).numel() for parameter in module.parameters() if parameter.requires_grad)
        adamw = ADAMW_BYTES_PER_PARAMETER * owned
        times = f", {adamw / taken:.1f} times smaller" if 0 < taken < adamw else ""
        rows.append(("optimizer", f"{names}, states {_size(taken)} (fp32 AdamW: {_size(adamw)}{times})"))
    for callback in getattr(trainer, "callbacks", ()):
        rows += callback.describe_result() if hasattr(callback, "describe_result") else []
    for checkpoint in dict.fromkeys(
        path
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint)
        for path in (callback.best_model_path, callback.last_model_path)
        if path
    ):
        rows.append(("checkpoint", _relative(checkpoint)))
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            rows.append(("look at it", f"{_command('tensorboard')} --logdir {shlex.quote(_relative(logger.root_dir))}"))
    lines = ["", *(f"{label:<11} {text}" for label, text in rows)]
    metrics = trainer.callback_metrics
    if "val_bits_per_byte" in metrics:
        lines.append(f"validation bits per byte: {float(metrics['val_bits_per_byte']):.2f}")
    elif "val_accuracy" in metrics:
        lines.append(f"validation accuracy: {float(metrics['val_accuracy']):.1%}")
    elif "val_loss" in metrics:
        lines.append(f"validation loss: {float(metrics['val_loss']):.4f}")
    return "\n".join(lines)


def _data(trainer: Trainer) -> str:
    """`` on TextFiles``, or nothing where loaders came without a data module."""
    datamodule = getattr(trainer, "datamodule", None)
    return f" on {type(datamodule).__name__}" if datamodule is not None else ""


def _command(name: str) -> str:
    """The command as it can be typed here: with its path where this Python's environment is not activated."""
    beside_python = Path(sys.executable).with_name(name)
    return name if shutil.which(name) or not beside_python.exists() else _relative(str(beside_python))


def _size(count: int) -> str:
    """Bytes in the unit that leaves few digits: ``713 B``, ``1.2 MB``."""
    amount = float(count)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.2f} GB"


def _relative(path: str) -> str:
    """The path as the user would type it here."""
    absolute, here = Path(path).absolute(), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(path)
