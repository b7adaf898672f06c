"""Random signs for zeroth-order training: perturb weights by ±ε, and move them by signed step lengths (FZOO, MeZO).

A sign is one bit of Philox, so it is never stored: the pass that moves the weights computes the same signs again that
perturbed them, on any device and for any part of a tensor. One call gives 128 signs: element ``e`` of a parameter,
flattened in its logical order, takes bit ``e % 128`` of call ``e // 128`` with counter (call, step, index of the
perturbation) and key (seed, sign stream); a set bit means -1. With ``rank1`` a matrix (rows, columns) has the signs
``r sᵀ``: s are the signs of elements 0 … columns-1, r those of columns … columns+rows-1.

Arithmetic is fp32 (fp64 for fp64 weights). 16-bit weights are rounded stochastically, perturbed ones too: what is less
than half a unit in the last place would otherwise never be seen by the loss, nor ever reach the weights. The 16-bit
draw of element ``e`` is half-word ``e % 8`` of call ``e // 8``, key (seed, weight stream), counter (call, step, slot):
slot 0 for the update, 1 + index for a perturbation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import rademacher_triton
from .philox import DRAWS_PER_CALL, philox_4x32
from .rademacher_cpu import Pass, load_library, run_compiled, takes
from .stochastic_rounding import round_to_bf16, round_to_fp16

SIGNS_PER_CALL = 128
UPDATE_SLOT = 0
# Elements that the reference treats at a time: bounds its transient memory.
_CHUNK = 65536
_MASK = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Noise:
    """Where the random bits of one parameter in one step come from; streams are :func:`.philox.stream_id`'s.

    ``rank1`` is for parameters of two or more dimensions, seen as (shape[0], -1).
    """

    seed: int
    sign_stream: int
    weight_stream: int
    step: int
    rank1: bool = False
    stochastic_rounding: bool = True


@dataclass(frozen=True, slots=True)
class Copy:
    """``out ← param + eps · uᵢ`` of perturbation ``index``; out has the parameter's shape, dtype and strides."""

    param: Tensor
    eps: float
    noise: Noise
    index: int
    out: Tensor


@dataclass(frozen=True, slots=True)
class Update:
    """``param ← decay · param - Σᵢ step_sizes[i] · uᵢ``, in place."""

    param: Tensor
    noise: Noise
    step_sizes: tuple[float, ...]
    decay: float = 1.0


def matrix_shape(param: Tensor) -> tuple[int, int]:
    """Return (rows, columns) of a parameter seen as a matrix; vectors and scalars are one row."""
    rows = param.shape[0] if param.ndim > 1 else 1
    return rows, param.numel() // max(rows, 1)


def signs(numel: int, noise: Noise, index: int, first: int = 0, device: torch.device | None = None) -> Tensor:
    """Return the signs of elements ``first`` … ``first + numel - 1`` of perturbation ``index``, fp32 ±1.

    The full signs, whatever ``noise.rank1`` says: rank-1 signs are made of these, see :func:`rank1_signs`.
    """
    return 1.0 - 2.0 * _sign_bits(_start(first, device), numel, noise, index)[0].float()


def rank1_signs(
    rows: int, columns: int, noise: Noise, index: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Return the fp32 ±1 vectors r (rows,) and s (columns,) whose product ``r sᵀ`` are a matrix's rank-1 signs."""
    both = signs(rows + columns, noise, index, device=device)
    return both[columns:], both[:columns]


def sign_tensor(param: Tensor, noise: Noise, index: int) -> Tensor:
    """Return the perturbation ``uᵢ`` of a parameter in full, fp32 ±1 of its shape; for small tensors and tests."""
    if noise.rank1:
        r, s = rank1_signs(*matrix_shape(param), noise, index, param.device)
        return torch.outer(r, s).view(param.shape)
    return signs(param.numel(), noise, index, device=param.device).view(param.shape)


# ---- the reference --------------------------------------------------------------------------------------------------


def perturbed_copy_reference(param: Tensor, eps: float, noise: Noise, index: int, out: Tensor) -> Tensor:
    """Write ``param + eps · uᵢ`` to ``out``, of the parameter's shape, dtype and strides; returns ``out``."""
    source, target = param.reshape(-1), out.reshape(-1)
    for first in range(0, source.numel(), _CHUNK):
        part = slice(first, first + _CHUNK)
        values = source[part].to(_compute_dtype(param)).unsqueeze(0)
        sign = _segment_signs(param, _start(first, param.device), values.shape[1], noise, index)
        values = values + eps * sign.to(values.dtype)
        target[part] = _rounded(values, param.dtype, _start(first, param.device), noise, 1 + index)[0]
    if target.data_ptr() != out.data_ptr():  # a memory format without a flat view, such as channels_last
        out.copy_(target.view(out.shape))
    return out


def perturbed_rows_reference(weight: Tensor, rows: Tensor, eps: float, noise: Noise, index: int) -> Tensor:
    """Return the given rows of ``weight + eps · uᵢ`` without making the others: a perturbed embedding look-up.

    Args:
        weight: (rows, columns).
        rows: int64 of any shape.
        eps: signed length of the perturbation.
        noise: of ``weight``.
        index: of the perturbation.

    Returns:
        (*rows.shape, columns) in the weight's dtype.
    """
    wanted, columns = rows.reshape(-1), weight.shape[1]
    out = weight.new_empty(wanted.numel(), columns)
    at_a_time = max(1, _CHUNK // max(columns, 1))
    for first in range(0, wanted.numel(), at_a_time):
        part = wanted[first : first + at_a_time]
        values = weight[part].to(_compute_dtype(weight))
        sign = _segment_signs(weight, part * columns, columns, noise, index)
        values = values + eps * sign.to(values.dtype)
        out[first : first + at_a_time] = _rounded(values, weight.dtype, part * columns, noise, 1 + index)
    return out.view(*rows.shape, columns)


def apply_update_reference(update: Update) -> None:
    """Make one :class:`Update`: all perturbations of a chunk before the next chunk, so weights are passed over once."""
    param, noise = update.param, update.noise
    target = param.reshape(-1)
    for first in range(0, target.numel(), _CHUNK):
        part, start = slice(first, first + _CHUNK), _start(first, param.device)
        values = target[part].to(_compute_dtype(param)).unsqueeze(0)
        moved = torch.zeros_like(values)
        for index, size in enumerate(update.step_sizes):
            moved += size * _segment_signs(param, start, values.shape[1], noise, index).to(values.dtype)
        target[part] = _rounded(values * update.decay - moved, param.dtype, start, noise, UPDATE_SLOT)[0]
    if target.data_ptr() != param.data_ptr():
        param.copy_(target.view(param.shape))


def _compute_dtype(param: Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _start(first: int, device: torch.device | None) -> Tensor:
    return torch.tensor([first], device=device)


def _segment_signs(param: Tensor, starts: Tensor, length: int, noise: Noise, index: int) -> Tensor:
    """Return the signs (segments, length) of runs of elements that begin at ``starts`` (segments,), fp32."""
    if not noise.rank1:
        return 1.0 - 2.0 * _sign_bits(starts, length, noise, index).float()
    rows, columns = matrix_shape(param)
    r, s = rank1_signs(rows, columns, noise, index, param.device)
    elements = starts.unsqueeze(1) + torch.arange(length, device=param.device)
    return r[elements // columns] * s[elements % columns]


def _words(starts: Tensor, length: int, per_call: int, key: tuple[int, int], clock: tuple[int, int]) -> Tensor:
    """Return the four words of every call that the segments touch, (segments, calls, 4) int64."""
    count = (length + per_call - 2) // per_call + 1
    calls = (starts // per_call).unsqueeze(1) + torch.arange(count, device=starts.device)
    zero = torch.zeros_like(calls)
    step, slot = clock
    return torch.stack(philox_4x32((calls & _MASK, calls >> 32, zero + (step & _MASK), zero + slot), key), dim=-1)


def _cut(values: Tensor, starts: Tensor, length: int, per_call: int) -> Tensor:
    """Return each segment's own part of the values of its calls, (segments, calls · per_call) → (segments, length)."""
    if starts.numel() == 1:
        offset = int(starts) % per_call
        return values[:, offset : offset + length]
    return values.gather(1, (starts % per_call).unsqueeze(1) + torch.arange(length, device=starts.device))


def _sign_bits(starts: Tensor, length: int, noise: Noise, index: int) -> Tensor:
    key = (noise.seed & _MASK, noise.sign_stream)
    words = _words(starts, length, SIGNS_PER_CALL, key, (noise.step, index))
    bits = (words.unsqueeze(-1) >> torch.arange(32, device=words.device)) & 1
    return _cut(bits.flatten(1), starts, length, SIGNS_PER_CALL)


def _draws(starts: Tensor, length: int, noise: Noise, slot: int) -> Tensor:
    key = (noise.seed & _MASK, noise.weight_stream)
    words = _words(starts, length, DRAWS_PER_CALL, key, (noise.step, slot))
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1)
    return _cut(halves.flatten(1), starts, length, DRAWS_PER_CALL).to(torch.int32)


def _rounded(values: Tensor, dtype: torch.dtype, starts: Tensor, noise: Noise, slot: int) -> Tensor:
    if dtype not in (torch.bfloat16, torch.float16) or not noise.stochastic_rounding:
        return values.to(dtype)
    draws = _draws(starts, values.shape[1], noise, slot)
    return round_to_bf16(values, draws) if dtype == torch.bfloat16 else round_to_fp16(values, draws)


# ---- the fastest way there is ---------------------------------------------------------------------------------------


def perturbed_copy(param: Tensor, eps: float, noise: Noise, index: int, out: Tensor) -> Tensor:
    """Write ``param + eps · uᵢ`` to ``out``; see :func:`perturbed_copy_reference`."""
    perturbed_copies([Copy(param, eps, noise, index, out)])
    return out


def perturbed_copies(copies: Sequence[Copy]) -> None:
    """Make many copies, of any devices, at once: small ones take longer to ask for than to make."""
    compiled = [copy for copy in copies if takes(copy.param, copy.out)]
    library = load_library() if compiled else None
    if library is not None:
        run_compiled(library, [_copy_pass(copy) for copy in compiled])
        if len(compiled) == len(copies):
            return
    for copy in copies:
        if rademacher_triton.takes(copy.param, copy.out):
            rademacher_triton.launch(_copy_pass(copy))
        elif library is None or not takes(copy.param, copy.out):
            perturbed_copy_reference(copy.param, copy.eps, copy.noise, copy.index, copy.out)


def perturbed_rows(weight: Tensor, rows: Tensor, eps: float, noise: Noise, index: int) -> Tensor:
    """Return rows of ``weight + eps · uᵢ``; see :func:`perturbed_rows_reference`."""
    on_cuda = rademacher_triton.takes(weight)
    library = load_library() if takes(weight) else None
    if not on_cuda and library is None:
        return perturbed_rows_reference(weight, rows, eps, noise, index)
    table_rows, columns = weight.shape
    out, chosen = weight.new_empty(*rows.shape, columns), rows.contiguous().long()
    one = Pass(weight, out, (1.0, -eps), noise, 1 + index, index, table_rows, columns, chosen)
    rademacher_triton.launch(one) if library is None else run_compiled(library, [one])
    return out


def apply_updates(updates: Sequence[Update]) -> None:
    """Make all updates of a step in place, each on its own device; see :func:`apply_update_reference`."""
    compiled = [update for update in updates if takes(update.param)]
    library = load_library() if compiled else None
    if library is not None:
        run_compiled(library, [_pass(update) for update in compiled])
    for update in updates:
        if rademacher_triton.takes(update.param):
            rademacher_triton.launch(_pass(update))
        elif library is None or not takes(update.param):
            apply_update_reference(update)


def _copy_pass(copy: Copy) -> Pass:
    param, index = copy.param, copy.index
    return Pass(param, copy.out, (1.0, -copy.eps), copy.noise, 1 + index, index, *matrix_shape(param))


def _pass(update: Update) -> Pass:
    factors = (update.decay, *update.step_sizes)
    return Pass(update.param, update.param, factors, update.noise, UPDATE_SLOT, 0, *matrix_shape(update.param))
