"""Repeating a training step on the same batch so that nobody notices: same dropout, no log, no trace left behind.

A forward-only step calls ``training_step`` several times where Lightning and the module's author expect once. What a
call changes beside its result is put back after each repetition: buffers (batch statistics, counters), metrics,
attributes of the LightningModule (``self.outputs.append(...)``), random generators; ``self.log`` is silent.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torchmetrics import Metric

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.optim.random_state import RandomState

# Elements up to which a buffer is always copied; larger ones (masks, quantized weights) only once seen to change.
_SMALL = 65536


class ModuleState:
    """What a training step may change beside the parameters, at one moment.

    Args:
        module: the LightningModule.
        changing: names of buffers that are known to change; :meth:`changed_buffers` finds others.
    """

    def __init__(self, module: LightningModule, changing: set[str]) -> None:
        self._random = RandomState({module.device})
        self._buffers = [
            _Buffer(owner._buffers, key, f"{prefix}.{key}" if prefix else key, changing)
            for prefix, owner in module.named_modules()
            for key, value in owner._buffers.items()
            if value is not None
        ]
        self._attributes = [
            _Attributes(part) for part in module.modules() if isinstance(part, LightningModule | Metric)
        ]

    def restore(self) -> None:
        """Put everything back."""
        self._random.restore()
        for buffer in self._buffers:
            buffer.restore()
        for attributes in self._attributes:
            attributes.restore()

    def changed_buffers(self) -> set[str]:
        """Return the names of the buffers that have been written or replaced since, as far as they are not known."""
        return {buffer.name for buffer in self._buffers if buffer.is_changed()}


class _Buffer:
    def __init__(self, home: dict[str, Tensor | None], key: str, name: str, changing: set[str]) -> None:
        value = home[key]
        assert value is not None
        self.name = name
        self._changing = changing
        self._home, self._key, self._value = home, key, value
        self._copy = value.clone() if value.numel() <= _SMALL or name in changing else None
        self._version = _version(value)

    def is_changed(self) -> bool:
        if self.name in self._changing:
            return False
        if self._home[self._key] is not self._value or _version(self._value) != self._version:
            return True
        # Batch normalization writes its statistics without raising their version.
        return self._copy is not None and not torch.equal(self._value, self._copy)

    def restore(self) -> None:
        self._home[self._key] = self._value
        if self._copy is not None and (self.name in self._changing or _version(self._value) != self._version):
            self._value.copy_(self._copy)


class _Attributes:
    """Plain attributes of a module, with the contents of containers; a metric's accumulators are among them."""

    def __init__(self, module: LightningModule | Metric) -> None:
        self._home = vars(module)
        # Underscored names are Lightning's and torch's own business, but a metric's counters are underscored too.
        self._own = isinstance(module, Metric)
        self._values = {name: value for name, value in self._home.items() if self._covers(name)}
        self._contents = {
            name: value.copy()
            for name, value in self._values.items()
            if isinstance(value, list | dict | set | deque) and not name.startswith("_")
        }
        states = module.metric_state if isinstance(module, Metric) else {}
        self._tensors = {name: value.clone() for name, value in states.items() if isinstance(value, Tensor)}

    def _covers(self, name: str) -> bool:
        return not name.startswith("_") or (self._own and name in ("_update_count", "_computed", "_forward_cache"))

    def restore(self) -> None:
        for name in [name for name in self._home if self._covers(name) and name not in self._values]:
            del self._home[name]
        self._home.update(self._values)
        self._home.update({name: value.clone() for name, value in self._tensors.items()})
        for name, content in self._contents.items():
            value: Any = self._home[name]
            value.clear()
            value.extend(content) if isinstance(value, list | deque) else value.update(content)


class Batch:
    """The arguments of a training step, to be handed to it several times.

    Args:
        args: positional arguments; the batch and its index.
        kwargs: keyword arguments.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._given = args, kwargs
        self._versions: list[tuple[Tensor, int]] = []
        apply_to_collection(self._given, Tensor, lambda tensor: self._versions.append((tensor, _version(tensor))))

    def copy(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments in new containers (a step may pop from a dict) around the same tensors."""
        args, kwargs = apply_to_collection(self._given, Tensor, lambda tensor: tensor)
        return args, kwargs

    def check_unchanged(self) -> None:
        """Raise if a tensor was written.

        Raises:
            InvalidArgumentError: the training step changes its batch in place, so it cannot be repeated.
        """
        for tensor, version in self._versions:
            if _version(tensor) != version:
                raise InvalidArgumentError(
                    f"training_step writes into its batch (a tensor of shape {tuple(tensor.shape)}), so it cannot be "
                    "repeated on the same batch as forward-only training must: clone that tensor first"
                )


@contextmanager
def silent(module: LightningModule) -> Iterator[None]:
    """Make ``self.log`` and ``self.log_dict`` do nothing: a repetition is not to be counted."""
    parts = [part for part in module.modules() if isinstance(part, LightningModule)]
    for part in parts:
        vars(part).update(log=_nothing, log_dict=_nothing)
    try:
        yield
    finally:
        for part in parts:
            del vars(part)["log"], vars(part)["log_dict"]


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
