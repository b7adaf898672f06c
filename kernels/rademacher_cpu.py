"""Random signs on CPUs: hands all tensors of a step to ``rademacher.cpp`` in one call; :mod:`.compiled` builds it."""

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .compiled import TYPES, build, load

if TYPE_CHECKING:
    from .rademacher import Noise

_TYPES = TYPES | {torch.float16: 2}


@dataclass(frozen=True, slots=True)
class Pass:
    """``out ← factors[0] · source - Σᵢ factors[1 + i] · u``, u of perturbation ``first_index + i``.

    ``source`` is (rows, columns); ``chosen`` are rows (n,) int64 of it, where ``out`` has (n, columns), or None.
    """

    source: Tensor
    out: Tensor
    factors: Sequence[float]
    noise: "Noise"
    slot: int
    first_index: int
    rows: int
    columns: int
    chosen: Tensor | None = None


def takes(*tensors: Tensor) -> bool:
    """Return whether the library can treat these: on the CPU, contiguous, of one dtype of up to 32 bits."""
    return all(
        tensor.is_cpu and tensor.dtype in _TYPES and tensor.is_contiguous() and tensor.dtype == tensors[0].dtype
        for tensor in tensors
    )


def run_compiled(library: ctypes.CDLL, passes: Sequence[Pass]) -> None:
    """Make all passes, bit for bit as the references in :mod:`.rademacher`.

    Args:
        library: from :func:`load_library`.
        passes: of tensors such as :func:`takes` accepts; ``chosen`` contiguous.
    """
    factors, table = array("f"), array("q")
    for one in passes:
        factors.extend(one.factors)
    address, size = factors.buffer_info()[0], factors.itemsize
    for one in passes:
        noise = one.noise
        chosen = (0, 0) if one.chosen is None else (one.chosen.data_ptr(), one.chosen.numel())
        shape = one.rows, one.columns, _TYPES[one.source.dtype], int(noise.rank1), int(noise.stochastic_rounding)
        key = noise.seed & 0xFFFFFFFF, noise.sign_stream, noise.weight_stream, noise.step & 0xFFFFFFFF, one.slot
        table.extend((one.source.data_ptr(), one.out.data_ptr(), *chosen, address, len(one.factors) - 1))
        table.extend((one.first_index, *shape, *key))
        address += size * len(one.factors)
    library.rademacher_passes(table.buffer_info()[0], len(passes), torch.get_num_threads())


@cache
def load_library() -> ctypes.CDLL | None:
    """Return the library, built if need be, or None where it is not wanted or cannot be had.

    Raises:
        ValueError: LOWBIT_LIGHTNING_CPU_KERNEL has a value that means nothing.
    """
    library = load("FZOO and MeZO", build_library)
    if library is not None:
        library.rademacher_passes.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
        library.rademacher_passes.restype = None
    return library


def build_library(folder: Path) -> Path:
    """Return the path of the library in ``folder``, compiled unless it is there already."""
    return build("rademacher", ("elements.h", "workers.h"), {}, folder)
