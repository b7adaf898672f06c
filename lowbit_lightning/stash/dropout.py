"""Operations of which backward needs far less than autograd keeps: a generator's state, or one bit an element."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import dropout, relu

from lowbit_lightning.stash.generators import generator_state, same_draws
from lowbit_lightning.stash.stash import Stash


class ReplayedDropout(torch.autograd.Function):
    """Dropout that keeps the generator's state and draws the same mask again for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, stash: Stash) -> Tensor:
        """Return ``x`` (any shape) with elements dropped and the others scaled."""
        state = generator_state(x.device)
        y = stash.meter.run("dropout", lambda x: dropout(x, p, True), x)
        stash.meter.kept_exactly(state, "dropout")
        ctx.save_for_backward(state)
        ctx.p, ctx.device, ctx.stride = p, x.device, x.stride()
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of ``x``."""
        (state,) = ctx.saved_tensors
        if dy.stride() != ctx.stride:  # draws go to elements in the order of memory
            dy = torch.empty_strided(dy.shape, ctx.stride, dtype=dy.dtype, device=dy.device).copy_(dy)
        with same_draws(ctx.device, state):
            return dropout(dy, ctx.p, True), None, None


class OneBitReLU(torch.autograd.Function):
    """ReLU that keeps one bit an element; exact."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stash: Stash) -> Tensor:
        """Return ``max(x, 0)`` of any shape."""
        y = stash.meter.run("activation", relu, x)
        bits = pack_bits(y > 0)
        stash.meter.packed([bits], "activation")
        ctx.save_for_backward(bits)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of ``x``."""
        (bits,) = ctx.saved_tensors
        return dy * unpack_bits(bits, dy.shape), None


def pack_bits(mask: Tensor) -> Tensor:
    """Return (⌈elements / 8⌉,) uint8 of a boolean tensor of any shape, first element in the lowest bit."""
    flat = torch.nn.functional.pad(mask.reshape(-1), (0, -mask.numel() % 8)).view(torch.uint8).view(-1, 8)
    packed = flat[:, 0].clone()
    for place in range(1, 8):
        packed |= flat[:, place] << place
    return packed


def unpack_bits(bits: Tensor, shape: torch.Size) -> Tensor:
    """Return the boolean tensor that was packed."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> places) & 1).flatten()[: shape.numel()].view(shape).bool()
