"""The Triton step is the reference bit for bit: on CUDA where there is one, else in Triton's interpreter."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit_lightning.kernels import micro_adam_triton
from lowbit_lightning.kernels.micro_adam import micro_adam_step, micro_adam_step_reference
from lowbit_lightning.kernels.micro_adam_tensor import MicroAdamHyperparameters, MicroAdamTensor, new_state
from lowbit_lightning.kernels.micro_adam_triton import step_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def _no_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_adam_triton, "_plans", type(micro_adam_triton._plans)())


def make(numel: int, dtypes: tuple[torch.dtype, torch.dtype] = (FP32, FP32), **settings: Any) -> MicroAdamTensor:
    defaults: dict[str, Any] = {
        "lr": 1e-2, "beta1": 0.8, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "window": 2, "topk_block": 512,
        "error_block": 64, "density": 0.05, "seed": 3,
    }  # fmt: skip
    hyper = MicroAdamHyperparameters(**(defaults | settings))
    param = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(dtypes[0])
    state = new_state(numel, hyper, CPU, CPU)
    return MicroAdamTensor(param, torch.zeros(numel, dtype=dtypes[1]), state, hyper, 5, 2**32 - 7)


def on_device(tensor: MicroAdamTensor) -> MicroAdamTensor:
    """Return a copy on the tested device, with a counter of skipped steps."""
    state = {key: value.to(DEVICE, copy=True) for key, value in tensor.state.items()}
    skips = torch.zeros((), dtype=torch.int64, device=DEVICE)
    param, grad = (value.to(DEVICE, copy=True) for value in (tensor.param, tensor.grad))
    return replace(tensor, param=param, grad=grad, state=state, skips=skips)


def gradient(tensor: MicroAdamTensor, step: int, number: int) -> Tensor:
    """Return values of many magnitudes, with zeros and ties."""
    generator = torch.Generator().manual_seed(1000 * number + step)
    values = torch.randn(len(tensor.param), generator=generator)
    values *= torch.exp(2 * torch.randn(len(values), generator=generator))
    values[torch.rand(len(values), generator=generator) < 0.3] = 0
    values[torch.rand(len(values), generator=generator) < 0.03] = 4.0
    return values.to(tensor.grad.dtype)


def compare(tensors: Sequence[MicroAdamTensor], steps: int = 3) -> list[MicroAdamTensor]:
    """Make the same steps both ways and assert equal bits after each."""
    ours = [on_device(tensor) for tensor in tensors]
    assert all(micro_adam_triton.takes(tensor) for tensor in ours)
    for step in range(steps):
        for number, (expected, got) in enumerate(zip(tensors, ours, strict=True)):
            expected.grad.copy_(gradient(expected, step, number))
            got.grad.copy_(expected.grad)
        assert step_triton(ours) == [micro_adam_step_reference(tensor) for tensor in tensors]
        for expected, got in zip(tensors, ours, strict=True):
            assert_equal(expected, got)
    return ours


def assert_equal(expected: MicroAdamTensor, got: MicroAdamTensor) -> None:
    for key, value in {"param": expected.param, **expected.state}.items():
        other = (got.param if key == "param" else got.state[key]).cpu()
        same = value == other
        assert same.all(), f"{key} of {tuple(value.shape)}: {int((~same).sum())} of {same.numel()} differ"


@pytest.mark.parametrize("numel", [1, 5, 512, 1025])
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (FP32, BF16)])
def test_steps_are_the_references(numel: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    compare([make(numel, dtypes)])


@pytest.mark.parametrize(
    "settings",
    [
        {"topk_block": 4096, "error_block": 256, "density": 0.01}, {"topk_block": 128, "error_block": 2},
        {"error_block": 512}, {"density": 1.0}, {"density": 1e-6}, {"density": None},
        {"density": None, "density_bounds": (0.02, 0.9), "caught_target": 0.99}, {"window": 1}, {"window": 6},
        {"window_correction": True}, {"stochastic_error": True}, {"feedback": 0.25}, {"weight_decay": 0.0},
        {"bf16_stochastic_rounding": False}, {"maximize": True}, {"beta1": 0.0, "beta2": 0.0}, {"eps": 0.0},
    ],
)  # fmt: skip
def test_steps_with_every_setting_are_the_references(settings: dict[str, Any]) -> None:
    compare([make(700, (BF16, BF16), **settings)])


def test_tensors_of_different_settings_step_together() -> None:
    sizes = ((1300, {}), (700, {}), (3, {}), (2000, {"window": 3}), (900, {"density": None}))
    compare([make(numel, **settings) for numel, settings in sizes], steps=3)


def test_shards_get_the_noise_of_their_place() -> None:
    shard = make(700, (BF16, BF16), stochastic_error=True)
    compare([replace(shard, first_element=2**36 + 128)])
    assert not micro_adam_triton.takes(replace(shard, first_element=100))


def test_a_changed_learning_rate_is_seen() -> None:
    tensor = make(600)
    ours = on_device(tensor)
    for lr in (1e-2, 1e-3):
        hyper = replace(tensor.hyper, lr=lr)
        tensor.hyper = ours.hyper = hyper
        tensor.grad.copy_(gradient(tensor, 0, 0))
        ours.grad.copy_(tensor.grad)
        step_triton([ours])
        micro_adam_step_reference(tensor)
        assert_equal(tensor, ours)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30])
def test_only_the_tensor_with_a_bad_gradient_is_skipped_and_counted(value: float) -> None:
    expected = [make(1300, density=density) for density in (0.05, None, 0.05)]
    ours = [on_device(tensor) for tensor in expected]
    for number, (reference, got) in enumerate(zip(expected, ours, strict=True)):
        reference.grad.copy_(gradient(reference, 0, number))
        if number < 2:
            reference.grad[-1] = value
        got.grad.copy_(reference.grad)
    assert step_triton(ours) == [micro_adam_step_reference(tensor) for tensor in expected] == [True, True, False]
    for reference, got in zip(expected, ours, strict=True):
        assert_equal(reference, got)
    assert [int(tensor.skips) for tensor in ours if tensor.skips is not None] == [1, 1, 0]


def test_memory_format_does_not_matter() -> None:
    expected = make(1024)
    ours = on_device(expected)
    expected.grad.copy_(gradient(expected, 0, 0))
    ours.param = ours.param.view(16, 64).t().contiguous().t()
    ours.grad = expected.grad.to(DEVICE).view(16, 64).t().contiguous().t()
    step_triton([ours])
    micro_adam_step_reference(expected)
    assert torch.equal(expected.param, ours.param.cpu().reshape(-1))


@pytest.mark.parametrize(
    "settings", [{"topk_block": 500}, {"error_block": 62}, {"topk_block": 64}, {"error_block": 1024}]
)
def test_other_blocks_are_left_to_the_reference(settings: dict[str, Any]) -> None:
    tensor = on_device(make(1000, **settings))
    assert not micro_adam_triton.takes(tensor)
    assert micro_adam_step([tensor]) == [False]
