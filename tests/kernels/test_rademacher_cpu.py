"""The compiled CPU passes equal the references bit for bit, whatever the shape, dtype, signs and number of threads."""

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lowbit_lightning.kernels import rademacher, rademacher_cpu
from lowbit_lightning.kernels.rademacher import (
    Noise,
    Update,
    apply_update_reference,
    apply_updates,
    perturbed_copy,
    perturbed_copy_reference,
    perturbed_rows,
    perturbed_rows_reference,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(), (7,), (4095,), (70_001,), (3, 50), (70, 130), (8, 3, 5, 5), (5, 9000), (3000, 3), (0, 4)]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _compiled() -> None:
    assert rademacher_cpu.load_library() is not None


def noise(rank1: bool = False, stochastic_rounding: bool = True, step: int = 3) -> Noise:
    return Noise(2**33 + 5, 11, 2**32 - 7, step, rank1, stochastic_rounding)


def filled(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Values of many magnitudes, down to fp16's subnormals and beyond its largest."""
    return (torch.randn(shape) * torch.exp(4 * torch.randn(shape))).to(dtype)


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(nan=7.0), other.nan_to_num(nan=7.0))


@pytest.mark.parametrize("stochastic_rounding", [True, False])
@pytest.mark.parametrize("rank1", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_passes_equal_the_references(
    shape: tuple[int, ...], dtype: torch.dtype, rank1: bool, stochastic_rounding: bool
) -> None:
    source = noise(rank1 and len(shape) > 1, stochastic_rounding)
    param = filled(shape, dtype)
    expected = perturbed_copy_reference(param, 1e-3, source, 2, torch.empty_like(param))
    assert same(perturbed_copy(param, 1e-3, source, 2, torch.empty_like(param)), expected)
    twin = param.clone()
    sizes = (1e-3, -2e-3, 5e-4)
    apply_update_reference(Update(param, source, sizes, 0.99))
    apply_updates([Update(twin, source, sizes, 0.99)])
    assert same(twin, param)


@pytest.mark.parametrize("rank1", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [5, 128, 200, 5000])
def test_rows_equal_the_reference(columns: int, dtype: torch.dtype, rank1: bool) -> None:
    weight, rows = filled((60, columns), dtype), torch.randint(0, 60, (3, 7))
    expected = perturbed_rows_reference(weight, rows, 1e-2, noise(rank1), 4)
    assert torch.equal(perturbed_rows(weight, rows, 1e-2, noise(rank1), 4), expected)


@pytest.mark.usefixtures("two_threads")
def test_many_tensors_in_one_call_equal_the_reference_on_two_threads() -> None:
    params = [filled(shape, dtype) for shape in SHAPES for dtype in DTYPES]
    twins = [param.clone() for param in params]
    sources = [noise(rank1=param.ndim > 1 and i % 2 == 0, step=i) for i, param in enumerate(params)]
    sizes = [tuple(1e-3 * (k + 1) for k in range(1 + i % 5)) for i in range(len(params))]
    for param, source, size in zip(params, sources, sizes, strict=True):
        apply_update_reference(Update(param, source, size, 0.5))
    apply_updates([Update(*args, 0.5) for args in zip(twins, sources, sizes, strict=True)])
    assert all(same(one, other) for one, other in zip(params, twins, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_stay_so(dtype: torch.dtype) -> None:
    param = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0] * 20).to(dtype)
    expected = perturbed_copy_reference(param, 1e-3, noise(), 0, torch.empty_like(param))
    found = perturbed_copy(param, 1e-3, noise(), 0, torch.empty_like(param))
    assert torch.equal(found.isnan(), param.isnan())
    assert same(found, expected)


def test_what_the_library_does_not_take_is_left_to_the_reference() -> None:
    strided, double = torch.randn(40, 30).t(), torch.randn(50, dtype=torch.float64)
    assert not rademacher_cpu.takes(strided)
    assert not rademacher_cpu.takes(double)
    for param in (strided, double):
        twin = param.clone(memory_format=torch.preserve_format)
        apply_update_reference(Update(twin, noise(), (0.1,), 1.0))
        apply_updates([Update(param, noise(), (0.1,), 1.0)])
        assert torch.equal(param, twin)


def test_the_library_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_LIGHTNING_CPU_KERNEL", "reference")
    monkeypatch.setattr(rademacher, "load_library", rademacher_cpu.load_library.__wrapped__)
    param = torch.randn(300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = perturbed_copy(param, 1e-3, noise(), 0, torch.empty_like(param))
    assert torch.equal(found, perturbed_copy_reference(param, 1e-3, noise(), 0, torch.empty_like(param)))
