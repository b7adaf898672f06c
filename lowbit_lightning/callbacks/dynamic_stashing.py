"""DynamicStashing: what a forward pass keeps for backward, in few bits, on any LightningModule.

DSQ (arXiv 2303.05295) names what is kept the *stash* and quantizes it. The paper simulates; here it is really packed,
so memory really falls. By default that is all: forward is exact, to the bit, and only gradients see the rounding. With
``levels`` or ``preset`` the operands of the linear layers' GEMMs are quantized too, as in the paper. Either way bits
rise while a run goes on. The machinery is in :mod:`lowbit_lightning.stash`.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info

from lowbit_lightning.callbacks.memory_ledger import MEGABYTE
from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.optim.forward_only import ForwardOnlyOptimizer
from lowbit_lightning.spikes.recorder import axis_step
from lowbit_lightning.stash import KINDS, Kind, Patches, Stash, StashPrecision, kinds_in, packed_by_hooks, patch
from lowbit_lightning.stash.budget import HIGHEST_BITS, bits_within, lowest_bits
from lowbit_lightning.stash.dsq_linear import DSQLinearForward, GemmPrecision
from lowbit_lightning.stash.levels import PlateauRule, parse_levels
from lowbit_lightning.stash.schedule import PrecisionSchedule

MISSED_VALIDATION = "dynamic_stashing_missed_validation"
"""Of a checkpoint: whether a validation followed it. No state, which a rollback would bring back."""


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
    the relative error of rounding, √(Σ‖x − x̂‖² / Σ‖x‖²). Also ``dsq/level`` (from 0), its ``dsq/q0`` to ``dsq/q3``,
    ``dsq/gradient_error``, that of one linear layer's weight, the layers taking turns, and, **modelled** by
    :func:`~lowbit_lightning.kernels.dsq.linear_cost`, how many times less arithmetic and memory traffic than in 16 bits
    the linear layers would have needed so far: ``dsq/arithmetic_ratio`` and ``dsq/dram_ratio``.

    Precision rises one level when the monitored metric has stopped improving, and never falls; SpikeGuard's
    ``raise_precision`` raises it too.

    Args:
        stash_only: bits of what is kept, 2 to 8, 16 or 32 (not packed), one number or one for each level, rising; null,
            without ``levels`` and ``preset``, is [4, 8]. Inputs of norms, hidden states of the loss and what hooks pack
            get 8 at least.
        levels: instead, [q0, q1, q2, q3] for each level: bits of both inputs of the forward GEMM, of what is kept, of
            the operands of the backward GEMMs, and of the outgoing gradient; 32 is not quantized. Validation is exact.
        preset: instead, ``paper``: [2, 2, 2, 16], [4, 4, 4, 16], [8, 4, 4, 16], [16, 4, 4, 16], for training from
            scratch: 2 bits in forward destroy what a trained model knows, and cost a new one many steps, see README.
        monitor: metric that the validation logs, by which the level rises; needed where there are several levels.
        mode: whether ``min`` or ``max`` of it is better.
        patience: validations in a row without an improvement that it takes to rise.
        min_delta: what counts as an improvement must be at least so large. In a run whose metric always improves a
            little, above all one whose learning rate decays, it decides how long the lower levels last.
        max_degradation: a validation that is worse than the best one by more than this share of it raises the level at
            once.
        max_gradient_error: a ``dsq/gradient_error`` above it raises the level at once.
        format: ``bfp``, block floating point, or ``affine``, levels between a minimum and a maximum: unbiased also at 2
            bits, where ``bfp`` clips; choose longer boxes with it.
        box: elements that share a scale, 16, 32, 64 or 128.
        rounding: ``stochastic`` (unbiased) or ``nearest`` (a smaller error; q0 always is).
        include: kinds of tensors (linear, attention, activation, norm, convolution, loss, other), and patterns for
            names or classes of modules, such as ``"*.layers.0"`` or ``LlamaMLP``, outside which nothing is packed.
        exclude: likewise, what is not packed.
        by_kind: bits of single kinds in place of ``stash_only``, such as ``{attention: 8}``.
        budget_mb: megabytes (10^6 bytes) that a batch may keep. Bits of linear, attention, activation and convolution,
            2 to 8, are then chosen for the least error of gradients, by what the first batch keeps, and anew when a
            batch keeps more. In place of ``stash_only``, ``levels``, ``preset`` and ``by_kind``.
        seed: of the noise of stochastic rounding.

    Raises:
        InvalidArgumentError: an argument is out of range; or, at the start of fit, something that it cannot work with.
    """

    restore_on_rollback = True

    def __init__(
        self,
        stash_only: int | list[int] | None = None,
        levels: list[list[int]] | None = None,
        preset: Literal["paper"] | None = None,
        monitor: str = "val_loss",
        mode: Literal["min", "max"] = "min",
        patience: int = 1,
        min_delta: float = 0.0,
        max_degradation: float | None = None,
        max_gradient_error: float | None = None,
        format: Literal["bfp", "affine"] = "bfp",
        box: Literal[16, 32, 64, 128] = 16,
        rounding: Literal["stochastic", "nearest"] = "stochastic",
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        by_kind: dict[str, int] | None = None,
        budget_mb: float | None = None,
        seed: int = 0,
    ) -> None:
        if budget_mb is not None:
            if not budget_mb > 0 or any(one is not None for one in (stash_only, levels, preset, by_kind)):
                raise InvalidArgumentError(
                    f"budget_mb={budget_mb!r} is a number above 0 from which all bits are chosen: leave out "
                    "stash_only, levels, preset and by_kind"
                )
            stash_only, by_kind = HIGHEST_BITS, cast(Any, lowest_bits())
        self.budget_mb = budget_mb
        self._has_chosen = False
        rule = PlateauRule(parse_levels(levels, preset, stash_only), mode, patience, min_delta, max_degradation)
        self.schedule = PrecisionSchedule(rule, monitor, max_gradient_error)
        self.precision = StashPrecision(rule.level.q1, format, box, rounding, cast(Any, by_kind or {}))
        self.gemms = GemmPrecision(rule.level, box, format, rounding)
        self.include: Sequence[str] = KINDS if include is None else include
        self.exclude: Sequence[str] = exclude or []
        self.seed = seed
        self.stash: Stash | None = None
        self.patches: Patches | None = None
        self._module: weakref.ref[LightningModule] | None = None
        self._batches = 0
        self._last_step = 0
        self._told = False
        self._result = ""

    def describe_result(self) -> list[tuple[str, str]]:
        """Return one row for the summary after a run: what the last batch that was logged kept."""
        return [("stash", self._result)] if self._result else []

    def describe_technique(self) -> list[tuple[str, str, str]]:
        """Return one row: what is packed, and how."""
        module = self._module() if self._module is not None else None
        counts = kinds_in(module, self.include, self.exclude) if module is not None else {}
        active = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "what autograd saves"
        return [("DynamicStashing", active, f"{self.schedule.describe()}; now {self.precision.describe()}")]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember what is going to be trained, and start at the lowest level; a checkpoint is loaded later."""
        self._module = weakref.ref(pl_module)
        if stage == "fit" and trainer.global_step == 0:
            self.schedule.reset()
            self._choose({})
            self._set_level()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put forwards on the modules, once all strategies have done with them."""
        _check(trainer, pl_module)
        self.schedule.check(trainer)
        self._remove(trainer)
        self.stash = Stash(self.precision, self.seed, trainer.global_rank)
        self.gemms = GemmPrecision(
            self.schedule.level, self.precision.box, self.precision.format, self.precision.rounding
        )
        linear = partial(DSQLinearForward, precision=self.gemms)
        self.patches = patch(pl_module, self.stash, self.include, self.exclude, linear)
        plugin = trainer.precision_plugin
        inner = plugin.train_step_context

        @contextmanager
        def train_step_context() -> Iterator[None]:
            assert self.stash is not None
            with inner(), packed_by_hooks(self.stash):
                yield

        plugin.train_step_context = train_step_context  # type: ignore[method-assign]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log from where the run starts or goes on, at the level that an uninterrupted run would have."""
        self._last_step = trainer.global_step
        self._told = False
        self.schedule.catch_up(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start a batch, whose noise is its own, within a window of accumulation too."""
        assert self.stash is not None
        self.stash.meter.measure_next = not self._told or self._is_logged(trainer)
        self.stash.begin_step(self._batches)
        self.gemms.turn = trainer.global_step // max(1, cast(Any, trainer).log_every_n_steps)
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
        self.schedule.spend(self.gemms)
        meter = self.stash.meter
        raw, packed = meter.raw_bytes.total(), meter.packed_bytes.total()
        self._keep_to_budget(packed)
        if not self._told and packed:
            self._told = True
            rank_zero_info(f"DynamicStashing: the first batch keeps {_amounts(raw, packed)}")
        if trainer.global_step == self._last_step:
            return
        logged = meter.measuring and self._is_logged(trainer)
        self._last_step = trainer.global_step
        if not logged:
            return
        self._result = _amounts(raw, packed)
        scalars = {"stash/error": meter.error, "stash/peak_mb": meter.peak_bytes / MEGABYTE}
        for name, counts in (("raw", meter.raw_bytes), ("packed", meter.packed_bytes)):
            scalars[f"stash/{name}_mb"] = counts.total() / MEGABYTE
            scalars |= {f"stash/{name}_mb_{kind}": size / MEGABYTE for kind, size in counts.items()}
        scalars |= self.schedule.scalars()
        error = None if self.gemms.gradient_error is None else float(self.gemms.gradient_error)
        if error is not None:
            scalars["dsq/gradient_error"] = error
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in scalars.items()})
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=axis_step(trainer))
        self._rise(self.schedule.after_sample(trainer, error))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go one level up if it is time; a sanity check is no validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._rise(self.schedule.after_validation(trainer))

    def raise_precision(self) -> bool:
        """Go one level up for good, if there is one, and return whether there was; on every rank."""
        raised = self.schedule.rule.rise(for_good=True)
        self._set_level()
        return raised

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note whether a validation follows that a resumed run would leave out."""
        checkpoint[MISSED_VALIDATION] = self.schedule.validation_follows(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """See to it that it is not left out."""
        self.schedule.validation_missed = checkpoint.get(MISSED_VALIDATION, False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the modules their own forwards back."""
        self._remove(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the modules their own forwards back."""
        self._remove(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the level and how it came about, and the number of batches so far, the clock of the noise."""
        by_kind = dict(self.precision.by_kind) if self._has_chosen else {}
        return {"batches": self._batches, "schedule": self.schedule.state_dict(), "by_kind": by_kind}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        self._batches = int(state_dict["batches"])
        self._choose(state_dict["by_kind"])
        self.schedule.load_state_dict(state_dict["schedule"])
        self._set_level()

    def _choose(self, by_kind: dict[Kind, int]) -> None:
        """Use bits that were chosen for the budget; none are those of a run that has not begun."""
        if self.budget_mb is not None:
            self._has_chosen = bool(by_kind)
            self.precision.by_kind = dict(by_kind) or lowest_bits()

    def _keep_to_budget(self, packed: int) -> None:
        """Choose bits after the first batch, and after one that kept too much."""
        if self.budget_mb is None or (self._has_chosen and packed <= self.budget_mb * MEGABYTE):
            return
        assert self.stash is not None
        chosen = bits_within(self.budget_mb * MEGABYTE, packed, self.stash.meter.elements, self.precision.by_kind)
        if not self._has_chosen and chosen == lowest_bits() and packed > self.budget_mb * MEGABYTE:
            raise InvalidArgumentError(
                f"budget_mb={self.budget_mb} is out of range: this batch keeps {packed / MEGABYTE:.2f} MB at the "
                "fewest bits. Allow as much, or make the batch smaller"
            )
        self._has_chosen = True
        if chosen != self.precision.by_kind:
            self.precision.by_kind = chosen
            rank_zero_info(f"DynamicStashing: budget_mb={self.budget_mb} gives {self.precision.describe()}")

    def _rise(self, reason: str | None) -> None:
        """Tell of a level that has risen, and use it."""
        if reason is not None:
            self._set_level()
            rank_zero_info(f"DynamicStashing goes up to {self.schedule.level}: {reason}")

    def _set_level(self) -> None:
        self.precision.bits = self.schedule.level.q1
        self.gemms.set_level(self.schedule.level)

    def _is_logged(self, trainer: Trainer) -> bool:
        """Whether the step that is being made is one that is logged."""
        every: int = cast(Any, trainer).log_every_n_steps
        return every > 0 and (axis_step(trainer) + 1) % every == 0

    def _remove(self, trainer: Trainer) -> None:
        if self.patches is not None:
            self.patches.remove()
            vars(trainer.precision_plugin).pop("train_step_context", None)
        self.patches = self.stash = None


def _amounts(raw: int, packed: int) -> str:
    times = f" ({raw / packed:.1f} times smaller)" if packed else ""
    return f"{packed / MEGABYTE:.2f} MB for backward instead of {raw / MEGABYTE:.2f} MB{times}"


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
    for name, module in pl_module.named_modules():
        compiled = type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
        if compiled or (module is pl_module and getattr(pl_module, "_compiler_ctx", None) is not None):
            raise InvalidArgumentError(
                f"{name or type(pl_module).__name__} is compiled by torch.compile, which decides by itself what is "
                "kept for backward: remove torch.compile, or DynamicStashing"
            )
