"""From Lightning's hooks to one set of numbers for a step: collected on the device, reduced once, read once."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lowbit_lightning.optim.forward_only import ForwardOnlyOptimizer
from lowbit_lightning.spikes.signals import UpdateSample, as_integers, gather_rows, global_norm, pack, sample_ids

SAMPLE_EVERY = 10  # optimizer steps between two looks at weights and updates, which the step itself does not touch


@dataclass(frozen=True)
class Measured:
    """One optimizer step's signals, the same on every rank.

    Attributes:
        values: every signal that could be measured, reduced over ranks.
        judged: those of ``values`` that are to be judged.
        weights_finite: whether all weights are finite, as far as is known.
        local: for every rank, its own values of the signals.
    """

    values: dict[str, float]
    judged: dict[str, float]
    weights_finite: bool
    local: list[dict[str, float]]

    def worst_rank(self, signal: str) -> int:
        """The rank with the worst value of the signal; where all have the same (gradients do), of the loss."""

        def badness(rank: int) -> list[float]:
            values = [self.local[rank].get(name, -math.inf) for name in (signal, "nonfinite", "loss")]
            return [value if math.isfinite(value) or value == -math.inf else math.inf for value in values]

        return max(range(len(self.local)), key=lambda rank: (badness(rank), -rank))


class StepMeter:
    """Collects what one optimizer step is made of, over its accumulated batches.

    Args:
        published: names of logged metrics that are signals too.
    """

    def __init__(self, published: Sequence[str]) -> None:
        self.published = tuple(published)
        self.stepped = False
        self._losses: list[Tensor] = []
        self._scale: Tensor | None = None
        self._ids: list[Any] = []
        self._samples: dict[int, UpdateSample] = {}
        self._updates: dict[int, tuple[Tensor | float, Tensor | float]] = {}

    def clear(self) -> None:
        """Forget a step that is half collected."""
        self.stepped = False
        for collected in (self._losses, self._ids, self._samples):
            collected.clear()

    def note_batch(self, batch: Any) -> None:
        """A batch begins; the first one after a step begins a new window."""
        if self.stepped:
            self.stepped = False
            self._losses.clear()
            self._ids.clear()
        if (ids := sample_ids(batch)) is not None:
            self._ids.append(ids)

    def note_loss(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Remember a loss as the module computed it: not scaled, not divided by the batches that are accumulated."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._scale = None if scaler is None else scaler.scale(torch.ones((), device=loss.device))
        divided_by = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        # A new tensor in any case: the module may go on with its own in place.
        value = loss.detach().float().mean() * divided_by
        self._losses.append(value if self._scale is None else value / self._scale)

    def measure(self, trainer: Trainer, optimizer: Optimizer, index: int, copies: int) -> Measured:
        """Read what there is just before the optimizer steps: one all-reduce, one wait for the device.

        A second, small one follows only if something is not finite: are the weights?

        Args:
            trainer: whose step it is.
            optimizer: that is about to step.
            index: its place among the trainer's optimizers.
            copies: ranks that hold the same values of a plain tensor.
        """
        device = trainer.strategy.root_device
        params = [param for group in optimizer.param_groups for param in group["params"]]
        row = self._loss_cells(device) | self._gradient_cells(optimizer, params, copies, device)
        row["update_square"], row["weight_square"] = self._updates.pop(index, (0.0, 0.0))
        look = trainer.global_step // max(len(trainer.optimizers), 1) % SAMPLE_EVERY == 0
        row["bad_weights"] = _bad(params, copies, device) if look else 0.0
        row["scale"] = 0.0 if self._scale is None else self._scale
        metrics = trainer.callback_metrics if self.published else {}
        for name in self.published:
            value = metrics.get(name)
            row[f"has {name}"], row[f"of {name}"] = float(value is not None), 0.0 if value is None else value
        cells = list(row)
        rows = [dict(zip(cells, values, strict=True)) for values in gather_rows(pack(list(row.values()), device))]
        self.stepped = True
        self._losses.clear()
        if look:
            self._samples[index] = UpdateSample(params)
        values = _reduce(rows, self.published)
        finite = not any(one["bad_weights"] for one in rows)
        if not look and values["nonfinite"]:
            finite = not any(count for (count,) in gather_rows(pack([_bad(params, copies, device)], device)))
        return Measured(
            values, _without_overflow(values, rows), finite, [_reduce([one], self.published) for one in rows]
        )

    def note_step_taken(self, healthy: bool) -> None:
        """After the step: measure its update, unless it may have been left out."""
        for index, sample in self._samples.items():
            if healthy and (squares := sample.squares()) is not None:
                self._updates[index] = squares
        self._samples.clear()

    def samples(self) -> list[int] | None:
        """Ids of this rank's samples in the window, where its batches name them."""
        return as_integers(self._ids)

    def state_dict(self) -> dict[str, Any]:
        """What the next step will be told of the last one's update, as plain numbers: this rank's part."""
        return {str(index): [float(square) for square in squares] for index, squares in self._updates.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on between two steps, where ``state_dict`` was taken."""
        self.clear()
        self._updates = {int(index): (float(update), float(weight)) for index, (update, weight) in state.items()}

    def _loss_cells(self, device: torch.device) -> dict[str, Tensor | float]:
        if not self._losses:
            return {"loss_sum": 0.0, "losses": 0.0, "bad_losses": 0.0}
        losses = torch.stack(self._losses).to(device)
        return {
            "loss_sum": losses.sum(),
            "losses": float(len(self._losses)),
            "bad_losses": (~torch.isfinite(losses)).sum(),
        }

    def _gradient_cells(
        self, optimizer: Optimizer, params: list[Tensor], copies: int, device: torch.device
    ) -> dict[str, Tensor | float]:
        if isinstance(optimizer, ForwardOnlyOptimizer):
            # An estimate from few losses, too noisy to be judged, but not finite if one of them is not.
            bad = float(optimizer.is_ready and not math.isfinite(optimizer.gradient_norm()))
            return {"grad_norm": 0.0, "has_gradient": 0.0, "bad_gradients": bad}
        found = global_norm((param.grad for param in params), copies, device)
        if found is None:
            return {"grad_norm": 0.0, "has_gradient": 0.0, "bad_gradients": 0.0}
        norm, nonfinite = found
        if self._scale is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            norm = norm / self._scale  # a fused optimizer takes the scale off itself, later
        return {"grad_norm": norm, "has_gradient": 1.0, "bad_gradients": nonfinite}


def _bad(params: list[Tensor], copies: int, device: torch.device) -> Tensor | float:
    """How many weight tensors are not finite."""
    found = global_norm(params, copies, device)
    return 0.0 if found is None else found[1]


def _reduce(rows: list[dict[str, float]], published: Sequence[str]) -> dict[str, float]:
    """The signals of all ranks together."""
    values = {"nonfinite": max(row["bad_gradients"] + row["bad_losses"] for row in rows)}
    if losses := sum(row["losses"] for row in rows):
        values["loss"] = sum(row["loss_sum"] for row in rows) / losses
    if any(row["has_gradient"] for row in rows):
        values["grad_norm"] = math.hypot(*(row["grad_norm"] for row in rows))
    if (weights := sum(row["weight_square"] for row in rows)) > 0:
        values["update_ratio"] = math.sqrt(sum(row["update_square"] for row in rows) / weights)
    for name in published:
        if present := [row[f"of {name}"] for row in rows if row[f"has {name}"]]:
            values[name] = sum(present) / len(present)
    return values


def _without_overflow(values: dict[str, float], rows: list[dict[str, float]]) -> dict[str, float]:
    """Gradients that overflow at a scale above 1 are no event: the scaler leaves out the step and lowers its scale."""
    scaled = min(row["scale"] for row in rows) > 1
    if scaled and values["nonfinite"] and math.isfinite(values.get("loss", 0.0)):
        return {name: value for name, value in values.items() if name not in ("grad_norm", "nonfinite")}
    return values
