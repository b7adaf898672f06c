"""All gradients of a step as a few numbers each, and one write of what was decided from them.

Rules that clip or scale gradients (AdaClip, AdaGN, ZClip, ...) need each tensor's largest magnitude and norm and answer
with a limit or a factor. They work on vectors with one element for each tensor; the gradients themselves are read once
before the first rule and written once after the last, however many rules there are.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.kernels.stable_spam import clipped_norms, is_usable, measure, rescale
from lowbit_lightning.optim.sharding import local, of_whole_tensors, placed_gradient


class GradientBatch:
    """The gradients of some parameters in one step. Nothing here waits for the device.

    Parameters that are divided among processes take part with the maxima and norms of the whole; then all processes
    must make the same calls.

    Args:
        params: n >= 1 parameters that have a gradient.
        names: of the parameters, for messages and for whoever keeps something by name.

    Attributes:
        grads: this process's part of each gradient.
        maxima: (n,) fp32, the largest magnitude of each tensor as it would be written now.
        norms: (n,) fp32, the norm likewise.
        usable: (n,) bool, whether a gradient and its squared norm are finite. One that is not stays as it is, and
            rules leave it out of their averages.
        clipped: (n,) bool, whether anything in a tensor was clipped.

    Raises:
        InvalidArgumentError: a gradient is sparse.
    """

    def __init__(self, params: Sequence[Tensor], names: Sequence[str]) -> None:
        self.params, self.names = params, names
        self._pending: bool
        self._limits: Tensor
        self._shrink: Tensor
        self._factors: Tensor
        self._placed = [placed_gradient(param) for param in params]
        for name, grad in zip(names, self._placed, strict=True):
            if grad is None or grad.is_sparse:
                raise InvalidArgumentError(
                    f"the gradient of parameter {name!r} is sparse, AdaClip and AdaGN take dense ones: "
                    "set sparse=False on the embedding, or leave its parameters to an optimizer of their own"
                )
        self.grads = [local(grad) for grad in self._placed if grad is not None]
        self.measure()
        self.usable = is_usable(self.maxima, self.norms)
        self.clipped = torch.zeros_like(self.usable)

    def measure(self) -> None:
        """Look at the gradients as they are now, which nothing may be pending for."""
        self._local_maxima, self._local_norms = measure(self.grads)
        self.maxima, self.norms = of_whole_tensors(self.params, self._local_maxima, self._local_norms)
        self._nothing_pending()

    def clip(self, limits: Tensor) -> None:
        """Multiply elements above their tensor's limit by what brings the largest one to the limit.

        Args:
            limits: (n,) fp32, infinite where nothing is to be clipped.
        """
        if self._pending:
            self.write()
        self._pending = True
        self._limits = torch.where(self.usable, limits, math.inf)
        is_clipped = self._limits.isfinite()
        self._shrink = torch.where(is_clipped, self._limits / self.maxima, 1.0)
        self._local_norms = clipped_norms(self.grads, self._limits, self._shrink, self._local_norms)
        _, self.norms = of_whole_tensors(self.params, self._local_maxima, self._local_norms)
        self.maxima = torch.minimum(self.maxima, self._limits)
        self.clipped = self.clipped | is_clipped

    def scale(self, factors: Tensor) -> None:
        """Multiply each gradient by its factor, (n,) fp32."""
        self._pending = True
        factors = torch.where(self.usable, factors, 1.0)
        self._factors = self._factors * factors
        self.maxima, self.norms = self.maxima * factors, self.norms * factors
        self._local_norms = self._local_norms * factors

    def write(self) -> None:
        """Write all that was decided into the gradients themselves."""
        if self._pending:
            rescale(self.grads, self.grads, self._limits, self._shrink, self._factors)
            for param, grad in zip(self.params, self._placed, strict=True):
                if param.grad is not grad:
                    param.grad = grad
            self._nothing_pending()

    @property
    def numel(self) -> int:
        """Elements of this process's parts together."""
        return sum(grad.numel() for grad in self.grads)

    def copies(self, memory: Tensor) -> list[Tensor]:
        """Return the gradients as they would be written, contiguous; NaN throughout where not usable.

        Args:
            memory: (at least ``numel``,) of the dtype of the copies, beside the gradients; what they are made in.
        """
        pieces = memory[: self.numel].split([grad.numel() for grad in self.grads])
        outs = [piece.view(grad.shape) for piece, grad in zip(pieces, self.grads, strict=True)]
        rescale(self.grads, outs, self._limits, self._shrink, torch.where(self.usable, self._factors, math.nan))
        return outs

    def _nothing_pending(self) -> None:
        self._pending = False
        self._limits = torch.full_like(self.maxima, math.inf)
        self._shrink, self._factors = torch.ones_like(self.maxima), torch.ones_like(self.maxima)
