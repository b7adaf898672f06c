"""After reset_momentum, an optimizer's next step is its first one, to the bit."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from lowbit_lightning.optim import SoloAdamW
from lowbit_lightning.spikes.momentum import reset_momentum

OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], Optimizer]] = {
    "adam-amsgrad": lambda params: torch.optim.Adam(params, lr=0.1, amsgrad=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1),
    "nadam": lambda params: torch.optim.NAdam(params, lr=0.1),
    "radam": lambda params: torch.optim.RAdam(params, lr=0.1),
    "adamax": lambda params: torch.optim.Adamax(params, lr=0.1),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1, initial_accumulator_value=0.5),
    "adadelta": lambda params: torch.optim.Adadelta(params, lr=0.1),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.1, momentum=0.9, centered=True),
    "sgd-momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=0.1),
    "solo": lambda params: SoloAdamW(params, lr=0.1, min_numel=0),
    "solo-fp32-and-bf16-scales": lambda params: SoloAdamW(params, lr=0.1, min_numel=9000, scale_dtype="bf16"),
}


def steps(optimizer: Optimizer, params: list[Tensor], count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_next_step_is_a_first_step(name: str) -> None:
    params = [torch.randn(8, 128).requires_grad_(), torch.randn(5).requires_grad_()]
    optimizer = OPTIMIZERS[name](params)
    steps(optimizer, params, 3)
    storages = {id(value): value.data_ptr() for value in tensors(optimizer)}
    assert reset_momentum(optimizer)
    fresh = [param.detach().clone().requires_grad_() for param in params]
    steps(optimizer, params, 1)
    steps(OPTIMIZERS[name](fresh), fresh, 1)
    assert all(torch.equal(one, other) for one, other in zip(params, fresh, strict=True))
    assert storages == {id(value): value.data_ptr() for value in tensors(optimizer)}


def tensors(optimizer: Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def test_plain_sgd_has_nothing_to_forget() -> None:
    param = torch.randn(3).requires_grad_()
    optimizer = torch.optim.SGD([param], lr=0.1)
    steps(optimizer, [param], 1)
    assert not reset_momentum(optimizer)


def test_before_the_first_step_there_is_nothing_to_forget() -> None:
    assert not reset_momentum(torch.optim.AdamW([torch.randn(3).requires_grad_()]))


def test_numbers_in_the_state_keep_their_type() -> None:
    param = torch.randn(3).requires_grad_()
    optimizer = torch.optim.AdamW([param])
    optimizer.state[param] = {"step": 7, "state1": torch.ones(3), "qmap1": torch.ones(3)}
    assert reset_momentum(optimizer)
    state = optimizer.state[param]
    assert (state["step"], type(state["step"])) == (0, int)
    assert (state["state1"].sum(), state["qmap1"].sum()) == (0, 3)


def test_codes_and_scales_of_a_torchao_state_are_those_of_a_new_one() -> None:
    class OptimState8bit(torch.Tensor):
        """Has of torchao's class what matters here: values that are made of three tensors."""

        codes: Tensor
        scale: Tensor
        qmap: Tensor

        def __tensor_flatten__(self) -> tuple[list[str], list[Any]]:
            return ["codes", "scale", "qmap"], []

    param = torch.randn(3).requires_grad_()
    state = torch.ones(3).as_subclass(OptimState8bit)
    state.codes, state.scale, state.qmap = torch.ones(3, dtype=torch.uint8), torch.ones(1), torch.ones(256)
    optimizer = torch.optim.AdamW([param])
    optimizer.state[param] = {"exp_avg": state}
    assert reset_momentum(optimizer)
    assert (state.codes.sum(), state.scale.sum(), state.qmap.sum()) == (0, 0, 256)


def test_optimizer_may_do_it_itself() -> None:
    class Own(torch.optim.SGD):
        forgot = False

        def reset_momentum(self) -> None:
            self.forgot = True

    optimizer: Any = Own([torch.randn(3).requires_grad_()], lr=0.1)
    assert reset_momentum(optimizer)
    assert optimizer.forgot
