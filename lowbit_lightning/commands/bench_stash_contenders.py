"""What ``bench stash`` compares: ways to keep, or not to keep, what backward needs, on the same unmodified Llama."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowbit_lightning.models import CausalLM
from lowbit_lightning.stash import Stash, StashPrecision, packed_by_hooks, patch

from .bench_guard import GuardWorkload


@dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        bits: of DynamicStashing's stash; None is without.
        autocast: to bf16, as Lightning's ``bf16-mixed``.
        checkpointing: the model's own gradient checkpointing, a block at a time.
        offload: torch's ``save_on_cpu``.
    """

    bits: int | None = None
    autocast: bool = False
    checkpointing: bool = False
    offload: bool = False

    @property
    def baseline(self) -> str:
        """The plain way in the same precision, against which its steps are timed."""
        return PLAIN_BF16 if self.autocast else PLAIN


PLAIN, PLAIN_BF16 = "plain fp32", "plain bf16-mixed"
WAYS = {
    PLAIN: Way(),
    "gradient checkpointing": Way(checkpointing=True),
    "save_on_cpu": Way(offload=True),
    "ours 8 bits": Way(8),
    "ours 4 bits": Way(4),
    "ours 2 bits": Way(2),
    "ours 4 bits + checkpointing": Way(4, checkpointing=True),
    PLAIN_BF16: Way(autocast=True),
    "ours 4 bits, bf16-mixed": Way(4, autocast=True),
}


class Contender:
    """A model that is trained in one way, by the functions that DynamicStashing uses.

    Args:
        way: how.
        workload: which model.
        device: where.
        weights: of the model, if not those from scratch.
    """

    def __init__(
        self, way: Way, workload: GuardWorkload, device: str, weights: dict[str, Tensor] | None = None
    ) -> None:
        self.way, self.device = way, device
        self.module: CausalLM = workload.module()
        if weights is not None:
            self.module.load_state_dict(weights)
        self.module.to(device)
        if way.checkpointing:
            enable = getattr(self.module.model, "activation_checkpointing_enable", None)  # its name from now on
            (enable or self.module.model.gradient_checkpointing_enable)()
        self.stash: Stash | None = None
        if way.bits is not None:
            self.stash = Stash(StashPrecision(way.bits))
            self.stash.meter.measure_next = False  # it would measure what autograd keeps, at the price of a graph
            patch(self.module, self.stash)
        self._steps = 0

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the loss of the next step."""
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(self.device, torch.bfloat16, enabled=self.way.autocast))
            if self.way.offload:
                stack.enter_context(save_on_cpu())
            if self.stash is not None:
                self.stash.begin_step(self._steps)
                stack.enter_context(packed_by_hooks(self.stash))
            self._steps += 1
            loss: Tensor = self.module.model(**batch, use_cache=False).loss
        return loss

    def backward(self, loss: Tensor) -> None:
        """Add the gradients."""
        loss.backward()
        if self.stash is not None:
            self.stash.forget()

    def step(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the loss of a step, forward and backward; gradients are new ones."""
        self.module.zero_grad()
        loss = self.forward(batch)
        self.backward(loss)
        return loss.detach()

    def gradient(self) -> Tensor:
        """Return all gradients in one vector."""
        return torch.cat([param.grad.flatten() for param in self.module.parameters() if param.grad is not None])

    def kept_bytes(self, batch: dict[str, Tensor]) -> int:
        """Return the bytes of all tensors that a forward pass made and that are alive at its end.

        Casts of parameters are left out: they are no activations. So is what was there before.
        """
        self.module.zero_grad()
        with _alive([*self.module.parameters(), *self.module.buffers(), *batch.values()]) as alive:
            loss = self.forward(batch)
            kept = alive.total()
        self.backward(loss)
        return kept


class _Alive(TorchDispatchMode):
    """Remembers the storages that operations return, without keeping them alive."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        cast = func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._known
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if cast:
                    self._known.add(storage._cdata)
                    self._made[storage._cdata] = StorageWeakRef(storage), 0  # so that nothing else gets its address
                elif storage._cdata not in self._known:
                    self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def total(self) -> int:
        """Return the bytes of those that are alive."""
        return sum(size for storage, size in self._made.values() if not storage.expired())


@contextmanager
def _alive(known: list[Tensor]) -> Iterator[_Alive]:
    mode = _Alive(known)
    with mode:
        yield mode
