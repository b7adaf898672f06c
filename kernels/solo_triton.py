"""The SOLO step on CUDA: tables of pointers for the kernels in :mod:`.solo_triton_kernels`, and their launches.

However many tensors there are, a step is one launch that checks gradients (per gradient dtype), one that counts steps,
and one per set of settings for everything else. Nothing waits for the device: step counters and the count of skipped
steps live on it, tables are copied from pinned memory and only when an address changed. Learning rate, betas, weight
decay, eps and step are data to the kernels, so that no change of them compiles anything.

Not yet run on a GPU. Predicted for 4/2 bits and block 128: 13.7 bytes a parameter with fp32 weights and gradients, 7.7
with bf16 ones, and once more the gradient (4 or 2 bytes) to check it. From the machine code that ptxas makes for an
H100, an element takes about 165 instructions (bf16: 180): 28 in the bisection for the quantile, 22 in division and
root, 40 in the logarithm, its draws and codes, 20 each in the search for a 4-bit code and its decoding. At 28·10¹²
instructions a second, fp32 is near the time of its bytes and bf16 takes twice as long as its bytes.

triton is imported at the first launch, not with this file.
"""

import contextlib
import math
import struct
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dynamic import dynamic_map, dynamic_midpoints
from .solo_tensor import SoloHyperparameters, SoloTensor, row_bytes

# Calls of Philox, eight elements each, in one warp's tile: four to a thread.
_WARP_CALLS = 128
_LARGEST_BLOCK = 8 * 16 * _WARP_CALLS  # 16 warps are the most that share a tile
# Programs that every multiprocessor should get before a program takes several tiles, and how many it takes at most.
_PROGRAMS_PER_PROCESSOR = 64
_MOST_TILES = 16
_CACHED_PLANS = 4


@cache
def is_available() -> bool:
    """Return whether triton is installed, without importing it."""
    return find_spec("triton") is not None


def takes(tensor: SoloTensor) -> bool:
    """Return whether the kernels can step this tensor: fp32 or bf16, and its whole state contiguous beside it."""
    param, grad = tensor.param, tensor.grad
    dtypes = (torch.float32, torch.bfloat16)
    if not is_available():
        return False
    if param.dtype not in dtypes or grad.dtype not in dtypes or tensor.hyper.block_size > _LARGEST_BLOCK:
        return False
    return all(value.device == param.device == grad.device and value.is_contiguous() for value in tensor.state.values())


def step_triton(tensors: Sequence[SoloTensor]) -> list[bool]:
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


def launch(tensors: Sequence[SoloTensor]) -> list[tuple[list[int], Tensor]]:
    """Start one step of all tensors in place, bit for bit what :func:`.solo.solo_step_reference` does.

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

    FIRST_BITS: int
    SECOND_BITS: int
    BLOCK: int
    PARAM_BF16: bool
    GRAD_BF16: bool
    STATE_NOISE: bool
    WEIGHT_NOISE: bool
    MAXIMIZE: bool
    EVEN: bool
    ALIGN: int
    SCALE_BF16: bool

    def tile(self) -> tuple[int, int]:
        """Return blocks and calls per block (a power of two) of a tile."""
        calls = 1 << (self.BLOCK // 8 - 1).bit_length()
        return max(1, self.warp_calls() // calls), calls

    def warp_calls(self) -> int:
        """Return the calls of a warp: fewer where addresses and masks of single elements would take its registers."""
        return _WARP_CALLS if self.ALIGN == 4 else _WARP_CALLS // 2


@dataclass
class _Plan:
    """Tables on the device for one list of addresses."""

    table: Tensor  # (tensors, fields) int64
    flags: Tensor  # (tensors,) int32, all zero between steps
    scalars: Tensor  # (tensors, scalars) fp32
    checks: list[tuple[bool, Tensor]]  # gradient is bf16; (programs,) int32 tensor of each program
    steps: list[tuple[_Variant, int, Tensor]]  # variant, tiles per program, (programs,) int32
    hyper_values: list[float] = field(default_factory=list)
    hypers: Tensor | None = None


def _launch(tensors: list[SoloTensor], device: torch.device) -> Tensor:
    from . import solo_triton_kernels as kernels

    written_back: list[tuple[Tensor, Tensor]] = []
    hypers: dict[int, tuple[int, SoloHyperparameters]] = {}
    rows, variants = array("q"), []
    # Live until all that read them is enqueued, after which their memory is only reused in order.
    copies: list[Tensor] = []
    for tensor in tensors:
        param, grad = tensor.param, tensor.grad
        if not grad.is_contiguous():
            grad = grad.contiguous()
            copies.append(grad)
        if not param.is_contiguous():
            written_back.append((param, param := param.contiguous()))
        hyper = hypers.setdefault(id(tensor.hyper), (len(hypers), tensor.hyper))[0]
        rows.extend(_row(tensor, param, grad, hyper))
        variants.append(_variant(tensor, param, grad))

    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        plan = _plan(rows, variants, device)
        values = [float(getattr(hyper, key)) for _, hyper in hypers.values() for key in kernels.HYPER_FIELDS]
        if plan.hyper_values != values:
            plan.hyper_values, plan.hypers = values, _to_device(torch.tensor(values, dtype=torch.float64), device)
        exact: dict[str, Any] = {"enable_fp_fusion": False}
        for is_bf16, programs in plan.checks:
            kernels.check_gradients[(len(programs),)](plan.table, programs, plan.flags, is_bf16, **exact)
        kernels.advance_steps[(len(tensors),)](plan.table, plan.hypers, plan.flags, plan.scalars, num_warps=1, **exact)
        map_8, midpoints_8, cells = _tables_of_8_bits(device)
        for variant, tiles, programs in plan.steps:
            blocks, calls = variant.tile()
            kernels.solo_step[(len(programs),)](
                plan.table, plan.hypers, plan.scalars, programs, tiles, map_8, cells, midpoints_8,
                **variant._asdict(), TILE_BLOCKS=blocks, TILE_CALLS=calls,
                num_warps=max(1, blocks * calls // variant.warp_calls()), **exact,
            )  # fmt: skip
        for param, copy in written_back:
            param.copy_(copy)
    return plan.scalars[:, 0]


def _row(tensor: SoloTensor, param: Tensor, grad: Tensor, hyper: int) -> tuple[int, ...]:
    """Return a row of the table, as FIELDS in solo_triton_kernels.py; the places in launches are filled in later."""
    state, (first_bits, second_bits), block_size = tensor.state, tensor.hyper.bits, tensor.hyper.block_size
    columns = tensor.columns
    first = ("exp_avg",) if first_bits == 32 else ("exp_avg_codes", "exp_avg_scale")
    second = ("exp_avg_sq",) if second_bits == 32 else ("exp_avg_sq_codes", "exp_avg_sq_scale", "exp_avg_sq_log2_base")
    blocks_per_row = -(-columns // block_size)
    last = columns - (blocks_per_row - 1) * block_size
    return (
        param.data_ptr(), grad.data_ptr(), state["step"].data_ptr(),
        0 if tensor.skips is None else tensor.skips.data_ptr(), hyper, tensor.rows * columns, 0, 0,
        *(state[key].data_ptr() for key in first), *(0,) * (2 - len(first)),
        *(state[key].data_ptr() for key in second), *(0,) * (3 - len(second)),
        columns, tensor.rows * blocks_per_row, blocks_per_row,
        row_bytes(columns, block_size, first_bits), row_bytes(columns, block_size, second_bits),
        tensor.hyper.seed & 0xFFFFFFFF, tensor.state_stream, tensor.weight_stream, tensor.first_row,
        *_quantile_place(tensor.hyper.quantile, block_size), *_quantile_place(tensor.hyper.quantile, last),
    )  # fmt: skip


def _quantile_place(quantile: float, length: int) -> tuple[int, int]:
    """Return the rank below the quantile, and the bits of the fp32 weight of the one above."""
    position = quantile * (length - 1)
    rank = math.floor(position)
    return rank, struct.unpack("<i", struct.pack("<f", position - rank))[0]


def _variant(tensor: SoloTensor, param: Tensor, grad: Tensor) -> _Variant:
    hyper = tensor.hyper
    even = tensor.columns % hyper.block_size == 0
    # Every lane of every block starts at a multiple of four elements, in the weights as in the packed codes.
    aligned = hyper.block_size % 32 == 0 and tensor.columns % 32 == 0
    aligned = aligned and all(value.data_ptr() % 16 == 0 for value in (param, grad, *_matrices(tensor)))
    return _Variant(
        *hyper.bits, hyper.block_size, param.dtype == torch.bfloat16, grad.dtype == torch.bfloat16,
        hyper.stochastic_rounding and hyper.bits[1] != 32,
        hyper.bf16_stochastic_rounding and param.dtype == torch.bfloat16,
        hyper.maximize, even, 4 if aligned else 1, tensor.scale_dtype == torch.bfloat16,
    )  # fmt: skip


def _matrices(tensor: SoloTensor) -> list[Tensor]:
    return [value for key, value in tensor.state.items() if key.endswith(("exp_avg", "exp_avg_sq", "codes"))]


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
    from .solo_triton_kernels import CHECK_ELEMENTS, FIELDS, SCALARS

    count = len(variants)
    table = torch.frombuffer(rows, dtype=torch.int64).view(count, len(FIELDS)).clone()
    column = {name: table[:, index] for index, name in enumerate(FIELDS)}

    checks = []
    for is_bf16 in sorted({variant.GRAD_BF16 for variant in variants}):
        members = torch.tensor([i for i, variant in enumerate(variants) if is_bf16 == variant.GRAD_BF16])
        programs = -(-column["numel"][members] // CHECK_ELEMENTS)
        checks.append((is_bf16, _distribute(members, programs, column["first_check"], device)))

    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    steps = []
    for variant in dict.fromkeys(variants):
        members = torch.tensor([i for i, other in enumerate(variants) if other == variant])
        tiles = -(-column["blocks"][members] // variant.tile()[0])
        share = int(tiles.sum()) // max(processors * _PROGRAMS_PER_PROCESSOR, 1)
        tiles_per_program = min(max(share, 1), _MOST_TILES)
        programs = -(-tiles // tiles_per_program)
        steps.append((variant, tiles_per_program, _distribute(members, programs, column["first_program"], device)))
    return _Plan(
        _to_device(table, device),
        torch.zeros(count, dtype=torch.int32, device=device),
        torch.zeros(count, SCALARS, device=device),
        checks,
        steps,
    )


def _distribute(members: Tensor, programs: Tensor, first: Tensor, device: torch.device) -> Tensor:
    """Number the programs of the member tensors, writing each one's first into ``first``; return each one's tensor."""
    first[members] = programs.cumsum(0) - programs
    return _to_device(torch.repeat_interleave(members, programs).to(torch.int32), device)


def _to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy without waiting: torch keeps the pinned memory until the copy is done."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


@cache
def _tables_of_8_bits(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the map, its midpoints, and the code of the lowest value of each cell (leading bits of a value)."""
    from .solo_triton_arithmetic import CELL_SHIFT

    midpoints = torch.tensor((*dynamic_midpoints(8), 2.0), dtype=torch.float32)  # normalized values stay below 2
    bits = torch.arange(1 << (32 - CELL_SHIFT)) << CELL_SHIFT
    lowest = torch.where(bits < 1 << 31, bits, (bits | ((1 << CELL_SHIFT) - 1)) - (1 << 32))
    codes = torch.bucketize(lowest.to(torch.int32).view(torch.float32), midpoints, right=True).clamp_max(255)
    entries = torch.tensor(dynamic_map(8), dtype=torch.float32)
    return _to_device(entries, device), _to_device(midpoints, device), _to_device(codes.to(torch.uint8), device)
