"""A layer at a level of DSQ: its gradients against float64, its stash, and what it leaves out."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowbit_lightning.kernels import dsq
from lowbit_lightning.kernels.block_float import quantize
from lowbit_lightning.stash import Stash, StashPrecision, patch
from lowbit_lightning.stash.dsq_linear import DSQLinearForward, GemmPrecision
from lowbit_lightning.stash.levels import Level

PAPER = [Level(2, 2, 2, 16), Level(4, 4, 4, 16), Level(16, 4, 4, 16)]
ROWS, INPUTS, OUTPUTS = 48, 64, 32


class Layers(nn.Module):
    """One layer, or several that read the same input, as queries, keys and values do."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return sum(layer(x) for layer in self.layers)  # type: ignore[return-value]


def at(level: Level, model: nn.Module, rounding: Any = "stochastic", kind: Any = "bfp") -> tuple[Stash, GemmPrecision]:
    stash = Stash(StashPrecision(level.q1, kind, 16, rounding), seed=3)
    gemms = GemmPrecision(level, 16, kind, rounding)
    patch(model, stash, ["linear"], linear=lambda *of_layer: DSQLinearForward(*of_layer, gemms))
    stash.begin_step(5)
    return stash, gemms


def linear_layer(transposed: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return Conv1D(OUTPUTS, INPUTS) if transposed else nn.Linear(INPUTS, OUTPUTS)


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, ROWS // 2, INPUTS, requires_grad=True), torch.randn(2, ROWS // 2, OUTPUTS)


@pytest.mark.parametrize("kind", ["bfp", "affine"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("level", PAPER[:2], ids=str)
def test_output_and_gradients_are_those_of_float64(level: Level, transposed: bool, rounding: Any, kind: Any) -> None:
    layer = linear_layer(transposed)
    model = Layers(layer)
    stash, gemms = at(level, model, rounding, kind)
    x, dy = inputs()
    y = model(x)
    y.backward(dy)
    noises = dsq.noises(3, dsq.noise_streams("layers.0:0"), 5)
    weight, bias = (parameter.detach() for parameter in (layer.weight, layer.bias))
    rows, grad = x.detach().flatten(0, 1), dy.flatten(0, 1)
    format = stash.precision.of("linear")
    noise = (3, stash._streams["layers.0", 0], 5) if rounding == "stochastic" else None
    stashed = quantize(rows, format, noise)
    expected = dsq.reference(rows, weight.T if transposed else weight, grad, stashed, gemms.formats, noises)
    y_wanted, dx, dw = expected[0] + bias, expected[1].view(x.shape), expected[2].T if transposed else expected[2]
    for found, wanted in (
        (y.flatten(0, 1), y_wanted),
        (layer.weight.grad, dw),
        (layer.bias.grad, grad.sum(0).double()),
    ):
        assert torch.allclose(found.double(), wanted.double(), rtol=1e-4, atol=1e-4)
    # An element of dx that lies between two mantissas of q3 may go either way: one of 2^15 of its box.
    assert torch.allclose(x.grad.double(), dx, rtol=1e-3, atol=1e-2)


def test_finite_differences_of_the_loss_agree_with_the_mean_gradient() -> None:
    """With noise that is fixed for each of many steps, and forward exact, as differences of a staircase say nothing."""
    layer = linear_layer()
    model = Layers(layer)
    stash, _ = at(Level(32, 3, 3, 16), model, kind="affine")
    x, dy = inputs()
    direction_x, direction_w = torch.randn_like(x), torch.randn_like(layer.weight)
    draws = 200

    def loss(by: float) -> float:
        with torch.no_grad():
            y = (x + by * direction_x).double() @ (layer.weight + by * direction_w).double().T
            return float((y * dy).sum())

    difference = (loss(1e-3) - loss(-1e-3)) / 2e-3
    for step in range(draws):
        stash.begin_step(step)
        model(x).backward(dy / draws)
    slope = float((x.grad * direction_x).sum() + (layer.weight.grad * direction_w).sum())
    assert slope == pytest.approx(difference, rel=0.05)


def test_the_same_step_rounds_alike_and_another_otherwise() -> None:
    model = Layers(linear_layer())
    stash, _ = at(PAPER[0], model)
    x, dy = inputs()

    def gradient_at(step: int) -> Tensor:
        stash.begin_step(step)
        (gradient,) = torch.autograd.grad(model(x), x, dy)
        return gradient

    first, again, other = (gradient_at(step) for step in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_layers_that_read_one_input_share_its_stash() -> None:
    model = Layers(linear_layer(), linear_layer(), linear_layer())
    stash, _ = at(PAPER[0], model)
    x, dy = inputs()
    model(x).backward(dy)
    assert stash.meter.packed_bytes.total() == ROWS * INPUTS * (2 + 8 / 16) / 8


def test_a_frozen_weight_stashes_nothing_and_an_input_without_gradient_costs_no_gemm() -> None:
    layer = linear_layer()
    layer.requires_grad_(False)
    model = Layers(layer)
    stash, gemms = at(PAPER[1], model)
    x, dy = inputs()
    model(x).backward(dy)
    assert stash.meter.packed_bytes.total() == 0
    assert x.grad is not None
    assert gemms.cost == dsq.linear_cost(PAPER[1], ROWS, OUTPUTS, INPUTS, 16, weight_grad=False)

    model = Layers(linear_layer())
    _, gemms = at(PAPER[1], model)
    y = model(x.detach())
    y.backward(dy)
    assert gemms.cost == dsq.linear_cost(PAPER[1], ROWS, OUTPUTS, INPUTS, 16, input_grad=False)
    assert gemms.yardstick == dsq.sixteen_bit_cost(ROWS, OUTPUTS, INPUTS, input_grad=False)


def test_evaluation_is_exact() -> None:
    model, plain = Layers(linear_layer()), linear_layer()
    _, gemms = at(PAPER[0], model)
    x, _ = inputs()
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    assert gemms.cost == (0, 0)


def test_the_stash_alone_leaves_forward_exact() -> None:
    model, plain = Layers(linear_layer()), linear_layer()
    stash, gemms = at(Level(32, 2, 32, 32), model)
    x, dy = inputs()
    y = model(x)
    assert torch.equal(y, plain(x))
    y.backward(dy)
    assert stash.meter.packed_bytes.total() == ROWS * INPUTS * (2 + 8 / 16) / 8
    assert gemms.cost == dsq.linear_cost((32, 2, 32, 32), ROWS, OUTPUTS, INPUTS, 16)


def test_a_level_that_rises_between_forward_and_backward_is_for_the_next_pass() -> None:
    def gradient(raise_to: Level) -> Tensor:
        layer = linear_layer()
        model = Layers(layer)
        _, gemms = at(PAPER[0], model)
        x, dy = inputs()
        y = model(x)
        gemms.set_level(raise_to)
        y.backward(dy)
        return layer.weight.grad

    assert torch.equal(gradient(PAPER[0]), gradient(PAPER[2]))


@pytest.mark.parametrize("level", [Level(2, 2, 2, 16), Level(32, 2, 32, 32)], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
def test_the_sampled_error_is_that_of_the_weights_gradient(level: Level, transposed: bool) -> None:
    layers = linear_layer(transposed), linear_layer(transposed)
    model = Layers(*layers)
    stash, gemms = at(level, model)
    stash.meter.measuring, gemms.turn = True, 3  # the second layer
    x, dy = inputs()
    model(x).backward(dy)
    rows, grad = x.detach().flatten(0, 1), dy.flatten(0, 1)
    exact = rows.T @ grad if transposed else grad.T @ rows
    expected = float((layers[1].weight.grad - exact).norm() / exact.norm())
    assert 0.1 < expected < 2
    assert gemms.gradient_error is not None
    assert float(gemms.gradient_error) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_and_keeps_gradients_in_the_weights(dtype: torch.dtype) -> None:
    layer = linear_layer()
    model = Layers(layer)
    at(PAPER[1], model)
    x, dy = inputs()
    with torch.autocast("cpu", dtype):
        y = model(x)
    assert y.dtype == dtype
    y.backward(dy.to(dtype))
    assert layer.weight.grad.dtype == x.grad.dtype == torch.float32
    exact = dy.flatten(0, 1).T @ x.detach().flatten(0, 1)
    assert float((layer.weight.grad - exact).norm() / exact.norm()) < 0.4


def test_what_nothing_is_quantized_in_equals_the_plain_layer() -> None:
    layer, plain = linear_layer(), linear_layer()
    model = Layers(layer)
    at(Level(16, 16, 16, 16), model, "nearest")
    x, dy = inputs()
    y = model(x)
    y.backward(dy)
    expected = plain(x.detach())
    expected.backward(dy)
    assert torch.allclose(y, expected, atol=1e-3)
    assert torch.allclose(layer.weight.grad, plain.weight.grad, rtol=1e-2, atol=math.sqrt(ROWS) * 1e-3)
