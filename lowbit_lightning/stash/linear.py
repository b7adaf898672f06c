"""Linear layers that keep their input packed: for the gradient of the weight, which is all that it is needed for."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowbit_lightning.stash.kept import Kept
from lowbit_lightning.stash.stash import Stash


class StashedLinear(torch.autograd.Function):
    """``y = x Wᵀ + b``, exact forward; ``dW = dyᵀ x̂`` with x̂ what was kept of x.

    A frozen weight keeps no x, and an x without a gradient costs no GEMM. Under autocast it is x before the cast that
    is kept, so that layers with the same input keep it once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        compute: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        transposed: bool,
        stash: Stash,
        name: str,
    ) -> Tensor:
        """Compute.

        Args:
            ctx: of autograd.
            x: (..., in).
            weight: (out, in), or (in, out) if ``transposed``.
            bias: (out,) or None.
            compute: the layer itself.
            transposed: as in GPT-2's ``Conv1D``.
            stash: keeps x.
            name: of the layer.

        Returns:
            (..., out).
        """
        y = stash.meter.run("linear", compute, x, weight, bias)
        kept = stash.keep(x, "linear", name) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, *(kept.tensors if kept else ()))
        ctx.rule = kept.restore if kept else None
        ctx.stash, ctx.transposed = stash, transposed
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias."""
        dx = dw = db = None
        weight, *tensors = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        rows = dy.reshape(-1, dy.shape[-1])
        if ctx.needs_input_grad[0]:
            matrix = weight.to(dy.dtype)
            dx = (dy @ (matrix.T if ctx.transposed else matrix)).to(x_dtype)
        if ctx.needs_input_grad[1]:
            x = ctx.stash.restore(Kept(tuple(tensors), ctx.rule), dy.dtype)
            x = x.reshape(-1, x.shape[-1])
            dw = (x.T @ rows if ctx.transposed else rows.T @ x).to(weight_dtype)
        if ctx.needs_input_grad[2]:
            db = rows.sum(0).to(bias_dtype)
        return dx, dw, db, None, None, None, None
