"""How many bytes tensors take, and how many the states of torch's own optimizers will take before they exist."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Tensors of the parameter's shape and dtype that torch's own optimizers make in their first step.
_STATE_TENSORS: dict[type[Optimizer], int] = {
    torch.optim.Adam: 2,
    torch.optim.AdamW: 2,
    torch.optim.NAdam: 2,
    torch.optim.RAdam: 2,
    torch.optim.Adamax: 2,
    torch.optim.Adadelta: 2,
    torch.optim.RMSprop: 1,
    torch.optim.SGD: 0,
}
# Group settings that add one tensor more when they are set.
_EXTRA_TENSORS = ("amsgrad", "momentum", "centered")


def tensor_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Returns the bytes of distinct tensors (tied ones count once); of a DTensor, those of the local shard."""
    distinct = {id(tensor): tensor for tensor in tensors if tensor is not None}
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in distinct.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def modelled_state_bytes(optimizer: Optimizer, group: dict[str, Any]) -> int | None:
    """Returns the bytes that the states of ``group`` will take, or None for an optimizer that is not torch's own."""
    tensors = _STATE_TENSORS.get(type(optimizer))
    if tensors is None:
        return None
    tensors += sum(bool(group.get(setting)) for setting in _EXTRA_TENSORS)
    return tensors * tensor_bytes(param for param in group["params"] if param.requires_grad)
