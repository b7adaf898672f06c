"""GradientStabilizer: what keeps spikes out of an optimizer, in front of any optimizer.

Stable-SPAM (arXiv 2502.17055) is AdamW behind two rules for gradients and a momentum reset. Here they are without the
AdamW: for optimizers with low-bit states, for Muon or Lion, for the optimizer that a module brings along. The rules
themselves are in :mod:`lowbit_lightning.optim.gradient_rules`.

They see gradients as the optimizer would: accumulated, reduced over ranks, unscaled. SpikeMonitor and SpikeGuard see
them first, and a step that the guard leaves out reaches no average.
"""

import inspect
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lowbit_lightning.callbacks.spike_guard import SpikeGuard
from lowbit_lightning.callbacks.spike_injector import SpikeInjector
from lowbit_lightning.callbacks.spike_monitor import SpikeMonitor
from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.optim import LowBitOptimizer
from lowbit_lightning.optim.forward_only import ForwardOnlyOptimizer
from lowbit_lightning.optim.gradient_batch import GradientBatch
from lowbit_lightning.optim.gradient_rules import RULES, GradientRule, global_norm
from lowbit_lightning.spikes.momentum import reset_momentum
from lowbit_lightning.spikes.recorder import axis_step

_STABLE_SPAM = ("ada_clip", "ada_gn", "momentum_reset")


class MomentumReset:
    """Let the optimizer forget its averages now and then.

    Args:
        every_n_steps: steps between two resets.
    """

    def __init__(self, every_n_steps: int = 1000) -> None:
        if every_n_steps < 1:
            raise InvalidArgumentError(
                f"rules: momentum_reset.every_n_steps={every_n_steps!r} is out of range: an integer >= 1"
            )
        self.every_n_steps = every_n_steps
        self.steps: dict[str, int] = {}

    def is_due(self, place: str) -> bool:
        """Count a step of the optimizer and return whether its averages are to be reset before it."""
        step = self.steps[place] = self.steps.get(place, 0) + 1
        return step > 1 and (step - 1) % self.every_n_steps == 0

    def describe(self) -> str:
        """Return how often."""
        return f"every {self.every_n_steps} steps"

    def state_dict(self) -> dict[str, int]:
        """Return the steps counted, by optimizer."""
        return dict(self.steps)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on with what ``state_dict`` returned."""
        self.steps = dict(state)


class GradientStabilizer(Callback):
    """Clip and normalize gradients before any optimizer steps, by what they were like before.

    Rules are applied in the order given; each is a name, or a name with settings such as ``ada_clip: {gamma: 0.999}``:

    - ``ada_clip`` (``gamma`` 0.999) scales down elements above an average of their tensor's largest magnitudes;
    - ``ada_gn`` (``gamma1`` 0.7, ``gamma2`` 0.9, ``eps`` 1e-8) gives every tensor's gradient a norm of about 1, so use
      it with optimizers that ignore a factor, as Adam's family does, and without ``gradient_clip_val``;
    - ``momentum_reset`` (``every_n_steps`` 1000) lets the optimizer forget its averages;
    - ``zclip`` (``alpha`` 0.97, ``z_threshold`` 2.5, ``warmup_steps`` 25, ``max_norm`` 1.0) scales all gradients down
      together where their norm is an outlier;
    - ``ada_gc`` (``relative`` 1.05, ``beta`` 0.98, ``absolute`` 1.0, ``warmup_steps`` 100) scales a tensor's gradient
      down where its norm is above an average;
    - ``spam_clip`` (``threshold`` 5000, ``warmup_steps`` 20) clips elements far above Adam's second moment of them.

    A tensor whose gradient is not finite is not stepped, reaches no average, and is counted. Every
    ``trainer.log_every_n_steps``, ``stabilizer/clipped_share`` (tensors with something clipped, since the last time),
    ``stabilizer/norm_before`` and ``norm_after`` (global), ``stabilizer/resets`` and ``stabilizer/nonfinite`` (so far)
    go to every logger and to ``trainer.callback_metrics``, where other callbacks can watch them.

    Works under automatic and manual optimization, accumulation, DDP, FSDP2 and every precision.

    Args:
        rules: Stable-SPAM's when null: ``[ada_clip, ada_gn, momentum_reset]``.

    Raises:
        InvalidArgumentError: a rule or a setting that does not exist or is out of range; or, at the start of fit, a
            strategy or an optimizer whose gradients it cannot see.
    """

    restore_on_rollback = True

    def __init__(self, rules: list[str | dict[str, Any]] | None = None) -> None:
        self.rules = _rules(list(_STABLE_SPAM) if rules is None else rules)
        self.resets = 0
        self._nonfinite = 0
        self._seen: dict[str, _Seen] = {}
        self._last_step = 0
        self._told = False

    def describe_technique(self) -> list[tuple[str, str, str]]:
        """Return one row: the rules and their settings."""
        rules = ", ".join(f"{name} ({rule.describe()})" for name, rule in self.rules.items())
        return [("GradientStabilizer", "all gradients", rules)]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the place behind whatever looks at gradients first."""
        if stage == "fit":
            # A new list, because Lightning is going through the old one.
            cast(Any, trainer).callbacks = _in_order(cast(Any, trainer).callbacks)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot work, and say what has no effect."""
        _check(trainer)
        limit = trainer.gradient_clip_val
        if limit is not None and "ada_gn" in self.rules:
            rank_zero_info(
                f"gradient_clip_val={limit} has no useful effect after ada_gn: by then every tensor's gradient has a "
                "norm of about 1, and optimizers of Adam's family ignore a factor. Remove gradient_clip_val."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from where the run starts or goes on."""
        self._last_step = trainer.global_step
        self._seen.clear()

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Apply the rules to what the optimizer is about to use."""
        index = next((i for i, one in enumerate(trainer.optimizers) if one is optimizer), 0)
        named = [
            (name, param)
            for name, param in _named(pl_module, optimizer, index)
            if param.grad is not None and param.numel()
        ]
        if not named:  # SpikeGuard leaves this step out
            return
        batch = GradientBatch([param for _, param in named], [name for name, _ in named])
        before = global_norm(batch)
        for rule in self.rules.values():
            if isinstance(rule, GradientRule):
                rule.apply(batch, optimizer, str(index))
            elif rule.is_due(str(index)):
                self._reset(optimizer)
        batch.write()
        self._note(trainer, index, batch, before)
        if not isinstance(optimizer, LowBitOptimizer):  # ours leave such a tensor out by themselves, without a wait
            for param, usable in zip(batch.params, batch.usable.tolist(), strict=True):
                if not usable:
                    param.grad = None

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what was done, every ``trainer.log_every_n_steps``."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        every: int = cast(Any, trainer).log_every_n_steps
        if not self._seen or every < 1 or (axis_step(trainer) + 1) % every != 0:
            return
        self._nonfinite = self._count_nonfinite()
        scalars = {"stabilizer/resets": float(self.resets), "stabilizer/nonfinite": float(self._nonfinite)}
        for suffix, seen in self._seen.items():
            scalars[f"stabilizer/clipped_share{suffix}"] = float(seen.clipped) / seen.tensors
            scalars[f"stabilizer/norm_before{suffix}"] = float(seen.norm_before)
            scalars[f"stabilizer/norm_after{suffix}"] = float(seen.norm_after)
        self._seen.clear()
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in scalars.items()})
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=axis_step(trainer))

    def state_dict(self) -> dict[str, Any]:
        """Return the averages of every rule by the parameters' names, and counts; plain values."""
        return {
            "rules": {name: rule.state_dict() for name, rule in self.rules.items()},
            "resets": self.resets,
            "nonfinite": self._count_nonfinite(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken. A rule that was not there then starts anew."""
        for name, rule in self.rules.items():
            rule.load_state_dict(state_dict["rules"].get(name, {}))
        self.resets = int(state_dict["resets"])
        self._nonfinite = int(state_dict["nonfinite"])
        self._seen.clear()

    def _reset(self, optimizer: Optimizer) -> None:
        if reset_momentum(optimizer):
            self.resets += 1
        elif not self._told:
            self._told = True
            rank_zero_warn(f"momentum_reset has nothing to reset: {type(optimizer).__name__} keeps no averages")

    def _note(self, trainer: Trainer, index: int, batch: GradientBatch, before: Tensor) -> None:
        seen = self._seen.setdefault("" if len(trainer.optimizers) == 1 else f"_{index}", _Seen())
        seen.tensors += len(batch.params)
        seen.clipped = seen.clipped + batch.clipped.sum()
        seen.nonfinite = seen.nonfinite + (~batch.usable).sum()
        seen.norm_before, seen.norm_after = before, global_norm(batch)

    def _count_nonfinite(self) -> int:
        return self._nonfinite + sum(int(seen.nonfinite) for seen in self._seen.values())


class _Seen:
    """What is to be logged of an optimizer's steps, on the device until then; norms are those of the last step."""

    def __init__(self) -> None:
        self.tensors = 0
        self.clipped: Tensor | int = 0
        self.nonfinite: Tensor | int = 0
        self.norm_before: Tensor | float = math.nan
        self.norm_after: Tensor | float = math.nan


def _named(pl_module: LightningModule, optimizer: Optimizer, index: int) -> list[tuple[str, Tensor]]:
    names: dict[Tensor, str] = {param: name for name, param in pl_module.named_parameters()}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [(names.get(param, f"optimizer{index}.{i}"), param) for i, param in enumerate(params)]


def _rules(asked: list[str | dict[str, Any]]) -> dict[str, GradientRule | MomentumReset]:
    kinds: dict[str, type[GradientRule] | type[MomentumReset]] = {**RULES, "momentum_reset": MomentumReset}
    made: dict[str, GradientRule | MomentumReset] = {}
    for entry in asked:
        named: dict[str, Any] = entry if isinstance(entry, dict) else {entry: None}
        for name, settings in named.items():
            if name not in kinds:
                raise InvalidArgumentError(f"rules: there is no {name!r}; choose from {', '.join(kinds)}")
            if name in made:
                raise InvalidArgumentError(f"rules: {name!r} is there twice")
            made[name] = _made(name, kinds[name], settings)
    if not made:
        raise InvalidArgumentError(f"rules={asked!r} is out of range: at least one of {', '.join(kinds)}")
    return made


def _made(name: str, kind: type[GradientRule] | type[MomentumReset], settings: Any) -> GradientRule | MomentumReset:
    known = {key: parameter.default for key, parameter in inspect.signature(kind).parameters.items()}
    if not isinstance(settings, dict | None):
        raise InvalidArgumentError(f"rules: {name}={settings!r} is no mapping of settings, such as {known}")
    for key, value in (settings or {}).items():
        if key not in known:
            raise InvalidArgumentError(f"rules: {name} has no setting {key!r}; it has {', '.join(known)}")
        whole = isinstance(known[key], int)
        nullable = name == "zclip" and key == "max_norm"
        numbers = (int,) if whole else (int, float)
        if isinstance(value, bool) or not (isinstance(value, numbers) or (value is None and nullable)):
            kind_of_number = "an integer" if whole else "a number"
            raise InvalidArgumentError(f"rules: {name}.{key}={value!r} is not {kind_of_number}")
    return kind(**(settings or {}))


def _in_order(callbacks: list[Callback]) -> list[Callback]:
    """Put stabilizers right behind the last of what breaks gradients, looks at them, or leaves them out."""
    first = [i for i, one in enumerate(callbacks) if isinstance(one, SpikeInjector | SpikeMonitor | SpikeGuard)]
    last = max(first, default=-1)
    early = [one for one in callbacks[: last + 1] if isinstance(one, GradientStabilizer)]
    return [one for one in callbacks[: last + 1] if one not in early] + early + callbacks[last + 1 :]


def _check(trainer: Trainer) -> None:
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
        raise InvalidArgumentError(
            f"strategy {type(trainer.strategy).__name__} hides parameters in flat pieces, of which GradientStabilizer "
            "cannot tell one tensor from another: use ModelParallelStrategy (FSDP2) or DDP"
        )
    for optimizer in trainer.optimizers:
        name = type(optimizer).__name__
        if isinstance(optimizer, ForwardOnlyOptimizer):
            raise InvalidArgumentError(
                f"the optimizer is {name}, which computes no gradients to stabilize: remove GradientStabilizer"
            )
        unscales_itself = getattr(optimizer, "_step_supports_amp_scaling", False)
        if unscales_itself and getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise InvalidArgumentError(
                f"the optimizer is a fused {name}, which takes the gradient scaler's factor off itself, after "
                "GradientStabilizer: set fused=False, or use bf16-mixed"
            )
