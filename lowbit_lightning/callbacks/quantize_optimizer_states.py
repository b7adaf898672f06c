"""QuantizeOptimizerStates: the module's own Adam or AdamW, with its states in few bits.

A module that brings its own ``configure_optimizers`` keeps all of it: parameter groups, schedulers of any nesting,
warm-up. The callback wraps that method for the time of a fit and puts the low-bit optimizer on the very same
``param_groups`` dictionaries, so whatever else holds on to them (schedulers, other callbacks) goes on working.

It knows the module's parameter names, so overrides by name work even under a stock LightningCLI, whose ``optimizer:``
hands over bare parameters.
"""

from collections.abc import Iterator
from functools import partial, wraps
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import instantiate_class
from torch.optim import Optimizer

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.optim import LowBitOptimizer

#: Exactly these: a subclass may have a step of its own that quantization would silently drop.
_CONVERTIBLE = (torch.optim.Adam, torch.optim.AdamW)
#: What the module's own optimizer decides and no setting of the callback may contradict.
_THE_MODULES_OWN = ("lr", "betas", "eps", "weight_decay", "maximize", "params")
_DEFAULT_CLASS = "lowbit_lightning.optim.SoloAdamW"


class QuantizeOptimizerStates(Callback):
    """Keep the states of the module's own Adam or AdamW in few bits.

    Args:
        optimizer: ``class_path`` and ``init_args`` of the optimizer that takes over, any of this project; SoloAdamW
            when null. Learning rate, betas, eps and weight decay stay the module's own, parameter group by group.

    Raises:
        InvalidArgumentError: at the start of fit, when the module's optimizer is neither Adam nor AdamW, uses
            amsgrad, or decays weights through the gradient; or when ``init_args`` sets what the module decides.
    """

    def __init__(self, optimizer: dict[str, Any] | None = None) -> None:
        config = optimizer or {}
        self.class_path: str = config.get("class_path", _DEFAULT_CLASS)
        self.init_args: dict[str, Any] = dict(config.get("init_args") or {})
        unknown = set(config) - {"class_path", "init_args"}
        if unknown:
            raise InvalidArgumentError(f"optimizer has keys {sorted(unknown)}: give class_path and init_args")
        contradicted = sorted(set(self.init_args) & set(_THE_MODULES_OWN))
        if contradicted:
            raise InvalidArgumentError(
                f"optimizer.init_args sets {contradicted}, which stay as the module's own optimizer has them: "
                "set them there, or use `optimizer:` instead of this callback"
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wrap ``configure_optimizers`` before Lightning calls it."""
        if stage == "fit":
            original = pl_module.configure_optimizers
            pl_module.configure_optimizers = partial(self._configure_optimizers, pl_module, original)  # type: ignore[method-assign]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it came."""
        wrapper = vars(pl_module).get("configure_optimizers")
        if stage == "fit" and isinstance(wrapper, partial) and wrapper.func == self._configure_optimizers:
            original = wrapper.args[1]
            if getattr(original, "__func__", None) is type(pl_module).configure_optimizers:
                del pl_module.configure_optimizers  # type: ignore[attr-defined]
            else:
                pl_module.configure_optimizers = original  # type: ignore[method-assign]

    def _configure_optimizers(self, pl_module: LightningModule, original: Any) -> Any:
        configured = original()
        names: dict[torch.Tensor, str] = {param: name for name, param in pl_module.named_parameters()}
        for found in list(_objects(configured, Optimizer)):
            configured = _replaced(configured, found, self.convert(found, names))
        return configured

    def convert(self, optimizer: Optimizer, names: dict[torch.Tensor, str]) -> LowBitOptimizer:
        """Return the low-bit optimizer on the groups of ``optimizer``.

        Args:
            optimizer: an Adam or AdamW that has not stepped yet, or an optimizer of this project, which gets the
                callback's settings and its parameters' names.
            names: parameter to fully qualified name.
        """
        if not isinstance(optimizer, LowBitOptimizer):
            _check_convertible(optimizer)
        for position, group in enumerate(optimizer.param_groups):
            group.pop("param_names", None)
            # A parameter from outside the module has no name, but must not share its noise with another.
            group["params"] = [(names.get(p, f"group{position}.{i}"), p) for i, p in enumerate(group["params"])]
            for key in self.init_args:
                group.pop(key, None)
        config = {"class_path": self.class_path, "init_args": self.init_args}
        converted = instantiate_class((optimizer.param_groups,), config)
        if not isinstance(converted, LowBitOptimizer):
            raise InvalidArgumentError(
                f"optimizer.class_path={self.class_path!r} keeps no low-bit states: give one of lowbit_lightning.optim"
            )
        if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
            _track_step_calls(converted)
        return converted


def _check_convertible(optimizer: Optimizer) -> None:
    name = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    if type(optimizer) not in _CONVERTIBLE:
        raise InvalidArgumentError(
            f"the module's optimizer is {name}, QuantizeOptimizerStates takes torch.optim.Adam or AdamW: "
            "change it there, or remove the callback"
        )
    for group in optimizer.param_groups:
        if group["amsgrad"]:
            raise InvalidArgumentError(f"the module's {name} has amsgrad=True, which has no low-bit form: unset it")
        decoupled = isinstance(optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay", False)
        if group["weight_decay"] and not decoupled:
            raise InvalidArgumentError(
                f"the module's {name} has weight_decay={group['weight_decay']} added to the gradient, low-bit "
                "optimizers decay weights directly: use torch.optim.AdamW in the module"
            )


def _children(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (key, value) of what may hold optimizers: containers, and the attributes of schedulers."""
    if isinstance(node, dict):
        yield from node.items()
    elif isinstance(node, list | tuple):
        yield from enumerate(node)
    elif hasattr(node, "last_epoch") or hasattr(node, "_schedulers"):
        yield from vars(node).items()


def _objects(node: Any, kind: type) -> Iterator[Any]:
    """Yield every object of a type in what ``configure_optimizers`` returned, each once, schedulers not looked into."""
    if isinstance(node, kind):
        yield node
    elif isinstance(node, dict | list | tuple):
        seen: list[Any] = []
        for _, child in _children(node):
            for found in _objects(child, kind):
                if not any(found is other for other in seen):
                    seen.append(found)
                    yield found


def _replaced(node: Any, old: Any, new: Any) -> Any:
    """Return ``node`` with every reference to ``old`` replaced, in place where it is a scheduler."""
    if node is old:
        return new
    if isinstance(node, dict):
        return {key: _replaced(child, old, new) for key, child in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(_replaced(child, old, new) for child in node)
    for key, child in list(_children(node)):
        if child is old or isinstance(child, dict | list | tuple) or hasattr(child, "last_epoch"):
            setattr(node, key, _replaced(child, old, new))
    return node


def _track_step_calls(optimizer: Optimizer) -> None:
    """Note calls of ``step`` as schedulers do on the optimizer they were made with, else they warn of a wrong order."""
    step = type(optimizer).step

    @wraps(step)
    def tracked(*args: Any, **kwargs: Any) -> Any:
        optimizer._opt_called = True  # type: ignore[attr-defined]
        return step(optimizer, *args, **kwargs)

    tracked._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = tracked  # type: ignore[method-assign]
