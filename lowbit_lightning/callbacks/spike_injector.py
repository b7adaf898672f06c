"""SpikeInjector: a fire drill. It breaks a training run on purpose, to see that monitor and guard do their work.

Nobody should learn on the third day of a production run whether the guard is set up right. Each fault here is one that
real runs meet: an overflow in a backward pass, an outlier in the loss, a corrupted batch, weights that an optimizer has
thrown out of range, and one broken device among healthy ones. The LightningModule is not changed: batch and loss pass
through a wrapper around its ``training_step`` that is there for the faulty batch only.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.optim import Optimizer

from lowbit_lightning.errors import InvalidArgumentError

Fault = Literal["nan_grad", "loss", "batch", "weights", "rank"]

LOSS_FACTOR = 1000.0
INPUT_FACTOR = 1000.0
WEIGHT_FACTOR = 10.0

_WHAT: dict[Fault, str] = {
    "nan_grad": "the largest gradient becomes NaN",
    "loss": f"the loss and its gradient times {LOSS_FACTOR:g}",
    "batch": f"a corrupted batch: floats times {INPUT_FACTOR:g}, integers at random",
    "weights": f"all weights times {WEIGHT_FACTOR:g}",
    "rank": "the largest gradient becomes NaN on the last rank only",
}


class SpikeInjector(Callback):
    """Break a run at given steps, once each.

    ``nan_grad`` makes the largest gradient NaN. ``loss`` multiplies the loss, and with it every gradient, by 1000.
    ``batch`` hands the module a corrupted batch: floating-point tensors times 1000, integer tensors filled at random
    with the values that occur in them, so that tokens and labels stay in range. ``weights`` multiplies all weights by
    10 before the step: a divergence that no skipped step mends. ``rank`` makes a gradient NaN on the last rank only,
    after the ranks have averaged theirs: the others see nothing wrong, and unless all act together the replicas part.

    The data itself is never touched, so a rollback that replays the batch meets it healthy, as after a fault of the
    hardware. With ``persistent`` the fault belongs to the batch and comes again with it. A resumed run does not repeat
    what happened before its checkpoint was saved.

    Args:
        step: optimizer steps made when a fault comes (from 0), one number or several. With accumulation the fault is in
            the first batch of the step.
        kind: the fault, or as many faults as there are steps.
        persistent: whether a batch that a rollback replays is faulty again.

    Raises:
        InvalidArgumentError: an unknown kind, a negative step, or not as many kinds as steps.
    """

    def __init__(self, step: int | list[int], kind: Fault | list[Fault] = "nan_grad", persistent: bool = False) -> None:
        steps = [step] if isinstance(step, int) else list(step)
        kinds: list[Fault] = [kind] * len(steps) if isinstance(kind, str) else list(kind)
        if not steps or min(steps) < 0:
            raise InvalidArgumentError(f"step={step} is out of range: one integer >= 0, or a list of them")
        for name in kinds:
            if name not in _WHAT:
                raise InvalidArgumentError(f"kind={name!r} is unknown; it is one of {', '.join(get_args(Fault))}")
        if len(kinds) != len(steps):
            raise InvalidArgumentError(
                f"kind={kind} and step={step}: {len(kinds)} faults for {len(steps)} steps; give one kind for all steps "
                "or one for each"
            )
        self.faults = sorted(zip(steps, kinds, strict=True))
        self.persistent = persistent
        # The batch, counted over the run, that each fault came in, by the fault's position.
        self._batches: dict[int, int] = {}
        self._in_gradient: list[Fault] = []
        self._in_loss = False
        self._undo: Callable[[], None] | None = None

    def describe_technique(self) -> list[tuple[str, str, str]]:
        """Say in the start table that this run is broken on purpose."""
        return [("spike drill", f"step {step}", _WHAT[kind]) for step, kind in self.faults]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Go in front: whoever looks at gradients must see the broken ones."""
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        # A new list, because Lightning is going through the old one.
        trainer.callbacks = [self, *others]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave out what a resumed run has behind it."""
        for position, (step, _) in enumerate(self.faults):
            if step < trainer.global_step:
                self._batches.setdefault(position, -1)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Break the weights, and make ready what comes later in the step."""
        this_batch = trainer.fit_loop.total_batch_idx
        now: set[Fault] = set()
        for position, (step, kind) in enumerate(self.faults):
            due = position not in self._batches and trainer.global_step >= step
            if due or (self.persistent and self._batches.get(position) == this_batch):
                self._batches[position] = this_batch
                now.add(kind)
                rank_zero_info(f"SpikeInjector at step {trainer.global_step}, batch {this_batch}: {_WHAT[kind]}")
        self._in_loss = "loss" in now
        self._in_gradient += now & {"nan_grad", "rank"}
        if "weights" in now:
            _multiply(pl_module.parameters(), WEIGHT_FACTOR)
        if now & {"loss", "batch"}:
            self._undo = _wrap_training_step(pl_module, now, seed=this_batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Break the gradient of a module that goes backward within its ``training_step``, before the loss is out."""
        if self._in_loss and not pl_module.automatic_optimization:
            loss.register_hook(lambda gradient: gradient * LOSS_FACTOR)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Break the gradient, which the ranks have averaged by now."""
        last_rank = trainer.global_rank == trainer.world_size - 1
        faults, self._in_gradient = self._in_gradient, []
        if "nan_grad" in faults or ("rank" in faults and last_rank):
            gradients = [param.grad for param in pl_module.parameters() if param.grad is not None]
            if gradients:
                max(gradients, key=Tensor.numel).mul_(torch.nan)
            else:
                rank_zero_warn("SpikeInjector: there is no gradient to break in this step; use kind: loss")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Give the module its own ``training_step`` back."""
        if self._undo is not None:
            self._undo()
            self._undo = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give it back, whatever the fault has led to."""
        self.on_train_batch_end(trainer, pl_module, None, None, 0)

    def state_dict(self) -> dict[str, Any]:
        """Which faults have come, and in which batches."""
        return {"faults": [[*fault] for fault in self.faults], "batches": dict(self._batches)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue; faults that the configuration has got since are still to come."""
        batches = {tuple(state_dict["faults"][position]): batch for position, batch in state_dict["batches"].items()}
        self._batches = {position: batches[fault] for position, fault in enumerate(self.faults) if fault in batches}


@torch.no_grad()
def _multiply(tensors: Any, factor: float) -> None:
    for tensor in tensors:
        if tensor.requires_grad and tensor.is_floating_point():
            tensor.mul_(factor)


def _wrap_training_step(module: LightningModule, faults: set[Fault], seed: int) -> Callable[[], None]:
    """Put the faults around ``module.training_step``; return what takes them away again."""
    healthy, wrapped_before = module.training_step, "training_step" in vars(module)

    @wraps(healthy)
    def broken(batch: Any, *arguments: Any, **keywords: Any) -> Any:
        if "batch" in faults:
            batch = corrupted(batch, seed)
        output = healthy(batch, *arguments, **keywords)
        return _scaled(output) if "loss" in faults else output

    def undo() -> None:
        if wrapped_before:
            module.training_step = healthy  # type: ignore[method-assign]
        else:
            del module.training_step

    module.training_step = broken  # type: ignore[method-assign]
    return undo


def _scaled(output: Any) -> Any:
    """Return what ``training_step`` returned with its loss multiplied: a tensor, a mapping with "loss", or None."""
    if isinstance(output, Mapping):
        return {**output, "loss": output["loss"] * LOSS_FACTOR} if "loss" in output else output
    return output * LOSS_FACTOR if isinstance(output, Tensor) else output


def corrupted(batch: Any, seed: int) -> Any:
    """Return a copy of a nest of tensors: floats multiplied, integers at random, the rest as it is.

    Each integer becomes one of the values in its tensor, all alike likely: rare tokens as often as frequent ones.

    A function of ``seed``, and the global generators are left alone: asking twice corrupts alike, as a step that makes
    several forward passes of one batch must.
    """
    generator = torch.Generator().manual_seed(seed)

    def corrupt(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return tensor * INPUT_FACTOR
        if tensor.dtype == torch.bool:
            return tensor
        values = tensor.unique()
        choice = torch.randint(max(len(values), 1), tensor.shape, generator=generator)
        return values[choice.to(tensor.device)] if len(values) else tensor

    return apply_to_collection(batch, Tensor, corrupt)
