"""StableSPAM: AdamW behind gradients that are clipped and normalized tensor by tensor (arXiv 2502.17055).

Differences from the authors' code, in both variants: averages of gradients are fp32 whatever the model's dtype;
``p.grad`` is only read; a gradient that is not finite reaches no average; every counter is saved, so a resumed run is
bit-exact; nothing waits for the device; bf16 weights are rounded stochastically; sharded parameters (FSDP2) are clipped
and normalized by the maximum and the norm of the whole.

``variant="paper"`` also mends what makes the published code behave unlike the paper: there the averages of AdaClip and
AdaGN lose their bias correction's clock at every momentum reset, which lifts the clipping threshold about a hundredfold
just when the paper wants it low; the step of the reset itself uses the old moments as if they were new; and the
schedule of β₁ and γ₁ climbs back after its end. ``variant="reference"`` does all of this as published, to compare with.

The AdamW step itself is that of :mod:`lowbit_lightning.kernels.solo` at 32 bits, with its fast paths.
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.kernels.philox import stream_id
from lowbit_lightning.kernels.solo import solo_step
from lowbit_lightning.kernels.solo_tensor import Part, SoloHyperparameters, SoloTensor
from lowbit_lightning.kernels.stable_spam import ada_clip, ada_gn
from lowbit_lightning.optim.base import LowBitOptimizer, ParamGroup, State, device_skips
from lowbit_lightning.optim.gradient_batch import GradientBatch
from lowbit_lightning.optim.matrix_layout import matrix_layout
from lowbit_lightning.optim.sharding import local, part, placed_like, zeros_beside
from lowbit_lightning.optim.solo_settings import adamw_hyperparameters

_stream_id = cache(stream_id)
_MOMENTS = ("exp_avg", "exp_avg_sq")
# Stabilized gradients exist in fp32 for so many elements at a time (64 MB), or for one tensor that is larger.
_BATCH_ELEMENTS = 2**24


class StableSPAM(LowBitOptimizer):
    """AdamW that spikes cannot shake: made for training in 4 bits and for high learning rates.

    Each tensor's gradient is clipped where it exceeds an average of its largest magnitudes (AdaClip), then divided by
    its norm and multiplied by a smoothed one (AdaGN), so that it has a norm of about 1; every ``reset_interval`` steps
    the moments start anew. Clipping by the Trainer (``gradient_clip_val``) adds nothing to it. To stabilize the
    gradients of another optimizer, use the callback GradientStabilizer.

    The state is AdamW's (8 bytes per parameter) and four numbers for each tensor, ``statistics``: how many gradients
    were averaged, the average of their largest magnitudes, of their norms, and of their squared norms.

    Args:
        params: parameters, named parameters or parameter groups, as for every torch optimizer.
        lr: learning rate; a float, or a one-element tensor that a scheduler changes in place.
        betas: decay of the first and second moment.
        eps: added to the denominator, of AdamW and of AdaGN.
        weight_decay: decoupled weight decay.
        gammas: decay of the averages of norms, of squared norms and of largest magnitudes. The paper's for 4-bit
            training; for bf16 training it takes (0.85, 0.99999, 0.999).
        reset_interval: steps between two momentum resets, 0 for none. The paper takes 500 in 4-bit training.
        schedule_steps: steps over which the first of ``betas`` and of ``gammas`` fall along a cosine to ``eta_min``
            times their value, where they stay; null leaves them as they are. Part of the published code, not of the
            paper.
        eta_min: where ``schedule_steps`` ends, in [0, 1].
        variant: ``"reference"`` repeats the published code, its momentum reset and its schedule included; see the top
            of the file.
        bf16_stochastic_rounding: write bf16 and fp16 weights with stochastic rounding instead of to nearest.
        seed: of the rounding noise.
        maximize: ascend instead of descend.

    Raises:
        InvalidArgumentError: an argument is outside its range; a ValueError that names argument, value and range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        gammas: tuple[float, float, float] = (0.7, 0.9, 0.999),
        reset_interval: int = 1000,
        schedule_steps: int | None = None,
        eta_min: float = 0.5,
        variant: Literal["paper", "reference"] = "paper",
        bf16_stochastic_rounding: bool = True,
        seed: int = 0,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "gammas": tuple(gammas),
            "reset_interval": reset_interval,
            "schedule_steps": schedule_steps,
            "eta_min": eta_min,
            "variant": variant,
            "bf16_stochastic_rounding": bf16_stochastic_rounding,
            "seed": seed,
            "maximize": maximize,
            "steps": 0,
            "nonfinite_skips": 0,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group, its settings and the sharding of its parameters checked."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["betas"], group["gammas"] = tuple(group["betas"]), tuple(group["gammas"])
        _check_settings(group)
        for own, name, param in self.named_params():
            if own is group and param.is_complex():
                raise InvalidArgumentError(
                    f"params: StableSPAM takes real parameters, {name!r} is complex; use view_as_real"
                )
            if own is group:
                part(param, name)

    def new_state(self, group: ParamGroup, name: str, param: Tensor, device: torch.device) -> State:
        """Return zero moments and averages of nothing yet."""
        # On CUDA it is the kernel that counts, so that the host need not wait to know which steps are skipped.
        counter_device = device if device.type == "cuda" else torch.device("cpu")
        return {
            "step": torch.zeros((), dtype=torch.float32, device=counter_device),
            "statistics": torch.zeros(4, dtype=torch.float32, device=device),
            **{key: zeros_beside(param, param.shape, torch.float32, device) for key in _MOMENTS},
        }

    def convert_state(self, group: ParamGroup, name: str, param: Tensor, saved: State) -> State | None:
        """Take over the moments of a torch Adam or AdamW."""
        if not {"step", *_MOMENTS} <= saved.keys() <= {"step", "statistics", *_MOMENTS}:
            return None
        if any(saved[key].shape != param.shape for key in _MOMENTS):
            return None
        state = self.new_state(group, name, param, param.device)
        state["step"].copy_(torch.as_tensor(saved["step"]))
        for key in _MOMENTS:
            local(state[key]).copy_(local(placed_like(saved[key].detach(), state[key], param.device)))
        return state

    def describe_technique(self) -> list[tuple[str, str, str]]:
        """Return a row for each group."""
        rows = []
        for group in self.param_groups:
            resets = f"reset every {group['reset_interval']} steps" if group["reset_interval"] else "no reset"
            gammas = "/".join(f"{gamma:g}" for gamma in group["gammas"])
            numel = sum(param.numel() for param in group["params"])
            active = f"{len(group['params'])} tensors, {numel:,} parameters"
            rows.append(("Stable-SPAM", active, f"{group['variant']}, γ {gammas}, {resets}"))
        return rows

    @torch.no_grad()
    def reset_momentum(self) -> None:
        """Start the moments anew, and their clock; the averages of gradients stay, and so does theirs."""
        for state in self.state.values():
            if state:
                _forget([state], *_MOMENTS, "step")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """Make one step; returns what ``closure`` returns.

        A tensor whose gradient holds a non-finite value, or whose squared norm is not finite, is left alone, parameter
        and averages, and ``nonfinite_skips`` of its group counts it.

        Raises:
            InvalidArgumentError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        names = {param: name for _, name, param in self.named_params()}
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None and param.numel()]
            if params:
                group["steps"] += 1
                self._step_group(group, params, names)
        return loss

    def _step_group(self, group: ParamGroup, params: list[Tensor], names: dict[Tensor, str]) -> None:
        for param in params:
            state = self.state[param]
            if not state:
                state.update(self.new_state(group, names[param], param, param.device))
            if param.is_cuda and not state["step"].is_cuda:  # loaded: checkpoints bring it to the CPU
                state["step"] = state["step"].to(param.device)
        states = [self.state[param] for param in params]
        is_reset, by_paper = _resets(group), group["variant"] == "paper"
        if is_reset and by_paper:
            _forget(states, *_MOMENTS, "step")
        elif is_reset:
            # One clock for all, and the moments only after they were used once more.
            _forget(states, "step")
            for state in states:
                state["statistics"][0] = 0
        for members in _batches(params):
            self._step_batch(group, members, [names[param] for param in members])
        if is_reset and not by_paper:
            _forget(states, *_MOMENTS)

    def _step_batch(self, group: ParamGroup, params: list[Tensor], names: list[str]) -> None:
        batch = GradientBatch(params, names)
        scale = schedule(group["steps"], group["schedule_steps"], group["eta_min"], group["variant"] == "paper")
        gamma1, gamma2, gamma3 = group["gammas"]
        statistics = [self.state[param]["statistics"] for param in params]
        before = torch.stack(statistics)
        count, clip_average, mean, mean_square = before.unbind(1)
        count = count + 1
        clip_average, limits = ada_clip(clip_average, count, batch.maxima, gamma3)
        batch.clip(limits)
        mean, mean_square, factors = ada_gn(mean, mean_square, count, batch.norms, gamma1 * scale, gamma2, group["eps"])
        batch.scale(factors)
        after = torch.stack([count, clip_average, mean, mean_square], dim=1)
        torch._foreach_copy_(statistics, torch.where(batch.usable[:, None], after, before).unbind(0))

        hyper = adamw_hyperparameters(group, beta1=float(group["betas"][0]) * scale)
        copies = batch.copies(self._memory(batch.numel, batch.grads[0].device))
        tensors = [
            self._tensor(param, name, grad, hyper, usable)
            for param, name, grad, usable in zip(params, names, copies, batch.usable, strict=True)
        ]
        for tensor, param in zip(tensors, params, strict=True):
            tensor.skips = device_skips(group, param)
        group["nonfinite_skips"] += sum(solo_step(tensors))

    def _tensor(self, param: Tensor, name: str, grad: Tensor, hyper: SoloHyperparameters, usable: Tensor) -> SoloTensor:
        """Return what to step of a parameter: all of it, this process's part, or a stand-in where that is empty."""
        state = {key: local(value) for key, value in self.state[param].items() if key != "statistics"}
        if not grad.numel():
            # One element that counts the steps of the others, or skips them: counters are saved by any one process.
            one = torch.where(usable, 1.0, math.nan).reshape(1)
            moments = {key: torch.zeros_like(one) for key in _MOMENTS}
            return SoloTensor(torch.zeros_like(one), one, {"step": state["step"], **moments}, hyper, 1, 1)
        cut, rows, columns, first_row = self._layout(param, name)
        return SoloTensor(
            local(param), grad, state, hyper, rows, columns,
            weight_stream=_stream_id(name, "weight"), first_row=first_row, cut=cut,
        )  # fmt: skip

    def _memory(self, numel: int, device: torch.device) -> Tensor:
        """Return memory for stabilized gradients, the same as before: fresh one is slow on a CPU, and on CUDA changes
        addresses that tables are made of. No state: copies make their own.
        """
        kept: dict[torch.device, Tensor] = self.__dict__.setdefault("_kept", {})
        if device in kept and len(kept[device]) >= numel:
            return kept[device]
        memory = torch.empty(numel, dtype=torch.float32, device=device)
        if numel <= _BATCH_ELEMENTS:
            kept[device] = memory
        return memory

    def _layout(self, param: Tensor, name: str) -> tuple[Part | None, int, int, int]:
        """Return :func:`.matrix_layout.matrix_layout` of a parameter; made once, but no state: copies make their own.

        The rows are those that SoloAdamW would see, so bf16 weights get the noise that they would get there.
        """
        layouts: dict[Tensor, tuple[Part | None, int, int, int]] = self.__dict__.setdefault("_layouts", {})
        if param not in layouts:
            layouts[param] = matrix_layout(param, name)
        return layouts[param]


def schedule(step: int, schedule_steps: int | None, eta_min: float, stays: bool) -> float:
    """Return what β₁ and γ₁ are multiplied with in a step (counted from 1): a cosine from 1 to ``eta_min``.

    Args:
        step: t.
        schedule_steps: its length; None for no schedule.
        eta_min: its end.
        stays: whether it stays at its end; published, it climbs back to 1 and falls again.
    """
    if schedule_steps is None:
        return 1.0
    if stays and step >= schedule_steps:
        return eta_min
    return eta_min + (1 - eta_min) * (1 + math.cos(math.pi * step / (schedule_steps + 1))) / 2


def _resets(group: ParamGroup) -> bool:
    """Whether the moments start anew in this step: after every full interval, or published, in its last step."""
    interval: int = group["reset_interval"]
    step: int = group["steps"]
    if not interval:
        return False
    return step > 1 and (step - 1) % interval == 0 if group["variant"] == "paper" else step % interval == 0


def _forget(states: list[State], *keys: str) -> None:
    for key in keys:
        torch._foreach_zero_([local(state[key]) for state in states])


def _batches(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the parameters of each device, as many at a time as their stabilized gradients may take memory."""
    devices: dict[torch.device, list[Tensor]] = {}
    for param in params:
        devices.setdefault(param.device, []).append(param)
    for members in devices.values():
        batch: list[Tensor] = []
        elements = 0
        for param in members:
            if batch and elements + param.numel() > _BATCH_ELEMENTS:
                yield batch
                batch, elements = [], 0
            batch.append(param)
            elements += param.numel()
        yield batch


def _check_settings(settings: ParamGroup) -> None:
    def require(name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise InvalidArgumentError(f"{name}={settings[name]!r} is out of range: {allowed}")

    def are_decays(name: str, count: int) -> bool:
        return len(settings[name]) == count and all(0 <= decay < 1 for decay in settings[name])

    interval, length = settings["reset_interval"], settings["schedule_steps"]
    require("lr", float(settings["lr"]) >= 0, "a number >= 0")
    require("betas", are_decays("betas", 2), "two numbers in [0, 1)")
    require("eps", settings["eps"] >= 0, "a number >= 0")
    require("weight_decay", settings["weight_decay"] >= 0, "a number >= 0")
    require("gammas", are_decays("gammas", 3), "three numbers in [0, 1)")
    require("reset_interval", isinstance(interval, int) and interval >= 0, "an integer >= 0, 0 for no reset")
    require("schedule_steps", length is None or (isinstance(length, int) and length >= 1), "an integer >= 1, or None")
    require("eta_min", 0 <= settings["eta_min"] <= 1, "a number in [0, 1]")
    require("variant", settings["variant"] in ("paper", "reference"), "paper or reference")
