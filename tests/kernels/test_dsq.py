"""The three GEMMs against float64 and against boxes written out by hand, and the modelled costs against the paper's."""

import math

import pytest
import torch
from torch import Tensor

from lowbit_lightning.kernels.dsq import (
    OFF,
    Cost,
    Formats,
    Noises,
    formats,
    forward,
    input_gradient,
    linear_cost,
    noise_streams,
    noises,
    reference,
    sixteen_bit_cost,
    weight_gradient,
)

M, N, K = 40, 24, 56  # the last box of each axis is short


def operands() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(M, K), torch.randn(N, K) / math.sqrt(K), torch.randn(M, N)


def in_boxes(x: Tensor, bits: int, axis: int) -> Tensor:
    """Block floating point to nearest, a box at a time, in Python's own numbers."""
    rows = x.movedim(axis, -1).double()
    result = torch.empty_like(rows)
    for r, row in enumerate(rows.tolist()):
        for start in range(0, len(row), 16):
            box = row[start : start + 16]
            _, exponent = math.frexp(max(map(abs, box)))
            step, most = 2.0 ** (exponent - bits + 1), 2 ** (bits - 1) - 1
            values = [max(-most, min(most, round(value / step))) * step for value in box]
            result[r, start : start + 16] = torch.tensor(values)
    return result.movedim(-1, axis)


def test_each_gemm_reads_what_its_place_says_in_boxes_along_its_sum() -> None:
    x, weight, grad = operands()
    places, none = formats((4, 8, 3, 6), 16, "bfp", "nearest"), Noises()
    y = forward(x, weight, places)
    assert torch.allclose(y.double(), in_boxes(x, 4, 1) @ in_boxes(weight, 4, 1).T, atol=1e-5)
    dw = weight_gradient(grad, x, places, none)
    assert torch.allclose(dw.double(), in_boxes(grad, 3, 0).T @ x.double(), atol=1e-5)
    dx = input_gradient(grad, weight, places._replace(q3=None), none)
    assert torch.allclose(dx.double(), in_boxes(grad, 3, 1) @ in_boxes(weight, 3, 0), atol=1e-5)
    assert torch.equal(input_gradient(grad, weight, places, none).double(), in_boxes(dx, 6, 1))


@pytest.mark.parametrize("kind", ["bfp", "affine"])
@pytest.mark.parametrize("bits", [(2, 2, 2, 16), (16, 4, 4, 16), (32, 4, 32, 32), (8, 8, 8, 8)])
def test_float64_agrees(bits: tuple[int, int, int, int], kind: str) -> None:
    x, weight, grad = operands()
    places = formats(bits, 16, kind, "stochastic")  # type: ignore[arg-type]
    noise = noises(7, noise_streams("layer"), 3)
    y, dx, dw = reference(x, weight, grad, x, places._replace(q3=None), noise)
    exact = places._replace(q3=None)
    assert torch.allclose(forward(x, weight, exact).double(), y, atol=1e-4)
    assert torch.allclose(input_gradient(grad, weight, exact, noise).double(), dx, atol=1e-4)
    assert torch.allclose(weight_gradient(grad, x, exact, noise).double(), dw, atol=1e-4)


def test_off_everywhere_is_the_plain_layer() -> None:
    x, weight, grad = operands()
    places = formats((OFF, OFF, OFF, OFF), 16, "bfp", "nearest")
    assert places == Formats(None, None, None, None)
    assert torch.equal(forward(x, weight, places), x @ weight.T)
    assert torch.equal(input_gradient(grad, weight, places, Noises()), grad @ weight)
    assert torch.equal(weight_gradient(grad, x, places, Noises()), grad.T @ x)


def test_stochastic_gradients_average_to_the_exact_ones() -> None:
    """Affine codes clip nothing, so the mean of k draws comes closer as 1/√k."""
    _, weight, grad = operands()
    places, streams = formats((2, OFF, 2, 8), 16, "affine", "stochastic"), noise_streams("layer")
    draws = [input_gradient(grad, weight, places, noises(0, streams, step)) for step in range(256)]
    exact = grad @ weight
    errors = [float((torch.stack(draws[:k]).mean(0) - exact).norm() / exact.norm()) for k in (1, 16, 256)]
    assert errors[0] > 0.2
    assert errors[1] < errors[0] / 3
    assert errors[2] < errors[0] / 12


def test_forward_rounds_to_nearest_and_what_is_backward_as_asked() -> None:
    places = formats((4, 4, 4, 16), 16, "bfp", "stochastic")
    assert [format.rounding for format in places if format] == ["nearest", "stochastic", "stochastic", "stochastic"]


def test_tensors_do_not_share_noise() -> None:
    streams = noise_streams("layer")
    assert len({*streams, *noise_streams("other")}) == 2 * len(Noises._fields)


@pytest.mark.parametrize(("bits", "times"), [((2, 2, 2, 16), 64), ((16, 4, 4, 16), 768 / 288), ((16, 16, 16, 16), 1)])
def test_arithmetic_is_the_area_of_integer_multipliers(bits: tuple[int, int, int, int], times: float) -> None:
    ratio = sixteen_bit_cost(M, N, K).arithmetic / linear_cost(bits, M, N, K, box=16).arithmetic
    assert ratio == pytest.approx(times)


def test_dram_counts_every_read_and_write() -> None:
    write_stash, read_stash = M * K * 4.5, M * K * 4.5
    weights, gradient, outgoing = K * N * (16.5 + 2.5), M * N * 2.5, M * K * 8.5
    expected = write_stash + read_stash + weights + gradient + outgoing
    assert linear_cost((16, 4, 2, 8), M, N, K, box=16).dram == pytest.approx(expected)
    assert sixteen_bit_cost(M, N, K).dram == 16 * (3 * M * K + 2 * K * N + M * N)


def test_what_is_not_computed_costs_nothing() -> None:
    whole = linear_cost((8, 4, 2, 16), M, N, K, box=16)
    frozen = linear_cost((8, 4, 2, 16), M, N, K, box=16, weight_grad=False)
    assert whole.arithmetic - frozen.arithmetic == M * N * K * 8
    assert whole.dram - frozen.dram == pytest.approx(2 * M * K * 4.5)
    first = linear_cost((8, 4, 2, 16), M, N, K, box=16, input_grad=False)
    assert whole.arithmetic - first.arithmetic == M * N * K * 4
    inference = linear_cost((8, 4, 2, 16), M, N, K, box=16, input_grad=False, weight_grad=False)
    assert inference == Cost(M * N * K * 64.0, K * N * 8.5)


def test_costs_add_up() -> None:
    assert Cost(1, 2) + Cost(3, 4) == Cost(4, 6)
