"""What a SOLO step (:mod:`.solo`) works on: a parameter, its gradient, its state, and the settings of the step.

A parameter is seen as a matrix (shape[0], -1) whose rows are cut into blocks of ``block_size``; blocks never cross
rows, the last of a row may be short.

State of a (rows, columns) parameter, by key; ``blocks = ceil(columns / block_size)``:

    exp_avg_codes         (rows, packed bytes of a row)  uint8    packed block by block, see :mod:`.packing`
    exp_avg_scale         (rows, blocks)                 scale    largest magnitude
    exp_avg_sq_codes      (rows, packed bytes of a row)  uint8
    exp_avg_sq_scale      (rows, blocks)                 scale    D
    exp_avg_sq_log2_base  (rows, blocks)                 scale    log₂α
    exp_avg, exp_avg_sq   (rows, columns)                fp32     instead of the above where a moment has 32 bits

``scale`` is fp32, or bf16 in all of them; the tensors themselves say which.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .packing import packed_length


@dataclass(frozen=True)
class SoloHyperparameters:
    """The numbers that all tensors of the same settings share in one step; every one may change from step to step.

    ``beta1`` is the effective β₁ (after momentum adjustment).
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    bits: tuple[int, int]
    block_size: int
    quantile: float
    stochastic_rounding: bool = True
    bf16_stochastic_rounding: bool = True
    maximize: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Part:
    """The part of a whole parameter that a shard is, for shards that cut rows.

    ``shape`` is the whole one's, of two dimensions or more; ``slices`` has one for each. The first is in rows.
    """

    shape: tuple[int, ...]
    slices: tuple[slice, ...]


@dataclass(slots=True)
class SoloTensor:
    """One parameter in one step.

    ``param`` and ``grad`` have any shape, memory format and floating dtype; they are seen as (rows, columns) in their
    logical order. ``state`` holds the tensors listed at the top of this file and ``step``, 0-d fp32, which counts the
    steps made so far: on the CPU, but beside the parameter where that is on CUDA. There ``skips`` (0-d int64) counts
    skipped steps, since the host does not wait to see them. The streams come from :func:`.philox.stream_id`;
    ``first_row`` is the global row of a shard's first row. A shard that is not made of whole rows says so by ``cut``;
    its moments must have 32 bits, and only :func:`solo_step` gives its weights the noise of their place in the whole.
    """

    param: Tensor
    grad: Tensor
    state: Mapping[str, Tensor]
    hyper: SoloHyperparameters
    rows: int
    columns: int
    state_stream: int = 0
    weight_stream: int = 0
    first_row: int = 0
    skips: Tensor | None = None
    cut: Part | None = None

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype of the blocks' metadata, fp32 where there is none."""
        scale = self.state.get("exp_avg_scale", self.state.get("exp_avg_sq_scale"))
        return torch.float32 if scale is None else scale.dtype


def row_bytes(columns: int, block_size: int, bits: int) -> int:
    """Return the packed bytes of a row; blocks are whole bytes, so only the row's last 8 codes can be padded."""
    full, rest = divmod(columns, block_size)
    return full * packed_length(block_size, bits) + packed_length(rest, bits)
