"""FourBitPrecision: training whose linear layers compute with 4-bit weights and activations (arXiv 2502.17055).

Master weights, gradients and optimizer stay as they are. Each matched layer gets another ``forward``; no parameter or
module is replaced, so names in ``state_dict``, tied weights, optimizers and sharding know nothing of it, and when the
run ends the module is as it came. The arithmetic is in :mod:`lowbit_lightning.precision.straight_through`.

Different from the published code: the activation is kept for backward in packed form, once for all layers that read
it; layers are chosen by patterns and not by a fixed list of names; the settings of activations are settings of their
own; fp4 is E2M1, and theirs is ``fp4_uniform``.
"""

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import HalfPrecision, Precision
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lowbit_lightning.callbacks.dynamic_stashing import DynamicStashing
from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.kernels.four_bit_formats import FormatName
from lowbit_lightning.optim.forward_only import ForwardOnlyOptimizer
from lowbit_lightning.precision.layers import FourBitLayer, LastInput, is_plain_linear, layers_to_quantize
from lowbit_lightning.precision.recipe import Recipe

DEFAULT_EXCLUDE = ("lm_head", "*embed*", "*lora_*")


def check_only_precision(plugins: Any, precision: Any) -> None:
    """Refuse a second word on precision beside FourBitPrecision, before Lightning does in other words.

    Args:
        plugins: what ``trainer.plugins`` has.
        precision: what ``trainer.precision`` has.

    Raises:
        InvalidArgumentError: there is one.
    """
    asked = plugins if isinstance(plugins, list | tuple) else [plugins]
    found = [type(one).__name__ for one in asked if isinstance(one, Precision)]
    if "FourBitPrecision" not in found:
        return
    if len(found) > 1:
        raise InvalidArgumentError(f"trainer.plugins has {len(found)} precision plugins, {', '.join(found)}: leave one")
    if precision is not None:
        raise InvalidArgumentError(
            f"trainer.precision={precision} beside FourBitPrecision: set it to null, and compute={precision} in the "
            "plugin's init_args (bf16-mixed, bf16-true or 32-true)"
        )


class FourBitPrecision(Precision):
    """Compute the linear layers of any module with 4-bit (3-bit, 2-bit) weights and activations.

    It is given as ``trainer.plugins``, in place of ``trainer.precision``. Of every matched layer the forward pass
    multiplies quantized operands, the backward pass goes straight through the quantization and multiplies the gradient
    with the same quantized operands. For it the activation is kept packed, in about a quarter of bf16's bytes, and not
    at all where the weight is frozen. There is no matrix product in these formats here: the operands are rounded to
    them and multiplied in ``compute``'s precision, which saves memory and not time.

    Formats: ``int4``, ``int3``, ``int2`` (weights with a zero point, activations symmetric), ``fp4`` (E2M1),
    ``fp4_uniform`` (nine equal steps, what the published code of Stable-SPAM calls FP4; its weights keep outliers as
    well), ``nvfp4`` (groups of 16, E4M3 scales) and ``mxfp4`` (groups of 32, powers of two as scales).

    Args:
        weight: format of weights, null to leave them as they are.
        activation: format of activations; ``same`` is that of the weights.
        group_size: elements of a row that share a scale, a multiple of 8; null is 256. The last group of a row may be
            short. nvfp4 and mxfp4 have their own.
        outliers: activations of largest magnitude in every group that stay exact; null is 2, of nvfp4 and mxfp4 0.
        rounding: of weights and activations in training.
        gradient: format in which the output's gradient enters the products of the backward pass: ``fp8`` (E4M3, to the
            nearest) or ``fp4`` (E2M1, stochastic, so that it is right on average).
        include: patterns of layers to convert, see ``exclude``.
        exclude: patterns of layers that stay as they are. They are compared with the layer's name in the module, and
            with every ending of it after a dot: ``lm_head`` is ``model.lm_head`` too.
        compute: precision of everything else, as in ``trainer.precision``.
        save_packed: keep activations for backward in packed form; false keeps them in ``compute``'s precision, which
            saves the time to unpack them.
        evaluate: whether validation, test and prediction compute in 4 bits, rounded to the nearest, or with the master
            weights in ``compute``'s precision.
        raised_steps: optimizer steps that ``raise_precision``, which SpikeGuard may ask for, leaves 4 bits for.
        seed: of the noise of stochastic rounding.

    Raises:
        InvalidArgumentError: an argument is out of range; at the start of a run, patterns that match no layer, or a
            strategy or an optimizer that it cannot work with.
    """

    def __init__(
        self,
        weight: FormatName | None = "fp4",
        activation: FormatName | Literal["same"] | None = "same",
        group_size: int | None = None,
        outliers: int | None = None,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        gradient: Literal["fp8", "fp4"] | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        compute: Literal["bf16-mixed", "bf16-true", "32-true"] = "bf16-mixed",
        save_packed: bool = True,
        evaluate: Literal["4-bit", "master"] = "4-bit",
        raised_steps: int = 100,
        seed: int = 0,
    ) -> None:
        for name, value, known in (
            ("compute", compute, ("bf16-mixed", "bf16-true", "32-true")),
            ("evaluate", evaluate, ("4-bit", "master")),
        ):
            if value not in known:
                raise InvalidArgumentError(f"{name}={value!r} is out of range: {', '.join(known)}")
        if raised_steps < 1:
            raise InvalidArgumentError(f"raised_steps={raised_steps} is out of range: an integer >= 1")
        self.precision = compute
        self.recipe = Recipe(weight, activation, group_size, outliers, rounding, gradient, save_packed, seed)
        self.include: Sequence[str] = ["*"] if include is None else list(include)
        self.exclude: Sequence[str] = DEFAULT_EXCLUDE if exclude is None else list(exclude)
        self.evaluate = evaluate
        self.raised_steps = raised_steps
        #: The input that a layer quantized last.
        self.last_input = LastInput()
        #: Training steps begun, which is the clock of the noise.
        self.step = 0
        self._raised_for = 0  # optimizer steps still to come without 4 bits
        self._evaluating = False
        self._noise_step: Tensor | None = None
        self._layers: list[FourBitLayer] = []
        self._described = ""
        self._module: nn.Module | None = None
        self._half = HalfPrecision("bf16-true") if compute == "bf16-true" else None

    # ---- what the layers ask ------------------------------------------------------------------------------------

    @property
    def quantizes(self) -> bool:
        """Whether layers compute in 4 bits now."""
        return self._raised_for == 0 and not (self._evaluating and self.evaluate == "master")

    @property
    def noise_step(self) -> Tensor | None:
        """The clock as the layers' noise takes it, () int64; None while nothing is rounded stochastically."""
        return None if self._evaluating else self._noise_step

    # ---- for the start table, SpikeGuard and checkpoints --------------------------------------------------------

    def describe_technique(self) -> list[tuple[str, str, str]]:
        """Return one row: what is converted, and to what."""
        return [("FourBitPrecision", self._described, f"{self.recipe}; emulated: saves memory, not time")]

    def raise_precision(self) -> bool:
        """Compute without quantization for ``raised_steps`` optimizer steps; return whether that changes anything."""
        if self._raised_for or not self._layers:
            return False
        self._raised_for = self.raised_steps
        return True

    def restore_precision(self) -> None:
        """Compute in 4 bits again."""
        self._raised_for = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the clock of the noise, and for how long precision is still raised."""
        return {"step": self.step, "raised_for": self._raised_for}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        self.step = int(state_dict["step"])
        self._raised_for = int(state_dict["raised_for"])

    # ---- Lightning's hooks --------------------------------------------------------------------------------------

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Give the layers their other ``forward``, in place."""
        self.teardown()
        trainer = getattr(module, "_trainer", None)
        if isinstance(getattr(trainer, "strategy", None), DeepSpeedStrategy):
            raise InvalidArgumentError(
                "strategy DeepSpeedStrategy decides on the precision itself: use FourBitPrecision with DDP or "
                "ModelParallelStrategy (FSDP2)"
            )
        if any(isinstance(one, DynamicStashing) for one in getattr(trainer, "callbacks", [])):
            raise InvalidArgumentError(
                "FourBitPrecision and DynamicStashing both decide what linear layers keep for backward: remove one"
            )
        if self._half is not None:
            module = self._half.convert_module(module)
        self._module = module
        found = list(layers_to_quantize(module, self.include, self.exclude))
        linears = [one for one in module.modules() if is_plain_linear(one)]
        if not found:
            names = [name for name, one in module.named_modules() if is_plain_linear(one)]
            raise InvalidArgumentError(
                f"include={list(self.include)} and exclude={list(self.exclude)} leave no layer to quantize; the linear "
                f"layers of {type(module).__name__} are {', '.join(names[:8]) or 'none'}{', ...' if names[8:] else ''}"
            )
        rank = getattr(trainer, "global_rank", 0)
        self._layers = [FourBitLayer(name, one, self, self.recipe.of_layer(name, one, rank)) for name, one in found]
        for layer in self._layers:
            layer.install()
        weights = sum(layer.module.weight.numel() for layer in self._layers)
        share = weights / sum(cast(Tensor, one.weight).numel() for one in linears)
        self._described = f"{len(found)} of {len(linears)} linear layers, {share:.0%} of their weights"
        return module

    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        """Refuse optimizers that compare losses at weights nearer than a step of a 4-bit grid."""
        for optimizer in optimizers:
            if isinstance(optimizer, ForwardOnlyOptimizer):
                raise InvalidArgumentError(
                    f"the optimizer is {type(optimizer).__name__}, whose perturbations of the weights are smaller than "
                    "the steps of a 4-bit grid and would be rounded away: remove FourBitPrecision"
                )
        return model, optimizers, lr_schedulers

    def convert_input(self, data: Any) -> Any:
        """Convert a batch as ``compute`` asks."""
        return data if self._half is None else self._half.convert_input(data)

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """Make new tensors as ``compute`` asks."""
        return super().tensor_init_context() if self._half is None else self._half.tensor_init_context()

    def module_init_context(self) -> AbstractContextManager[Any]:
        """Make new modules as ``compute`` asks."""
        return super().module_init_context() if self._half is None else self._half.module_init_context()

    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        """Compute all else as ``compute`` asks."""
        if self._half is not None:
            context: AbstractContextManager[Any] = self._half.forward_context()
        else:
            mixed = self.precision == "bf16-mixed"
            # Without a cache of casts, as Lightning has it: weights change between two forward passes.
            context = torch.autocast(self._device_type(), torch.bfloat16, enabled=mixed, cache_enabled=False)
        with context:
            yield

    @contextmanager
    def train_step_context(self) -> Generator[None, None, None]:
        """Count the step. Backward passes, recomputed activations included, come before the next."""
        self.step += 1
        # A new tensor for every step: backward keeps the one of its own.
        self._noise_step = torch.tensor(self.step) if self.recipe.is_random else None
        with self.forward_context():
            yield

    @contextmanager
    def val_step_context(self) -> Generator[None, None, None]:
        """Compute as ``evaluate`` says."""
        self._evaluating = True
        try:
            with self.forward_context():
                yield
        finally:
            self._evaluating = False

    @contextmanager
    def test_step_context(self) -> Generator[None, None, None]:
        """Compute as ``evaluate`` says."""
        with self.val_step_context():
            yield

    @contextmanager
    def predict_step_context(self) -> Generator[None, None, None]:
        """Compute as ``evaluate`` says."""
        with self.val_step_context():
            yield

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """Step, and count how long precision is raised."""
        result = super().optimizer_step(*args, **kwargs)
        if self._raised_for:
            self._raised_for -= 1
            if self._raised_for == 0:
                rank_zero_info("FourBitPrecision computes in 4 bits again.")
        return result

    def teardown(self) -> None:
        """Give the layers their own ``forward`` back."""
        for layer in self._layers:
            layer.remove()
        self._layers = []
        self.last_input.clear()

    def _device_type(self) -> str:
        module = self._module
        return module.device.type if isinstance(module, LightningModule) else "cpu"
