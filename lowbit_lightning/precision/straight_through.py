"""A linear layer whose matrix products see quantized operands, differentiated straight through the quantization.

With q(·) the quantization, ``y = q(x) q(W)ᵀ + b`` and, as the derivative of q is taken to be 1,

    dL/dx = g q(W),   dL/dW = gᵀ q(x),   dL/db = Σ g      (g = dL/dy, itself quantized in the products if asked)

as in the published code of Stable-SPAM (arXiv 2502.17055). What that code keeps for backward differs: here it is the
packed q(x), in half a byte per element, and only if W is trained; q(W) is computed once more instead of kept, from the
weight that exists anyway; and a product that nobody needs is not computed.
"""

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from lowbit_lightning.kernels.four_bit import fake_quantize_fp8
from lowbit_lightning.kernels.four_bit_ops import Operand, dequantized, quantized


@dataclass(frozen=True)
class Quantization:
    """How the operands of one layer are quantized; an operand that is None stays as it is.

    Attributes:
        weight: of W, in groups along its input axis.
        activation: of x, in groups along its last axis.
        gradient: of g, along its last axis; ``"fp8"`` is E4M3 in groups of ``fp8_group_size``.
        save_packed: keep q(x) packed for backward, and not as it is.
        transposed: whether the weight is stored as (in, out), as in the Conv1D of transformers.
        fp8_group_size: see ``gradient``.
    """

    weight: Operand | None
    activation: Operand | None
    gradient: Operand | Literal["fp8"] | None = None
    save_packed: bool = True
    transposed: bool = False
    fp8_group_size: int = 256


@dataclass(frozen=True)
class QuantizedInput:
    """q(x): its values, (rows, in), and what is kept of them for backward, () if nothing."""

    values: Tensor
    saved: tuple[Tensor, ...]


def quantize_input(x: Tensor, how: Quantization, dtype: torch.dtype, step: Tensor | None, keep: bool) -> QuantizedInput:
    """Quantize a layer's input.

    Args:
        x: (..., in).
        how: the layer's.
        dtype: to compute in.
        step: () int64, the clock of the noise, or None.
        keep: whether backward will need it.
    """
    with torch.no_grad():
        rows = x.detach().reshape(-1, x.shape[-1])
        if how.activation is None:
            values = rows.to(dtype)
            return QuantizedInput(values, (values,) if keep else ())
        pack = keep and how.save_packed
        found, packed = quantized(rows, how.activation, dtype, step, packed=pack)
        values = cast(Tensor, found)
        if packed is not None:
            return QuantizedInput(values, tuple(packed))
        return QuantizedInput(values, (values,) if keep else ())


def quantize_weight(weight: Tensor, how: Quantization, dtype: torch.dtype, step: Tensor | None) -> Tensor:
    """Return q(W), (out, in) of ``dtype``."""
    matrix = weight.t() if how.transposed else weight
    if how.weight is None:
        return matrix.to(dtype)
    return cast(Tensor, quantized(matrix, how.weight, dtype, step)[0])


class StraightThroughLinear(torch.autograd.Function):
    """See the top of this file; :func:`straight_through_linear` is what to call."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor,
        how: Quantization,
        step: Tensor | None,
        *saved: Tensor,
    ) -> Tensor:
        """Return (..., out)."""
        ctx.how, ctx.dtype, ctx.x_shape, ctx.x_dtype = how, values.dtype, x.shape, x.dtype
        ctx.parts = len(saved)
        ctx.has_step = step is not None
        ctx.save_for_backward(weight, *saved, *(() if step is None else (step,)))
        w = quantize_weight(weight, how, values.dtype, step)
        # Not a view, whose in-place change FSDP2 could not follow.
        return linear(values.view(x.shape), w, None if bias is None else bias.to(values.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of ``x``, ``weight`` and ``bias``."""
        how: Quantization = ctx.how
        weight, *saved = ctx.saved_tensors
        step = saved.pop() if ctx.has_step else None
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        exact = grad.reshape(-1, grad.shape[-1]).to(ctx.dtype)
        grad_x = grad_weight = grad_bias = None
        if needs_bias:
            grad_bias = exact.sum(0).to(weight.dtype)
        g = _quantized_gradient(exact, how, step) if needs_x or needs_weight else exact
        if needs_x:
            grad_x = (g @ quantize_weight(weight, how, ctx.dtype, step)).view(ctx.x_shape).to(ctx.x_dtype)
        if needs_weight:
            values = saved[0]
            if ctx.parts > 1 and how.activation is not None:
                values = dequantized(saved, how.activation.scheme, ctx.x_shape[-1])
            product = values.t() @ g if how.transposed else g.t() @ values
            grad_weight = product.to(weight.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, *(None for _ in range(ctx.parts))


def _quantized_gradient(grad: Tensor, how: Quantization, step: Tensor | None) -> Tensor:
    if how.gradient is None:
        return grad
    if how.gradient == "fp8":
        return fake_quantize_fp8(grad, how.fp8_group_size, grad.dtype)
    return cast(Tensor, quantized(grad, how.gradient, grad.dtype, step)[0])


def straight_through_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    quantized_input: QuantizedInput,
    how: Quantization,
    step: Tensor | None,
) -> Tensor:
    """Return ``q(x) q(W)ᵀ + b``.

    Args:
        x: (..., in), which the gradient goes to.
        weight: (out, in), or (in, out) if ``how.transposed``.
        bias: (out,) or None.
        quantized_input: of ``x``, from :func:`quantize_input`.
        how: the layer's quantization.
        step: () int64, the clock of the noise, which must not change until backward; None if there is none.
    """
    result: Tensor = StraightThroughLinear.apply(
        x, weight, bias, quantized_input.values, how, step, *quantized_input.saved
    )
    return result
