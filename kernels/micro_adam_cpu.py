"""The MicroAdam step on CPUs: hands all tensors of a step to ``micro_adam.cpp`` in one call, see :mod:`.compiled`."""

import ctypes
import math
from array import array
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .compiled import TYPES, build, constants_header, load
from .elementary import LARGEST_SQUARABLE
from .error_codes import LEVELS
from .micro_adam_tensor import MicroAdamHyperparameters, MicroAdamTensor
from .philox import NOISE_BLOCK

# Elements of the largest unit of whole blocks of both kinds; a thread keeps 29 bytes for each.
_LARGEST_UNIT = 1 << 18


def takes(tensor: MicroAdamTensor) -> bool:
    """Return whether the library can step this tensor: on the CPU, fp32 or bf16, with blocks that nest."""
    param, grad, hyper = tensor.param, tensor.grad, tensor.hyper
    if not (param.is_cpu and grad.is_cpu and param.dtype in TYPES and grad.dtype in TYPES):
        return False
    if any(not (value.is_cpu and value.is_contiguous()) for value in tensor.state.values()):
        return False
    unit = math.lcm(tensor.blocks.length, hyper.error_block)
    return 0 < param.numel() == grad.numel() and min(unit, param.numel()) <= _LARGEST_UNIT


def step_compiled(library: ctypes.CDLL, tensors: Sequence[MicroAdamTensor]) -> list[bool]:
    """Make one step of all tensors in place, bit for bit what :func:`.micro_adam.micro_adam_step_reference` does.

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
        hyper, param, grad, state, blocks = tensor.hyper, tensor.param, tensor.grad, tensor.state, tensor.blocks
        if not grad.is_contiguous():
            grad = grad.contiguous()
            copies.append(grad)
        if not param.is_contiguous():
            written_back.append((param, param := param.contiguous()))
        if id(hyper) not in hypers:
            hypers[id(hyper)] = len(hypers)
            hyper_table.extend(_hyper_row(hyper))
        keys = ("step", "error_codes", "error_min", "error_max", "indices", "values")
        counts = [state[key].data_ptr() if key in state else 0 for key in ("row_counts", "count")]
        pointers = param.data_ptr(), grad.data_ptr(), *(state[key].data_ptr() for key in keys), *counts
        types = TYPES[param.dtype], TYPES[grad.dtype]
        cut = blocks.length, blocks.full, blocks.last, blocks.k, blocks.last_k, blocks.smallest_k
        noise = tensor.error_stream, tensor.weight_stream, tensor.first_element
        table.extend((*pointers, param.numel(), *types, *cut, *noise, hypers[id(hyper)]))

    skipped = ctypes.create_string_buffer(len(tensors))
    library.micro_adam_step(
        table.buffer_info()[0], len(tensors), hyper_table.buffer_info()[0], torch.get_num_threads(), skipped
    )
    for param, copy in written_back:
        param.copy_(copy)
    return [flag != 0 for flag in skipped.raw]


def _hyper_row(hyper: MicroAdamHyperparameters) -> tuple[float, ...]:
    return (
        hyper.lr,
        hyper.beta1,
        hyper.beta2,
        hyper.eps,
        hyper.weight_decay,
        hyper.window,
        hyper.error_block,
        hyper.caught_target,
        hyper.window_correction,
        hyper.stochastic_error,
        hyper.feedback,
        hyper.bf16_stochastic_rounding,
        hyper.maximize,
        hyper.seed & 0xFFFFFFFF,
    )


@cache
def load_library() -> ctypes.CDLL | None:
    """Return the library, built if need be, or None where it is not wanted or cannot be had.

    Raises:
        ValueError: LOWBIT_LIGHTNING_CPU_KERNEL has a value that means nothing.
    """
    library = load("MicroAdam", build_library)
    if library is not None:
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        library.micro_adam_step.argtypes = (pointer, integer, pointer, integer, pointer)
        library.micro_adam_step.restype = None
    return library


def build_library(folder: Path) -> Path:
    """Return the path of the library in ``folder``, compiled unless it is there already."""
    constants = constants_header(
        {"LARGEST_SQUARABLE": LARGEST_SQUARABLE}, {"LEVELS": LEVELS, "NOISE_BLOCK": NOISE_BLOCK}, {}
    )
    includes = ("checked_steps.h", "elements.h", "workers.h")
    return build("micro_adam", includes, {"micro_adam_constants.h": constants}, folder)
