"""Build the optimizer and its scheduler from configuration when Lightning asks for them, not when the CLI starts.

The stock CLI instantiates ``optimizer:`` at once with the flat ``model.parameters()``: no parameter groups, no names,
and an empty list for a module that creates its weights in ``configure_model`` (what FSDP2 needs). Building inside
``configure_optimizers`` sees the final weights and their names, so norms and biases can be kept from weight decay.
"""

import inspect
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import ReduceLROnPlateau, instantiate_class
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

from lowbit_lightning.errors import InvalidArgumentError

NO_DECAY = ["*bias", "*norm*", "*ln_*"]
"""Names that weight decay leaves alone by default: biases and every usual spelling of a normalization layer."""


def bind(
    module: LightningModule,
    optimizer: dict[str, Any] | None,
    lr_scheduler: dict[str, Any] | None,
    scheduler_interval: str | None,
    no_decay: list[str],
) -> None:
    """Give ``module`` a ``configure_optimizers`` that builds what the configuration names; its own one stays otherwise.

    Args:
        module: The module to train.
        optimizer: ``class_path`` and ``init_args``, or None to leave the module's own ``configure_optimizers`` alone.
        lr_scheduler: The same for a scheduler.
        scheduler_interval: ``step``, ``epoch``, or None to choose by the scheduler, see :func:`build`.
        no_decay: Patterns of parameter names without weight decay, see :func:`parameter_groups`.

    Raises:
        InvalidArgumentError: Neither the module nor the configuration says how to optimize, or there is a scheduler in
            the configuration and no optimizer to schedule.
    """
    name = type(module).__name__
    own = is_overridden("configure_optimizers", module, LightningModule)
    if optimizer is None:
        if lr_scheduler is not None:
            raise InvalidArgumentError(
                f"lr_scheduler is {lr_scheduler['class_path']!r} but there is no `optimizer:` to schedule. Add one,"
                f" or schedule inside {name}.configure_optimizers."
            )
        if not own:
            raise InvalidArgumentError(
                f"no optimizer: {name} has no configure_optimizers and the configuration has no `optimizer:`."
                " Add `--optimizer SoloAdamW --optimizer.lr 0.001` for AdamW with low-bit states, or any other as"
                " `optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.001}}`."
            )
        return
    if own:
        rank_zero_info(f"`optimizer: {optimizer['class_path']}` takes the place of {name}.configure_optimizers.")

    # A partial, not a closure: it must survive pickling (strategies that spawn) and deepcopy (averaged copies).
    module.configure_optimizers = partial(build, module, optimizer, lr_scheduler, scheduler_interval, no_decay)  # type: ignore[method-assign, assignment]


def build(
    module: LightningModule,
    optimizer: dict[str, Any],
    lr_scheduler: dict[str, Any] | None,
    scheduler_interval: str | None,
    no_decay: list[str],
) -> dict[str, Any]:
    """What ``configure_optimizers`` returns: the optimizer and, if any, the scheduler.

    Without a ``scheduler_interval``, a scheduler that is told the length of the run in steps (``total_steps``) goes on
    after every optimizer step, any other after every epoch, as under the stock CLI.
    """
    groups = parameter_groups(module, no_decay, decays="weight_decay" in _parameters(optimizer))
    built: Optimizer = instantiate_class((groups,), optimizer)
    result: dict[str, Any] = {"optimizer": built}
    if lr_scheduler is not None:
        scheduler = instantiate_class((built,), _with_total_steps(lr_scheduler, module.trainer))
        counts_steps = "total_steps" in _parameters(lr_scheduler)
        entry = {"scheduler": scheduler, "interval": scheduler_interval or ("step" if counts_steps else "epoch")}
        if isinstance(scheduler, ReduceLROnPlateau):
            # A plateau of a validation metric can only be seen once per validation.
            entry |= {"interval": scheduler_interval or "epoch", "monitor": scheduler.monitor}
        result["lr_scheduler"] = entry
    return result


def parameter_groups(module: torch.nn.Module, no_decay: Sequence[str], decays: bool = True) -> list[dict[str, Any]]:
    """Split the trainable parameters into those that decay and those that do not.

    Args:
        module: Parameters shared under several names appear once, under the first.
        no_decay: Shell patterns, matched against the full parameter name without regard to case.
        decays: Whether the optimizer has a weight decay at all; without one there is a single group.

    Returns:
        Groups ``{"params": [(name, parameter), ...]}``, the second with ``"weight_decay": 0.0``. No group is empty.

    Raises:
        InvalidArgumentError: Nothing is trainable.
    """
    trainable = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise InvalidArgumentError(f"{type(module).__name__} has no trainable parameter: there is nothing to optimize.")
    if not decays:
        return [{"params": trainable}]
    patterns = [pattern.lower() for pattern in no_decay]
    exempt = {name for name, _ in trainable if any(fnmatchcase(name.lower(), pattern) for pattern in patterns)}
    groups: list[dict[str, Any]] = [
        {"params": [(name, parameter) for name, parameter in trainable if name not in exempt]},
        {"params": [(name, parameter) for name, parameter in trainable if name in exempt], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _with_total_steps(lr_scheduler: dict[str, Any], trainer: Trainer) -> dict[str, Any]:
    """Fill in ``total_steps`` where the scheduler takes it and the user left it to us."""
    init_args = lr_scheduler.get("init_args", {})
    # OneCycleLR takes epochs and steps_per_epoch instead.
    given = init_args.get("total_steps") is not None or init_args.get("epochs") is not None
    if given or "total_steps" not in _parameters(lr_scheduler):
        return lr_scheduler
    total_steps = trainer.estimated_stepping_batches
    if math.isinf(total_steps):
        raise InvalidArgumentError(
            f"lr_scheduler.init_args.total_steps of {lr_scheduler['class_path']} is null and the run has no end to"
            " take it from: set it, or trainer.max_steps or trainer.max_epochs."
        )
    return {**lr_scheduler, "init_args": {**init_args, "total_steps": int(total_steps)}}


def configured_class(configured: dict[str, Any]) -> Any:
    """The class that ``class_path`` names."""
    module_name, class_name = configured["class_path"].rsplit(".", 1)
    return getattr(__import__(module_name, fromlist=[class_name]), class_name)


def _parameters(configured: dict[str, Any]) -> set[str]:
    """The names that the constructor of a configured class takes."""
    return set(inspect.signature(configured_class(configured)).parameters)
