"""state_bytes: the memory that states really take, whatever tensors they are made of."""

import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor  # torch's own example of a tensor subclass

from lowbit_lightning.optim import SoloAdamW, state_bytes


def with_state(state: dict[str, object]) -> tuple[torch.optim.Optimizer, Tensor]:
    param = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([param])
    optimizer.state[param] = state
    return optimizer, param


def test_shared_memory_counts_once_and_nests_are_looked_into() -> None:
    tensor = torch.zeros(10)
    state = {"a": [tensor, tensor.view(2, 5)], "b": {"c": torch.zeros(3, dtype=torch.uint8)}, "step": 7}
    assert state_bytes(with_state(state)[0]) == 43


def test_tensor_subclasses_count_with_what_they_are_made_of() -> None:
    assert state_bytes(with_state({"exp_avg": TwoTensor(torch.zeros(8), torch.zeros(8))})[0]) == 64


def test_tensors_without_memory_are_told_apart() -> None:
    state = {key: torch.zeros(8, device="meta") for key in ("exp_avg", "exp_avg_sq")}
    assert state_bytes(with_state(dict(state))[0]) == 64


def test_groups_count_apart() -> None:
    params = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(8))]
    optimizer = torch.optim.SGD([{"params": params[:2]}, {"params": params[2:]}])
    for param in params[1:]:
        optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
    assert [state_bytes(optimizer, group) for group in optimizer.param_groups] == [24, 32]


def test_it_agrees_with_the_layout_of_solo() -> None:
    optimizer = SoloAdamW([nn.Parameter(torch.ones(64, 128))], bits=(2, 2))
    assert state_bytes(optimizer) == 0
    optimizer.initialize_state()
    assert state_bytes(optimizer) == 64 * 128 * 19 // 32 + 4
