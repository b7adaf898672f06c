"""The SOLO step: AdamW whose two moments live in 2 to 8 bits between steps (arXiv 2505.00347).

For every block of a row (see :mod:`.solo_tensor`, which also lists the state) the moments are decoded, one exact AdamW
step is made with the fresh fp32 moments, and only then they are encoded again: quantization noise reaches the weights
one step later and damped by the averages. The first moment uses :mod:`.dynamic`, the second :mod:`.logarithmic`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import solo_triton
from .dynamic import decode_dynamic, encode_dynamic
from .elementary import LARGEST_SQUARABLE, sqrt
from .logarithmic import decode_logarithmic, encode_logarithmic
from .packing import pack, packed_length, unpack
from .philox import DRAWS_PER_CALL, block_calls, draw_16bit
from .solo_cpu import load_library, step_compiled, takes
from .solo_tensor import SoloHyperparameters, SoloTensor
from .stochastic_rounding import ROUNDED_DTYPES, round_scale, round_weights

# Elements that the reference treats at a time: bounds its transient memory, and intermediates stay in a CPU's cache.
_CHUNK = 65536


def adamw_update(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, hyper: SoloHyperparameters, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One decoupled-weight-decay Adam step (Loshchilov and Hutter, arXiv 1711.05101), all tensors fp32 of one shape.

    Returns:
        The new parameter, first and second moment.
    """
    exp_avg = exp_avg + (1 - hyper.beta1) * (grad - exp_avg)
    exp_avg_sq = exp_avg_sq + (1 - hyper.beta2) * (grad * grad - exp_avg_sq)
    denominator = sqrt(exp_avg_sq) * (1 - hyper.beta2**step) ** -0.5 + hyper.eps
    step_size = hyper.lr / (1 - hyper.beta1**step)
    param = param * (1 - hyper.lr * hyper.weight_decay) - step_size * (exp_avg / denominator)
    return param, exp_avg, exp_avg_sq


@dataclass(frozen=True)
class _Segment:
    """Equal blocks of consecutive rows: the full blocks of each row, or its short last one."""

    rows: slice
    columns: slice
    blocks: slice
    length: int

    def elements(self, matrix: Tensor) -> Tensor:
        """Return a copy of the segment's part of a (rows, columns) matrix as (blocks, length)."""
        return matrix[self.rows, self.columns].reshape(-1, self.length)

    def codes(self, packed: Tensor, bits: int) -> Tensor:
        """Return the view (rows, bytes) of the segment's packed codes."""
        first = self.columns.start * bits // 8
        count = (self.blocks.stop - self.blocks.start) * packed_length(self.length, bits)
        return packed[self.rows, first : first + count]


def _segments(rows: int, columns: int, block_size: int) -> Iterator[_Segment]:
    full, rest = divmod(columns, block_size)
    step = max(1, _CHUNK // max(columns, 1))
    span = max(1, _CHUNK // block_size)
    for first_row in range(0, rows, step):
        chunk = slice(first_row, min(first_row + step, rows))
        for first in range(0, full, span):
            blocks = slice(first, min(first + span, full))
            yield _Segment(chunk, slice(first * block_size, blocks.stop * block_size), blocks, block_size)
        if rest:
            yield _Segment(chunk, slice(full * block_size, columns), slice(full, full + 1), rest)


def _decode_first(state: Mapping[str, Tensor], segment: _Segment, bits: int) -> Tensor:
    if bits == 32:
        return segment.elements(state["exp_avg"])
    packed = segment.codes(state["exp_avg_codes"], bits).reshape(-1, packed_length(segment.length, bits))
    scale = state["exp_avg_scale"][segment.rows, segment.blocks].reshape(-1)
    return decode_dynamic(unpack(packed, bits, segment.length), scale, bits)


def _decode_second(state: Mapping[str, Tensor], segment: _Segment, bits: int) -> Tensor:
    if bits == 32:
        return segment.elements(state["exp_avg_sq"])
    packed = segment.codes(state["exp_avg_sq_codes"], bits).reshape(-1, packed_length(segment.length, bits))
    scale = state["exp_avg_sq_scale"][segment.rows, segment.blocks].reshape(-1)
    log2_base = state["exp_avg_sq_log2_base"][segment.rows, segment.blocks].reshape(-1)
    return decode_logarithmic(unpack(packed, bits, segment.length), scale, log2_base, bits)


def _write(destination: Tensor, values: Tensor) -> None:
    destination.copy_(values.reshape(destination.shape))


def _encode_first(state: Mapping[str, Tensor], segment: _Segment, values: Tensor, bits: int) -> None:
    if bits == 32:
        _write(state["exp_avg"][segment.rows, segment.columns], values)
        return
    codes, scale = encode_dynamic(values, bits, state["exp_avg_scale"].dtype)
    _write(segment.codes(state["exp_avg_codes"], bits), pack(codes, bits))
    _write(state["exp_avg_scale"][segment.rows, segment.blocks], scale)


def _encode_second(
    state: Mapping[str, Tensor],
    segment: _Segment,
    values: Tensor,
    bits: int,
    quantile: float,
    draws: Tensor | None = None,
) -> None:
    """Encode with stochastic rounding by ``draws`` from :func:`_draws`, or without them to the nearest."""
    if bits == 32:
        _write(state["exp_avg_sq"][segment.rows, segment.columns], values)
        return
    rounding: Tensor | float = 0.5
    scale_draws: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
    if draws is not None:
        rounding = (draws[:, : segment.length].float() + 0.5) * 2.0**-16
        # The exclusive or of two draws is independent of either one, so no element's rounding meets its own draw.
        lanes = draws[:, :: draws.shape[1] // DRAWS_PER_CALL]
        scale_draws = lanes[:, 0] ^ lanes[:, 1], lanes[:, 2] ^ lanes[:, 3]
    codes, scale, log2_base = encode_logarithmic(values, bits, quantile, rounding)
    _write(segment.codes(state["exp_avg_sq_codes"], bits), pack(codes, bits))
    for key, value, draw in zip(("scale", "log2_base"), (scale, log2_base), scale_draws, strict=True):
        stored = state[f"exp_avg_sq_{key}"]
        _write(stored[segment.rows, segment.blocks], round_scale(value, stored.dtype, draw))


def _draws(segment: _Segment, tensor: SoloTensor, stream: int, step: int) -> Tensor:
    """Return int32 draws (blocks, length padded to whole calls), numbered through each global row, then row by row."""
    device = tensor.param.device
    calls_per_block = -(-segment.length // DRAWS_PER_CALL)
    blocks = segment.blocks.stop - segment.blocks.start
    calls_per_row = -(-tensor.columns // DRAWS_PER_CALL)
    first = segment.columns.start // DRAWS_PER_CALL
    row = torch.arange(segment.rows.start, segment.rows.stop, device=device) + tensor.first_row
    calls = (row * calls_per_row + first).view(-1, 1, 1) + block_calls(0, blocks, calls_per_block, device)
    return draw_16bit(tensor.hyper.seed, stream, step, calls.view(-1, calls_per_block))


def solo_step_reference(tensor: SoloTensor) -> bool:
    """Make one step in place on any device: the meaning of every other path.

    bf16 weights are written with stochastic rounding if ``tensor.hyper`` says so.

    Returns:
        True if the step was skipped, with nothing changed, because the gradient holds a value that is not finite or
        whose square is not: the second moment would be infinite for ever.
    """
    hyper, shape = tensor.hyper, (tensor.rows, tensor.columns)
    if not tensor.grad.abs().amax().float() <= LARGEST_SQUARABLE:  # false for NaN as well
        return True
    tensor.state["step"].add_(1)
    step = int(tensor.state["step"])
    # fp32 moments have the parameter's own shape.
    state = {
        key: value.view(shape) if key in ("exp_avg", "exp_avg_sq") else value for key, value in tensor.state.items()
    }
    param, grad = tensor.param.reshape(shape), tensor.grad.reshape(shape)
    first_bits, second_bits = hyper.bits
    for segment in _segments(*shape, hyper.block_size):
        gradient = segment.elements(grad).float()
        updated, exp_avg, exp_avg_sq = adamw_update(
            segment.elements(param).float(),
            -gradient if hyper.maximize else gradient,
            _decode_first(state, segment, first_bits),
            _decode_second(state, segment, second_bits),
            hyper,
            step,
        )

        if param.dtype in ROUNDED_DTYPES and hyper.bf16_stochastic_rounding:
            draws = _draws(segment, tensor, tensor.weight_stream, step)
            updated = round_weights(updated, param.dtype, draws[:, : segment.length])
        _write(param[segment.rows, segment.columns], updated)

        state_noise = hyper.stochastic_rounding and second_bits != 32
        state_draws = _draws(segment, tensor, tensor.state_stream, step) if state_noise else None
        _encode_first(state, segment, exp_avg, first_bits)
        _encode_second(state, segment, exp_avg_sq, second_bits, hyper.quantile, state_draws)
    if param.data_ptr() != tensor.param.data_ptr():  # a memory format without a matrix view, such as channels_last
        tensor.param.copy_(param.view(tensor.param.shape))
    return False


def dequantize_moments(
    state: Mapping[str, Tensor], rows: int, columns: int, bits: tuple[int, int], block_size: int
) -> tuple[Tensor, Tensor]:
    """Return both moments as (rows, columns) fp32."""
    device = next(iter(state.values())).device
    exp_avg = torch.empty(rows, columns, device=device)
    exp_avg_sq = torch.empty(rows, columns, device=device)
    for segment in _segments(rows, columns, block_size):
        _write(exp_avg[segment.rows, segment.columns], _decode_first(state, segment, bits[0]))
        _write(exp_avg_sq[segment.rows, segment.columns], _decode_second(state, segment, bits[1]))
    return exp_avg, exp_avg_sq


def quantize_moments(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    state: Mapping[str, Tensor],
    bits: tuple[int, int],
    block_size: int,
    quantile: float,
) -> None:
    """Encode (rows, columns) fp32 moments into ``state`` at the nearest levels, to take over a full-precision run."""
    rows, columns = exp_avg.shape
    for segment in _segments(rows, columns, block_size):
        _encode_first(state, segment, segment.elements(exp_avg), bits[0])
        _encode_second(state, segment, segment.elements(exp_avg_sq), bits[1], quantile)


def solo_step(tensors: Sequence[SoloTensor]) -> list[bool]:
    """Make one step of all tensors in place, each on its own device, by the fastest way there is.

    Returns:
        For each tensor whether it was skipped, see :func:`solo_step_reference`; False for one that was given to CUDA,
        where it is only known later: there the tensor's ``skips`` counts.
    """
    asked, tensors = tensors, [_in_fp32(tensor) for tensor in tensors]
    given = [tensor for tensor in tensors if tensor.param.is_cuda and solo_triton.takes(tensor)]
    if given:
        solo_triton.launch(given)
    library = load_library() if any(tensor.param.is_cpu for tensor in tensors) else None
    compiled = [tensor for tensor in tensors if takes(tensor)] if library else []
    skipped = dict(zip(map(id, compiled), step_compiled(library, compiled), strict=True)) if library else {}
    skipped |= {id(tensor): False for tensor in given}
    result = [skipped[id(tensor)] if id(tensor) in skipped else solo_step_reference(tensor) for tensor in tensors]
    for tensor, stepped in zip(asked, tensors, strict=True):
        if stepped is not tensor:
            _round_cut(tensor, stepped.param)
    return result


def _in_fp32(tensor: SoloTensor) -> SoloTensor:
    """Return a tensor with a copy of the weights in fp32 where their noise is not that of a matrix of whole rows."""
    if tensor.cut is None or tensor.param.dtype not in ROUNDED_DTYPES or not tensor.hyper.bf16_stochastic_rounding:
        return tensor
    return replace(tensor, param=tensor.param.float())


def _round_cut(tensor: SoloTensor, updated: Tensor) -> None:
    """Round fp32 weights to the bf16 or fp16 ones of ``tensor``, by the draws that the whole parameter would get there.

    Unchanged weights, of a step that was skipped, stay so: rounding leaves alone what their dtype can represent.
    """
    assert tensor.cut is not None
    (rows, *others), (_, *shape) = tensor.cut.slices, tensor.cut.shape
    part_shape = [piece.stop - piece.start for piece in tensor.cut.slices]
    param, updated = tensor.param.view(part_shape), updated.view(part_shape)
    counter = tensor.state["step"]
    # On a device the counter stays a tensor, which draws take as well: nothing waits to see it.
    step: Any = int(counter) if counter.is_cpu else counter.long()
    columns = math.prod(shape)
    span = max(1, _CHUNK // max(columns, 1))
    for first in range(0, part_shape[0], span):
        chunk = slice(first, min(first + span, part_shape[0]))
        count = chunk.stop - chunk.start
        whole = replace(tensor, columns=columns, first_row=rows.start + first)
        draws = [
            _draws(segment, whole, tensor.weight_stream, step)[:, : segment.length].reshape(count, -1)
            for segment in _segments(count, columns, tensor.hyper.block_size)
        ]
        placed = torch.cat(draws, dim=1).view(count, *shape)[(slice(None), *others)]
        param[chunk] = round_weights(updated[chunk], param.dtype, placed)
