"""MicroAdam where parameters are divided among processes along their first dimension, as FSDP2's ``fully_shard`` does.

Blocks run over the flattened parameter, and every process selects in its own shard. Where all shards end on the edges
of blocks that is what one process selects: the state is one process's, divided, and a checkpoint goes on with any
number of processes of which that is true. Elsewhere a shard is like a parameter of its own: state tensors have a first
dimension that counts shards, and a checkpoint goes on with the same number of processes only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from lowbit_lightning.errors import CheckpointError, InvalidArgumentError
from lowbit_lightning.kernels.micro_adam_tensor import (
    MicroAdamHyperparameters,
    MicroAdamTensor,
    new_state,
    state_layout,
)
from lowbit_lightning.kernels.philox import NOISE_BLOCK
from lowbit_lightning.optim.base import State
from lowbit_lightning.optim.sharding import local

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# More processes than this are not tried when an error names those that would do.
_MOST_PROCESSES = 1024


@dataclass(frozen=True)
class Shards:
    """How a parameter is divided: ``count`` shards along dimension ``mesh_dim`` of its mesh.

    The largest have ``numel`` elements, which all states have room for, this process's has ``own``, perhaps none, from
    ``first_element`` of the flattened whole on. ``aligned`` ones end on the edges of blocks.
    """

    mesh_dim: int
    count: int
    numel: int
    own: int
    first_element: int
    aligned: bool


def shards_of(param: "DTensor", name: str, hyper: MicroAdamHyperparameters) -> Shards:
    """Return how a parameter is divided.

    Raises:
        InvalidArgumentError: along another dimension than the first, or along several of its mesh.
    """
    mesh, placements, divided = param.device_mesh, param.placements, _divided(param)
    if len(divided) > 1 or any(getattr(placements[i], "dim", 0) != 0 for i in divided):
        raise InvalidArgumentError(
            f"parameter {name!r} of shape {tuple(param.shape)} is placed as {placements} on {mesh}: MicroAdam takes "
            "parameters that are divided along their first dimension and by one dimension of the mesh, as "
            "fully_shard does without tensor parallelism"
        )
    mesh_dim = divided[0] if divided else 0
    count, index = (mesh.size(mesh_dim), mesh.get_local_rank(mesh_dim)) if divided else (1, 0)
    rows, row_numel = -(-len(param) // count), math.prod(param.shape[1:])
    first = min(index * rows, len(param)) * row_numel
    own = min((index + 1) * rows * row_numel, param.numel()) - first
    return Shards(mesh_dim, count, rows * row_numel, max(own, 0), first, _is_aligned(param.shape, count, hyper))


def _is_aligned(shape: torch.Size, count: int, hyper: MicroAdamHyperparameters) -> bool:
    unit = math.lcm(hyper.topk_block, hyper.error_block, NOISE_BLOCK)
    return count == 1 or (shape[0] % count == 0 and shape.numel() // count % unit == 0)


def new_sharded_state(
    param: "DTensor",
    shards: Shards,
    hyper: MicroAdamHyperparameters,
    device: torch.device,
    counter_device: torch.device,
) -> State:
    """Return the state before the first step, DTensors but for ``step``."""
    from torch.distributed.tensor import DTensor, Shard

    state = {}
    for key, (shape, dtype) in state_layout(shards.numel, hyper).items():
        if key == "step":
            state[key] = torch.zeros(shape, dtype=dtype, device=counter_device)
            continue
        dim, local_shape = (len(shape) - 1, shape) if shards.aligned else (0, (1, *shape))
        whole = torch.Size(size * shards.count if i == dim else size for i, size in enumerate(local_shape))
        placements = list(param.placements)
        if shards.count > 1:
            placements[shards.mesh_dim] = Shard(dim)
        layout = DTensor.from_local(
            torch.empty(local_shape, dtype=dtype, device="meta"), param.device_mesh, placements,
            run_check=False, shape=whole, stride=torch.empty(whole, device="meta").stride(),
        )  # fmt: skip
        # By way of meta: from_local moves all else to the mesh's device, but offloaded parameters stay on the CPU.
        state[key] = torch.zeros_like(layout, device=device)
    return state


def own_shard_of(tensor: MicroAdamTensor, shards: Shards) -> MicroAdamTensor:
    """Return what to step: ``tensor``, local but for its state, with this process's part of that.

    Where this process has nothing of the parameter it is one element that only counts the steps of the others, or skips
    them: counters are saved by any one process.
    """
    if not shards.own:
        device = tensor.grad.device
        state = new_state(1, tensor.hyper, device, device) | {"step": tensor.state["step"]}
        return replace(tensor, param=tensor.grad.new_zeros(1), state=state)
    state = {
        # A last shard is smaller; its tensors are packed, so that they stay contiguous.
        key: tensor.state[key] if key == "step" else local(tensor.state[key]).view(-1)[: math.prod(shape)].view(shape)
        for key, (shape, _) in state_layout(shards.own, tensor.hyper).items()
    }
    return replace(tensor, state=state, first_element=shards.first_element)


def sum_over_shards(numbers: Sequence[float], param: "DTensor") -> list[float]:
    """Return the sums over all shards of what each process found in its own; they must call it together."""
    values = torch.tensor(numbers if local(param).numel() else [0.0] * len(numbers), dtype=torch.float64)
    values = values.to(param.device_mesh.device_type)
    for mesh_dim in _divided(param):
        torch.distributed.all_reduce(values, group=param.device_mesh.get_group(mesh_dim))
    found: list[float] = values.tolist()
    return found


def _divided(param: "DTensor") -> list[int]:
    """Return the dimensions of the mesh that divide a parameter."""
    mesh = param.device_mesh
    return [i for i, placement in enumerate(param.placements) if hasattr(placement, "dim") and mesh.size(i) > 1]


def refuse_other_shards(name: str, shape: torch.Size, saved: State, hyper: MicroAdamHyperparameters) -> None:
    """Raise where ``saved`` is a state of this parameter and these settings, but of other shards.

    Raises:
        CheckpointError: it is; the message names the numbers of processes that the state would suit.
    """
    codes = saved.get("error_codes")
    if codes is not None and codes.ndim == 2:
        was, suits = f"in {len(codes)} shards that do not end on the edges of blocks", f"{len(codes)}"
    elif codes is not None and len(codes) == -(-shape.numel() // 2):
        counts = range(1, min(shape[0], _MOST_PROCESSES) + 1)
        was = "in whole blocks"
        suits = ", ".join(str(count) for count in counts if _is_aligned(shape, count, hyper))
    else:
        return
    raise CheckpointError(
        f"the checkpoint's selections of parameter {name!r}, {tuple(shape)}, were made {was} of "
        f"topk_block={hyper.topk_block}, and this run divides it otherwise: resume with the number of processes that "
        f"share a parameter among {suits}, or start without the checkpoint"
    )
