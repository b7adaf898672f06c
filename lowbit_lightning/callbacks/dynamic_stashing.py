"""DynamicStashing: what a forward pass keeps for backward, in few bits, on any LightningModule.

DSQ (arXiv 2303.05295) names what is kept the *stash* and quantizes it. The paper simulates; here it is really packed,
so memory really falls. In this mode forward is exact, to the bit, and only gradients see the rounding. The machinery is
in :mod:`lowbit_lightning.stash`.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info

from lowbit_lightning.callbacks.memory_ledger import MEGABYTE
from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.optim.fzoo import ForwardOnlyOptimizer
from lowbit_lightning.spikes.recorder import axis_step
from lowbit_lightning.stash import KINDS, Patches, Stash, StashPrecision, kinds_in, packed_by_hooks, patch


class DynamicStashing(Callback):
    """Keep activations packed between forward and backward.

    Linear layers keep their input; attention keeps queries, keys and values and recomputes its output from them; gates,
    activation functions and norms keep their inputs; a language model's loss keeps hidden states and no logits; what
    anything else saves is packed at 8 bits by saved-tensor hooks. Works on the modules of torch and transformers as
    they are, under autocast, accumulation, gradient checkpointing, DDP and FSDP2, and with adapters (frozen weights
    keep nothing).

    Logged every ``trainer.log_every_n_steps``: ``stash/raw_mb``, what autograd would have kept for the last batch, and
    ``stash/packed_mb``, what was kept, both counted on the tensors, in 10^6 bytes, also for each kind of tensor
    (``stash/packed_mb_linear``); ``stash/peak_mb``, the most that was kept packed at one moment; and ``stash/error``,
    the relative error of rounding, √(Σ‖x − x̂‖² / Σ‖x‖²).

    Args:
        stash_only: bits of what is kept, 2 to 8 or 16; inputs of norms, hidden states of the loss and what hooks pack
            get 8 at least.
        format: ``bfp``, block floating point, or ``affine``, levels between a minimum and a maximum: unbiased also at 2
            bits, where ``bfp`` clips; choose longer boxes with it.
        box: elements that share a scale, 16, 32, 64 or 128.
        rounding: ``stochastic`` (unbiased) or ``nearest`` (a smaller error).
        include: kinds of tensors (linear, attention, activation, norm, convolution, loss, other), and patterns for
            names or classes of modules, such as ``"*.layers.0"`` or ``LlamaMLP``, outside which nothing is packed.
        exclude: likewise, what is not packed.
        by_kind: bits of single kinds in place of ``stash_only``, such as ``{attention: 8}``.
        seed: of the noise of stochastic rounding.

    Raises:
        InvalidArgumentError: an argument is out of range; or, at the start of fit, something that it cannot work with.
    """

    restore_on_rollback = True

    def __init__(
        self,
        stash_only: int = 4,
        format: Literal["bfp", "affine"] = "bfp",
        box: Literal[16, 32, 64, 128] = 16,
        rounding: Literal["stochastic", "nearest"] = "stochastic",
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        by_kind: dict[str, int] | None = None,
        seed: int = 0,
    ) -> None:
        self.precision = StashPrecision(stash_only, format, box, rounding, cast(Any, by_kind or {}))
        self.include: Sequence[str] = KINDS if include is None else include
        self.exclude: Sequence[str] = exclude or []
        self.seed = seed
        self.stash: Stash | None = None
        self.patches: Patches | None = None
        self._module: weakref.ref[LightningModule] | None = None
        self._batches = 0
        self._last_step = 0
        self._told = False

    def describe_technique(self) -> list[tuple[str, str, str]]:
        """Return one row: what is packed, and how."""
        module = self._module() if self._module is not None else None
        counts = kinds_in(module, self.include, self.exclude) if module is not None else {}
        active = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "what autograd saves"
        return [("DynamicStashing", active, self.precision.describe())]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember what is going to be trained."""
        self._module = weakref.ref(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put forwards on the modules, once all strategies have done with them."""
        _check(trainer, pl_module)
        self._remove(trainer)
        self.stash = Stash(self.precision, self.seed, trainer.global_rank)
        self.patches = patch(pl_module, self.stash, self.include, self.exclude)
        plugin = trainer.precision_plugin
        inner = plugin.train_step_context

        @contextmanager
        def train_step_context() -> Iterator[None]:
            assert self.stash is not None
            with inner(), packed_by_hooks(self.stash):
                yield

        plugin.train_step_context = train_step_context  # type: ignore[method-assign]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log from where the run starts or goes on."""
        self._last_step = trainer.global_step
        self._told = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start a batch, whose noise is its own, within a window of accumulation too."""
        assert self.stash is not None
        self.stash.meter.measure_next = not self._told or self._is_logged(trainer)
        self.stash.begin_step(self._batches)
        self._batches += 1

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the tensor that was unpacked last."""
        assert self.stash is not None
        self.stash.forget()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say once what it amounts to, and log."""
        assert self.stash is not None
        meter = self.stash.meter
        raw, packed = meter.raw_bytes.total(), meter.packed_bytes.total()
        if not self._told and packed:
            self._told = True
            rank_zero_info(
                f"DynamicStashing: of {raw / MEGABYTE:.2f} MB that the first batch keeps for backward, "
                f"{packed / MEGABYTE:.2f} MB are left ({raw / packed:.1f} times smaller)"
            )
        if trainer.global_step == self._last_step:
            return
        logged = meter.measuring and self._is_logged(trainer)
        self._last_step = trainer.global_step
        if not logged:
            return
        scalars = {"stash/error": meter.error, "stash/peak_mb": meter.peak_bytes / MEGABYTE}
        for name, counts in (("raw", meter.raw_bytes), ("packed", meter.packed_bytes)):
            scalars[f"stash/{name}_mb"] = counts.total() / MEGABYTE
            scalars |= {f"stash/{name}_mb_{kind}": size / MEGABYTE for kind, size in counts.items()}
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in scalars.items()})
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=axis_step(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the modules their own forwards back."""
        self._remove(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the modules their own forwards back."""
        self._remove(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of batches so far, which is the clock of the noise."""
        return {"batches": self._batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        self._batches = int(state_dict["batches"])

    def _is_logged(self, trainer: Trainer) -> bool:
        """Whether the step that is being made is one that is logged."""
        every: int = cast(Any, trainer).log_every_n_steps
        return every > 0 and (axis_step(trainer) + 1) % every == 0

    def _remove(self, trainer: Trainer) -> None:
        if self.patches is not None:
            self.patches.remove()
            vars(trainer.precision_plugin).pop("train_step_context", None)
        self.patches = self.stash = None


def _check(trainer: Trainer, pl_module: LightningModule) -> None:
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
        raise InvalidArgumentError(
            f"strategy {type(trainer.strategy).__name__} is not supported by DynamicStashing, which has to tell "
            "parameters from activations: use ModelParallelStrategy (FSDP2) or DDP"
        )
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, ForwardOnlyOptimizer):
            raise InvalidArgumentError(
                f"the optimizer is {type(optimizer).__name__}, which has no backward pass to keep anything for: remove "
                "DynamicStashing"
            )
    callbacks: list[Callback] = cast(Any, trainer).callbacks
    if sum(isinstance(one, DynamicStashing) for one in callbacks) > 1:
        raise InvalidArgumentError("there are two DynamicStashing callbacks: give one all settings")
    for name, module in pl_module.named_modules():
        compiled = type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
        if compiled or (module is pl_module and getattr(pl_module, "_compiler_ctx", None) is not None):
            raise InvalidArgumentError(
                f"{name or type(pl_module).__name__} is compiled by torch.compile, which decides by itself what is "
                "kept for backward: remove torch.compile, or DynamicStashing"
            )
