"""MicroAdam: Adam on compressed gradients with compressed error feedback, stepped by :mod:`lowbit_lightning.kernels`.

Differences from the authors' code (arXiv 2405.15593): any device and floating dtype; ``p.grad`` is only read; blocks do
not depend on the GPU, so a state is portable; step counters, window and betas are saved and 16-bit indices keep their
bits, so a resumed run is bit-exact; a tensor without a gradient does not age; a constant block divides by no zero;
bf16 and fp16 weights are rounded stochastically; and density may adjust itself.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.kernels.elementary import LARGEST_SQUARABLE
from lowbit_lightning.kernels.micro_adam import dequantize_error, dequantize_moments, last_selection, micro_adam_step
from lowbit_lightning.kernels.micro_adam_tensor import MicroAdamHyperparameters, MicroAdamTensor, new_state
from lowbit_lightning.kernels.philox import stream_id
from lowbit_lightning.kernels.solo import solo_step
from lowbit_lightning.kernels.solo_tensor import SoloHyperparameters, SoloTensor
from lowbit_lightning.optim.base import LowBitOptimizer, ParamGroup, State, device_skips
from lowbit_lightning.optim.matrix_layout import matrix_layout, own_shard
from lowbit_lightning.optim.micro_adam_settings import check_settings, hyperparameters
from lowbit_lightning.optim.micro_adam_shards import (
    new_sharded_state,
    own_shard_of,
    refuse_other_shards,
    shards_of,
    sum_over_shards,
)
from lowbit_lightning.optim.sharding import agreed_gradients, is_dtensor, local, zeros_beside
from lowbit_lightning.optim.solo_settings import adamw_hyperparameters

_stream_id = cache(stream_id)


@dataclass(frozen=True)
class Compression:
    """What one step of a parameter sent to the weights, and what it kept back.

    Energies are squared norms: of the selection V, of all that was to be sent, of the error that is kept, and of the
    gradient that the parameter has now, NaN without one. The error is known as it is kept, in 4 bits. ``selected``
    counts the selected elements.
    """

    selected_energy: float
    total_energy: float
    error_energy: float
    gradient_energy: float
    selected: int

    @property
    def caught(self) -> float:
        """The share of the energy that was selected; all of nothing."""
        return self.selected_energy / self.total_energy if self.total_energy else 1.0


class MicroAdam(LowBitOptimizer):
    """Adam that sees the largest 1 % of each gradient: 0.92 bytes of state per parameter instead of 8.

    Made for fine-tuning: at most ``window`` · ``density`` of the weights move in a step. What is not selected is added
    to later gradients, so nothing is lost, only late. For pre-training see ``density="auto"``, or use SoloAdamW.
    Parameters may be divided among processes by FSDP2's ``fully_shard``. Each then selects in its own shard: where
    shards end on the edges of ``topk_block`` and ``error_block``, the same as one process, and a checkpoint may go on
    with another number of processes; else with the same number only. ``density="auto"`` takes whole parameters.

    Args:
        params: parameters, named parameters or parameter groups, as for every torch optimizer.
        lr: learning rate; a float, or a one-element tensor that a scheduler changes in place.
        betas: decay of the first and second moment.
        eps: added to the denominator.
        weight_decay: decoupled weight decay, of all weights in every step.
        window: how many selections the moments are summed from; each costs 4 bytes per selected element.
        density: share of each block that is selected, in (0, 1], or ``"auto"``, which adjusts it within
            ``density_bounds`` to keep ``caught_target``.
        topk_block: elements among which the largest are selected, at most 65536.
        error_block: elements that share the two bounds of their 4-bit error codes, even. At 64 the error is the most
            precise, at 0.05 bytes per parameter more than at 256.
        min_numel: tensors with fewer elements, and vectors, get plain AdamW with fp32 states.
        error_rounding: how the error is coded; ``"stochastic"`` is the one that the paper proves things about.
        bias_correction: ``"global"`` is the published one, by which the step of a weight that is selected always grows
            from 1 to 6.5 times ``lr`` over training; ``"window"`` keeps it at 1.
        feedback: share of the error that is sent to the weights at once instead of being kept, in [0, 1). The
            authors' remedy for pre-training; makes the update dense.
        bf16_stochastic_rounding: write bf16 and fp16 weights with stochastic rounding instead of to nearest.
        caught_target: what ``density="auto"`` holds: the share of the energy of gradient and error that is selected.
        density_bounds: between which ``density="auto"`` moves; the state takes what the upper one needs.
        seed: of the rounding noise.
        maximize: ascend instead of descend.

    Raises:
        InvalidArgumentError: an argument is outside its range; a ValueError that names argument, value and range.
    """

    layout_keys = ("window", "density", "topk_block", "error_block", "min_numel", "density_bounds")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        window: int = 10,
        density: float | Literal["auto"] = 0.01,
        topk_block: int = 4096,
        error_block: int = 256,
        min_numel: int = 4096,
        error_rounding: Literal["nearest", "stochastic"] = "nearest",
        bias_correction: Literal["global", "window"] = "global",
        feedback: float = 0.0,
        bf16_stochastic_rounding: bool = True,
        caught_target: float = 0.8,
        density_bounds: tuple[float, float] = (0.005, 0.02),
        seed: int = 0,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "window": window,
            "density": density,
            "topk_block": topk_block,
            "error_block": error_block,
            "min_numel": min_numel,
            "error_rounding": error_rounding,
            "bias_correction": bias_correction,
            "feedback": feedback,
            "bf16_stochastic_rounding": bf16_stochastic_rounding,
            "caught_target": caught_target,
            "density_bounds": tuple(density_bounds),
            "seed": seed,
            "maximize": maximize,
            "nonfinite_skips": 0,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group, its settings checked."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["betas"], group["density_bounds"] = tuple(group["betas"]), tuple(group["density_bounds"])
        check_settings(group)
        for own, name, param in self.named_params():
            if own is group and param.is_complex():
                raise InvalidArgumentError(
                    f"params: MicroAdam takes real parameters, {name!r} is complex; use view_as_real"
                )
            if own is group and is_dtensor(param) and is_compressed(group, param):
                shards_of(param, name, hyperparameters(group))
                if group["density"] == "auto":
                    raise InvalidArgumentError(
                        f"density='auto' looks at whole parameters, {name!r} is divided among processes: set a number"
                    )

    def new_state(self, group: ParamGroup, name: str, param: Tensor, device: torch.device) -> State:
        """Return no error and an empty window, or zero moments; see :mod:`lowbit_lightning.kernels.micro_adam`."""
        # On CUDA it is the kernel that counts, so that the host need not wait to know which steps are skipped.
        counter_device = device if device.type == "cuda" else torch.device("cpu")
        if is_compressed(group, param):
            hyper = hyperparameters(group)
            if is_dtensor(param):
                return new_sharded_state(param, shards_of(param, name, hyper), hyper, device, counter_device)
            return new_state(param.numel(), hyper, device, counter_device)
        moments = {key: zeros_beside(param, param.shape, torch.float32, device) for key in ("exp_avg", "exp_avg_sq")}
        return {"step": torch.zeros((), dtype=torch.float32, device=counter_device), **moments}

    def convert_state(self, group: ParamGroup, name: str, param: Tensor, saved: State) -> State | None:
        """Convert nothing; says which numbers of processes a state of other shards suits."""
        if is_compressed(group, param):
            refuse_other_shards(name, param.shape, saved, hyperparameters(group))
        return None

    def dequantized_state(self, param: Tensor) -> dict[str, Tensor]:
        """Return ``{"exp_avg", "exp_avg_sq"}`` of a parameter, fp32 and of its shape, DTensors for a DTensor.

        They are the averages over the window, scaled as Adam's: without bias correction.
        """
        tensor = self._compressed_state(param)
        if tensor is None:
            return {key: self.state[param][key].clone() for key in ("exp_avg", "exp_avg_sq")}
        first, second = dequantize_moments(tensor)
        return {"exp_avg": _shaped(first, param), "exp_avg_sq": _shaped(second, param)}

    def dequantized_error(self, param: Tensor) -> Tensor:
        """Return what the next gradient of a parameter will be added to, fp32 and of its shape; 0 with plain states."""
        tensor = self._compressed_state(param)
        if tensor is None:
            return torch.zeros_like(param, dtype=torch.float32)
        return _shaped(dequantize_error(tensor), param)

    def compression(self, param: Tensor) -> Compression | None:
        """Return what the last step of a parameter sent and kept; None with plain states or before the first step.

        Processes that share a DTensor must call this together.
        """
        tensor = self._compressed_state(param)
        if tensor is None or not tensor.state["step"]:
            return None
        gradient = torch.full((1,), torch.nan) if param.grad is None else local(param.grad).float()
        selection, error = last_selection(tensor), dequantize_error(tensor)
        numbers = [*(float(values.square().sum()) for values in (selection, error, gradient)), float(len(selection))]
        sent, kept, squares, selected = sum_over_shards(numbers, param) if is_dtensor(param) else numbers
        total = sent + kept / (1 - tensor.hyper.feedback) ** 2
        return Compression(sent, total, kept, squares, int(selected))

    def describe_technique(self) -> list[tuple[str, str, str]]:
        """Return a row for the compressed tensors of each group and one for the others."""
        rows: dict[str, list[Tensor]] = {}
        for group, name, param in self.named_params():
            density = "automatic density" if group["density"] == "auto" else f"density {group['density']:.3g}"
            detail = f"{density}, window {group['window']}, {group['bias_correction']} bias correction"
            if not is_compressed(group, param):
                detail = "fp32 AdamW"
            elif is_dtensor(param) and not (shards := shards_of(param, name, hyperparameters(group))).aligned:
                detail += f", {shards.count} shards that end within blocks: resume on as many processes"
            rows.setdefault(detail, []).append(param)
        return [
            ("MicroAdam", f"{len(params)} tensors, {sum(param.numel() for param in params):,} parameters", detail)
            for detail, params in rows.items()
        ]

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
        compressed, plain = self.gather()
        skips = *micro_adam_step([tensor for _, tensor in compressed]), *solo_step([tensor for _, tensor in plain])
        for (group, _), skipped in zip((*compressed, *plain), skips, strict=True):
            if skipped:
                group["nonfinite_skips"] += 1
        return loss

    def gather(self) -> tuple[list[tuple[ParamGroup, MicroAdamTensor]], list[tuple[ParamGroup, SoloTensor]]]:
        """Return all that the kernels need for one step, with their groups: tensors to be compressed, and the others.

        Processes that share DTensors must call this together, see :func:`.sharding.agreed_gradients`.

        Raises:
            InvalidArgumentError: a gradient is sparse.
        """
        compressed: list[tuple[ParamGroup, MicroAdamTensor]] = []
        plain: list[tuple[ParamGroup, SoloTensor]] = []
        gradients = agreed_gradients((param for _, _, param in self.named_params()), LARGEST_SQUARABLE)
        hypers = {
            id(group): (hyperparameters(group), adamw_hyperparameters(group, float(group["betas"][0])))
            for group in self.param_groups
        }
        for group, name, param in self.named_params():
            if param.grad is None or not param.numel():
                continue
            if param.grad.is_sparse:
                raise InvalidArgumentError(
                    f"the gradient of parameter {name!r} is sparse, MicroAdam takes dense ones: "
                    "set sparse=False on the embedding, or train it with torch.optim.SparseAdam"
                )
            state = self.state[param]
            if not state:
                state.update(self.new_state(group, name, param, param.device))
            if param.is_cuda and not state["step"].is_cuda:  # loaded: checkpoints bring it to the CPU
                state["step"] = state["step"].to(param.device)
            grad, (hyper, plain_hyper) = gradients.get(param, param.grad), hypers[id(group)]
            if is_compressed(group, param):
                compressed.append((group, self._compressed_tensor(group, name, param, hyper, grad)))
            else:
                plain.append((group, self._plain_tensor(group, name, param, plain_hyper, grad)))
        return compressed, plain

    def _compressed_state(self, param: Tensor) -> MicroAdamTensor | None:
        """Return a parameter to look at its state; None with plain states, or none yet."""
        group, name = next((group, name) for group, name, own in self.named_params() if own is param)
        if not is_compressed(group, param) or not self.state[param]:
            return None
        return self._compressed_tensor(group, name, param, hyperparameters(group), local(param))

    def _compressed_tensor(
        self, group: ParamGroup, name: str, param: Tensor, hyper: MicroAdamHyperparameters, grad: Tensor
    ) -> MicroAdamTensor:
        streams, skips = (_stream_id(name, "error"), _stream_id(name, "weight")), device_skips(group, param)
        tensor = MicroAdamTensor(local(param), grad, self.state[param], hyper, *streams, skips=skips)
        return own_shard_of(tensor, shards_of(param, name, hyper)) if is_dtensor(param) else tensor

    def _plain_tensor(
        self, group: ParamGroup, name: str, param: Tensor, hyper: SoloHyperparameters, grad: Tensor
    ) -> SoloTensor:
        cut, rows, columns, first_row = matrix_layout(param, name)
        tensor = SoloTensor(
            local(param), grad, {key: local(value) for key, value in self.state[param].items()}, hyper, rows, columns,
            weight_stream=_stream_id(name, "weight"), first_row=first_row, skips=device_skips(group, param),
        )  # fmt: skip
        return own_shard(tensor, cut)


def is_compressed(group: ParamGroup, param: Tensor) -> bool:
    """Return whether a parameter has MicroAdam's state, and not that of plain AdamW."""
    return param.ndim >= 2 and param.numel() >= max(group["min_numel"], 1)


def _shaped(values: Tensor, param: Tensor) -> Tensor:
    """Return the flattened values of this process's part of ``param`` in its shape, a DTensor for a DTensor."""
    if not is_dtensor(param):
        return values.view(param.shape)
    whole = zeros_beside(param, param.shape, torch.float32, param.device)
    if local(whole).numel():
        local(whole).copy_(values.view_as(local(whole)))
    return whole
