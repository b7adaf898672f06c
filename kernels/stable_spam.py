"""AdaClip and AdaGN: the gradient stabilizers of Stable-SPAM (arXiv 2502.17055) on all tensors of a step at once.

What is known about a tensor's gradient are a few numbers, so all decisions are arithmetic on vectors of length n, one
element for each of n tensors, in fp32, and nothing waits for the device:

    AdaClip   T ← T + (1-γ₃)(max|g| - T);  T̂ = T / (1-γ₃ᵗ);  where |g| > T̂:  g ← g · T̂ / max|g|  (scaled, not clamped)
    AdaGN     n = ‖g‖₂;  μ ← μ + (1-γ₁)(n - μ);  ν ← ν + (1-γ₂)(n² - ν);  g ← g / n · μ̂ / (√ν̂ + ε)

The gradients are read once for their largest magnitudes and norms (:func:`measure`), those in which something is
clipped once more (:func:`clipped_norms`), and written once (:func:`rescale`).

Different from the authors' code: averages are fp32 whatever the gradients' dtype, gradients are only written where the
caller says, and a gradient that is not finite does not reach the averages.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import stable_spam_triton
from .elementary import LARGEST_SQUARABLE

# An average of equal numbers is off by a few roundings; a magnitude so little above its limit is not above it.
_ROUNDING = 1 + 2.0**-20
_PIECE = 2**17


def measure(grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the largest magnitude and the norm of each tensor, both (n,) fp32 on the device of the first.

    An empty tensor has 0 of both. Where one element is NaN both are; where one is infinite, or the sum of squares
    overflows, the norm is not finite.

    Args:
        grads: of any shape and real floating dtype.
    """
    if stable_spam_triton.takes(grads):
        return stable_spam_triton.measure(grads)
    return measure_on_cpu(grads) if all(grad.is_cpu for grad in grads) else measure_reference(grads)


def measure_reference(grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """See :func:`measure`; any device, in two passes."""
    filled = [grad for grad in grads if grad.numel()]
    device = grads[0].device
    found = []
    for kind in (math.inf, 2):
        narrow = any(grad.dtype.itemsize < 4 for grad in filled)
        norms = iter(torch._foreach_norm(filled, kind, dtype=torch.float32 if narrow else None) if filled else ())
        zero = torch.zeros((), dtype=torch.float32, device=device)
        found.append(torch.stack([next(norms).to(device, torch.float32) if grad.numel() else zero for grad in grads]))
    return found[0], found[1]


def measure_on_cpu(grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """See :func:`measure`. A maximum norm takes torch 20 times longer there than the least and the largest value."""
    maxima, norms = torch.zeros(2, len(grads), dtype=torch.float32).unbind(0)
    for index, grad in enumerate(grads):
        if grad.numel():
            least, largest = torch.aminmax(grad)
            maxima[index] = torch.maximum(-least, largest)
            norms[index] = _norm(grad)
    return maxima, norms


def _norm(grad: Tensor) -> Tensor:
    """Return the norm in fp32, added up in pieces: torch's sum of squares is off by 4e-4 after ten million elements."""
    pieces = [torch.linalg.vector_norm(piece, dtype=torch.float32) for piece in grad.flatten().split(_PIECE)]
    norm: Tensor = pieces[0] if len(pieces) == 1 else torch.linalg.vector_norm(torch.stack(pieces))
    return norm


def is_usable(maxima: Tensor, norms: Tensor) -> Tensor:
    """Return (n,) bool: nothing in the tensor is NaN or infinite, nor is its squared norm in fp32."""
    usable: Tensor = (maxima <= LARGEST_SQUARABLE) & (norms <= LARGEST_SQUARABLE)  # false for NaN as well
    return usable


def bias_correction(count: Tensor, decay: float) -> Tensor:
    """Return 1 - decayᵗ for (n,) counts, exact to fp32 also for a decay of 0.99999 at t = 1."""
    return -torch.expm1(count * (math.log(decay) if decay else -math.inf))


def ada_clip(average: Tensor, count: Tensor, maxima: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Return T after this step and the limits T̂, infinite where no element exceeds it; all (n,) fp32.

    Args:
        average: T before the step.
        count: t, how many gradients T has seen with this one.
        maxima: max|g|.
        gamma: γ₃.
    """
    average = average + (1 - gamma) * (maxima - average)
    limits = average / bias_correction(count, gamma)
    return average, torch.where(maxima > limits * _ROUNDING, limits, math.inf)


def ada_gn(
    mean: Tensor, mean_square: Tensor, count: Tensor, norms: Tensor, gamma1: float, gamma2: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return μ and ν after this step and the factors that normalize the gradients; all (n,) fp32.

    A gradient of zeros has the factor 1.

    Args:
        mean: μ before the step.
        mean_square: ν before the step.
        count: t, how many gradients they have seen with this one.
        norms: ‖g‖₂, after clipping.
        gamma1: γ₁.
        gamma2: γ₂.
        eps: added to √ν̂.
    """
    mean = mean + (1 - gamma1) * (norms - mean)
    mean_square = mean_square + (1 - gamma2) * (norms * norms - mean_square)
    ratio = mean / bias_correction(count, gamma1) / ((mean_square / bias_correction(count, gamma2)).sqrt() + eps)
    return mean, mean_square, torch.where(norms > 0, ratio / norms, 1.0)


def clipped_norms(grads: Sequence[Tensor], limits: Tensor, shrink: Tensor, norms: Tensor) -> Tensor:
    """Return the norms that the tensors will have once their elements above the limits are multiplied by ``shrink``.

    Args:
        grads: what was measured.
        limits: (n,) fp32, infinite where nothing is clipped; such a tensor is not read.
        shrink: (n,) fp32, T̂ / max|g|.
        norms: (n,) fp32, of the tensors as they are.
    """
    if stable_spam_triton.takes(grads):
        return stable_spam_triton.clipped_norms(grads, limits, shrink, norms)
    if not limits.is_cpu:
        clipped = torch.stack([_clipped_norm(*each) for each in zip(grads, limits, shrink, strict=True)])
        return torch.where(limits.isinf(), norms, clipped)
    norms = norms.clone()
    for index in limits.isfinite().nonzero().flatten().tolist():
        norms[index] = _clipped_norm(grads[index], limits[index], shrink[index])
    return norms


def rescale(grads: Sequence[Tensor], outs: Sequence[Tensor], limits: Tensor, shrink: Tensor, factors: Tensor) -> None:
    """Write each gradient, clipped and multiplied by its factor, to ``outs``: tensors of the same shapes, or the same.

    Args:
        grads: what was measured.
        outs: any floating dtype.
        limits: (n,) fp32, infinite where nothing is clipped.
        shrink: (n,) fp32, by which elements above the limit are multiplied.
        factors: (n,) fp32, by which all elements are multiplied; NaN makes all of them NaN.
    """
    if stable_spam_triton.takes([*grads, *outs]):
        stable_spam_triton.rescale(grads, outs, limits, shrink, factors)
        return
    if not limits.is_cpu:
        for grad, out, *numbers in zip(grads, outs, limits, shrink, factors, strict=True):
            out.copy_(rescaled(grad, *numbers))
        return
    # On the host numbers are there without waiting: a tensor that stays as it is, or is only scaled, costs less.
    plain = zip(limits.tolist(), factors.tolist(), strict=True)
    for index, (grad, out, (limit, factor)) in enumerate(zip(grads, outs, plain, strict=True)):
        if limit != math.inf:
            out.copy_(rescaled(grad, limits[index], shrink[index], factors[index]))
        elif out is not grad:
            torch.mul(grad.float() if grad.dtype.itemsize < 4 else grad, factor, out=out)
        elif factor != 1:
            out.mul_(factor)


def rescaled(grad: Tensor, limit: Tensor, shrink: Tensor, factor: Tensor) -> Tensor:
    """Return one gradient as :func:`rescale` writes it, fp32: the meaning of every other path."""
    return _clipped(grad, limit, shrink) * factor.to(grad.device)


def _clipped(grad: Tensor, limit: Tensor, shrink: Tensor) -> Tensor:
    values = grad.float()
    return torch.where(values.abs() > limit.to(grad.device), values * shrink.to(grad.device), values)


def _clipped_norm(grad: Tensor, limit: Tensor, shrink: Tensor) -> Tensor:
    return _norm(_clipped(grad, limit, shrink)).to(limit.device)
