"""Where the memory goes and which techniques are really on: one table when a run starts, scalars while it runs.

Users of low-memory optimizers cannot tell from a loss curve whether the states are as small as promised, or whether a
technique is active at all. So bytes are counted on the tensors themselves, and a figure that is only expected, because
the tensors do not exist before the first step, is called "modelled".
"""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.optim import state_bytes
from lowbit_lightning.optim.forward_only import ForwardOnlyOptimizer
from lowbit_lightning.optim.state_memory import modelled_state_bytes, tensor_bytes

MEGABYTE = 1_000_000  # bytes


def peak_bytes(device: torch.device) -> int:
    """Returns the most that was ever allocated on a CUDA device, else the peak resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":  # has no getrusage
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns an aligned plain-text table: columns as wide as their longest cell, numbers to the right."""
    columns = [[str(cell) for cell in column] for column in zip(header, *rows, strict=True)]
    widths = [max(len(cell) for cell in column) for column in columns]
    right = [all(cell[:1].isdigit() or not cell for cell in column[1:]) for column in columns]
    lines = [
        "  ".join(
            cell.rjust(width) if is_number else cell.ljust(width)
            for cell, width, is_number in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in zip(*columns, strict=True)
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def memory_rows(module: torch.nn.Module, optimizers: Sequence[Optimizer]) -> list[tuple[str, str, str, str]]:
    """Returns rows (what, megabytes, bytes per parameter, how it is known) for the table at the start."""
    weights = list(module.parameters())
    trainable = [param for param in weights if param.requires_grad]
    rows = [_row("weights", tensor_bytes(weights), weights, "measured")]
    if buffers := tensor_bytes(module.buffers()):
        rows.append(("buffers", f"{buffers / MEGABYTE:.3f}", "", "measured"))
    if not optimizers or not all(isinstance(optimizer, ForwardOnlyOptimizer) for optimizer in optimizers):
        rows.append(_row("gradients", tensor_bytes(trainable), trainable, "modelled: one for every trainable weight"))
    for name, optimizer, group in _named_groups(optimizers):
        measured = state_bytes(optimizer, group)
        is_known = measured > 0 or isinstance(optimizer, ForwardOnlyOptimizer)  # which never has any
        modelled = None if is_known else modelled_state_bytes(optimizer, group)
        if is_known or modelled is not None:
            rows.append(_row(name, measured or modelled or 0, group["params"], "measured" if is_known else "modelled"))
        else:
            rows.append((name, "", "", "known after the first step"))
    return rows


def technique_rows(candidates: Iterable[Any]) -> list[tuple[str, str, str]]:
    """Returns the rows of every object that offers ``describe_technique()``, or one row that says "none"."""
    rows = [row for one in candidates if hasattr(one, "describe_technique") for row in one.describe_technique()]
    return rows or [("none", "", "")]


class MemoryLedger(Callback):
    """Prints at the start what takes how much memory and which techniques are on; logs megabytes during the run.

    Logged: ``memory/weights_mb``, ``memory/gradients_mb``, ``memory/optimizer_mb`` (and one for each parameter group
    where there are several) and ``memory/peak_mb``, the peak of the CUDA device or of the process, in 10^6 bytes.

    Args:
        every_n_steps: Optimizer steps between two entries in the log.

    Raises:
        InvalidArgumentError: if ``every_n_steps`` is below 1.

    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise InvalidArgumentError(f"every_n_steps={every_n_steps} must be at least 1.")
        self.every_n_steps = every_n_steps
        self._gradient_bytes = 0
        self._logged_step = 0
        self._to_measure = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the table; optimizers that can allocate their states now do so, which makes the figure exact."""
        if not self._in_charge(trainer):
            return
        for optimizer in trainer.optimizers:
            if hasattr(optimizer, "initialize_state"):
                optimizer.initialize_state()
        memory = memory_rows(pl_module, trainer.optimizers)
        self._to_measure = any(how != "measured" for name, _, _, how in memory if name.startswith("optimizer"))
        self._logged_step, self._gradient_bytes = 0, 0
        techniques = technique_rows(
            [*trainer.optimizers, *_callbacks(trainer), trainer.strategy, trainer.precision_plugin]
        )
        if trainer.is_global_zero:
            print(format_table(("memory", "MB", "bytes/parameter", ""), memory))
            print()
            print(format_table(("technique", "active on", "detail"), techniques))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Counts the gradients while they exist; a run without a backward pass has none."""
        if self._in_charge(trainer):
            self._gradient_bytes = tensor_bytes(param.grad for param in pl_module.parameters())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the scalars when they are due, and once the states that did not exist at the start."""
        step = trainer.global_step
        if not self._in_charge(trainer) or step == self._logged_step:
            return
        if self._to_measure and trainer.is_global_zero:
            states = sum(state_bytes(optimizer) for optimizer in trainer.optimizers)
            print(f"optimizer states, measured after the first step: {states / MEGABYTE:.3f} MB")
            self._to_measure = False
        if step % self.every_n_steps:
            return
        self._logged_step = step
        groups = {name: state_bytes(optimizer, group) for name, optimizer, group in _named_groups(trainer.optimizers)}
        counted = {
            "weights": tensor_bytes(pl_module.parameters()),
            "gradients": self._gradient_bytes,
            "optimizer": sum(groups.values()),
            "peak": peak_bytes(pl_module.device),
        }
        if len(groups) > 1:
            counted |= {name.replace(" ", "_"): size for name, size in groups.items()}
        scalars = {f"memory/{name}_mb": size / MEGABYTE for name, size in counted.items()}
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in scalars.items()})
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=step)

    def _in_charge(self, trainer: Trainer) -> bool:
        """Whether this is the first ledger of the trainer; an overlay may add a second one, which stays quiet."""
        return self is next(callback for callback in _callbacks(trainer) if isinstance(callback, MemoryLedger))


def _callbacks(trainer: Any) -> list[Callback]:
    return list(trainer.callbacks)  # an attribute that Trainer's connectors add, unknown to its annotations


def _named_groups(optimizers: Sequence[Optimizer]) -> list[tuple[str, Optimizer, dict[str, Any]]]:
    several = sum(len(optimizer.param_groups) for optimizer in optimizers) > 1
    groups = [(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]
    return [(f"optimizer group {i}" if several else "optimizer", *pair) for i, pair in enumerate(groups)]


def _row(name: str, size: int, params: Sequence[Tensor], how: str) -> tuple[str, str, str, str]:
    count = sum(param.to_local().numel() if hasattr(param, "to_local") else param.numel() for param in params)
    return name, f"{size / MEGABYTE:.3f}", f"{size / count:.3f}" if count else "", how
