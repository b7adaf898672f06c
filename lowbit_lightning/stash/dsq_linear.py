"""Linear layers whose three GEMMs have quantized operands, as DSQ's levels say, on top of the packed stash.

The arithmetic, and what it would cost, is in :mod:`lowbit_lightning.kernels.dsq`; here it meets autograd. A level that
touches the stash alone leaves the layer to :class:`~lowbit_lightning.stash.linear.StashedLinear`, forward exact.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from lowbit_lightning.kernels import dsq
from lowbit_lightning.kernels.block_float import DTYPES
from lowbit_lightning.stash.forwards import LinearForward, conv1d
from lowbit_lightning.stash.kept import Kept, Unpack
from lowbit_lightning.stash.levels import Level
from lowbit_lightning.stash.stash import Stash


class GemmPrecision:
    """What the linear layers of a model compute with now, and what that would have cost so far in this step.

    Args:
        level: the present one; :meth:`set_level` changes it.
        box: elements that share a scale.
        kind: ``bfp`` or ``affine``.
        rounding: ``nearest`` or ``stochastic``.

    Attributes:
        cost: modelled cost of the layers' passes since it was last set to zero.
        yardstick: what the same passes would cost in 16 bits.
        turn: of which layer the gradient's error is sampled, in a step that is measured; see :meth:`is_sampled`.
        gradient_error: ‖dW − dW of exact operands‖ / ‖the latter‖ of the layer sampled last, a 0-d tensor, for
            the dy that reached it; None before.
    """

    def __init__(
        self,
        level: Level,
        box: int,
        kind: Literal["bfp", "affine"],
        rounding: Literal["nearest", "stochastic"],
    ) -> None:
        self.box, self.kind, self.rounding = box, kind, rounding
        self.cost = self.yardstick = dsq.Cost(0.0, 0.0)
        self.turn = 0
        self.gradient_error: Tensor | None = None
        self._layers = 0
        self.set_level(level)

    def set_level(self, level: Level) -> None:
        """Compute with this level from the next forward pass on."""
        self.level = level
        self.formats = dsq.formats(level, self.box, self.kind, self.rounding)

    def take_number(self) -> int:
        """Return the number of one more layer whose gradients can be sampled."""
        self._layers += 1
        return self._layers - 1

    def is_sampled(self, number: int) -> bool:
        """Whether it is this layer's turn. One at a time: its input has to be kept exactly."""
        return number == self.turn % self._layers

    def count(self, x: Tensor, weight: Tensor, transposed: bool) -> None:
        """Add the cost of a layer's forward pass and of the backward pass that will follow."""
        inputs, outputs = weight.shape if transposed else weight.shape[::-1]
        sizes = (x.numel() // inputs, outputs, inputs)
        grads = {"input_grad": x.requires_grad, "weight_grad": weight.requires_grad}
        self.cost += dsq.linear_cost(self.level, *sizes, self.box, **grads)
        self.yardstick += dsq.sixteen_bit_cost(*sizes, **grads)


class DSQLinear(torch.autograd.Function):
    """``y = Q0(x) Q0(W)ᵀ + b`` with gradients of quantized operands; x is kept packed.

    Bias and its gradient are not quantized. The backward pass uses the formats that forward began with, also where the
    level rises in between.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transposed: bool,
        formats: dsq.Formats,
        noises: dsq.Noises,
        stash: Stash,
        name: str,
    ) -> Tensor:
        """Compute.

        Args:
            ctx: of autograd.
            x: (..., in).
            weight: (out, in), or (in, out) if ``transposed``.
            bias: (out,) or None.
            transposed: as in GPT-2's ``Conv1D``.
            formats: of the operands.
            noises: for those of the backward pass.
            stash: keeps x.
            name: of the layer.

        Returns:
            (..., out).
        """
        if stash.meter.measuring:
            stash.meter.run("linear", conv1d if transposed else linear, x, weight, bias)
        matrix = weight.T if transposed else weight
        y = dsq.forward(x.reshape(-1, x.shape[-1]), matrix, formats)
        y = y if bias is None else y + bias.to(y.dtype)
        kept = stash.keep(x, "linear", name) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, *(kept.tensors if kept else ()))
        ctx.rule = kept.restore if kept else None
        ctx.stash, ctx.transposed, ctx.formats, ctx.noises = stash, transposed, formats, noises
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias."""
        dx = dw = db = None
        weight, *tensors = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        rows = dy.reshape(-1, dy.shape[-1])
        if ctx.needs_input_grad[0]:
            matrix = (weight.T if ctx.transposed else weight).to(dy.dtype)
            dx = dsq.input_gradient(rows, matrix, ctx.formats, ctx.noises)
            dx = dx.view(*dy.shape[:-1], dx.shape[-1]).to(x_dtype)
        if ctx.needs_input_grad[1]:
            x = ctx.stash.restore(Kept(tuple(tensors), ctx.rule), dy.dtype)
            x = x.reshape(-1, x.shape[-1])
            if not isinstance(ctx.rule, Unpack):  # recomputed from what another operation keeps, or kept as it was
                x = dsq.quantized(x, ctx.formats.q1, ctx.noises.recomputed, 0)
            dw = dsq.weight_gradient(rows, x, ctx.formats, ctx.noises)
            dw = (dw.T if ctx.transposed else dw).to(weight_dtype)
        if ctx.needs_input_grad[2]:
            db = rows.sum(0).to(bias_dtype)
        return dx, dw, db, None, None, None, None, None


class DSQLinearForward(LinearForward):
    """``nn.Linear`` and GPT-2's ``Conv1D`` at the present level.

    Args:
        module: the layer.
        name: of the layer.
        stash: keeps its input.
        precision: shared by all layers of a model.
    """

    def __init__(self, module: nn.Module, name: str, stash: Stash, precision: GemmPrecision) -> None:
        super().__init__(module, name, stash)
        self.precision = precision
        self.number = precision.take_number() if module.weight.requires_grad else -1
        self.streams = dsq.noise_streams(f"{name}:{stash.rank}")

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output."""
        precision = self.precision
        precision.count(x, weight, self.transposed)
        if self.stash.meter.measuring and weight.requires_grad and precision.is_sampled(self.number):
            return self._sampled(x, weight, bias)
        return self._at_level(x, weight, bias)

    def _at_level(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        precision = self.precision
        if precision.level.stash_only or x.dtype not in DTYPES:
            return super().compute(x, weight, bias)
        noises = dsq.noises(self.stash.seed, self.streams, self.stash.step)
        y: Tensor = DSQLinear.apply(x, weight, bias, self.transposed, precision.formats, noises, self.stash, self.name)
        return y

    def _sampled(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Run the layer and compare the gradient of this use of its weight with that of exact operands."""
        use, rows, exact = weight.view_as(weight), x.detach().reshape(-1, x.shape[-1]), []
        y = self._at_level(x, use, bias)

        def at_output(dy: Tensor) -> None:
            grad = dy.reshape(-1, dy.shape[-1])
            exact.append(rows.T.to(grad.dtype) @ grad if self.transposed else grad.T @ rows.to(grad.dtype))

        def at_weight(dw: Tensor) -> None:
            wanted = exact.pop().float()
            self.precision.gradient_error = (dw.float() - wanted).norm() / wanted.norm()

        y.register_hook(at_output)
        use.register_hook(at_weight)
        return y
