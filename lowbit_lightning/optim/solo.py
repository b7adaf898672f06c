"""SoloAdamW: AdamW with 2- to 8-bit states (SOLO, arXiv 2505.00347), stepped by :mod:`lowbit_lightning.kernels.solo`.

Differences from the authors' code: states are plain tensors that survive saving and loading, 3-bit codes take 3 bits,
blocks never cross rows (so precision does not depend on how a tensor is sharded), blocks with many zeros are decoded
correctly, noise is a function of (seed, parameter name, step) so that a resumed run is bit-exact, bf16 weights are
rounded stochastically, and β₁ is adjusted to the bits by default. With FSDP2 every process steps its own rows, to the
same bits as a single process would.
"""

from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.kernels.elementary import LARGEST_SQUARABLE
from lowbit_lightning.kernels.philox import stream_id
from lowbit_lightning.kernels.solo import dequantize_moments, quantize_moments, solo_step
from lowbit_lightning.kernels.solo_tensor import SoloTensor, row_bytes
from lowbit_lightning.optim.base import LowBitOptimizer, ParamGroup, State, device_skips
from lowbit_lightning.optim.matrix_layout import matrix_layout, matrix_shape, matrix_views, own_shard
from lowbit_lightning.optim.sharding import (
    agreed_gradients,
    cut_dimensions,
    is_dtensor,
    local,
    part,
    placed_like,
    zeros_beside,
)
from lowbit_lightning.optim.solo_settings import (
    OVERRIDABLE,
    SCALE_DTYPES,
    adjusted_beta1,
    check_settings,
    hyperparameters,
    normalized_overrides,
)

# Narrower rows would pay more for block scales than for codes (LoRA's B, depthwise convolutions).
_MIN_COLUMNS = 64


class SoloAdamW(LowBitOptimizer):
    """AdamW with its moments in 2 to 8 bits: 0.84 bytes of state per parameter at the default 4/2 bits instead of 8.

    Use it wherever AdamW is used. Expect the least from it on embeddings whose rows are rarely hit: keep those at
    8 bits through ``overrides`` (which needs named parameters: pass ``model.named_parameters()``).

    Parameters may be divided among processes by FSDP2's ``fully_shard`` or along their first dimension by tensor
    parallelism. Those divided along another dimension need ``bits`` of (32, 32).

    Args:
        params: parameters, named parameters or parameter groups, as for every torch optimizer.
        lr: learning rate; a float, or a one-element tensor that a scheduler changes in place.
        betas: decay of the first and second moment. The first is lowered for low bits, see ``reference_bits``.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        bits: bits of the (first, second) moment, each 2, 3, 4, 8 or 32; 32 keeps fp32.
        block_size: elements that share a scale, a multiple of 8.
        quantile: share of a block that lies below the second moment's last level, in [0, 1).
        reference_bits: the first moment may be as noisy as this many bits are at the β₁ asked for; 2 to 8, or null
            to leave β₁ alone.
        stochastic_rounding: round the second moment stochastically; without it a decay near 1 never shows.
        bf16_stochastic_rounding: write bf16 and fp16 weights with stochastic rounding instead of to nearest.
        min_numel: tensors with fewer elements keep fp32 states, as do vectors and rows narrower than 64.
        overrides: settings by parameter-name pattern, for example ``{"*embed*": {"bits": [8, 8]}}``; the first
            pattern that matches wins.
        scale_dtype: ``"bf16"`` keeps the scales of blocks in bf16, which saves 0.047 bytes a parameter at
            ``block_size`` 128: 0.80 at 4/2 bits, 0.55 at 2/2. The second moment's are rounded stochastically too, and
            without ``stochastic_rounding`` move in steps of 0.4 to 0.8 % only.
        seed: of the rounding noise.
        maximize: ascend instead of descend.

    Raises:
        InvalidArgumentError: an argument is outside its range; a ValueError that names argument, value and range. Or
            the blocks of a parameter, which is named, would be divided among processes.
    """

    _plans: list["_GroupPlan"]
    layout_keys = ("bits", "block_size", "min_numel", "overrides", "scale_dtype")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        bits: tuple[int, int] = (4, 2),
        block_size: int = 128,
        quantile: float = 0.1,
        reference_bits: int | None = 5,
        stochastic_rounding: bool = True,
        bf16_stochastic_rounding: bool = True,
        min_numel: int = 4096,
        overrides: dict[str, dict[str, Any]] | None = None,
        scale_dtype: Literal["fp32", "bf16"] = "fp32",
        seed: int = 0,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "bits": tuple(bits),
            "block_size": block_size,
            "quantile": quantile,
            "reference_bits": reference_bits,
            "stochastic_rounding": stochastic_rounding,
            "bf16_stochastic_rounding": bf16_stochastic_rounding,
            "min_numel": min_numel,
            "overrides": normalized_overrides(overrides),
            "scale_dtype": scale_dtype,
            "seed": seed,
            "maximize": maximize,
            "nonfinite_skips": 0,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group, its settings and the sharding of its parameters checked."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["bits"], group["betas"] = tuple(group["bits"]), tuple(group["betas"])
        check_settings(group)
        for pattern, settings in group["overrides"].items():
            check_settings(group | settings, f"overrides[{pattern!r}].")
        if group["overrides"] and "param_names" not in group:
            raise InvalidArgumentError(
                f"overrides={group['overrides']!r} matches parameters by name, but this optimizer was given none: "
                "pass model.named_parameters(), or use LowBitCLI, which does"
            )
        for param in group["params"]:
            if param.is_complex():
                raise InvalidArgumentError(
                    "params: SoloAdamW takes real parameters, got a complex one; use view_as_real"
                )
        if any(map(is_dtensor, group["params"])):
            for own, name, param in self.named_params():
                if own is group:
                    self._check_sharding(group, name, param)

    def _check_sharding(self, group: ParamGroup, name: str, param: Tensor) -> None:
        part(param, name)
        cut = cut_dimensions(param)
        if cut and self.settings(group, name, param)["bits"] != (32, 32):
            raise InvalidArgumentError(
                f"parameter {name!r} of shape {tuple(param.shape)} is divided among processes along dimension "
                f"{cut[0]}, which would cut the blocks of its low-bit states: divide it along dimension 0 (as "
                "fully_shard and ColwiseParallel do), or keep its states in fp32 with "
                f"overrides={{{name!r}: {{'bits': [32, 32]}}}}"
            )

    def settings(self, group: ParamGroup, name: str, param: Tensor) -> ParamGroup:
        """Return the group's settings with this parameter's overrides, and (32, 32) bits where it stays in fp32."""
        override: ParamGroup = next((s for pattern, s in group["overrides"].items() if fnmatch(name, pattern)), {})
        settings = group | override
        if param.ndim < 2 or param.numel() < settings["min_numel"] or matrix_shape(param.shape)[1] < _MIN_COLUMNS:
            settings["bits"] = (32, 32)
        return settings

    def new_state(self, group: ParamGroup, name: str, param: Tensor, device: torch.device) -> State:
        """Return zero moments, see :mod:`lowbit_lightning.kernels.solo` for the tensors."""
        settings = self.settings(group, name, param)
        (rows, columns), block_size = matrix_shape(param.shape), settings["block_size"]
        blocks, scale_dtype = -(-columns // block_size), SCALE_DTYPES[settings["scale_dtype"]]
        # On CUDA it is the kernel that counts, so that the host need not wait to know which steps are skipped.
        counter_device = device if device.type == "cuda" else torch.device("cpu")
        state = {"step": torch.zeros((), dtype=torch.float32, device=counter_device)}
        for key, bits in zip(("exp_avg", "exp_avg_sq"), settings["bits"], strict=True):
            if bits == 32:
                state[key] = zeros_beside(param, param.shape, torch.float32, device)
                continue
            packed = row_bytes(columns, block_size, bits)
            state[f"{key}_codes"] = zeros_beside(param, (rows, packed), torch.uint8, device)
            state[f"{key}_scale"] = zeros_beside(param, (rows, blocks), scale_dtype, device)
        if "exp_avg_sq_codes" in state:
            state["exp_avg_sq_log2_base"] = zeros_beside(param, (rows, blocks), scale_dtype, device)
        return state

    def convert_state(self, group: ParamGroup, name: str, param: Tensor, saved: State) -> State | None:
        """Quantize the state of a torch Adam or AdamW."""
        # A whole state that distributed checkpointing loads comes with this optimizer's own empty tensors beside it.
        theirs, own = {"step", "exp_avg", "exp_avg_sq"}, self.new_state(group, name, param, torch.device("meta"))
        if not theirs <= set(saved) <= theirs | set(own) or saved["exp_avg"].shape != param.shape:
            return None
        settings = self.settings(group, name, param)
        state = self.new_state(group, name, param, param.device)
        state["step"].copy_(torch.as_tensor(saved["step"]))
        shape = matrix_shape(local(param).shape)
        whole = zeros_beside(param, param.shape, torch.float32, torch.device("meta"))
        exp_avg, exp_avg_sq = (
            local(placed_like(saved[key].detach(), whole, param.device)).float().reshape(shape)
            for key in ("exp_avg", "exp_avg_sq")
        )
        views = matrix_views(state, shape)
        quantize_moments(exp_avg, exp_avg_sq, views, settings["bits"], settings["block_size"], settings["quantile"])
        return state

    def dequantized_state(self, param: Tensor, rows: int | None = None) -> dict[str, Tensor]:
        """Return ``{"exp_avg", "exp_avg_sq"}`` of a parameter, fp32 and of its shape, or of its first ``rows``.

        Those of a DTensor are DTensors divided as it is, unless ``rows`` asks for the first rows of this process's
        part, which are plain tensors. No process waits for another.
        """
        group, name = next((group, name) for group, name, own in self.named_params() if own is param)
        settings, own_part = self.settings(group, name, param), local(param)
        all_rows, columns = matrix_shape(own_part.shape)
        state = matrix_views(self.state[param], (all_rows, columns))
        first = {key: value[:rows] for key, value in state.items() if key != "step"}
        shape = (all_rows if rows is None else min(rows, all_rows), columns)
        moments = dequantize_moments(first, *shape, settings["bits"], settings["block_size"])
        named = dict(zip(("exp_avg", "exp_avg_sq"), moments, strict=True))
        if rows is not None or not is_dtensor(param):
            return {key: moment.view(own_part[:rows].shape) for key, moment in named.items()}
        whole = {key: zeros_beside(param, param.shape, torch.float32, param.device) for key in named}
        for key, moment in named.items():
            local(whole[key]).copy_(moment.view(own_part.shape))
        return whole

    def describe_technique(self) -> list[tuple[str, str, str]]:
        """Return one row for each pair of bits in use, with parameters, state bytes and the effective β₁."""
        tensors: dict[tuple[Any, ...], list[Tensor]] = {}
        for group, name, param in self.named_params():
            settings = self.settings(group, name, param)
            beta1 = adjusted_beta1(settings["betas"][0], settings["bits"][0], settings["reference_bits"])
            tensors.setdefault((settings["bits"], settings["betas"][0], beta1), []).append(param)
        rows = []
        for (bits, asked, beta1), params in tensors.items():
            label = "fp32" if bits == (32, 32) else f"{bits[0]}/{bits[1]}-bit"
            numel = sum(param.numel() for param in params)
            detail = f"β₁ {beta1:.3f}" + (f" (adjusted from {asked})" if beta1 != asked else "")
            rows.append(("SOLO states", f"{len(params)} tensors, {numel:,} parameters", f"{label}, {detail}"))
        return rows

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """Make one step; returns what ``closure`` returns.

        A tensor whose gradient holds a non-finite value, or one whose square is, is left alone, parameter and state,
        and ``nonfinite_skips`` of its group counts it.

        Raises:
            InvalidArgumentError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        owners, tensors = self.gather()
        for group, skipped in zip(owners, solo_step(tensors), strict=True):
            if skipped:
                group["nonfinite_skips"] += 1
        return loss

    def gather(self) -> tuple[list[ParamGroup], list[SoloTensor]]:
        """Return all that the kernel needs for one step: the tensors that have a gradient, and the group of each.

        Processes that share DTensors must call this together, see :func:`.sharding.agreed_gradients`.

        Raises:
            InvalidArgumentError: a gradient is sparse.
        """
        owners: list[ParamGroup] = []
        tensors: list[SoloTensor] = []
        plans = list(zip(self.param_groups, self._current_plans(), strict=True))
        sharded = [param for group, plan in plans if plan.sharded for param in group["params"]]
        gradients = agreed_gradients(sharded, LARGEST_SQUARABLE)
        for group, plan in plans:
            hypers = [hyperparameters(group, settings) for settings in plan.settings]
            for param, constants in zip(group["params"], plan.constants, strict=True):
                grad, (name, which, cut, *layout) = param.grad, constants
                if grad is None or not param.numel():
                    continue
                if grad.is_sparse:
                    raise InvalidArgumentError(
                        f"the gradient of parameter {name!r} is sparse, SoloAdamW takes dense ones: "
                        "set sparse=False on the embedding, or train it with torch.optim.SparseAdam"
                    )
                state = self.state[param]
                if not state:
                    state.update(self.new_state(group, name, param, param.device))
                if param.is_cuda and not state["step"].is_cuda:  # loaded: checkpoints bring it to the CPU
                    state["step"] = state["step"].to(param.device)
                owners.append(group)
                if plan.sharded and param in gradients:
                    grad, state = gradients[param], {key: local(value) for key, value in state.items()}
                    tensors.append(own_shard(SoloTensor(local(param), grad, state, hypers[which], *layout), cut))
                else:
                    tensors.append(SoloTensor(param, grad, state, hypers[which], *layout))
                tensors[-1].skips = device_skips(group, param)
        return owners, tensors

    def _current_plans(self) -> list["_GroupPlan"]:
        """Return what is derived from names, shapes and settings, made again for all groups when any of them changed.

        With thousands of parameters, deriving it would take longer than the step. It lives on the object but is no
        state: copies and loaded optimizers derive their own.
        """
        sources = [_plan_source(group) for group in self.param_groups]
        plans: list[_GroupPlan] = self.__dict__.get("_plans", [])
        if [plan.source for plan in plans] != sources:
            plans = [_GroupPlan(deepcopy(source), [], []) for source in sources]
            plan_of = {id(group): plan for group, plan in zip(self.param_groups, plans, strict=True)}
            for group, name, param in self.named_params():
                plan_of[id(group)].add(self.settings(group, name, param), name, param)
            self._plans = plans
        return plans


@dataclass
class _GroupPlan:
    """What the steps of one parameter group share, as long as ``source`` stays the same."""

    source: tuple[Any, ...]
    settings: list[ParamGroup]  # the distinct ones, by override and eligibility
    constants: list[tuple[Any, ...]]  # of each parameter: name, index in settings, cut, then as in SoloTensor
    sharded: bool = False  # there is a DTensor

    def add(self, settings: ParamGroup, name: str, param: Tensor) -> None:
        chosen = {key: settings[key] for key in OVERRIDABLE}
        if chosen not in self.settings:
            self.settings.append(chosen)
        streams = stream_id(name, "state"), stream_id(name, "weight")
        self.sharded = self.sharded or is_dtensor(param)
        cut, rows, columns, first_row = matrix_layout(param, name)
        self.constants.append((name, self.settings.index(chosen), cut, rows, columns, *streams, first_row))


def _plan_source(group: ParamGroup) -> tuple[Any, ...]:
    # The address stands for the parameter: names may depend on its place, and shapes are compared as well.
    tensors = [(id(param), param.shape) for param in group["params"]]
    return tensors, group.get("param_names"), group["overrides"], [group[key] for key in OVERRIDABLE]
