"""Which layers compute in four bits, and the ``forward`` that they get for it."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.optim.sharding import is_dtensor
from lowbit_lightning.precision.straight_through import (
    Quantization,
    QuantizedInput,
    quantize_input,
    quantize_weight,
    straight_through_linear,
)
from lowbit_lightning.stash.forwards import is_conv1d

if TYPE_CHECKING:
    from lowbit_lightning.precision.four_bit import FourBitPrecision


def layers_to_quantize(
    model: nn.Module, include: Sequence[str], exclude: Sequence[str]
) -> Iterator[tuple[str, nn.Module]]:
    """Yield names and layers: every Linear, and Conv1D of transformers, that is included and not excluded.

    A pattern such as ``"*embed*"`` or ``"lm_head"`` is compared with the layer's whole name and with every ending of it
    that begins after a dot. Left out are layers with a ``forward`` of their own (quantized by another library, say),
    and those whose weight is empty or no floating-point matrix.
    """
    for full_name, module in model.named_modules():
        name = full_name.replace("_orig_mod.", "")  # which torch.compile adds
        if is_plain_linear(module) and _matches(name, include) and not _matches(name, exclude):
            yield name, module


def is_plain_linear(module: nn.Module) -> bool:
    """Return whether this is a Linear or Conv1D that computes what such a layer does, and is called to do so."""
    if "forward" in vars(module) and not isinstance(getattr(module.forward, "__self__", None), FourBitLayer):
        return False
    # The output projection of nn.MultiheadAttention, which is never called: its weight is used elsewhere.
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    weight = getattr(module, "weight", None)
    return (
        (plain or is_conv1d(module))
        and isinstance(weight, Tensor)
        and weight.ndim == 2
        and weight.is_floating_point()
        and weight.numel() > 0
    )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    parts = name.split(".")
    endings = [".".join(parts[i:]) for i in range(len(parts))]
    return any(fnmatchcase(ending, pattern) for pattern in patterns for ending in endings)


class LastInput:
    """The input that was quantized last, for layers that read the same tensor: query, key and value, gate and up.

    They then share one packed copy for backward, as without quantization they share the tensor.
    """

    def __init__(self) -> None:
        self._entry: tuple[weakref.ref[Tensor], Any, QuantizedInput] | None = None

    def get(self, x: Tensor, key: Any, make: Callable[[], QuantizedInput]) -> QuantizedInput:
        """Return the quantized ``x``, by ``make`` if it is not the one at hand; ``key`` is all else it depends on."""
        if x.is_inference():  # which has no version to tell whether it was changed in place
            return make()
        key = (x._version, key)
        if self._entry is not None and self._entry[0]() is x and self._entry[1] == key:
            return self._entry[2]
        self.clear()
        made = make()
        # It is let go of with the tensor that it was made of.
        self._entry = weakref.ref(x, self._forget), key, made
        return made

    def clear(self) -> None:
        """Hold nothing."""
        self._entry = None

    def _forget(self, reference: "weakref.ref[Tensor]") -> None:
        if self._entry is not None and self._entry[0] is reference:
            self._entry = None


class FourBitLayer:
    """What stands in for a layer's ``forward``."""

    def __init__(self, name: str, module: nn.Module, plugin: "FourBitPrecision", how: Quantization) -> None:
        self.name = name
        self.module: Any = module
        self.plugin = plugin
        self.how = how

    def install(self) -> None:
        """Put it in the place of the layer's own."""
        self.module.forward = self.forward

    def remove(self) -> None:
        """Give the layer its own back."""
        if getattr(vars(self.module).get("forward"), "__self__", None) is self:
            del self.module.forward

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for (..., in): quantized, or as the layer itself computes it."""
        plugin, module = self.plugin, self.module
        if not plugin.quantizes:
            result: Tensor = type(module).forward(module, x)
            return result
        weight, bias, how = module.weight, module.bias, self.how
        if is_dtensor(weight):  # FSDP2 has gathered its own by now
            raise InvalidArgumentError(
                f"layer {self.name} is divided by tensor parallelism, and a group of 4-bit elements would be divided "
                f"with it: add {self.name!r} to FourBitPrecision's exclude, or shard by fully_shard alone"
            )
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        step = plugin.noise_step
        keep = torch.is_grad_enabled() and weight.requires_grad
        if torch.compiler.is_compiling():
            made = quantize_input(x, how, dtype, step, keep)
        else:
            key = (how.activation and how.activation.scheme, how.save_packed, dtype, plugin.step, keep)
            made = plugin.last_input.get(x, key, lambda: quantize_input(x, how, dtype, step, keep))
        if torch.is_grad_enabled():
            return straight_through_linear(x, weight, bias, made, how, step)
        w = quantize_weight(weight, how, dtype, step)
        return torch.nn.functional.linear(made.values.view(x.shape), w, None if bias is None else bias.to(dtype))
