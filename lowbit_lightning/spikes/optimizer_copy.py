"""The complete state of any torch optimizer, taken and put back in place.

Not by ``state_dict`` and ``load_state_dict``: those share memory with what they are given, cast every state to its
parameter's dtype, and know nothing of numbers that some optimizers keep on themselves.
"""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lowbit_lightning.spikes.host_copy import HostCopy


def save_optimizer(host: HostCopy, number: int, optimizer: Optimizer) -> dict[str, Any]:
    """Copies the states by the parameter's position, the groups' settings, and plain numbers kept on the object.

    Args:
        host: Where the tensors go, between its ``begin`` and its ``end``.
        number: Of the optimizer among the run's.
        optimizer: Any torch optimizer; states may be tensors of any class, in any nesting.

    Returns:
        What ``restore_optimizer`` takes.

    """
    positions = {id(parameter): i for i, parameter in enumerate(_parameters(optimizer))}
    # Some optimizers keep entries of their own under a string.
    states = {("parameter", positions[id(k)]) if id(k) in positions else ("own", k): k for k in optimizer.state}
    prefix = f"optimizer{number}"
    return {
        "states": {
            label: host.pack(f"{prefix}/{label[1]}", optimizer.state[key], background=True)
            for label, key in states.items()
        },
        "groups": [
            {k: host.pack(f"{prefix}/group{i}/{k}", v) for k, v in group.items() if k != "params"}
            for i, group in enumerate(optimizer.param_groups)
        ],
        "numbers": {k: v for k, v in vars(optimizer).items() if isinstance(v, int | float)},
    }


def restore_optimizer(host: HostCopy, optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Puts everything back in place and deletes what did not exist; the saved copy stays as it is."""
    del optimizer.param_groups[len(saved["groups"]) :]
    for group, settings in zip(optimizer.param_groups, saved["groups"], strict=True):
        for stale in group.keys() - settings.keys() - {"params"}:
            del group[stale]
        for key, value in settings.items():
            group[key] = host.unpack(value, group.get(key))
    parameters = _parameters(optimizer)
    keys = {label: parameters[label[1]] if label[0] == "parameter" else label[1] for label in saved["states"]}
    kept = {id(key) if isinstance(key, Tensor) else key for key in keys.values()}
    # What a first step makes lazily did not exist before it.
    for stale in [k for k in optimizer.state if (id(k) if isinstance(k, Tensor) else k) not in kept]:
        del optimizer.state[stale]
    for label, key in keys.items():
        optimizer.state[key] = host.unpack(saved["states"][label], optimizer.state.get(key))
    vars(optimizer).update(saved["numbers"])


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
