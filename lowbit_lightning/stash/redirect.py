"""Functions that modules call on their own, such as attention, redirected to ones that keep their inputs packed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import dropout, gelu, linear, relu, scaled_dot_product_attention, silu
from torch.overrides import TorchFunctionMode

from lowbit_lightning.stash.dropout import OneBitReLU, ReplayedDropout
from lowbit_lightning.stash.linear import StashedLinear
from lowbit_lightning.stash.precision import Kind
from lowbit_lightning.stash.replay import Operation, replay
from lowbit_lightning.stash.stash import Stash


class Redirect(TorchFunctionMode):
    """While it is on, these functions keep their inputs packed; for the forward of one module.

    Args:
        module: whose forward runs.
        name: of the module.
        kinds: of what is packed; the others are left as they are.
        stash: keeps.
    """

    def __init__(self, module: nn.Module, name: str, kinds: frozenset[Kind], stash: Stash) -> None:
        super().__init__()
        self.module, self.name, self.kinds, self.stash = module, name, kinds, stash
        self._repeats: bool | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function, or what stands in for it."""
        kwargs = kwargs or {}
        if self._applies() and (stand_in := _STAND_INS.get(func)) is not None:
            result = stand_in(self, *args, **kwargs)
            if result is not None:
                return result
        return func(*args, **kwargs)

    def _applies(self) -> bool:
        return self.stash.redirects and stashes(self.stash)

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor | None:
        """Attention that keeps queries, keys and values, and neither output nor statistics."""
        if "attention" not in self.kinds or not plain(query, key, value, attn_mask):
            return None
        repeats = 1 if enable_gqa else self._repeated_heads(query, key, value)
        settings: dict[str, Any] = {
            "dropout_p": dropout_p,
            "is_causal": is_causal,
            "scale": scale,
            "enable_gqa": enable_gqa,
        }
        function = partial(_attention, repeats=repeats, **settings)
        operation = Operation(function, 3, "attention", f"{self.name}.attention", random=dropout_p > 0)
        if repeats > 1:
            key, value = key[:, ::repeats], value[:, ::repeats]
        return replay(operation, self.stash, query, key, value, attn_mask)

    def _repeated_heads(self, query: Tensor, key: Tensor, value: Tensor) -> int:
        """Return how many heads next to each other share keys and values that were copied for them."""
        groups = getattr(self.module, "num_key_value_groups", 1)
        if not isinstance(groups, int) or groups < 2 or key.ndim != 4 or key.shape[1] != query.shape[1]:
            return 1
        if self._repeats is None:  # looked at once: it waits for the device
            self._repeats = all(torch.equal(x, _repeat(x[:, ::groups], groups)) for x in (key, value))
        return groups if self._repeats else 1

    def activation(self, function: Callable[..., Tensor], input: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        """An activation function that keeps its input."""
        if "activation" not in self.kinds or not plain(input) or kwargs.get("inplace", False) or True in args:
            return None
        return activate(partial(function, *args, **kwargs), input, self.stash, self.name)

    def product(self, *factors: Any, **kwargs: Any) -> Tensor | None:
        """A gate: the product of an activation function's output and another tensor keeps the inputs of both."""
        if "activation" not in self.kinds or kwargs or len(factors) != 2 or not plain(*factors):
            return None
        for gate, up in (factors, factors[::-1]):
            source: Gate | None = getattr(gate, _GATE, None)
            if (
                source is not None
                and source.versions == (source.x._version, gate._version)
                and gate.shape == up.shape
                and up.requires_grad
            ):
                operation = Operation(_Gated(source.function), 2, "activation", f"{self.name}.gate")
                return replay(operation, self.stash, source.x, up, again=True)
        return None

    def multi_head_attention(self, *args: Any, **kwargs: Any) -> Any:
        """Torch's own code of ``nn.MultiheadAttention``, with the functions in here in place of those that it calls."""
        return _rebound(functional.multi_head_attention_forward, self)(*args, **kwargs)

    def relu(self, input: Tensor, inplace: bool = False) -> Tensor | None:
        """ReLU that keeps bits."""
        if "activation" not in self.kinds or inplace or not plain(input):
            return None
        result: Tensor = OneBitReLU.apply(input, self.stash)
        return result

    def dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor | None:
        """Dropout that keeps no mask."""
        if "dropout" not in self.kinds or inplace or not training or not 0 < p < 1 or not plain(input):
            return None
        result: Tensor = ReplayedDropout.apply(input, p, self.stash)
        return result

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """A linear layer that a module computes by itself."""
        if "linear" not in self.kinds or not plain(input, weight, bias):
            return None
        result: Tensor = StashedLinear.apply(input, weight, bias, linear, False, self.stash, f"{self.name}.linear")
        return result


class Gate(NamedTuple):
    """What an activation function's output was made of, while neither changes; goes with the output."""

    function: Callable[[Tensor], Tensor]
    x: Tensor
    versions: tuple[int, int]


def activate(function: Callable[[Tensor], Tensor], x: Tensor, stash: Stash, name: str) -> Tensor:
    """Run an activation function that keeps its input packed, and keeps nothing if its output only gates another."""
    y = replay(Operation(function, 1, "activation", f"{name}.activation"), stash, x, again=True)
    setattr(y, _GATE, Gate(function, x, (x._version, y._version)))
    return y


_GATE = "_lowbit_lightning_gate"


@dataclass(frozen=True)
class _Gated:
    function: Callable[[Tensor], Tensor]

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.function(gate) * up


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, repeats: int, **kwargs: Any
) -> Tensor:
    if repeats > 1:
        key, value = _repeat(key, repeats), _repeat(value, repeats)
    return scaled_dot_product_attention(query, key, value, mask, **kwargs)


def _repeat(x: Tensor, repeats: int) -> Tensor:
    """Return (batch, heads * repeats, length, width), each head ``repeats`` times in a row."""
    return x[:, :, None].expand(-1, -1, repeats, -1, -1).reshape(x.shape[0], -1, *x.shape[2:])


def _rebound(function: Any, redirect: Redirect) -> Callable[..., Any]:
    """Return a function of torch.nn.functional which calls what a redirection offers, where that applies.

    A function written in Python hands itself over to the mode as a whole, and is on its own from there on.
    """

    def instead_of(name: str, stand_in: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = stand_in(*args, **kwargs)
            return getattr(functional, name)(*args, **kwargs) if result is None else result

        return call

    names = vars(functional) | {"has_torch_function": lambda _: False}
    for name in ("linear", "scaled_dot_product_attention", "dropout"):
        stand_in = redirect.attention if name == "scaled_dot_product_attention" else getattr(redirect, name)
        names[name] = instead_of(name, stand_in)
    for name in ("_in_projection", "_in_projection_packed"):
        names[name] = FunctionType(names[name].__code__, names, name, names[name].__defaults__)
    return FunctionType(function.__code__, names, function.__name__, function.__defaults__)


def stashes(stash: Stash) -> bool:
    """Whether what runs now is to be kept for backward by us.

    Not what is being compiled, which keeps what its compiler decides; nor what torch.func transforms, whose tensors are
    not what they seem.
    """
    elsewhere = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return torch.is_grad_enabled() and not stash.meter.within and not elsewhere


def plain(*tensors: Any) -> bool:
    """Whether these are ordinary tensors (or None) of which one takes part in a graph."""
    kinds = (Tensor, nn.Parameter, type(None))
    return all(type(one) in kinds for one in tensors) and any(one is not None and one.requires_grad for one in tensors)


_STAND_INS: dict[Any, Callable[..., Tensor | None]] = {
    scaled_dot_product_attention: Redirect.attention,
    gelu: lambda self, *args, **kwargs: self.activation(gelu, *args, **kwargs),
    silu: lambda self, *args, **kwargs: self.activation(silu, *args, **kwargs),
    torch.mul: Redirect.product,
    Tensor.mul: Redirect.product,
    linear: Redirect.linear,
    relu: Redirect.relu,
    functional.multi_head_attention_forward: Redirect.multi_head_attention,
    dropout: Redirect.dropout,
}
