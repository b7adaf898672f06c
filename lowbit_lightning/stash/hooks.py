"""What no operation of ours keeps: saved-tensor hooks that pack whatever else autograd saves, at 8 bits or more."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parameter import Parameter

from lowbit_lightning.kernels.block_float import DTYPES
from lowbit_lightning.stash.kept import Kept
from lowbit_lightning.stash.meter import of_a_parameter
from lowbit_lightning.stash.stash import SMALLEST_BYTES, Stash

# Outputs of which backward assumes that they sum to one, and what holds infinities on purpose.
_EXACT = ("SoftmaxBackward", "LogSoftmaxBackward", "LogsumexpBackward", "MaskedFillBackward", "WhereBackward")


@contextmanager
def packed_by_hooks(stash: Stash) -> Iterator[None]:
    """Pack what autograd saves in this context, unless a context or an operation within has hooks of its own.

    Left as they are: parameters, their views and casts; what is not fp32, bf16 or fp16 (masks, indices, random states,
    codes); what has no gradient (constants, such as rotary tables, and inputs, which the loop holds on to anyway);
    softmax outputs; tensors below 1 KiB; modules that are exempt; and what is not finite.
    """

    def pack(x: Tensor) -> Tensor | Kept:
        if stash.is_left(x):
            return x
        if stash.meter.measuring:
            stash.meter.would_keep(x, "other")
        if not stash.exempt and _can_be_packed(x):
            kept = stash.keep(x, "other", f"{stash.where}:other")
            if stash.finite(kept):
                return kept
        if not of_a_parameter(x):
            stash.meter.kept_exactly(x, "other")
        # A live output in its own node would be a cycle that nothing frees.
        return x if x.is_leaf else x.detach()

    def unpack(kept: Tensor | Kept) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept.restore(kept.tensors)

    with saved_tensors_hooks(pack, unpack):
        yield


def _can_be_packed(x: Tensor) -> bool:
    if type(x) is not Tensor or x.dtype not in DTYPES or x.nbytes < SMALLEST_BYTES or isinstance(x, Parameter):
        return False
    node = x.grad_fn
    if node is None:
        return False
    return not node.name().lstrip("_").startswith(_EXACT) and not of_a_parameter(x)
