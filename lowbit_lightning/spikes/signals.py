"""What is measured at every optimizer step, without waiting for the device, and how all ranks come to the same numbers.

Every rank fills its own row of a (ranks, signals) table of zeros and one all-reduce adds the tables up: a row is then
one rank's values plus zeros, exactly, NaN and infinity included, on every rank. So the ranks not only agree on the
sums, they also know whose value was the worst. Norms are accumulated in fp32 whatever the gradients' dtype.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

SAMPLE_KEYS = ("id", "ids", "idx", "index", "sample_id")
SAMPLED_TENSORS, SAMPLED_ELEMENTS = 64, 1024  # at most, for the update/weight ratio: less than a MB, in a few kernels


def global_norm(tensors: Iterable[Tensor | None], copies: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """This rank's part of the global norm of tensors that may be sharded over ranks.

    The root of the sum of the squares of all ranks' parts is the global norm: an element that lives on several ranks
    counts on each of them, by the share of one over its copies.

    Args:
        tensors: gradients or weights of any dtype; None is passed over. Of a DTensor the local shard is read.
        copies: ranks that hold the same values of a plain tensor (all of them under data parallelism).
        device: where the result is wanted.

    Returns:
        The norm (0-d, fp32 or wider) and the number of tensors whose own norm is not finite (0-d), or None if there
        are no tensors.
    """
    groups: dict[tuple[torch.device, torch.dtype, int], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        if tensor is not None:
            local, its_copies = _local(tensor.detach(), copies)
            groups[local.device, local.dtype, its_copies].append(local)
    if not groups:
        return None
    parts, nonfinite = [], []
    for (_, dtype, its_copies), group in groups.items():
        wide = torch.float32 if dtype.itemsize < 4 else None
        norms = torch.stack(torch._foreach_norm(group, 2, dtype=wide))
        parts.append((torch.linalg.vector_norm(norms) / its_copies**0.5).to(device))
        nonfinite.append((~torch.isfinite(norms)).sum().to(device))
    return torch.linalg.vector_norm(torch.stack(parts)), torch.stack(nonfinite).sum()


def _local(tensor: Tensor, copies: int) -> tuple[Tensor, int]:
    """What of a tensor is on this rank, as plain real numbers, and on how many ranks the same is."""
    if isinstance(tensor, DTensor):
        if any(placement.is_partial() for placement in tensor.placements):  # a sum that is not summed yet
            whole = [Replicate() if placement.is_partial() else placement for placement in tensor.placements]
            tensor = tensor.redistribute(placements=whole)
        for dimension, placement in enumerate(tensor.placements):
            if placement.is_shard():
                copies //= tensor.device_mesh.size(dimension)
        tensor = tensor.to_local()
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor), max(copies, 1)


def gather_rows(row: Tensor) -> list[list[float]]:
    """Every rank's row, the same on every rank: one all-reduce and one wait for the device.

    Args:
        row: (signals,) float tensor of this rank.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return [row.tolist()]
    table = row.new_zeros(dist.get_world_size(), len(row))
    table[dist.get_rank()] = row
    dist.all_reduce(table)
    rows: list[list[float]] = table.tolist()
    return rows


def pack(values: Sequence[Tensor | float], device: torch.device) -> Tensor:
    """Returns 0-d tensors and numbers as one row, fp64 where the device has it; nothing waits for the device."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    numbers = torch.tensor([0.0 if isinstance(value, Tensor) else value for value in values], dtype=dtype)
    row = numbers.to(device, non_blocking=True)
    for index, value in enumerate(values):
        if isinstance(value, Tensor):
            row[index] = value.detach()
    return row


class UpdateSample:
    """How large is a step's update, relative to the weights? Measured on a sample of their elements.

    Args:
        params: those that the step is about to change.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        local = [_local(param.detach(), 1)[0] for param in params]
        whole = [tensor for tensor in local if tensor.numel() and tensor.is_contiguous()]
        chosen = whole[:: max(1, -(-len(whole) // SAMPLED_TENSORS))]
        # Views, spread over the tensor: they show the new values after the step.
        self._views = [tensor.view(-1)[:: -(-tensor.numel() // SAMPLED_ELEMENTS)] for tensor in chosen]
        self._before = [view.clone() for view in self._views]

    def squares(self) -> tuple[Tensor, Tensor] | None:
        """After the step: the sum of squares of the sampled updates, and of the sampled weights; None without any."""
        if not self._views:
            return None
        device = self._views[0].device
        before = torch.cat([sample.float().to(device) for sample in self._before])
        after = torch.cat([view.float().to(device) for view in self._views])
        return (after - before).square().sum(), before.square().sum()


def sample_ids(batch: Any) -> Any:
    """What of a batch names its samples (a tensor or a list), or None."""
    if isinstance(batch, Mapping):
        return next((batch[key] for key in SAMPLE_KEYS if key in batch), None)
    return None


def as_integers(found: Iterable[Any]) -> list[int] | None:
    """The ids of several batches as one list, or None if there are none or they are not integers."""
    ids: list[int] = []
    for one in found:
        values = one.flatten().tolist() if isinstance(one, Tensor) else one if isinstance(one, list | tuple) else [one]
        if not all(isinstance(value, int) for value in values):
            return None
        ids += values
    return ids or None
