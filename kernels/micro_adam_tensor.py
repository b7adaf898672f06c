"""What a MicroAdam step (:mod:`.micro_adam`) works on: a parameter, how it is cut into blocks, its state, the settings.

State of a parameter of d elements, by key; a row of the ring holds ``entries`` = k for each whole block and fewer for
a short last one:

    step          ()                          fp32   t, this tensor's own
    error_codes   (ceil(d / 2),)              uint8  e, see :mod:`.error_codes`
    error_min     (ceil(d / error_block),)    bf16   δ
    error_max     (ceil(d / error_block),)    bf16   Δ
    indices       (window, 2 entries)         uint8  I, within the block, ascending, each an unsigned 16-bit number
    values        (window, entries)           bf16   V

and with ``density=None`` (automatic), where rows have room for the most that may be selected:

    row_counts    (window,)                   int32  how many of each whole block's entries in a row are in use
    count         ()                          int32  how many the next step selects
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class MicroAdamHyperparameters:
    """The numbers that all tensors of the same settings share in one step.

    ``density=None`` adjusts the number of selected elements by itself, within ``density_bounds``, so that their share
    of the energy ‖a‖² stays at ``caught_target``. ``window_correction`` corrects the bias of the ``window`` terms that
    are summed, not of all t as published.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    window: int
    topk_block: int
    error_block: int
    density: float | None
    density_bounds: tuple[float, float] = (0.005, 0.02)
    caught_target: float = 0.8
    window_correction: bool = False
    stochastic_error: bool = False
    feedback: float = 0.0
    bf16_stochastic_rounding: bool = True
    maximize: bool = False
    seed: int = 0


@dataclass(slots=True)
class MicroAdamTensor:
    """One parameter in one step.

    ``param`` and ``grad`` have any shape, memory format and floating dtype and are flattened in their logical order.
    ``state`` holds the tensors listed at the top of this file, ``step`` on the CPU or beside a parameter on CUDA. There
    ``skips`` (0-d int64) counts skipped steps. The streams come from :func:`.philox.stream_id`. Of a parameter that is
    divided among processes this is a shard, and ``first_element`` its place in the flattened whole.
    """

    param: Tensor
    grad: Tensor
    state: State
    hyper: MicroAdamHyperparameters
    error_stream: int = 0
    weight_stream: int = 0
    first_element: int = 0
    skips: Tensor | None = None

    @property
    def blocks(self) -> "Blocks":
        """How the parameter is cut."""
        hyper = self.hyper
        return blocks_of(self.param.numel(), hyper.topk_block, hyper.density, hyper.density_bounds)


@dataclass(frozen=True)
class Blocks:
    """A flattened tensor cut for selection: ``full`` blocks of ``length``, and one of ``last`` elements if not 0.

    ``k`` and ``last_k`` entries of a ring row belong to them, of which a step fills ``smallest_k`` at least.
    """

    length: int
    full: int
    last: int
    k: int
    last_k: int
    smallest_k: int

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return self.full * self.length + self.last

    @property
    def entries(self) -> int:
        """Entries of a ring row."""
        return self.full * self.k + self.last_k

    def last_count(self, count: int) -> int:
        """Return how many entries of the short last block are used where each whole one has ``count``."""
        return self.last_k if count == self.k else min(self.last_k, -(-count * self.last // self.length))


@cache
def blocks_of(numel: int, topk_block: int, density: float | None, density_bounds: tuple[float, float]) -> Blocks:
    """Return how a tensor is cut; one smaller than ``topk_block`` is a single block."""
    length = min(topk_block, numel)
    full, last = divmod(numel, length)
    least, most = density_bounds if density is None else (density, density)
    k, last_k, smallest_k = (math.ceil(share * size) for share, size in ((most, length), (most, last), (least, length)))
    return Blocks(length, full, last, k, last_k, smallest_k)


def state_layout(numel: int, hyper: MicroAdamHyperparameters) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of each state tensor of a parameter of ``numel`` elements."""
    blocks = blocks_of(numel, hyper.topk_block, hyper.density, hyper.density_bounds)
    error_blocks = (-(-numel // hyper.error_block),)
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "step": ((), torch.float32),
        "error_codes": ((-(-numel // 2),), torch.uint8),
        "error_min": (error_blocks, torch.bfloat16),
        "error_max": (error_blocks, torch.bfloat16),
        # Bytes, because no process group moves 16-bit integers.
        "indices": ((hyper.window, 2 * blocks.entries), torch.uint8),
        "values": ((hyper.window, blocks.entries), torch.bfloat16),
    }
    if hyper.density is None:
        layout |= {"row_counts": ((hyper.window,), torch.int32), "count": ((), torch.int32)}
    return layout


def new_state(numel: int, hyper: MicroAdamHyperparameters, device: torch.device, counter_device: torch.device) -> State:
    """Return the state of a parameter of ``numel`` elements before its first step: no error, an empty window."""
    state = {
        key: torch.zeros(shape, dtype=dtype, device=counter_device if key == "step" else device)
        for key, (shape, dtype) in state_layout(numel, hyper).items()
    }
    if hyper.density is None:
        state["count"].fill_(blocks_of(numel, hyper.topk_block, hyper.density, hyper.density_bounds).k)
    return state
