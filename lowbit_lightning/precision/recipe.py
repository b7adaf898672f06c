"""From the arguments of FourBitPrecision to how each layer's operands are quantized."""

from typing import Any, Literal, get_args

from torch import nn

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.kernels.four_bit_formats import FORMATS, Scheme
from lowbit_lightning.kernels.four_bit_ops import Operand
from lowbit_lightning.kernels.philox import stream_id
from lowbit_lightning.precision.straight_through import Quantization
from lowbit_lightning.stash.forwards import is_conv1d

Rounding = Literal["nearest", "stochastic"]
Gradient = Literal["fp8", "fp4"]

DEFAULT_GROUP_SIZE = 256
DEFAULT_OUTLIERS = 2


class Recipe:
    """The quantization that a user asked for; its arguments are those of FourBitPrecision.

    Raises:
        InvalidArgumentError: an argument is out of range.
    """

    def __init__(
        self,
        weight: str | None,
        activation: str | None,
        group_size: int | None,
        outliers: int | None,
        rounding: str,
        gradient: str | None,
        save_packed: bool,
        seed: int,
    ) -> None:
        activation = weight if activation == "same" else activation
        for name, value, known in (
            ("weight", weight, tuple(FORMATS)),
            ("activation", activation, tuple(FORMATS)),
            ("gradient", gradient, get_args(Gradient)),
        ):
            if value is not None and value not in known:
                raise InvalidArgumentError(f"{name}={value!r} is unknown; it is one of {', '.join(known)}, or null")
        if rounding not in get_args(Rounding):
            raise InvalidArgumentError(f"rounding={rounding!r} is out of range: {', '.join(get_args(Rounding))}")
        if weight is None and activation is None:
            raise InvalidArgumentError("weight=None and activation=None quantize nothing: give one of them a format")
        asked = [one for one in (weight, activation) if one is not None]
        own = [one for one in asked if FORMATS[one].group_size is not None]
        if group_size is not None and len(own) == len(asked) and gradient is None:
            sizes = ", ".join(f"{one} has groups of {FORMATS[one].group_size}" for one in dict.fromkeys(own))
            raise InvalidArgumentError(f"group_size={group_size} has no use: {sizes}; leave it out")
        self.group_size = DEFAULT_GROUP_SIZE if group_size is None else group_size
        self.random_operands = rounding == "stochastic"
        self.is_random = self.random_operands or gradient == "fp4"
        self.save_packed = save_packed
        self.seed = seed
        try:
            Scheme("fp4", self.group_size)
            self.weight = self._weight_scheme(weight, outliers)
            self.activation = self._activation_scheme(activation, outliers)
        except ValueError as error:
            raise InvalidArgumentError(str(error)) from None
        self.gradient = gradient

    def _weight_scheme(self, name: str | None, outliers: int | None) -> Scheme | None:
        if name is None:
            return None
        # Their FP4 keeps the largest of weights too.
        kept = (DEFAULT_OUTLIERS if outliers is None else outliers) if name == "fp4_uniform" else 0
        return Scheme(name, FORMATS[name].group_size or self.group_size, name.startswith("int"), kept)

    def _activation_scheme(self, name: str | None, outliers: int | None) -> Scheme | None:
        if name is None:
            return None
        own = FORMATS[name].group_size
        kept = (DEFAULT_OUTLIERS if own is None else 0) if outliers is None else outliers
        return Scheme(name, own or self.group_size, False, kept)

    def of_layer(self, name: str, module: nn.Module, rank: int) -> Quantization:
        """Return how a layer's operands are quantized.

        Args:
            name: of the layer, which its noise depends on.
            module: the layer.
            rank: of this process: weights are rounded alike on all, and each rounds its own activations.
        """
        gradient: Any = self.gradient
        if gradient == "fp4":
            key = self.seed, stream_id(f"{name} gradient {rank}", "operand")
            gradient = Operand(Scheme("fp4", self.group_size), key)
        return Quantization(
            weight=self._operand(self.weight, f"{name} weight"),
            activation=self._operand(self.activation, f"{name} activation {rank}"),
            gradient=gradient,
            save_packed=self.save_packed,
            transposed=is_conv1d(module),
            fp8_group_size=self.group_size,
        )

    def _operand(self, scheme: Scheme | None, stream: str) -> Operand | None:
        if scheme is None:
            return None
        return Operand(scheme, (self.seed, stream_id(stream, "operand")) if self.random_operands else None)

    def __str__(self) -> str:
        """What the start table says of it."""
        parts = [f"{_described(self.weight)} weights", f"{_described(self.activation)} activations"]
        if self.weight is not None and self.weight == self.activation:
            parts = [f"{_described(self.weight)} weights and activations"]
        if self.gradient is not None:
            parts.append(f"{self.gradient} gradients")
        return ", ".join([*parts, "stochastic rounding" if self.random_operands else "nearest rounding"])


def _described(scheme: Scheme | None) -> str:
    if scheme is None:
        return "unquantized"
    kept = f" less {scheme.outliers} outliers" if scheme.outliers else ""
    return f"{scheme.format} (groups of {scheme.group_size}{kept})"
