"""The stash: what a forward pass keeps for backward, packed, each tensor once however many operations save it.

Tensors are told apart by storage, not by object or address. The key is the address of the storage's own record, which
a weak reference holds on to: while an entry exists the address cannot be given to another storage, although the memory
behind it may be. The version counter tells whether the values have changed since.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lowbit_lightning.kernels.block_float import DTYPES, BoxFormat, pack
from lowbit_lightning.kernels.philox import stream_id
from lowbit_lightning.stash.autocast import Autocast
from lowbit_lightning.stash.kept import Kept, Recompute, Rule, Same, Unpack, View
from lowbit_lightning.stash.meter import Meter
from lowbit_lightning.stash.precision import Kind, StashPrecision

#: Smaller tensors stay as they are: they are too many for what they weigh.
SMALLEST_BYTES = 1024
_ENTRIES_BEFORE_A_PURGE = 512


class _Entry(NamedTuple):
    storage: StorageWeakRef
    version: int
    view: View
    tensors: tuple["weakref.ref[Tensor]", ...]
    rule: Rule


class Stash:
    """Keeps tensors for backward in few bits.

    Noise of stochastic rounding is a function of the seed, the rank, the name of the operation, how many times it has
    run in this step, and the step.

    Args:
        precision: bits of every kind of tensor; may be changed between steps.
        seed: of the noise; its low 32 bits count.
        rank: of this process, whose data, and so whose rounding errors, are its own.

    Attributes:
        step: the clock of the noise.
        where: name of the module that runs.
        exempt: whether hooks are to leave alone what runs.
        redirects: whether functions that are called are redirected to ones that pack.
        meter: counts bytes.
        not_finite: module and operation of what hooks found not to be finite.
    """

    def __init__(self, precision: StashPrecision, seed: int = 0, rank: int = 0) -> None:
        self.precision = precision
        self.seed = seed
        self.rank = rank
        self.step = 0
        self.where = ""
        self.exempt = False
        self.redirects = True
        self.meter = Meter()
        self._entries: dict[tuple[Any, ...], _Entry] = {}
        self._purge_at = _ENTRIES_BEFORE_A_PURGE
        self._calls: Counter[str] = Counter()
        self._streams: dict[tuple[str, int], int] = {}
        self.not_finite: set[tuple[str, str]] = set()
        self._left: dict[int, StorageWeakRef] = {}
        self._latest: tuple[Tensor, Rule, torch.dtype | None, Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Stash":
        """A copy of a model that is being trained, such as an average of its weights, shares the stash."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """What is kept between a forward and its backward stays behind when a model is pickled."""
        return Stash, (self.precision, self.seed, self.rank)

    @contextmanager
    def place(self, name: str, exempt: bool | None = None) -> Iterator[None]:
        """Say that a module runs, and whether what it saves is to be left alone."""
        before = self.where, self.exempt
        self.where, self.exempt = name, self.exempt if exempt is None else exempt
        try:
            yield
        finally:
            self.where, self.exempt = before

    def begin_step(self, step: int) -> None:
        """Start a step: noise and figures are its own, and nothing of the one before is remembered."""
        self.step = step
        self._calls.clear()
        self._entries.clear()
        self._left.clear()
        self._latest = None
        self.meter.begin_step()

    def keep(self, x: Tensor, kind: Kind, name: str, recompute: bool = True) -> Kept:
        """Return what to keep of a tensor.

        Args:
            x: any tensor; what cannot be packed, or is too small, is kept as it is.
            kind: what it is to the operation that needs it.
            name: of that operation, unique within the model.
            recompute: whether it may be recomputed instead, if :meth:`note` has said how.
        """
        x = x.detach()
        if type(x) is not Tensor or x.dtype not in DTYPES or x.nbytes < SMALLEST_BYTES:
            self.meter.kept_exactly(x, kind)
            return Kept((x,), Same())
        if recompute and (known := self._find(x, "recipe")) is not None:
            return known
        if (format := self.precision.of(kind)) is None:
            self.meter.kept_exactly(x, kind)
            return Kept((x,), Same())
        return self.pack(x, kind, name, format)

    def pack(self, x: Tensor, kind: Kind, name: str, format: BoxFormat) -> Kept:
        """Return a tensor packed in a given format; once only, if several operations ask for it."""
        if (known := self._find(x, format)) is not None:
            return known
        storage, whole = x.untyped_storage(), None
        values = x
        if storage.nbytes() <= x.nbytes:
            count = storage.nbytes() // x.element_size()
            columns = x.shape[-1] if x.ndim and x.shape[-1] % format.box == 0 and count % x.shape[-1] == 0 else count
            whole = View.of(x)
            values = x.as_strided((count // columns, columns), (columns, 1), 0)
        noise = (self.seed, self._stream(name), self.step) if format.stochastic else None
        packed = pack(values, format, noise)
        tensors = (packed.codes, packed.scales.view(torch.uint8))
        rule = Unpack(format, tuple(values.shape), x.dtype, whole)
        self._enter(x, format, tensors, rule)
        self.meter.packed(tensors, kind, values.numel())
        if self.meter.measuring:
            self.meter.rounding(x, rule(tensors))
        return Kept(tensors, rule)

    def leave(self, x: Tensor, kind: Kind) -> None:
        """Keep a tensor as it is, such as a mask, and let no hooks pack it."""
        self.meter.kept_exactly(x, kind)
        self._left[x.untyped_storage()._cdata] = StorageWeakRef(x.untyped_storage())

    def is_left(self, x: Tensor) -> bool:
        """Whether an operation of ours keeps a tensor as it is, or packed it itself."""
        return self.meter.is_own(x) or x.untyped_storage()._cdata in self._left

    def note(self, y: Tensor, parts: list[Kept], function: Callable[..., Tensor], autocast: Autocast) -> None:
        """Say that a tensor need not be kept, because it can be computed again from what is kept of others."""
        if y.is_contiguous() and y.storage_offset() == 0 and y.untyped_storage().nbytes() == y.nbytes:
            rules = tuple((len(kept.tensors), kept.restore) for kept in parts)
            rule = Recompute(function, rules, autocast, View.of(y))
            self._enter(y, "recipe", tuple(tensor for kept in parts for tensor in kept.tensors), rule)

    def restore(self, kept: Kept, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor of what was kept of it, not to be written to.

        The latest one is remembered, because the projections of a block (queries, keys and values) ask for the same
        one after another.
        """
        if self._latest is not None:
            first, rule, for_dtype, value = self._latest
            same = first.untyped_storage()._cdata == kept.tensors[0].untyped_storage()._cdata
            if same and rule == kept.restore and for_dtype == dtype:
                return value
        value = kept.restore(kept.tensors, dtype)
        self._latest = (kept.tensors[0], kept.restore, dtype, value)
        return value

    def forget(self) -> None:
        """Let go of the tensor that was restored last, after a backward pass."""
        self._latest = None

    def _key(self, x: Tensor, tag: object) -> tuple[Any, ...]:
        storage = x.untyped_storage()
        if storage.nbytes() <= x.nbytes:
            return (storage._cdata, tag, x.dtype)
        return (storage._cdata, tag, x.dtype, *View.of(x))

    def _find(self, x: Tensor, tag: object) -> Kept | None:
        if x.is_inference() or not self.meter.keeps():
            return None
        entry = self._entries.get(self._key(x, tag))
        if entry is None or entry.version != x._version or entry.storage.expired():
            return None
        tensors = tuple(alive for ref in entry.tensors if (alive := ref()) is not None)
        if len(tensors) < len(entry.tensors):  # whoever kept it is done with it
            return None
        view, rule = View.of(x), entry.rule
        if view != entry.view:
            rule = _with_view(rule, view)
        return Kept(tensors, rule)

    def _enter(self, x: Tensor, tag: object, tensors: tuple[Tensor, ...], rule: Rule) -> None:
        if x.is_inference() or not self.meter.keeps():
            return
        if len(self._entries) >= self._purge_at:
            self._entries = {
                key: entry
                for key, entry in self._entries.items()
                if not entry.storage.expired() and all(ref() is not None for ref in entry.tensors)
            }
            self._purge_at = max(_ENTRIES_BEFORE_A_PURGE, 2 * len(self._entries))
        references = tuple(weakref.ref(tensor) for tensor in tensors)
        storage = StorageWeakRef(x.untyped_storage())
        self._entries[self._key(x, tag)] = _Entry(storage, x._version, View.of(x), references, rule)

    def _stream(self, name: str) -> int:
        call = self._calls[name]
        self._calls[name] += 1
        if (name, call) not in self._streams:
            self._streams[name, call] = stream_id(f"{name}:{call}:{self.rank}", "stash")
        return self._streams[name, call]


def _with_view(rule: Rule, view: View) -> Rule:
    """Return the rule for another view of the same storage."""
    if isinstance(rule, Unpack):
        return Unpack(rule.format, rule.shape, rule.dtype, view)
    assert isinstance(rule, Recompute)
    return Recompute(rule.function, rule.parts, rule.autocast, view)
