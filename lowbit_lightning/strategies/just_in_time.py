"""A module's forward pass at perturbed weights, without the weights ever being written.

Adding ε u and subtracting it again drifts in every dtype. Here each module's own parameters are pointed at a scratch
buffer that holds W + ε u while its forward runs, and back at W after it: the extra memory is that of the largest
module's own parameters, not of the model, and where they are large it is there for that forward only. A plain embedding
needs no buffer: only the rows it looks up are perturbed.

A parameter that is used outside its own module's forward (a tied head through ``F.linear``, a module that reads its
child's weight) would be missed. A pass with ``watch=True`` looks at every torch function that is called with a
trainable parameter, finds those, and they get a perturbed copy of their own for the whole pass from then on. It also
finds what takes no part in the loss: such a parameter must not be moved.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lowbit_lightning.kernels.rademacher import perturbed_rows
from lowbit_lightning.optim.base import ParamGroup
from lowbit_lightning.optim.forward_only import Evaluation, ForwardOnlyOptimizer

Result = TypeVar("Result")
Entry = tuple[ParamGroup, str, Tensor]

_ALIGNMENT = 64  # bytes; a vector register's, so that kernels on scratch are as fast as on weights
# Share of the trainable weights above which a parameter gets memory for its forward only. There are few such: the head
# of a language model, say, after which logits and loss make the peak of memory, and scratch would lie idle beside them.
_LARGE = 1 / 16


class JustInTime:
    """Runs a function at the weights that an evaluation wants.

    Args:
        module: whose submodules' forwards the function calls.
        optimizer: says which parameters are perturbed, and how.
    """

    def __init__(self, module: nn.Module, optimizer: ForwardOnlyOptimizer) -> None:
        self._module = module
        self._optimizer = optimizer
        self._outside: set[int] = set()  # ids of parameters that are used outside their own module
        self._plan: _Plan | None = None
        self._copies: dict[int, Tensor] = {}

    def run(
        self, evaluation: Evaluation, function: Callable[[], Result], *, watch: bool = False
    ) -> tuple[Result, "_Watch | None"]:
        """Return what ``function`` returns, and with ``watch`` what was seen of the parameters.

        The watch's ``is_complete`` is False if parameters were found that had to be perturbed and were not: they are
        known now, and the function is to be run again.
        """
        plan = self._current_plan()
        pass_ = _Pass(plan, self._optimizer, evaluation)
        watching = _Watch(plan, pass_) if watch else None
        handles = [handle for module in plan.owners for handle in pass_.register(module)]
        try:
            with self._copied(plan, evaluation), watching or nullcontext():
                result = function()
        finally:
            for handle in handles:
                handle.remove()
            pass_.point_back()
        if watching is not None and watching.outside - self._outside:
            watching.is_complete = evaluation.sign == 0
            self._outside |= watching.outside
            self._plan = None
        return result, watching

    def _current_plan(self) -> "_Plan":
        entries = list(self._optimizer.trainable())
        if self._plan is None or [id(param) for _, _, param in entries] != list(self._plan.entries):
            self._plan = _Plan(self._module, entries, self._outside)
            self._copies = {}
        return self._plan

    @contextmanager
    def _copied(self, plan: "_Plan", evaluation: Evaluation) -> Iterator[None]:
        """Point what is used outside its own module at a perturbed copy."""
        originals: list[tuple[Tensor, Tensor]] = []
        try:
            for group, name, param in plan.outside if evaluation.sign else ():
                if id(param) not in self._copies:
                    self._copies[id(param)] = torch.empty_like(param)
                originals.append((param, param.data))
                param.data = self._optimizer.perturb(group, name, param, evaluation, self._copies[id(param)])
            yield
        finally:
            for param, original in originals:
                param.data = original


class _Plan:
    """Which module points which of its parameters where; made again when the trainable parameters change.

    Attributes:
        entries: what the optimizer trains, by id.
        owners: modules with parameters of their own among them, each once.
        outside: entries that are perturbed for the whole pass.
        scratch: the buffers.
    """

    def __init__(self, module: nn.Module, entries: Sequence[Entry], outside: set[int]) -> None:
        self.entries = {id(entry[2]): entry for entry in entries}
        self.outside = [entry for entry in entries if id(entry[2]) in outside]
        self.owners: dict[nn.Module, list[Tensor]] = {}
        for owner in module.modules():
            own: list[Tensor] = [param for param in owner.parameters(recurse=False) if id(param) in self.entries]
            if own:
                self.owners[owner] = own
        self.inside = {id(param) for own in self.owners.values() for param in own} - outside
        self._large = _LARGE * sum(param.nbytes for _, _, param in entries)
        capacity: dict[torch.device, int] = {}
        for device in {param.device for _, _, param in entries}:
            capacity[device] = self._deepest(module, device, dict.fromkeys(self.looking_up(), 0))
        self.scratch = _Scratch(capacity)

    def buffered(self, owner: nn.Module) -> list[Tensor]:
        """Return the module's own parameters that its forward needs in scratch."""
        return [param for param in self.owners.get(owner, ()) if id(param) in self.inside]

    def looking_up(self) -> set[nn.Module]:
        """Return the embeddings of which only the rows that they look up are perturbed.

        Not those with hooks of the user's, which may read the weight. To be called while there are none of ours.
        """
        return {
            owner
            for owner, own in self.owners.items()
            if _looks_up_rows(owner)
            and id(own[0]) in self.inside
            and not owner._forward_hooks
            and not owner._forward_pre_hooks
        }

    def _deepest(self, module: nn.Module, device: torch.device, known: dict[nn.Module, int]) -> int:
        """Return the most bytes of scratch that nested forwards of a module and its children hold at a time."""
        if module not in known:
            kept = (p for p in self.buffered(module) if p.device == device and p.nbytes <= self._large)
            own = sum(map(_padded_bytes, kept))
            children = [self._deepest(child, device, known) for child in module.children()]
            known[module] = own + max(children, default=0)
        return known[module]


class _Pass:
    """One forward pass: the hooks, and what they have pointed elsewhere."""

    def __init__(self, plan: _Plan, optimizer: ForwardOnlyOptimizer, evaluation: Evaluation) -> None:
        self._plan = plan
        self._optimizer = optimizer
        self._evaluation = evaluation
        self._looking_up = plan.looking_up()
        self._originals: list[tuple[Tensor, Tensor, int]] = []  # of parameters now in scratch: where it began
        self.depth: dict[int, int] = {}  # of running forwards, by id of the parameter
        self.entered: set[nn.Module] = set()
        self.in_hook = False

    def register(self, module: nn.Module) -> list[Any]:
        """Add the hooks: first before and last after the forward, so that other hooks see one set of weights."""
        enter = module.register_forward_pre_hook(self._enter, prepend=True)
        leave = module.register_forward_hook(self._leave, with_kwargs=True, always_call=True)
        return [enter, leave]

    def point_back(self) -> None:
        """Point every parameter at its weights; after an error in a forward some are elsewhere."""
        while self._originals:
            self._pop()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.in_hook = True
        self.entered.add(module)
        is_buffered = self._evaluation.sign and module not in self._looking_up
        buffered = {id(param) for param in self._plan.buffered(module)} if is_buffered else set()
        for param in self._plan.owners[module]:
            self.depth[id(param)] = self.depth.get(id(param), 0) + 1
            if self.depth[id(param)] == 1 and id(param) in buffered:
                out, mark = self._plan.scratch.take(param)
                self._originals.append((param, param.data, mark))
                param.data = self._optimizer.perturb(*self._plan.entries[id(param)], self._evaluation, out)
        self.in_hook = False

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        self.in_hook = True
        own = self._plan.owners[module]
        for param in reversed(own):
            self.depth[id(param)] -= 1
            if self.depth[id(param)] == 0 and self._originals and self._originals[-1][0] is param:
                self._pop()
        replaced = None
        looked_up = self._evaluation.sign and module in self._looking_up
        # Where an outer module holds the same parameter, the rows looked up were perturbed ones; None is an error's.
        if looked_up and self.depth[id(own[0])] == 0 and output is not None:
            group, name, weight = self._plan.entries[id(own[0])]
            rows = args[0] if args else kwargs["input"]
            eps = self._evaluation.sign * group["eps"]
            noise = self._optimizer.noise(group, name, weight)
            replaced = perturbed_rows(weight.data, rows, eps, noise, self._evaluation.index)
        self.in_hook = False
        return replaced

    def _pop(self) -> None:
        param, original, mark = self._originals.pop()
        param.data = original
        self._plan.scratch.release(param.device, mark)


class _Watch(TorchFunctionMode):
    """Sees which trainable parameters are handed to torch functions, inside and outside their own module's forward.

    Attributes:
        outside: ids of those seen outside.
        is_complete: whether the pass had perturbed all that it should have.
    """

    def __init__(self, plan: _Plan, pass_: _Pass) -> None:
        super().__init__()
        self._plan = plan
        self._pass = pass_
        self._seen: set[int] = set()
        self.outside: set[int] = set()
        self.is_complete = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._pass.in_hook:
            found = [
                id(value) for value in _leaves((*args, *(kwargs or {}).values())) if id(value) in self._plan.entries
            ]
            if found and _holds_tensor(result):  # questions about shape or dtype are no use of weights
                self._seen.update(found)
                self.outside.update(key for key in found if not self._pass.depth.get(key))
        return result

    def used(self) -> list[Tensor]:
        """Return the parameters that took part in the pass.

        Custom functions (``autograd.Function``, compiled extensions) are invisible here. So where none of the
        parameters of a module that ran was seen, all of them count as used.
        """
        used = set(self._seen)
        for module in self._pass.entered:
            own = {id(param) for param in self._plan.owners[module]}
            if not own & self._seen:
                used |= own
        return [entry[2] for key, entry in self._plan.entries.items() if key in used]


class _Scratch:
    """Memory for perturbed parameters, taken and released like a stack as forwards nest."""

    def __init__(self, capacity: dict[torch.device, int]) -> None:
        self._buffers = {d: torch.empty(size, dtype=torch.uint8, device=d) for d, size in capacity.items()}
        self._top = dict.fromkeys(capacity, 0)

    def take(self, param: Tensor) -> tuple[Tensor, int]:
        """Return a tensor of the parameter's shape, dtype and strides, and what to hand to ``release``."""
        mark = self._top[param.device]
        buffer, end = self._buffers[param.device], mark + _padded_bytes(param)
        # Large ones have no place, nor what is held by forwards that nest otherwise than their modules do.
        if end > buffer.numel() or not param.is_contiguous():
            return torch.empty_like(param), mark
        self._top[param.device] = end
        return buffer[mark : mark + param.numel() * param.element_size()].view(param.dtype).view(param.shape), mark

    def release(self, device: torch.device, mark: int) -> None:
        """Give back all that was taken since."""
        self._top[device] = mark


def _padded_bytes(param: Tensor) -> int:
    return -(-param.numel() * param.element_size() // _ALIGNMENT) * _ALIGNMENT


def _looks_up_rows(module: nn.Module) -> bool:
    """Whether the forward is nothing but an embedding look-up."""
    return (
        isinstance(module, nn.Embedding)
        and type(module).forward is nn.Embedding.forward
        and "forward" not in vars(module)
        and module.max_norm is None  # renormalizes the table in place: let it have a copy
    )


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, tuple | list) and any(map(_holds_tensor, value)))


def _leaves(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _leaves(value)
        else:
            yield value
