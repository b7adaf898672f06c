"""What stands in for a tensor between forward and backward: packed, recomputed from packed ones, or the tensor itself.

A :class:`Kept` is a few tensors and a rule that makes the original of them. The rule holds no tensors, so an autograd
Function hands the tensors to ``save_for_backward`` and keeps the rule: checkpointing, offloading and version counters
work on a stash as on anything else that autograd saves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lowbit_lightning.kernels.block_float import BoxFormat, Packed, unpack
from lowbit_lightning.stash.autocast import Autocast


class Rule(Protocol):
    """Makes a tensor of what was kept of it. Pure: autograd may ask for it twice and in any order."""

    def __call__(self, tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """Return the tensor, of this dtype or its own."""


class Kept(NamedTuple):
    """What is kept of a tensor.

    Attributes:
        tensors: what memory holds until backward.
        restore: makes the tensor of them.
    """

    tensors: tuple[Tensor, ...]
    restore: Rule


class View(NamedTuple):
    """Where a tensor lies in its storage, in elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, x: Tensor) -> "View":
        """Return that of ``x``."""
        return cls(tuple(x.shape), x.stride(), int(x.storage_offset()))

    def apply(self, base: Tensor) -> Tensor:
        """Return the same view of another storage, whose elements ``base`` has in order."""
        if self.offset == 0 and base.shape == self.shape and base.stride() == self.stride:
            return base
        return base.as_strided(self.shape, self.stride, self.offset)


@dataclass(frozen=True)
class Same:
    """The tensor itself was kept."""

    def __call__(self, tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """Return it."""
        return tensors[0].to(dtype or tensors[0].dtype)


@dataclass(frozen=True)
class Unpack:
    """Codes and scales were kept, both as uint8, because nobody takes bytes for values that may be packed again.

    Attributes:
        format: of the codes.
        shape: of what was packed.
        dtype: of what was packed.
        view: of a storage with these elements, if the whole storage was packed.
    """

    format: BoxFormat
    shape: tuple[int, ...]
    dtype: torch.dtype
    view: View | None

    def __call__(self, tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """Return the values."""
        codes, scales = tensors
        packed = Packed(codes, scales if self.format.kind == "bfp" else scales.view(torch.bfloat16))
        values = unpack(packed, self.format, self.shape, dtype or self.dtype)
        return values if self.view is None else self.view.apply(values)


@dataclass(frozen=True)
class Recompute:
    """The tensor is a cheap function of others that are kept anyway.

    Attributes:
        function: of the others, in order.
        parts: how many of the kept tensors belong to each of them, and its rule.
        autocast: the state of autocast in forward.
        view: of the function's result.
    """

    function: Callable[..., Tensor]
    parts: tuple[tuple[int, Rule], ...]
    autocast: Autocast
    view: View

    def __call__(self, tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """Return what the function makes of the others."""
        with torch.no_grad(), self.autocast.again():
            result = self.function(*restored(tensors, self.parts))
        result = self.view.apply(result.contiguous())
        return result.to(dtype or result.dtype)


def restored(tensors: Sequence[Tensor], parts: Sequence[tuple[int, Rule]]) -> list[Tensor]:
    """Return several tensors of what was kept of them, one after another."""
    values, start = [], 0
    for count, rule in parts:
        values.append(rule(tensors[start : start + count]))
        start += count
    return values
