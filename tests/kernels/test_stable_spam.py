"""AdaClip and AdaGN: numbers against float64, every path against the meaning; Triton on CUDA or in its interpreter."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit_lightning.kernels import stable_spam, stable_spam_triton
from lowbit_lightning.kernels.stable_spam import ada_gn, bias_correction, is_usable, measure, rescale, rescaled

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(40, 70), (33,), (), (0, 4), (20000,)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Measure = Callable[[list[Tensor]], tuple[Tensor, Tensor]]


def tensors(dtype: torch.dtype = torch.float32, device: torch.device = DEVICE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).to(dtype).to(device) for shape in SHAPES]


@pytest.mark.parametrize("path", [stable_spam.measure_reference, measure, stable_spam_triton.measure])
@pytest.mark.parametrize("dtype", DTYPES)
def test_maxima_and_norms_are_those_of_float64(dtype: torch.dtype, path: Measure) -> None:
    grads = tensors(dtype)
    maxima, norms = path(grads)
    wide = [grad.double().cpu() for grad in grads]
    assert maxima.dtype == norms.dtype == torch.float32
    assert maxima.tolist() == [float(grad.abs().max()) if grad.numel() else 0.0 for grad in wide]
    assert norms.tolist() == pytest.approx([float(grad.norm()) for grad in wide], rel=5e-6)


@pytest.mark.parametrize("path", [stable_spam.measure_reference, measure, stable_spam_triton.measure])
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")  # by NumPy, in Triton's interpreter
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e25])
def test_what_is_not_finite_is_not_usable(value: float, path: Measure) -> None:
    grads = tensors()
    grads[4][17000] = value
    assert is_usable(*path(grads)).tolist() == [True, True, True, True, False]


def test_norm_of_a_large_tensor_is_added_up_in_pieces() -> None:
    grad = torch.randn(4_000_000)
    assert measure([grad])[1].item() == pytest.approx(float(grad.double().norm()), rel=2e-5)


def test_mixed_dtypes_are_measured_together() -> None:
    grads = [grad.to(dtype) for grad, dtype in zip(tensors(), [*DTYPES, *DTYPES], strict=False)]
    for path in (stable_spam.measure_reference, measure, stable_spam_triton.measure):
        assert path(grads)[1].tolist() == pytest.approx([float(grad.double().norm()) for grad in grads], rel=5e-6)


def test_bias_correction_is_exact_near_one() -> None:
    counts = torch.tensor([1.0, 2.0, 1000.0])
    for decay in (0.0, 0.7, 0.99999):
        expected = [1 - decay ** int(count) for count in counts]
        assert bias_correction(counts, decay).tolist() == pytest.approx(expected, rel=1e-6)


def test_a_gradient_of_zeros_is_not_divided_by_its_norm() -> None:
    zero = torch.zeros(1)
    mean, square, factor = ada_gn(zero, zero, torch.ones(1), zero, 0.7, 0.9, 1e-8)
    assert (mean.item(), square.item(), factor.item()) == (0.0, 0.0, 1.0)


def numbers(device: torch.device = DEVICE) -> tuple[Tensor, ...]:
    """Limits, shrink and factors: clipped, untouched, scaled, empty, clipped and scaled."""
    rows = [[1.5, math.inf, math.inf, math.inf, 2.0], [0.3, 1.0, 1.0, 1.0, 0.125], [1.0, 1.0, 0.7, 2.0, 1e-3]]
    return torch.tensor(rows, device=device).unbind(0)


@pytest.mark.parametrize("path", [rescale, stable_spam_triton.rescale])
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_the_meaning(dtype: torch.dtype, in_place: bool, path: Any) -> None:
    grads, (limits, shrink, factors) = tensors(dtype), numbers()
    outs = grads if in_place else [torch.empty(shape, device=DEVICE) for shape in SHAPES]
    expected = [rescaled(*each).to(out.dtype) for *each, out in zip(grads, limits, shrink, factors, outs, strict=True)]
    path(grads, outs, limits, shrink, factors)
    assert all(torch.equal(one, other) for one, other in zip(outs, expected, strict=True))


@pytest.mark.parametrize("path", [stable_spam.clipped_norms, stable_spam_triton.clipped_norms])
@pytest.mark.parametrize("dtype", DTYPES)
def test_clipped_norms_are_those_of_what_is_written(dtype: torch.dtype, path: Any) -> None:
    grads, (limits, shrink, _) = tensors(dtype), numbers()
    norms = path(grads, limits, shrink, measure(grads)[1])
    clipped = [rescaled(grad, *each, torch.ones(())) for grad, *each in zip(grads, limits, shrink, strict=True)]
    assert norms.tolist() == pytest.approx([float(grad.double().norm()) for grad in clipped], rel=5e-6)


@pytest.mark.parametrize("path", [rescale, stable_spam_triton.rescale])
def test_a_factor_of_nan_reaches_zeros_as_well(path: Any) -> None:
    grads, out = [torch.zeros(5, device=DEVICE)], [torch.empty(5, device=DEVICE)]
    limits, one = torch.tensor([math.inf], device=DEVICE), torch.ones(1, device=DEVICE)
    path(grads, out, limits, one, one * math.nan)
    assert out[0].isnan().all()


def test_tensors_that_are_not_contiguous_are_written_in_place() -> None:
    grad = torch.randn(4, 3, 5, 5, device=DEVICE).to(memory_format=torch.channels_last)
    expected = grad * 0.5
    half = torch.full((1,), 0.5, device=DEVICE)
    rescale([grad], [grad], torch.full((1,), math.inf, device=DEVICE), torch.ones(1, device=DEVICE), half)
    assert torch.equal(grad, expected)
    assert not stable_spam_triton.takes([grad])
