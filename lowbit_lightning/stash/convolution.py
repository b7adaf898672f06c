"""Convolutions that keep their input packed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowbit_lightning.stash.kept import Kept
from lowbit_lightning.stash.stash import Stash

ConvModule = nn.Conv1d | nn.Conv2d | nn.Conv3d


class StashedConvolution(torch.autograd.Function):
    """A convolution, exact forward; the gradient of its weight is that at what was kept of its input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        compute: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        module: ConvModule,
        stash: Stash,
        name: str,
    ) -> Tensor:
        """Compute.

        Args:
            ctx: of autograd.
            x: (batch, channels, *size).
            weight: of the layer.
            bias: of the layer or None.
            compute: the layer itself.
            module: its settings; padded with zeros by a number of elements.
            stash: keeps x.
            name: of the layer.
        """
        y = stash.meter.run("convolution", compute, x, weight, bias)
        kept = stash.keep(x, "convolution", name) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(weight, *(kept.tensors if kept else ()))
        ctx.rule, ctx.module, ctx.stash = kept.restore if kept else None, module, stash
        ctx.x = x.shape, x.stride(), x.dtype
        ctx.bias = None if bias is None else (list(bias.shape), bias.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias."""
        weight, *tensors = ctx.saved_tensors
        shape, stride, x_dtype = ctx.x
        wanted = list(ctx.needs_input_grad[:3])
        if wanted[1]:
            x = ctx.stash.restore(Kept(tuple(tensors), ctx.rule), dy.dtype)
        else:  # of which only the shape is looked at
            x = torch.empty_strided(shape, stride, dtype=dy.dtype, device=dy.device)
        own = ctx.module
        dx, dw, db = torch.ops.aten.convolution_backward(
            dy, x, weight.to(dy.dtype), ctx.bias and ctx.bias[0], own.stride, own.padding, own.dilation, False,
            [0] * len(own.stride), own.groups, wanted,
        )  # fmt: skip
        return (
            dx.to(x_dtype) if wanted[0] else None,
            dw.to(weight.dtype) if wanted[1] else None,
            db.to(ctx.bias[1]) if wanted[2] else None,
            *(None,) * 4,
        )
