"""Bytes of the stash, counted on the tensors that exist: what autograd would have kept, and what is kept."""

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from lowbit_lightning.stash.precision import Kind

# Nodes of autograd that hand on, cast or lay out anew what a parameter holds.
_HANDED_ON = (
    "TBackward", "ToCopyBackward", "ViewBackward", "UnsafeViewBackward", "TransposeBackward", "PermuteBackward",
    "AsStridedBackward", "ExpandBackward", "SliceBackward", "AliasBackward", "SplitBackward", "UnsqueezeBackward",
    "CloneBackward",
)  # fmt: skip


def leaf_of(x: Tensor) -> Tensor | None:
    """Return the leaf that a tensor is, or is a view or a cast of: weights reach autograd as ``W.t()`` and in bf16."""
    node = x.grad_fn
    while node is not None and node.name().startswith(_HANDED_ON):
        node = node.next_functions[0][0]
    if node is None:
        return x
    leaf: Tensor | None = getattr(node, "variable", None)
    return leaf


class Meter:
    """Counts a step's stash. What plain autograd would keep is measured on request, because it takes a graph.

    Attributes:
        own_hook: the saved-tensor hook of the stash, if it is on.
        within: whether a function is being measured at this moment.
        measure_next: whether the next step is to be measured.
        measuring: whether this step is measured: what autograd would have kept, and the error of rounding.
        raw_bytes: by kind, what autograd would have kept; of the step that was measured last.
        packed_bytes: by kind, what was kept in this step; of what is checkpointed, what lies between.
        elements: by kind, how many of it were packed.
        live_bytes: what is being kept at this moment.
        peak_bytes: the most that was kept at one moment of this step.
    """

    def __init__(self) -> None:
        self.own_hook: Callable[[Tensor], Any] | None = None
        self.measuring = False
        self.within = False
        self.measure_next = True
        self.raw_bytes: Counter[str] = Counter()
        self.packed_bytes: Counter[str] = Counter()
        self.elements: Counter[Kind] = Counter()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._errors: list[tuple[Tensor, Tensor]] = []
        self._seen: dict[int, StorageWeakRef] = {}
        self._kept: dict[int, StorageWeakRef] = {}
        self._own: set[int] = set()

    def keeps(self) -> bool:
        """Whether what is handed to autograd stays as it is until backward.

        Not under hooks of somebody else: non-reentrant checkpointing throws saved tensors away and takes those of a
        second run in their place, so both must save the same, whatever else happens to exist.
        """
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        return hooks is None or hooks[0] is self.own_hook

    def begin_step(self) -> None:
        """Start to count anew."""
        self.measuring, self.measure_next = self.measure_next, False
        self.packed_bytes.clear()
        self.elements.clear()
        self.peak_bytes = self.live_bytes
        self._seen.clear()
        self._kept.clear()
        if self.measuring:
            self.raw_bytes.clear()
            self._errors.clear()

    def packed(self, tensors: Sequence[Tensor], kind: Kind, elements: int = 0) -> None:
        """Count tensors that were made to be kept, of so many elements in as many bits as the kind has."""
        size = sum(tensor.nbytes for tensor in tensors)
        if self.keeps():
            self.packed_bytes[kind] += size
            self.elements[kind] += elements
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        for tensor in tensors:
            address = tensor.untyped_storage()._cdata
            self._own.add(address)
            weakref.finalize(tensor, self._free, tensor.nbytes, address).atexit = False

    def kept_exactly(self, x: Tensor, kind: Kind) -> None:
        """Count a tensor that is kept as it is, once."""
        storage = x.untyped_storage()
        if storage._cdata not in self._kept and self.keeps():
            self._kept[storage._cdata] = StorageWeakRef(storage)
            self.packed_bytes[kind] += storage.nbytes()

    def rounding(self, x: Tensor, packed: Tensor) -> None:
        """Note what rounding did to a tensor."""
        exact = x.float()
        self._errors.append(((packed.float() - exact).square().sum(), exact.square().sum()))

    @property
    def error(self) -> float:
        """The relative error of what was packed in the step measured last: √(Σ‖x − x̂‖² / Σ‖x‖²)."""
        if not self._errors:
            return 0.0
        errors, squares = (
            torch.stack([part.cpu() for part in parts]).sum() for parts in zip(*self._errors, strict=True)
        )
        return float((errors / squares.clamp_min(torch.finfo(torch.float32).tiny)).sqrt())

    def run(self, kind: Kind, function: Callable[..., Tensor], *tensors: Any) -> Tensor:
        """Return what a function returns, without a graph; if this step is measured, count what one would keep."""
        if not self.measuring or not self.keeps():
            with torch.no_grad():
                return function(*tensors)
        self.within = True
        try:
            with torch.enable_grad(), saved_tensors_hooks(lambda x: self.would_keep(x, kind), lambda x: x):
                return function(*tensors).detach()
        finally:
            self.within = False

    def would_keep(self, x: Tensor, kind: Kind) -> Tensor:
        """Count a tensor that autograd would keep, and return it."""
        storage = x.untyped_storage()
        if storage._cdata not in self._seen and not isinstance(leaf_of(x), nn.Parameter):
            self._seen[storage._cdata] = StorageWeakRef(storage)
            self.raw_bytes[kind] += storage.nbytes()
        return x.detach()

    def is_own(self, x: Tensor) -> bool:
        """Whether a tensor is one that was counted as packed."""
        return x.untyped_storage()._cdata in self._own

    def _free(self, size: int, address: int) -> None:
        self.live_bytes -= size
        self._own.discard(address)
