"""The SOLO step on CPUs: hands all tensors of a step to ``solo.cpp`` in one call, see :mod:`.compiled`."""

import ctypes
from array import array
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from . import elementary, logarithmic
from .compiled import TYPES, build, constants_header, load
from .dynamic import dynamic_map, dynamic_midpoints
from .solo_tensor import SoloHyperparameters, SoloTensor


def takes(tensor: SoloTensor) -> bool:
    """Return whether the library can step this tensor: on the CPU, fp32 or bf16, state as the optimizer makes it."""
    param, grad = tensor.param, tensor.grad
    if not (param.is_cpu and grad.is_cpu and param.dtype in TYPES and grad.dtype in TYPES):
        return False
    for value in tensor.state.values():
        if not (value.is_cpu and value.is_contiguous()):
            return False
    return 0 < param.numel() == grad.numel() == tensor.rows * tensor.columns


def step_compiled(library: ctypes.CDLL, tensors: Sequence[SoloTensor]) -> list[bool]:
    """Make one step of all tensors in place, bit for bit what :func:`.solo.solo_step_reference` does.

    Args:
        library: from :func:`load_library`.
        tensors: such as :func:`takes` accepts.

    Returns:
        For each tensor whether it was skipped because of a gradient that is not finite.
    """
    hypers: dict[int, int] = {}
    hyper_table, table = array("d"), array("q")
    copies: list[Tensor] = []  # keeps them alive until the library has read them
    written_back: list[tuple[Tensor, Tensor]] = []
    for tensor in tensors:
        hyper, param, grad = tensor.hyper, tensor.param, tensor.grad
        if not grad.is_contiguous():
            grad = grad.contiguous()
            copies.append(grad)
        if not param.is_contiguous():
            written_back.append((param, param := param.contiguous()))
        if id(hyper) not in hypers:
            hypers[id(hyper)] = len(hypers)
            hyper_table.extend(_hyper_row(hyper))
        types = TYPES[param.dtype], TYPES[grad.dtype], TYPES[tensor.scale_dtype]
        noise = tensor.state_stream, tensor.weight_stream, tensor.first_row
        pointers = param.data_ptr(), grad.data_ptr(), *_state_pointers(tensor)
        table.extend((*pointers, tensor.rows, tensor.columns, *types, *noise, hypers[id(hyper)]))

    skipped = ctypes.create_string_buffer(len(tensors))
    library.solo_step(
        table.buffer_info()[0], len(tensors), hyper_table.buffer_info()[0], torch.get_num_threads(), skipped
    )
    for param, copy in written_back:
        param.copy_(copy)
    return [flag != 0 for flag in skipped.raw]


def _state_pointers(tensor: SoloTensor) -> tuple[int, ...]:
    state, (first_bits, second_bits) = tensor.state, tensor.hyper.bits
    step = state["step"].data_ptr()
    if first_bits == second_bits == 32:
        return step, state["exp_avg"].data_ptr(), 0, state["exp_avg_sq"].data_ptr(), 0, 0
    first = ("exp_avg",) if first_bits == 32 else ("exp_avg_codes", "exp_avg_scale")
    second = ("exp_avg_sq",) if second_bits == 32 else ("exp_avg_sq_codes", "exp_avg_sq_scale", "exp_avg_sq_log2_base")
    pointers = [[state[key].data_ptr() for key in keys] for keys in (first, second)]
    return step, *pointers[0], *(0,) * (2 - len(first)), *pointers[1], *(0,) * (3 - len(second))


def _hyper_row(hyper: SoloHyperparameters) -> tuple[float, ...]:
    return (
        hyper.lr,
        hyper.beta1,
        hyper.beta2,
        hyper.eps,
        hyper.weight_decay,
        hyper.quantile,
        *hyper.bits,
        hyper.block_size,
        hyper.seed & 0xFFFFFFFF,
        hyper.stochastic_rounding,
        hyper.bf16_stochastic_rounding,
        hyper.maximize,
    )


@cache
def load_library() -> ctypes.CDLL | None:
    """Return the library, built if need be, or None where it is not wanted or cannot be had.

    Raises:
        ValueError: LOWBIT_LIGHTNING_CPU_KERNEL has a value that means nothing.
    """
    library = load("SoloAdamW", build_library)
    if library is not None:
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        library.solo_step.argtypes = (pointer, integer, pointer, integer, pointer)
        library.solo_step.restype = None
    return library


def build_library(folder: Path) -> Path:
    """Return the path of the library in ``folder``, compiled unless it is there already."""
    arrays = {"LOG2_COEFFICIENTS": elementary.LOG2_COEFFICIENTS, "EXP2_COEFFICIENTS": elementary.EXP2_COEFFICIENTS}
    for bits in (2, 3, 4, 8):
        # Vector look-ups read sixteen entries. Normalized values stay below 2, so no code passes the last midpoint.
        padding = (0.0,) * (16 - 2**bits)
        arrays[f"DYNAMIC_MAP_{bits}"] = dynamic_map(bits) + padding
        arrays[f"DYNAMIC_MIDPOINTS_{bits}"] = (*dynamic_midpoints(bits), 2.0, *padding)
    scalars = {
        "SMALLEST_NORMAL": elementary.SMALLEST_NORMAL,
        "LARGEST_SQUARABLE": elementary.LARGEST_SQUARABLE,
        "LOG2_FLOOR": logarithmic.LOG2_FLOOR,
        "LARGEST_ZERO": logarithmic.LARGEST_ZERO,
        "SMALLEST_SPAN": logarithmic.SMALLEST_SPAN,
        "LARGEST_BF16": torch.finfo(torch.bfloat16).max,
    }
    constants = constants_header(scalars, {"SQRT_HALF_BITS": elementary.SQRT_HALF_BITS}, arrays)
    includes = ("checked_steps.h", "solo_formats.h", "packing.h", "elements.h", "workers.h")
    return build("solo", includes, {"solo_constants.h": constants}, folder)
