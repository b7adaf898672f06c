"""The forwards that modules get in place of their own. Objects, not closures, so that a copied module copies them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lowbit_lightning.stash.convolution import StashedConvolution
from lowbit_lightning.stash.dropout import OneBitReLU, ReplayedDropout
from lowbit_lightning.stash.linear import StashedLinear
from lowbit_lightning.stash.precision import Kind
from lowbit_lightning.stash.redirect import Redirect, activate, plain, stashes
from lowbit_lightning.stash.replay import ModuleFunction, Operation, replay
from lowbit_lightning.stash.stash import Stash


class PatchedForward:
    """In place of a module's ``forward``, on the instance.

    Attributes:
        module: whose.
        original: its forward before.
        name: of the module.
        stash: keeps.
    """

    #: Whether nothing is packed while it runs; None leaves that as it is.
    exempt: bool | None = None

    def __init__(self, module: nn.Module, name: str, stash: Stash) -> None:
        self.module = module
        self.original: Callable[..., Any] = module.forward
        self.__wrapped__ = self.original  # so that its signature is shown
        self.name = name
        self.stash = stash

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module; what stashes nothing is none of our business."""
        if not stashes(self.stash):
            return self.original(*args, **kwargs)
        with self.stash.place(self.name, self.exempt):
            return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module where a graph is made."""
        return self.original(*args, **kwargs)


class ExemptForward(PatchedForward):
    """Nothing within is packed, and no function called there is redirected."""

    exempt = True

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        before, self.stash.redirects = self.stash.redirects, False
        try:
            return self.original(*args, **kwargs)
        finally:
            self.stash.redirects = before


class LinearForward(PatchedForward):
    """``nn.Linear`` and GPT-2's ``Conv1D``."""

    def __init__(self, module: nn.Module, name: str, stash: Stash) -> None:
        super().__init__(module, name, stash)
        self.transposed = is_conv1d(module)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer."""
        module: Any = self.module
        weight, bias = module.weight, module.bias
        if kwargs or len(args) != 1 or not plain(args[0], weight, bias):
            return self.original(*args, **kwargs)
        return self.compute(args[0], weight, bias)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output."""
        function = conv1d if self.transposed else linear
        y: Tensor = StashedLinear.apply(x, weight, bias, function, self.transposed, self.stash, self.name)
        return y


class NormForward(PatchedForward):
    """Norms over the last dimensions or groups, without statistics of their own."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the norm."""
        function = ModuleFunction(self.module, self.original)
        parameters = function.parameters()
        if kwargs or len(args) != 1 or not plain(args[0], *parameters):
            return self.original(*args, **kwargs)
        operation = Operation(function, 1, "norm", self.name)
        # A module that is sharded by itself has no weights while those around it run.
        return replay(operation, self.stash, args[0], *parameters, again=not shards_itself(self.module))


class ActivationForward(PatchedForward):
    """Activation functions."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function."""
        if kwargs or len(args) != 1 or not plain(args[0]):
            return self.original(*args, **kwargs)
        return activate(self.original, args[0], self.stash, self.name)


class ReLUForward(PatchedForward):
    """``nn.ReLU``."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function."""
        if kwargs or len(args) != 1 or not plain(args[0]):
            return self.original(*args, **kwargs)
        return OneBitReLU.apply(args[0], self.stash)


class DropoutForward(PatchedForward):
    """``nn.Dropout``."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the dropout."""
        p: Any = self.module.p
        if not self.module.training or not 0 < p < 1 or kwargs or len(args) != 1 or not plain(args[0]):
            return self.original(*args, **kwargs)
        return ReplayedDropout.apply(args[0], p, self.stash)


class ConvolutionForward(PatchedForward):
    """Convolutions with zeros around, of one, two or three dimensions."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer."""
        module: Any = self.module
        weight, bias = module.weight, module.bias
        unbatched = len(args) == 1 and args[0].ndim != weight.ndim
        if kwargs or len(args) != 1 or unbatched or not plain(args[0], weight, bias):
            return self.original(*args, **kwargs)
        return StashedConvolution.apply(args[0], weight, bias, module._conv_forward, module, self.stash, self.name)


class RedirectedForward(PatchedForward):
    """Modules that call functions on their own: attention, gated layers, torch's transformer layers."""

    def __init__(self, module: nn.Module, name: str, stash: Stash, kinds: frozenset[Kind]) -> None:
        super().__init__(module, name, stash)
        self.redirect = Redirect(module, name, kinds, stash)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        with self.redirect:
            return self.original(*args, **kwargs)


def is_conv1d(module: nn.Module) -> bool:
    """Return whether this is GPT-2's kind of linear layer, whose weight is (in, out); sharded by itself or not."""
    kind: Any = type(module)
    return any(
        (base.__module__, base.__name__) == ("transformers.pytorch_utils", "Conv1D") and kind.forward is base.forward
        for base in kind.__mro__
    )


def conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return ``x W + b`` (..., out) as transformers' ``Conv1D`` does; weight (in, out)."""
    return torch.addmm(bias, x.view(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])


def shards_itself(module: nn.Module) -> bool:
    """Whether FSDP2 gathers and frees the parameters of this very module."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)
