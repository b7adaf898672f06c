"""The MicroAdam step on CUDA: tables of pointers for :mod:`.micro_adam_triton_kernels`, and their launches.

However many tensors there are, a step is one launch that checks gradients (per gradient dtype), one that counts steps,
one per set of settings for everything else, and one where densities adjust themselves. Nothing waits for the device:
step counters, counts of selected elements and of skipped steps live on it, tables are copied from pinned memory and
only when an address changed. Learning rate, betas, weight decay, eps and step are data to the kernels, so that no
change of them compiles anything.

Not yet run on a GPU. With bf16 weights and gradients it moves 7.4 bytes a parameter, and the gradient once more to
check it. For an H100 ptxas gives the main kernel 128 registers and spills none, so 16 warps share a multiprocessor.

triton is imported at the first launch, not with this file.
"""

import contextlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .micro_adam_tensor import MicroAdamHyperparameters, MicroAdamTensor
from .philox import NOISE_BLOCK
from .solo_triton import is_available

# A block is held in the registers of one program.
_LARGEST_BLOCK = 8192
# Programs for every multiprocessor: what their registers allow. Each has a scratch in the second-level cache.
_PROGRAMS_PER_PROCESSOR = 4
_CACHED_PLANS = 4


def takes(tensor: MicroAdamTensor) -> bool:
    """Return whether the kernels can step this tensor: fp32 or bf16, blocks powers of two that nest, on one device."""
    param, grad, hyper = tensor.param, tensor.grad, tensor.hyper
    dtypes = (torch.float32, torch.bfloat16)
    if not is_available() or param.dtype not in dtypes or grad.dtype not in dtypes:
        return False
    powers = all(size & (size - 1) == 0 for size in (hyper.topk_block, hyper.error_block))
    if not powers or not max(hyper.error_block, NOISE_BLOCK) <= hyper.topk_block <= _LARGEST_BLOCK:
        return False
    if tensor.first_element % NOISE_BLOCK:
        return False
    return all(value.device == param.device == grad.device and value.is_contiguous() for value in tensor.state.values())


def step_triton(tensors: Sequence[MicroAdamTensor]) -> list[bool]:
    """Make one step of all tensors in place and wait for it.

    Args:
        tensors: such as :func:`takes` accepts.

    Returns:
        For each tensor whether it was skipped because of a gradient that is not finite.
    """
    skipped = [False] * len(tensors)
    for positions, taken in launch(tensors):
        for position, take in zip(positions, taken.tolist(), strict=True):
            skipped[position] = not take
    return skipped


def launch(tensors: Sequence[MicroAdamTensor]) -> list[tuple[list[int], Tensor]]:
    """Start one step of all tensors in place, bit for bit what :func:`.micro_adam.micro_adam_step_reference` does.

    A skipped tensor adds one to its ``skips``, if it has such a counter.

    Returns:
        For each device the positions of its tensors, and on it, as fp32, 1 for each that is stepped and 0 for each that
        is skipped; valid until the next launch.
    """
    devices: dict[torch.device, list[int]] = {}
    for position, tensor in enumerate(tensors):
        devices.setdefault(tensor.param.device, []).append(position)
    return [(found, _launch([tensors[i] for i in found], device)) for device, found in devices.items()]


class _Variant(NamedTuple):
    """What the main kernel is compiled for; tensors of one variant share a launch."""

    BLOCK: int
    ERROR_BLOCK: int
    ROW: int
    WINDOW: int
    PARAM_BF16: bool
    GRAD_BF16: bool
    AUTOMATIC: bool
    ERROR_NOISE: bool
    WEIGHT_NOISE: bool
    FEEDBACK: bool
    MAXIMIZE: bool


@dataclass
class _Launch:
    """One launch of the main kernel: tensor of each block of all its tensors, and the programs' scratch."""

    variant: _Variant
    entry_of_block: Tensor  # (blocks,) int32
    programs: int
    scratch: Tensor  # (programs, 2, BLOCK) fp32, zero between steps
    energies: Tensor  # (blocks, 2) fp64 where density is automatic, else empty
    automatic: Tensor  # (tensors,) int32 those of automatic density


@dataclass
class _Plan:
    """Tables on the device for one list of addresses."""

    table: Tensor  # (tensors, fields) int64
    flags: Tensor  # (tensors,) int32, all zero between steps
    scalars: Tensor  # (tensors, scalars) fp32
    checks: list[tuple[bool, Tensor]]  # gradient is bf16; (programs,) int32 tensor of each program
    launches: list[_Launch]
    hyper_values: list[tuple[float, ...]] = field(default_factory=list)
    hypers: Tensor | None = None
    weights: dict[int, Tensor] = field(default_factory=dict)  # by window, (hyperparameters, 2, window) fp32


def _launch(tensors: list[MicroAdamTensor], device: torch.device) -> Tensor:
    from . import micro_adam_triton_kernels as kernels

    written_back: list[tuple[Tensor, Tensor]] = []
    hypers: dict[int, tuple[int, MicroAdamHyperparameters]] = {}
    rows, variants = array("q"), []
    copies: list[Tensor] = []  # lives until all that read it is enqueued; its memory is only reused in order after that
    for tensor in tensors:
        param, grad = tensor.param, tensor.grad
        if not grad.is_contiguous():
            grad = grad.contiguous()
            copies.append(grad)
        if not param.is_contiguous():
            written_back.append((param, param := param.contiguous()))
        hyper = hypers.setdefault(id(tensor.hyper), (len(hypers), tensor.hyper))[0]
        rows.extend(_row(tensor, param, grad, hyper))
        variants.append(_variant(tensor))

    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        plan = _plan(rows, variants, device)
        _set_hypers(plan, [hyper for _, hyper in hypers.values()], device)
        exact: dict[str, Any] = {"enable_fp_fusion": False}
        for is_bf16, programs in plan.checks:
            kernels.check_gradients[(len(programs),)](plan.table, programs, plan.flags, is_bf16, **exact)
        kernels.advance_steps[(len(tensors),)](plan.table, plan.hypers, plan.flags, plan.scalars, num_warps=1, **exact)
        for made in plan.launches:
            kernels.micro_adam_step[(made.programs,)](
                plan.table, plan.scalars, plan.weights[made.variant.WINDOW], made.entry_of_block,
                len(made.entry_of_block), made.scratch, made.energies, **made.variant._asdict(),
                num_warps=min(16, max(4, made.variant.BLOCK // 256)), **exact,
            )  # fmt: skip
            if made.variant.AUTOMATIC:
                kernels.adjust_counts[(len(made.automatic),)](
                    plan.table, plan.hypers, plan.scalars, made.energies, made.automatic, **exact
                )
        for param, copy in written_back:
            param.copy_(copy)
    return plan.scalars[:, 0]


def _row(tensor: MicroAdamTensor, param: Tensor, grad: Tensor, hyper: int) -> tuple[int, ...]:
    """Return a row of the table, as FIELDS in micro_adam_triton_kernels.py; places in launches are filled in later."""
    state, blocks = tensor.state, tensor.blocks
    keys = ("error_codes", "error_min", "error_max", "indices", "values", "row_counts", "count")
    return (
        param.data_ptr(), grad.data_ptr(), state["step"].data_ptr(),
        0 if tensor.skips is None else tensor.skips.data_ptr(), hyper, param.numel(), 0, 0,
        tensor.hyper.window, tensor.hyper.seed & 0xFFFFFFFF,
        *(state[key].data_ptr() if key in state else 0 for key in keys),
        blocks.full, blocks.k, blocks.last_k, blocks.smallest_k, blocks.length, blocks.entries,
        blocks.full + (blocks.last > 0), tensor.error_stream, tensor.weight_stream, tensor.first_element,
    )  # fmt: skip


def _variant(tensor: MicroAdamTensor) -> _Variant:
    hyper, blocks = tensor.hyper, tensor.blocks
    param_bf16 = tensor.param.dtype == torch.bfloat16
    return _Variant(
        hyper.topk_block, hyper.error_block, 1 << (blocks.k - 1).bit_length(), hyper.window, param_bf16,
        tensor.grad.dtype == torch.bfloat16, hyper.density is None, hyper.stochastic_error,
        hyper.bf16_stochastic_rounding and param_bf16, hyper.feedback != 0, hyper.maximize,
    )  # fmt: skip


def _set_hypers(plan: _Plan, hypers: list[MicroAdamHyperparameters], device: torch.device) -> None:
    from .micro_adam_triton_kernels import HYPER_FIELDS

    values = [tuple(float(getattr(hyper, key)) for key in HYPER_FIELDS) for hyper in hypers]
    if plan.hyper_values == values:
        return
    plan.hyper_values, plan.hypers = values, _to_device(torch.tensor(values, dtype=torch.float64), device)
    for window in {made.variant.WINDOW for made in plan.launches}:
        powers = [[[beta**age for age in range(window)] for beta in (hyper.beta1, hyper.beta2)] for hyper in hypers]
        plan.weights[window] = _to_device(torch.tensor(powers, dtype=torch.float32), device)


_plans: OrderedDict[tuple[Any, ...], _Plan] = OrderedDict()


def _plan(rows: "array[int]", variants: list[_Variant], device: torch.device) -> _Plan:
    """Return the tables for these addresses, the ones made before if they are the same."""
    key = (device, rows.tobytes(), tuple(variants))
    if key not in _plans:
        _plans[key] = _new_plan(rows, variants, device)
        while len(_plans) > _CACHED_PLANS:
            _plans.popitem(last=False)
    _plans.move_to_end(key)
    return _plans[key]


def _new_plan(rows: "array[int]", variants: list[_Variant], device: torch.device) -> _Plan:
    from .micro_adam_triton_kernels import CHECK_ELEMENTS, FIELDS, SCALARS

    count = len(variants)
    table = torch.frombuffer(rows, dtype=torch.int64).view(count, len(FIELDS)).clone()
    column = {name: table[:, index] for index, name in enumerate(FIELDS)}

    checks = []
    for is_bf16 in sorted({variant.GRAD_BF16 for variant in variants}):
        members = torch.tensor([i for i, variant in enumerate(variants) if is_bf16 == variant.GRAD_BF16])
        programs = -(-column["numel"][members] // CHECK_ELEMENTS)
        checks.append((is_bf16, _distribute(members, programs, column["first_check"], device)))

    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    launches = []
    for variant in dict.fromkeys(variants):
        members = torch.tensor([i for i, other in enumerate(variants) if other == variant])
        entry_of_block = _distribute(members, column["blocks"][members], column["first_block"], device)
        most = min(len(entry_of_block), processors * _PROGRAMS_PER_PROCESSOR)
        scratch = torch.zeros(most, 2, variant.BLOCK, device=device)
        measured = len(entry_of_block) if variant.AUTOMATIC else 0
        energies = torch.zeros(measured, 2, dtype=torch.float64, device=device)
        automatic = _to_device(members.to(torch.int32), device)
        launches.append(_Launch(variant, entry_of_block, most, scratch, energies, automatic))
    return _Plan(
        _to_device(table, device),
        torch.zeros(count, dtype=torch.int32, device=device),
        torch.zeros(count, SCALARS, device=device),
        checks,
        launches,
    )


def _distribute(members: Tensor, programs: Tensor, first: Tensor, device: torch.device) -> Tensor:
    """Number the programs of the member tensors, writing each one's first into ``first``; return each one's tensor."""
    first[members] = programs.cumsum(0) - programs
    return _to_device(torch.repeat_interleave(members, programs).to(torch.int32), device)


def _to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy without waiting: torch keeps the pinned memory until the copy is done."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values
