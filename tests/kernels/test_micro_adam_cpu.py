"""The compiled CPU step equals the reference bit for bit, whatever the shape, blocks, data and number of threads."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit_lightning.kernels import micro_adam_cpu
from lowbit_lightning.kernels.elementary import LARGEST_SQUARABLE
from lowbit_lightning.kernels.micro_adam import micro_adam_step, micro_adam_step_reference
from lowbit_lightning.kernels.micro_adam_tensor import MicroAdamHyperparameters, MicroAdamTensor, new_state

CPU = torch.device("cpu")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def make(numel: int, dtype: torch.dtype = torch.float32, **settings: Any) -> MicroAdamTensor:
    defaults: dict[str, Any] = {
        "lr": 1e-2, "beta1": 0.8, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "window": 3, "topk_block": 256,
        "error_block": 64, "density": 0.05, "seed": 3,
    }  # fmt: skip
    hyper = MicroAdamHyperparameters(**(defaults | settings))
    param = torch.randn(numel, generator=torch.Generator().manual_seed(0)).to(dtype)
    state = new_state(numel, hyper, CPU, CPU)
    return MicroAdamTensor(param, torch.empty(0), state, hyper, error_stream=5, weight_stream=2**32 - 7)


def twin(tensor: MicroAdamTensor) -> MicroAdamTensor:
    state = {key: value.clone() for key, value in tensor.state.items()}
    return replace(tensor, param=tensor.param.clone(), state=state)


def step_compiled(*tensors: MicroAdamTensor) -> list[bool]:
    library = micro_adam_cpu.load_library()
    assert library is not None
    assert all(micro_adam_cpu.takes(tensor) for tensor in tensors)
    return micro_adam_cpu.step_compiled(library, tensors)


def assert_equal(left: MicroAdamTensor, right: MicroAdamTensor) -> None:
    for key, value in left.state.items():
        assert torch.equal(value, right.state[key]), key
    assert torch.equal(left.param, right.param)


def assert_same_steps(tensor: MicroAdamTensor, grads: list[Tensor]) -> None:
    other = twin(tensor)
    for grad in grads:
        tensor.grad = other.grad = grad.to(tensor.param.dtype)
        assert micro_adam_step_reference(tensor) is False
        assert step_compiled(other) == [False]
        assert_equal(tensor, other)


def normal_grads(numel: int, steps: int = 7, scale: float = 1e-3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [scale * torch.randn(numel, generator=generator) for _ in range(steps)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numel", [1, 2, 5, 63, 64, 256, 257, 1000, 4096, 70_001])
def test_equals_the_reference_at_all_sizes(numel: int, dtype: torch.dtype) -> None:
    assert_same_steps(make(numel, dtype), normal_grads(numel))


@pytest.mark.parametrize(
    ("topk_block", "error_block"), [(256, 256), (64, 256), (100, 64), (37, 2), (1, 2), (4096, 1000), (65536, 256)]
)
def test_equals_the_reference_with_all_blocks(topk_block: int, error_block: int) -> None:
    for numel in (1000, 8191):
        tensor = make(numel, torch.bfloat16, topk_block=topk_block, error_block=error_block)
        assert_same_steps(tensor, normal_grads(numel, 4))


@pytest.mark.parametrize(
    "settings",
    [
        {"density": 1.0}, {"density": 1e-6}, {"density": None}, {"density": None, "density_bounds": (0.1, 0.9)},
        {"density": None, "caught_target": 0.1}, {"window": 1}, {"window": 20}, {"window_correction": True},
        {"stochastic_error": True}, {"feedback": 0.25}, {"feedback": 0.25, "weight_decay": 0.0},
        {"weight_decay": 0.0}, {"weight_decay": 0.0, "density": 0.9}, {"bf16_stochastic_rounding": False},
        {"maximize": True}, {"beta1": 0.0, "beta2": 0.0}, {"seed": 2**40 + 1}, {"lr": 0.0}, {"eps": 0.0},
    ],
)  # fmt: skip
def test_equals_the_reference_with_every_setting(settings: dict[str, Any]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_same_steps(make(1500, dtype, **settings), normal_grads(1500))


@pytest.mark.parametrize("first_element", [256, 1001, 2**36 + 3])
def test_shards_get_the_noise_of_their_place(first_element: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensor = replace(make(1500, dtype, stochastic_error=True), first_element=first_element)
        assert_same_steps(tensor, normal_grads(1500, 3))


def test_shards_of_whole_blocks_are_the_whole() -> None:
    whole, blocks = make(1024, torch.bfloat16, stochastic_error=True), (256, 768)
    parts = [make(size, torch.bfloat16, stochastic_error=True) for size in blocks]
    for part, first in zip(parts, (0, 256), strict=True):
        part.param, part.first_element = whole.param[first : first + part.param.numel()].clone(), first
    for grad in normal_grads(1024):
        whole.grad = grad.bfloat16()
        for part in parts:
            part.grad = whole.grad[part.first_element : part.first_element + part.param.numel()]
            micro_adam_step_reference(part)
        micro_adam_step_reference(whole)
        assert torch.equal(torch.cat([part.param for part in parts]), whole.param)


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-30, 1e-22, 1e-12, 1.0, 1e15, LARGEST_SQUARABLE / 8])
def test_equals_the_reference_at_all_magnitudes(scale: float) -> None:
    for density in (0.05, None):
        grads = [grad.clamp(-8, 8) * scale for grad in normal_grads(1500, scale=1.0)]
        tensor = make(1500, density=density)
        assert_same_steps(tensor, grads)
        assert all(value.isfinite().all() for value in (tensor.param, *tensor.state.values()))


def test_equals_the_reference_on_ties_and_constant_blocks() -> None:
    generator = torch.Generator().manual_seed(2)
    few = [torch.randint(-2, 3, (1500,), generator=generator).float() for _ in range(7)]
    single = [torch.zeros(1500).index_fill_(0, torch.tensor([7, 600]), 1.0) for _ in range(7)]
    for grads in (few, single, [torch.ones(1500)] * 7, [torch.zeros(1500)] * 3):
        assert_same_steps(make(1500), grads)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("density", [0.01, None])
def test_does_not_depend_on_the_number_of_threads(density: float | None) -> None:
    tensor = make(300_001, torch.bfloat16, topk_block=4096, density=density)
    other = twin(tensor)
    for grad in normal_grads(300_001, 3):
        tensor.grad = other.grad = grad.bfloat16()
        torch.set_num_threads(1)
        step_compiled(tensor)
        torch.set_num_threads(2)
        step_compiled(other)
    assert_equal(tensor, other)


def test_gradient_and_weights_may_differ_in_dtype() -> None:
    for param_dtype, grad_dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        tensor = make(1500, param_dtype)
        other = twin(tensor)
        for grad in normal_grads(1500):
            tensor.grad = other.grad = grad.to(grad_dtype)
            micro_adam_step_reference(tensor)
            step_compiled(other)
        assert_equal(tensor, other)


def test_memory_format_does_not_matter() -> None:
    plain, strided = make(1024), make(1024)
    plain.param, strided.param = plain.param.view(16, 64), strided.param.view(16, 64).t().contiguous().t()
    for grad in normal_grads(1024):
        plain.grad, strided.grad = grad.view(16, 64), grad.view(16, 64).t().contiguous().t()
        step_compiled(plain, strided)
    assert_equal(plain, strided)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e20])
@pytest.mark.parametrize("numel", [1000, 200_000])
def test_only_the_tensor_with_a_bad_gradient_is_skipped(numel: int, value: float) -> None:
    tensors = [make(numel, dtype, density=None) for dtype in (torch.float32, torch.bfloat16, torch.float32)]
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor.param)
    for bad in tensors[:2]:
        bad.grad[-1] = value
    before = [twin(tensor) for tensor in tensors]
    assert step_compiled(*tensors) == [True, True, False]
    assert_equal(tensors[0], before[0])
    assert_equal(tensors[1], before[1])
    assert tensors[2].state["step"] == 1
    assert not torch.equal(tensors[2].param, before[2].param)


def test_tensors_that_the_library_cannot_take_are_stepped_beside_others() -> None:
    settings = {}, {"topk_block": 65536, "error_block": 65534}
    tensors = [make(1000), make(1000, torch.float16), make(300_000, torch.float32, **settings[1])]
    assert [micro_adam_cpu.takes(replace(tensor, grad=tensor.param)) for tensor in tensors] == [True, False, False]
    expected = [twin(tensor) for tensor in tensors]
    for tensor, other in zip(tensors, expected, strict=True):
        tensor.grad = other.grad = torch.ones_like(tensor.param)
    assert micro_adam_step(tensors) == [micro_adam_step_reference(tensor) for tensor in expected] == [False] * 3
    for tensor, other in zip(tensors, expected, strict=True):
        assert_equal(tensor, other)


def test_without_a_compiler_the_reference_steps_and_one_warning_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LOWBIT_LIGHTNING_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    tensor = make(1000)
    tensor.grad = torch.ones(1000)
    expected = twin(tensor)
    micro_adam_step_reference(expected)
    micro_adam_cpu.load_library.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"MicroAdam.*no-such-compiler.*install g\+\+ or clang\+\+"):
        micro_adam_step([tensor])
    micro_adam_step([expected])  # a second warning would be an error here
    micro_adam_cpu.load_library.cache_clear()
    micro_adam_step_reference(tensor)
    assert_equal(tensor, expected)
