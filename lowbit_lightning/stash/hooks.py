"""What no operation of ours keeps: saved-tensor hooks that pack whatever else autograd saves, at 8 bits or more."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lowbit_lightning.kernels.block_float import DTYPES
from lowbit_lightning.stash.kept import Kept
from lowbit_lightning.stash.meter import leaf_of
from lowbit_lightning.stash.stash import SMALLEST_BYTES, Stash

# Outputs of which backward assumes that they sum to one, and what holds infinities on purpose.
_EXACT = ("SoftmaxBackward", "LogSoftmaxBackward", "LogsumexpBackward", "MaskedFillBackward", "WhereBackward")


@contextmanager
def packed_by_hooks(stash: Stash) -> Iterator[None]:
    """Pack what autograd saves in this context, unless a context or an operation within has hooks of its own.

    Left as they are: parameters, their views and casts; what is not fp32, bf16 or fp16 (masks, indices, random states,
    codes); what has no gradient (constants, such as rotary tables) or is a leaf, which whoever made it holds on to
    anyway; softmax outputs; tensors below 1 KiB; modules that are exempt; and what is not finite, after a warning.
    """

    def pack(x: Tensor) -> Tensor | Kept:
        if stash.is_left(x):
            return x
        if stash.meter.measuring:
            stash.meter.would_keep(x, "other")
        if not stash.exempt and _can_be_packed(x) and _is_finite(x, stash):
            return stash.keep(x, "other", f"{stash.where}:other")
        if not isinstance(leaf_of(x), nn.Parameter):
            stash.meter.kept_exactly(x, "other")
        # A live output in its own node would be a cycle that nothing frees.
        return x if x.is_leaf else x.detach()

    def unpack(kept: Tensor | Kept) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept.restore(kept.tensors)

    before, stash.meter.own_hook = stash.meter.own_hook, pack
    try:
        with saved_tensors_hooks(pack, unpack):
            yield
    finally:
        stash.meter.own_hook = before


def _can_be_packed(x: Tensor) -> bool:
    if type(x) is not Tensor or x.dtype not in DTYPES or x.nbytes < SMALLEST_BYTES or x.grad_fn is None:
        return False
    if x.grad_fn.name().lstrip("_").startswith(_EXACT):
        return False
    leaf = leaf_of(x)
    is_view = leaf is not None and leaf.untyped_storage()._cdata == x.untyped_storage()._cdata
    return not isinstance(leaf, nn.Parameter) and not is_view


def _is_finite(x: Tensor, stash: Stash) -> bool:
    """Whether all elements are: one that is not makes a whole box not a number.

    To look is to wait for a device other than the CPU, so there it is done in steps that are measured, and what was
    found of a place in a model holds until the next one.
    """
    assert x.grad_fn is not None
    place = (stash.where, x.grad_fn.name())
    if x.device.type == "cpu" or stash.meter.measuring:
        if bool(x.isfinite().all()):
            stash.not_finite.discard(place)
        else:
            if place not in stash.not_finite and stash.meter.measuring:
                warnings.warn(
                    f"{stash.where or 'the model'} saves what {place[1]} made for backward, with elements that are not "
                    "finite, such as masked scores: it is kept as it is",
                    stacklevel=2,
                )
            stash.not_finite.add(place)
            return False
    return x.device.type == "cpu" or place not in stash.not_finite
