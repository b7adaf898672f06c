"""The Triton kernel is the reference bit for bit: on CUDA where there is one, else in Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from lowbit_lightning.kernels.rademacher import (
    Noise,
    Update,
    apply_update_reference,
    matrix_shape,
    perturbed_copy_reference,
    perturbed_rows_reference,
)
from lowbit_lightning.kernels.rademacher_cpu import Pass
from lowbit_lightning.kernels.rademacher_triton import launch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def noise(rank1: bool = False, stochastic_rounding: bool = True) -> Noise:
    return Noise(2**33 + 5, 11, 2**32 - 7, 3, rank1, stochastic_rounding)


def filled(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Values of many magnitudes, down to fp16's subnormals."""
    return (torch.randn(shape) * torch.exp(3 * torch.randn(shape))).to(dtype).to(DEVICE)


@pytest.mark.parametrize("stochastic_rounding", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "rank1"),
    [
        *(((), False), ((129,), False), ((9000,), False), ((3, 50), False), ((40, 264), False), ((0, 4), False)),
        *(((3, 50), True), ((40, 264), True), ((8, 3, 5, 5), True), ((0, 4), True)),
    ],
)
def test_perturbed_copy_is_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, rank1: bool, stochastic_rounding: bool
) -> None:
    param, source = filled(shape, dtype), noise(rank1, stochastic_rounding)
    expected = perturbed_copy_reference(param, 1e-2, source, 2, torch.empty_like(param))
    out = torch.empty_like(param)
    launch(Pass(param, out, (1.0, -1e-2), source, 3, 2, *matrix_shape(param)))
    assert torch.equal(out, expected)


@pytest.mark.parametrize("rank1", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_update_is_the_reference(dtype: torch.dtype, rank1: bool) -> None:
    param = filled((20, 150), dtype)
    twin, sizes = param.clone(), (1e-2, -2e-2, 5e-3, 1e-3, -7e-3)
    apply_update_reference(Update(param, noise(rank1), sizes, 0.9))
    launch(Pass(twin, twin, (0.9, *sizes), noise(rank1), 0, 0, 20, 150))
    assert torch.equal(param, twin)


@pytest.mark.parametrize("rank1", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [5, 128, 200])
def test_rows_are_the_reference(columns: int, dtype: torch.dtype, rank1: bool) -> None:
    weight, rows = filled((60, columns), dtype), torch.randint(0, 60, (3, 5), device=DEVICE)
    expected = perturbed_rows_reference(weight, rows, 1e-2, noise(rank1), 4)
    out = torch.empty_like(expected)
    launch(Pass(weight, out, (1.0, -1e-2), noise(rank1), 5, 4, 60, columns, rows))
    assert torch.equal(out, expected)
