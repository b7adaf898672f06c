"""SwampingMonitor: do the low-bit second moments follow what full precision would do?

A state in few bits can be swamped: its average moves by so little a step that rounding always puts it back. SOLO's
logarithmic levels with stochastic rounding are made so that this does not happen (arXiv 2505.00347, corollary 3.2 and
proposition 3.5); this callback measures it in your run. It keeps the true fp32 average of a few rows of every quantized
tensor beside the run and compares.
"""

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.optim import SoloAdamW
from lowbit_lightning.optim.sharding import local

FEWEST_MOVED = 30
"""Elements whose exact average moved by a level: of fewer, a swamped share is noise."""


@dataclass
class _Sample:
    """The first rows of one parameter: the true average, and both averages when last looked at."""

    optimizer: SoloAdamW
    param: Tensor
    beta2: float
    block_size: int
    rows: int
    exact: Tensor
    last_exact: Tensor
    last_state: Tensor
    steps: int


class SwampingMonitor(Callback):
    """Log how well SOLO's second moments follow their exact averages.

    ``solo/state_error`` is the relative error of the square root of the second moment, over the sampled rows.
    ``solo/swamped`` is, of the elements whose exact average moved by at least one level since the last look, the share
    whose state moved by less than half a level; it is left out where fewer than 30 moved. Both go to every logger and
    to ``trainer.callback_metrics``. After a resume the exact averages start from the states. Of sharded parameters the
    logging process follows its own rows.

    Args:
        every_n_steps: optimizer steps between two looks.
        sample: elements of each tensor that are followed, in whole rows; costs 12 bytes each.

    Raises:
        InvalidArgumentError: an argument is below 1.
    """

    def __init__(self, every_n_steps: int = 100, sample: int = 4096) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("sample", sample)):
            if value < 1:
                raise InvalidArgumentError(f"{name}={value} is out of range: an integer >= 1")
        self.every_n_steps = every_n_steps
        self.sample = sample
        self._samples: list[_Sample] = []
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the rows."""
        self._samples = []
        self._last_step = trainer.global_step
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, SoloAdamW):
                optimizer.initialize_state()
                for group, name, param in optimizer.named_params():
                    if "exp_avg_sq_codes" in optimizer.state[param] and local(param).numel():
                        self._samples.append(self._sample(optimizer, group, name, param))

    def _sample(self, optimizer: SoloAdamW, group: dict[str, Any], name: str, param: Tensor) -> _Sample:
        own_rows = local(param).shape[0]
        columns = local(param).numel() // own_rows
        rows = min(own_rows, -(-self.sample // columns))
        state = optimizer.dequantized_state(param, rows)["exp_avg_sq"].view(rows, columns)
        return _Sample(
            optimizer,
            param,
            beta2=group["betas"][1],
            block_size=optimizer.settings(group, name, param)["block_size"],
            rows=rows,
            exact=state.clone(),
            last_exact=state.clone(),
            last_state=state,
            steps=int(optimizer.state[param]["step"]),
        )

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follow the step, and look every ``every_n_steps``."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        for sample in self._samples:
            # The gradient is still there as the optimizer saw it, clipped; a step that it skipped does not count.
            steps = int(sample.optimizer.state[sample.param]["step"])
            if sample.param.grad is not None and steps == sample.steps + 1:
                grad = local(sample.param.grad)[: sample.rows].reshape(sample.exact.shape).float()
                sample.exact.lerp_(grad.square(), 1 - sample.beta2)
            sample.steps = steps
        if self._samples and trainer.global_step % self.every_n_steps == 0:
            self._log(trainer)

    def _log(self, trainer: Trainer) -> None:
        error = norm = 0.0
        swamped = moved = 0
        for sample in self._samples:
            state = sample.optimizer.dequantized_state(sample.param, sample.rows)["exp_avg_sq"].view_as(sample.exact)
            error += float((state.sqrt() - sample.exact.sqrt()).square().sum())
            norm += float(sample.exact.sum())
            level = level_distance(sample.optimizer, sample.param, sample.rows, sample.block_size)
            followed = swamped_elements(sample.exact, sample.last_exact, state, sample.last_state, level)
            swamped, moved = swamped + followed[0], moved + followed[1]
            sample.last_exact.copy_(sample.exact)
            sample.last_state = state
        scalars = {"solo/state_error": (error / norm) ** 0.5 if norm else 0.0}
        if moved >= FEWEST_MOVED:
            scalars["solo/swamped"] = swamped / moved
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in scalars.items()})
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)


def swamped_elements(
    exact: Tensor, last_exact: Tensor, state: Tensor, last_state: Tensor, level: Tensor
) -> tuple[int, int]:
    """Return how many elements are swamped, and how many of all could be.

    Could be: those whose exact average moved by at least one level between two looks. Swamped: those of them whose
    state moved by less than half a level.

    Args:
        exact: the exact second moments now, (rows, columns) fp32; ``last_exact`` those of the last look.
        state: the dequantized ones; ``last_state`` those of the last look.
        level: the distance of neighbouring levels in log2, see :func:`level_distance`.
    """
    moved = _log2_ratio(exact, last_exact) >= level
    swamped = moved & (_log2_ratio(state, last_state) < level / 2)
    return int(swamped.sum()), int(moved.sum())


def level_distance(optimizer: SoloAdamW, param: Tensor, rows: int, block_size: int) -> Tensor:
    """Return the distance of neighbouring levels in log2, of the first ``rows`` as (rows, columns), now."""
    base = local(optimizer.state[param]["exp_avg_sq_log2_base"])[:rows].float()
    columns = local(param).numel() // local(param).shape[0]
    return (-base).repeat_interleave(block_size, dim=1)[:, :columns].clamp_min(1e-3)


def _log2_ratio(new: Tensor, old: Tensor) -> Tensor:
    """Return |log2(new / old)|, 0 where either is 0 (a state before its first step has no ratio)."""
    ratio = (new.log2() - old.log2()).abs()
    return ratio.where((new > 0) & (old > 0), torch.zeros(()))
