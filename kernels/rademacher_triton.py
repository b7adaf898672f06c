"""Random signs on CUDA: launches of the kernel in :mod:`.rademacher_triton_kernels`, one for each tensor.

Nothing waits for the device, and no change of a number (step, index, size, weight decay) compiles anything. The kernel
reads and writes every weight once however many perturbations there are; Philox costs an element about one 128th of a
call for each perturbation, and an eighth of a call where 16-bit weights are rounded stochastically.

triton is imported at the first launch, not with this file.
"""

from functools import cache, lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from .rademacher_cpu import Pass

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Lines of 128 elements that a program treats: one for each lane of a warp, each of which makes one line's signs.
_ROWS = 32


@cache
def is_available() -> bool:
    """Return whether triton is installed, without importing it."""
    return find_spec("triton") is not None


def takes(*tensors: Tensor) -> bool:
    """Return whether the kernel can treat these: on CUDA, contiguous, of one dtype of up to 32 bits."""
    return is_available() and all(
        tensor.is_cuda and tensor.dtype in _DTYPES and tensor.is_contiguous() and tensor.dtype == tensors[0].dtype
        for tensor in tensors
    )


def launch(one: Pass) -> None:
    """Start a pass, bit for bit as the references in :mod:`.rademacher`.

    Args:
        one: of tensors such as :func:`takes` accepts; ``chosen`` contiguous, beside them.
    """
    from .rademacher_triton_kernels import apply_signs

    noise, source, out, dtype = one.noise, one.source, one.out, _DTYPES[one.source.dtype]
    rows, columns = (one.rows if one.chosen is None else one.chosen.numel()), one.columns
    by_rows = noise.rank1 or one.chosen is not None
    if not by_rows:
        rows, columns = 1, one.rows * one.columns
    spans = -(-columns // 128)
    programs = -(-rows // _ROWS) * spans if by_rows else -(-spans // _ROWS)
    if not programs or not columns:
        return
    if dtype == 1:
        source, out = source.view(torch.int16), out.view(torch.int16)
    key = noise.seed, noise.sign_stream, noise.weight_stream, noise.step
    apply_signs[(programs,)](
        source, out, source if one.chosen is None else one.chosen, _factors(tuple(one.factors), source.device),
        len(one.factors) - 1, one.first_index, rows, columns, *map(_signed, key), one.slot,
        RANK1=noise.rank1, CHOSEN=one.chosen is not None, DTYPE=dtype,
        STOCHASTIC=noise.stochastic_rounding and dtype != 0, ALIGNED=not by_rows or columns % 8 == 0, ROWS=_ROWS,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def _signed(word: int) -> int:
    """Return a 32-bit word as the int32 of its bits: larger arguments would be compiled for as 64-bit ones."""
    return ((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


@lru_cache(maxsize=64)
def _factors(factors: tuple[float, ...], device: torch.device) -> Tensor:
    """Return the factors on the device; parameters of one group share theirs, and so do all steps' perturbed copies."""
    values = torch.tensor(factors, dtype=torch.float32)
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values
