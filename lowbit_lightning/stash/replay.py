"""Operations whose inputs are kept packed, and which are run again from them in backward: a consistent stash.

Packing each tensor that an operation saves on its own breaks what backward formulas rely on: that probabilities sum to
one, that an output is the function of the input. Keeping the inputs alone and running the operation again gives the
exact gradient at a slightly different point. For attention at 4 bits the error is ten times smaller so, and fewer bytes
are kept: neither output nor statistics.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowbit_lightning.stash.autocast import Autocast
from lowbit_lightning.stash.generators import generator_state, same_draws
from lowbit_lightning.stash.kept import Kept, restored
from lowbit_lightning.stash.precision import Kind
from lowbit_lightning.stash.stash import Stash


@dataclass(frozen=True)
class Operation:
    """What is run, and how its inputs are kept.

    Attributes:
        function: of tensors, returns one tensor that shares no memory with them.
        packed: how many of its tensors, the first ones, are packed. The others (weights, masks) are kept as they are.
        kind: of the packed ones.
        name: for the noise.
        random: whether it draws random numbers (dropout), which are to be the same in backward.
    """

    function: Callable[..., Tensor]
    packed: int
    kind: Kind
    name: str
    random: bool = False


class Replayed(torch.autograd.Function):
    """Runs an operation exactly in forward, and again from its packed inputs in backward."""

    @staticmethod
    def forward(ctx: Any, operation: Operation, stash: Stash, *tensors: Tensor | None) -> Tensor:
        """Return what the operation makes of the tensors."""
        device = next(tensor.device for tensor in tensors if tensor is not None)
        ctx.autocast = Autocast.now(device)
        state = generator_state(device) if operation.random else None
        with ctx.autocast.again():
            y = stash.meter.run(operation.kind, operation.function, *tensors)
        kept = keep_inputs(operation, stash, tensors)
        if state is not None:
            stash.meter.kept_exactly(state, operation.kind)
        ctx.parts = [(len(one.tensors), one.restore) for one in kept]
        exact = tensors[operation.packed :]
        for one in exact:
            if one is not None and not isinstance(one, nn.Parameter):
                stash.leave(one, operation.kind)
        ctx.save_for_backward(*(tensor for one in kept for tensor in one.tensors), *exact, state)
        ctx.operation, ctx.device, ctx.exact = operation, device, len(exact)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the tensors."""
        *saved, state = ctx.saved_tensors
        count = len(saved) - ctx.exact
        inputs = [*restored(saved[:count], ctx.parts), *saved[count:]]
        wanted = ctx.needs_input_grad[2:]
        inputs = [
            one if one is None else one.detach().requires_grad_(needed)
            for one, needed in zip(inputs, wanted, strict=True)
        ]
        with torch.enable_grad(), ctx.autocast.again(), same_draws(ctx.device, state):
            y = ctx.operation.function(*inputs)
        leaves = [one for one, needed in zip(inputs, wanted, strict=True) if needed]
        gradients = iter(torch.autograd.grad(y, leaves, dy, allow_unused=True))
        return None, None, *(next(gradients) if needed else None for needed in wanted)


def keep_inputs(operation: Operation, stash: Stash, tensors: Sequence[Tensor | None]) -> list[Kept]:
    """Return what is kept of the inputs that are packed."""
    return [
        stash.keep(tensor, operation.kind, f"{operation.name}:{index}")
        for index, tensor in enumerate(tensors[: operation.packed])
        if tensor is not None
    ]


def replay(operation: Operation, stash: Stash, *tensors: Tensor | None, again: bool = False) -> Tensor:
    """Run an operation in the graph of autograd.

    Args:
        operation: what.
        stash: keeps the inputs.
        tensors: its inputs.
        again: whether whoever needs the result in backward may run the operation once more instead of keeping it.
    """
    y: Tensor = Replayed.apply(operation, stash, *tensors)
    if again and y.requires_grad and stash.meter.keeps():
        # Packed already, so that these are the same codes.
        parts = keep_inputs(operation, stash, tensors)
        stash.note(y, parts, operation.function, Autocast.now(y.device))
    return y


class ModuleFunction:
    """A module's own forward as a function of its input and its parameters.

    In backward the parameters are whatever autograd saved of them, which need not be the objects in the module.

    Args:
        module: with parameters of its own only, if any.
        forward: of that module, as it was before it was patched.
    """

    def __init__(self, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        self.module = module
        self.forward = forward
        self.names = [name for name, param in module._parameters.items() if param is not None]

    def parameters(self) -> list[Tensor]:
        """Return the parameters to call it with."""
        return [self.module._parameters[name] for name in self.names]  # type: ignore[misc]

    def __call__(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """Return the module's output."""
        own = self.module._parameters
        if not parameters or all(own[name] is value for name, value in zip(self.names, parameters, strict=True)):
            return self.forward(x)
        before = {name: own[name] for name in self.names}
        try:
            own.update(zip(self.names, parameters, strict=True))  # type: ignore[arg-type]
            return self.forward(x)
        finally:
            own.update(before)
