"""What the tests of the stash share: a model trained for a few steps, with and without a stash."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_lightning.stash import Patches, Stash, StashPrecision, packed_by_hooks, patch

Loss = Callable[[], Tensor]


def gradients(module: nn.Module) -> Tensor:
    """All of them, (parameters,) fp32."""
    return torch.cat([param.grad.flatten().float() for param in module.parameters() if param.grad is not None])


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def backward(module: nn.Module, loss: Loss, stash: Stash | None = None, seed: int = 1) -> tuple[float, Tensor]:
    """The loss and all gradients of one step."""
    torch.manual_seed(seed)
    module.zero_grad()
    if stash is None:
        value = loss()
    else:
        with packed_by_hooks(stash):
            value = loss()
    value.backward()  # type: ignore[no-untyped-call]
    if stash is not None:
        stash.forget()
    return value.item(), gradients(module)


def train(module: nn.Module, loss: Loss, steps: int = 5) -> None:
    """A few steps, so that activations and gradients are no longer those of a random model."""
    optimizer = torch.optim.AdamW(module.parameters(), 1e-3)
    for _ in range(steps):
        backward(module, loss)
        optimizer.step()


@contextmanager
def stashing(module: nn.Module, bits: int, *, measure: bool = True, **settings: Any) -> Iterator[tuple[Stash, Patches]]:
    """A stash on all that is within ``module``, at its first step."""
    choice = {key: settings.pop(key) for key in ("include", "exclude") if key in settings}
    stash = Stash(StashPrecision(bits, **settings))
    patches = patch(nn.ModuleList([module]), stash, **choice)
    stash.meter.measure_next = measure
    stash.begin_step(1)
    try:
        yield stash, patches
    finally:
        patches.remove()


def saved_bytes(run: Callable[[], Tensor], without: nn.Module, stash: Stash | None = None) -> int:
    """What autograd keeps of a run, each storage once, without a module's parameters; an independent count."""
    parameters = {param.untyped_storage().data_ptr() for param in without.parameters()}
    alive: dict[int, Any] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        node: Any = x.grad_fn
        while node is not None and node.name().startswith(("TBackward", "ToCopyBackward", "ViewBackward")):
            node = node.next_functions[0][0]
        cast = node is not None and isinstance(getattr(node, "variable", None), nn.Parameter)
        if storage.data_ptr() not in parameters and not cast:
            alive[storage.data_ptr()] = storage
        return x

    if stash is not None:
        stash.meter.own_hook = pack
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = run()
    total = sum(storage.nbytes() for storage in alive.values())
    del result
    return total
