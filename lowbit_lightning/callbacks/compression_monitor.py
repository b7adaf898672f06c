"""CompressionMonitor: how much of the gradients does MicroAdam send to the weights, and how much does it owe them?

MicroAdam (arXiv 2405.15593) selects the largest elements and keeps the rest, in 4 bits, for later steps. Its theory
holds as long as what it keeps stays bounded, and it works well while what it selects holds most of the energy. Both are
read from the optimizer's state, so watching costs nothing between two looks.
"""

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.optim import MicroAdam


class CompressionMonitor(Callback):
    """Log what MicroAdam's compression catches and keeps.

    ``micro_adam/caught`` is the share of the energy (squared norm) of gradient plus error that the last step selected,
    ``micro_adam/error_norm`` the norm of the error over that of the gradient, and ``micro_adam/density`` the share of
    elements that were selected; all over the compressed tensors that the last step moved. They go to every logger and
    to ``trainer.callback_metrics``, where other callbacks can watch them. An error that keeps growing means that the
    density is too low, or the learning rate too high.

    Args:
        every_n_steps: optimizer steps between two looks.

    Raises:
        InvalidArgumentError: ``every_n_steps`` is below 1.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise InvalidArgumentError(f"every_n_steps={every_n_steps} is out of range: an integer >= 1")
        self.every_n_steps = every_n_steps
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from where the run starts or goes on."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look every ``every_n_steps``."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        if trainer.global_step % self.every_n_steps == 0:
            scalars = compression_scalars([own for own in trainer.optimizers if isinstance(own, MicroAdam)])
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in scalars.items()})
            for logger in trainer.loggers if scalars else ():
                logger.log_metrics(scalars, step=trainer.global_step)


def compression_scalars(optimizers: list[MicroAdam]) -> dict[str, float]:
    """Return the three scalars; none before the first step, nor where nothing is compressed."""
    sent = total = kept = gradient = 0.0
    selected = elements = 0
    for optimizer in optimizers:
        for _, _, param in optimizer.named_params():
            step = optimizer.compression(param)
            # The gradient is still there as the optimizer saw it, clipped; NaN means that it was not used.
            if step is not None and math.isfinite(step.gradient_energy):
                sent, total = sent + step.selected_energy, total + step.total_energy
                kept, gradient = kept + step.error_energy, gradient + step.gradient_energy
                selected, elements = selected + step.selected, elements + param.numel()
    if not elements:
        return {}
    return {
        "micro_adam/caught": sent / total if total else 1.0,
        "micro_adam/error_norm": math.sqrt(kept / gradient) if gradient else 0.0,
        "micro_adam/density": selected / elements,
    }
