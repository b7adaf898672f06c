"""AdaClip and AdaGN on CUDA: tables of pointers for :mod:`.stable_spam_triton_kernels`, and their launches.

However many tensors there are, measuring them is two launches for each dtype, and writing them one. Nothing waits for
the device: tables are copied from pinned memory and only when an address changed.

Not yet run on a GPU. With bf16 gradients AdaClip and AdaGN read 4 bytes and write 2 for each parameter; tensors in
which something is clipped are read once more.

triton is imported at the first launch, not with this file.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .solo_triton import is_available

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CACHED_PLANS = 16
_EXACT: dict[str, Any] = {"enable_fp_fusion": False}


def takes(tensors: Sequence[Tensor]) -> bool:
    """Return whether the kernels can treat these: on one CUDA device, contiguous, of a dtype of up to 32 bits."""
    device = tensors[0].device
    return (
        device.type == "cuda"
        and is_available()
        and all(one.device == device and one.dtype in _DTYPES and one.is_contiguous() for one in tensors)
    )


def measure(grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """See :func:`.stable_spam.measure`."""
    return _measured(grads, None)


def clipped_norms(grads: Sequence[Tensor], limits: Tensor, shrink: Tensor, norms: Tensor) -> Tensor:
    """See :func:`.stable_spam.clipped_norms`."""
    _, clipped = _measured(grads, (limits.contiguous(), shrink.contiguous()))
    return torch.where(limits.isinf(), norms, clipped)


def rescale(grads: Sequence[Tensor], outs: Sequence[Tensor], limits: Tensor, shrink: Tensor, factors: Tensor) -> None:
    """See :func:`.stable_spam.rescale`."""
    from . import stable_spam_triton_kernels as kernels

    numbers = limits.contiguous(), shrink.contiguous(), factors.contiguous()
    with _on(grads[0].device):
        for plan in _plans_for(grads, outs):
            if len(plan.entry_of_program):
                kernels.rescale[(len(plan.entry_of_program),)](
                    plan.table, plan.entry_of_program, *numbers, DTYPE=plan.dtype, OUT_DTYPE=plan.out_dtype, **_EXACT
                )


def _measured(grads: Sequence[Tensor], clip: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Return maxima and norms, of the tensors as they are, or clipped by limits and factors."""
    from . import stable_spam_triton_kernels as kernels

    device = grads[0].device
    found = torch.zeros(2, len(grads), dtype=torch.float32, device=device)
    with _on(device):
        for plan in _plans_for(grads, grads):
            programs = len(plan.entry_of_program)
            partials = torch.empty(programs, 2, dtype=torch.float32, device=device)
            if programs:
                kernels.partial_measures[(programs,)](
                    plan.table, plan.entry_of_program, *(clip or (found, found)), partials,
                    CLIPS=clip is not None, DTYPE=plan.dtype, **_EXACT,
                )  # fmt: skip
                kernels.whole_measures[(len(plan.table),)](plan.table, partials, found[0], found[1], TILE=128, **_EXACT)
    return found[0], found[1].sqrt()


@dataclass(frozen=True)
class _Plan:
    """Tables on the device for the tensors of one pair of dtypes."""

    dtype: int
    out_dtype: int
    table: Tensor  # (tensors, fields) int64
    entry_of_program: Tensor  # (programs,) int32


_plans: OrderedDict[tuple[Any, ...], list[_Plan]] = OrderedDict()


def _plans_for(grads: Sequence[Tensor], outs: Sequence[Tensor]) -> list[_Plan]:
    """Return the tables for these addresses, the ones made before if they are the same."""
    pairs = zip(grads, outs, strict=True)
    rows = [(g.data_ptr(), o.data_ptr(), g.numel(), _DTYPES[g.dtype], _DTYPES[o.dtype]) for g, o in pairs]
    key = (grads[0].device, tuple(rows))
    if key not in _plans:
        _plans[key] = list(_new_plans(rows, grads[0].device))
        while len(_plans) > _CACHED_PLANS:
            _plans.popitem(last=False)
    _plans.move_to_end(key)
    return _plans[key]


def _new_plans(rows: Sequence[tuple[int, ...]], device: torch.device) -> Iterator[_Plan]:
    from .stable_spam_triton_kernels import ELEMENTS

    for dtypes in dict.fromkeys(row[3:] for row in rows):
        places = [place for place, row in enumerate(rows) if row[3:] == dtypes]
        programs = torch.tensor([-(-rows[place][2] // ELEMENTS) for place in places])
        first = (programs.cumsum(0) - programs).tolist()
        table = [(*rows[place][:3], start, place) for place, start in zip(places, first, strict=True)]
        entry_of_program = torch.repeat_interleave(torch.arange(len(places)), programs).to(torch.int32)
        yield _Plan(
            dtype=dtypes[0],
            out_dtype=dtypes[1],
            table=_to_device(torch.tensor(table, dtype=torch.int64), device),
            entry_of_program=_to_device(entry_of_program, device),
        )


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy without waiting: torch keeps the pinned memory until the copy is done."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values
