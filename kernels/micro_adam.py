"""The MicroAdam step: Adam on the few largest gradients, the rest remembered in 4 bits (arXiv 2405.15593, Algorithm 1).

What a step does not send to the weights it adds to the next gradient (error feedback). The moments are not kept: they
are summed anew from the last ``window`` selections. Blocks run over the **flattened** parameter: selection is exact in
each ``topk_block`` elements, the error is coded in each ``error_block``. Nothing depends on the device, and
``param.grad`` is only read. :mod:`.micro_adam_tensor` lists the state.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import micro_adam_triton
from .elementary import LARGEST_SQUARABLE, sqrt
from .error_codes import decode_error, encode_error, error_bounds
from .micro_adam_cpu import load_library, step_compiled, takes
from .micro_adam_tensor import Blocks, MicroAdamHyperparameters, MicroAdamTensor, State
from .philox import element_draws
from .stochastic_rounding import ROUNDED_DTYPES, round_weights
from .top_k import top_k

# Elements that the reference treats at a time, at least: bounds its transient memory.
_CHUNK = 65536


@dataclass(frozen=True)
class _Chunk:
    """Consecutive whole blocks of both kinds, and what of the state belongs to them."""

    start: int
    stop: int
    blocks: Blocks
    entries: slice
    error_block: int

    @property
    def elements(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def code_bytes(self) -> slice:
        return slice(self.start // 2, -(-self.stop // 2))

    @property
    def error_blocks(self) -> slice:
        return slice(self.start // self.error_block, -(-self.stop // self.error_block))


def _chunks(tensor_blocks: Blocks, error_block: int) -> Iterator[_Chunk]:
    whole = tensor_blocks
    unit = math.lcm(whole.length, error_block)
    span = unit * max(1, _CHUNK // unit)
    for start in range(0, whole.numel, span):
        stop = min(start + span, whole.numel)
        full, last = divmod(stop - start, whole.length)
        last_k = whole.last_k if last else 0
        blocks = Blocks(whole.length, full, last, whole.k, last_k, whole.smallest_k)
        first = start // whole.length * whole.k
        yield _Chunk(start, stop, blocks, slice(first, first + blocks.entries), error_block)


def select(values: Tensor, blocks: Blocks, count: int) -> tuple[Tensor, Tensor]:
    """Return the places of the largest magnitudes: ``count`` in each whole block, its share in a short last one.

    Args:
        values: (n,) fp32.
        blocks: how they are cut.
        count: at most ``blocks.k``.

    Returns:
        (selected,) int64 positions in ``values``, and (selected,) int64 entries of a ring row to keep them in.
    """
    device, parts = values.device, []
    whole, last_count = blocks.full * blocks.length, blocks.last_count(count)
    for first, rows, length, k, first_entry in (
        (0, blocks.full, blocks.length, count, 0),
        (whole, 1, blocks.last, last_count, blocks.full * blocks.k),
    ):
        if rows * length:
            row = torch.arange(rows, device=device)[:, None]
            found = top_k(values[first : first + rows * length].view(rows, length), k)
            entries = first_entry + row * blocks.k + torch.arange(k, device=device)
            parts.append(torch.stack([first + row * length + found, entries]).flatten(1))
    positions, entries = torch.cat(parts, dim=1)
    return positions, entries


def window_row(state: State, chunk: _Chunk, row: int) -> tuple[Tensor, Tensor]:
    """Return the positions in the chunk, int64, and the fp32 values that are kept in one row of the ring."""
    indices = state["indices"][row].view(torch.int16)[chunk.entries]
    values = state["values"][row, chunk.entries]
    entry = torch.arange(len(indices), device=indices.device)
    block = entry // chunk.blocks.k
    positions = block * chunk.blocks.length + (indices.to(torch.int64) & 0xFFFF)
    if "row_counts" not in state:
        return positions, values.float()
    count = int(state["row_counts"][row])
    counts = torch.where(block < chunk.blocks.full, count, chunk.blocks.last_count(count))
    used = entry % chunk.blocks.k < counts
    return positions[used], values[used].float()


def window_sums(state: State, chunk: _Chunk, hyper: MicroAdamHyperparameters, step: int) -> tuple[Tensor, Tensor]:
    """Return Σ β₁^age·V and Σ β₂^age·V² over the last selections, dense (elements of the chunk,) fp32."""
    first = torch.zeros(chunk.stop - chunk.start, device=state["values"].device)
    second = torch.zeros_like(first)
    for age in range(min(step, hyper.window)):
        positions, values = window_row(state, chunk, (step - 1 - age) % hyper.window)
        # No position occurs twice in a row, so these are plain sums in the order of age.
        first[positions] += values * hyper.beta1**age
        second[positions] += values * values * hyper.beta2**age
    return first, second


def bias_corrections(hyper: MicroAdamHyperparameters, step: int) -> tuple[float, float]:
    """Return c₁ and c₂, by which the sums over the window become averages."""
    terms = min(step, hyper.window) if hyper.window_correction else step
    return (1 - hyper.beta1) / (1 - hyper.beta1**terms), (1 - hyper.beta2) / (1 - hyper.beta2**terms)


def next_count(count: int, selected: float, total: float, blocks: Blocks, target: float) -> int:
    """Return how many elements of a block the next step selects, by the energies of this one's.

    It rises by an eighth where they were too few and falls by a 32nd, so lost quality is answered within a few steps.
    """
    count += count // 8 + 1 if selected < target * total else -(count // 32 + 1)
    return min(max(count, blocks.smallest_k), blocks.k)


def _draws(tensor: MicroAdamTensor, stream: int, step: int, chunk: _Chunk) -> Tensor:
    first = tensor.first_element
    return element_draws(tensor.hyper.seed, stream, step, first + chunk.start, first + chunk.stop, tensor.param.device)


def micro_adam_step_reference(tensor: MicroAdamTensor) -> bool:
    """Make one step in place on any device: the meaning of every other path. Comments give lines of Algorithm 1.

    Returns:
        True if the step was skipped, with nothing changed, because the gradient holds a value that is not finite or
        whose square is not.
    """
    hyper, state, blocks = tensor.hyper, tensor.state, tensor.blocks
    if not tensor.grad.abs().amax().float() <= LARGEST_SQUARABLE:  # false for NaN as well
        return True
    state["step"].add_(1)
    step = int(state["step"])
    row = (step - 1) % hyper.window
    count = int(state["count"]) if hyper.density is None else blocks.k
    if hyper.density is None:
        state["row_counts"][row] = count
    param, grad = tensor.param.reshape(-1), tensor.grad.reshape(-1)
    c1, c2 = bias_corrections(hyper, step)
    selected = total = 0.0
    for chunk in _chunks(blocks, hyper.error_block):
        gradient = grad[chunk.elements].float()
        codes = state["error_codes"][chunk.code_bytes]
        low, high = (state[key][chunk.error_blocks] for key in ("error_min", "error_max"))

        # 4: a = g + Q⁻¹(e)
        error = decode_error(codes, low, high, hyper.error_block, len(gradient))
        accumulated = (-gradient if hyper.maximize else gradient) + error
        # 5: I, V = the k largest of each block, into the ring
        positions, entries = select(accumulated, chunk.blocks, count)
        start_of_block = positions // chunk.blocks.length * chunk.blocks.length
        state["indices"][row].view(torch.int16)[chunk.entries][entries] = (positions - start_of_block).to(torch.int16)
        state["values"][row, chunk.entries][entries] = accumulated[positions].to(torch.bfloat16)
        if hyper.density is None:
            total += float(accumulated.double().square().sum())
            selected += float(accumulated[positions].double().square().sum())
        # 6: a[I] = 0
        accumulated[positions] = 0
        # 7: δ, Δ
        new_low, new_high = error_bounds(accumulated, hyper.error_block)
        # 8: e = Q(a)
        rounding: Tensor | float = 0.5
        if hyper.stochastic_error:
            rounding = (_draws(tensor, tensor.error_stream, step, chunk).float() + 0.5) * 2.0**-16
        codes.copy_(encode_error(accumulated, new_low, new_high, hyper.error_block, rounding))
        kept = 1 - hyper.feedback
        # Levels scale with their bounds, so the codes of (1 - feedback)·e are those of e.
        low.copy_(new_low.float() * kept)
        high.copy_(new_high.float() * kept)
        # 10, 11: m̂ / c₁ and v̂ / c₂
        first, second = window_sums(state, chunk, hyper, step)
        # 12: p = p (1 - lr·wd) - lr·m̂ / (√v̂ + ε)
        direction = torch.where(second > 0, first / (sqrt(second) * c2**0.5 + hyper.eps), 0.0)
        updated = param[chunk.elements].float() * (1 - hyper.lr * hyper.weight_decay) - direction * (hyper.lr * c1)
        if hyper.feedback:
            sent = decode_error(codes, new_low, new_high, hyper.error_block, len(gradient))
            updated -= sent * (hyper.lr * hyper.feedback)
        if param.dtype in ROUNDED_DTYPES and hyper.bf16_stochastic_rounding:
            updated = round_weights(updated, param.dtype, _draws(tensor, tensor.weight_stream, step, chunk))
        param[chunk.elements].copy_(updated)
    if hyper.density is None:
        state["count"].fill_(next_count(count, selected, total, blocks, hyper.caught_target))
    if param.data_ptr() != tensor.param.data_ptr():  # a memory format without a flat view, such as channels_last
        tensor.param.copy_(param.view(tensor.param.shape))
    return False


def dequantize_moments(tensor: MicroAdamTensor) -> tuple[Tensor, Tensor]:
    """Return the averages that the window stands for, (1 - β₁) Σ β₁^age·V and so on, (numel,) fp32."""
    step = int(tensor.state["step"])
    chunks = _chunks(tensor.blocks, tensor.hyper.error_block)
    sums = [window_sums(tensor.state, chunk, tensor.hyper, step) for chunk in chunks]
    first, second = (torch.cat(parts) for parts in zip(*sums, strict=True))
    return first * (1 - tensor.hyper.beta1), second * (1 - tensor.hyper.beta2)


def dequantize_error(tensor: MicroAdamTensor) -> Tensor:
    """Return e, what is yet to be sent to the weights, (numel,) fp32."""
    state = tensor.state
    bounds = state["error_min"], state["error_max"]
    return decode_error(state["error_codes"], *bounds, tensor.hyper.error_block, tensor.param.numel())


def last_selection(tensor: MicroAdamTensor) -> Tensor:
    """Return V of the last step, (selected,) fp32; nothing before the first."""
    step = int(tensor.state["step"])
    row = (step - 1) % tensor.hyper.window
    chunks = _chunks(tensor.blocks, tensor.hyper.error_block) if step else ()
    return torch.cat([window_row(tensor.state, chunk, row)[1] for chunk in chunks] or [torch.empty(0)])


def micro_adam_step(tensors: Sequence[MicroAdamTensor]) -> list[bool]:
    """Make one step of all tensors in place, each on its own device, by the fastest way there is.

    Returns:
        For each tensor whether it was skipped, see :func:`micro_adam_step_reference`; False for one that was given to
        CUDA, where it is only known later: there the tensor's ``skips`` counts.
    """
    given = [tensor for tensor in tensors if tensor.param.is_cuda and micro_adam_triton.takes(tensor)]
    if given:
        micro_adam_triton.launch(given)
    library = load_library() if any(tensor.param.is_cpu for tensor in tensors) else None
    compiled = [tensor for tensor in tensors if takes(tensor)] if library else []
    skipped = dict(zip(map(id, compiled), step_compiled(library, compiled), strict=True)) if library else {}
    skipped |= {id(tensor): False for tensor in given}
    return [skipped[id(tensor)] if id(tensor) in skipped else micro_adam_step_reference(tensor) for tensor in tensors]
