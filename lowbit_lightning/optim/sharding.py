"""Sharded parameters (DTensors: FSDP2's ``fully_shard``, tensor parallelism) for optimizers that step plain tensors.

An optimizer steps the local part of each parameter and keeps its state as DTensors that are laid out the same way, so
that torch.distributed.checkpoint saves it and loads it on another number of processes. Results must not depend on that
number: here are the place of a shard in the whole (for noise, which is a function of the global index), and the
agreement of all processes on gradients that are not finite.

Every function takes plain tensors too. ``torch.distributed.tensor`` is imported only when there is a DTensor: that
import takes longer than all else here.
"""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from lowbit_lightning.errors import InvalidArgumentError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Return whether ``tensor`` is a DTensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a DTensor, sharing its memory; a plain tensor itself."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def cut_dimensions(tensor: Tensor) -> list[int]:
    """Return the dimensions other than the first that are divided among processes; the same in each of them."""
    if not is_dtensor(tensor):
        return []
    placed = [
        getattr(placement, "dim", 0)
        for position, placement in enumerate(tensor.placements)
        if tensor.device_mesh.size(position) > 1
    ]
    return sorted({dim for dim in placed if dim != 0})


def part(tensor: Tensor, name: str) -> tuple[slice, ...]:
    """Return which part of the whole tensor this process has: a slice of every dimension, empty ones included.

    Raises:
        InvalidArgumentError: the part is not one piece, as where FSDP2 divides unevenly what tensor parallelism has
            divided already; ``name`` is in the message.
    """
    if not is_dtensor(tensor):
        return tuple(slice(0, size) for size in tensor.shape)
    mesh = tensor.device_mesh
    coordinate: Sequence[int] = mesh.get_coordinate() or ()
    slices = []
    for dim, (size, local_size) in enumerate(zip(tensor.shape, local(tensor).shape, strict=True)):
        index = torch.arange(size)
        for position, placement in enumerate(tensor.placements):
            if getattr(placement, "dim", None) == dim:
                # Strided shards, of FSDP2 over tensor parallelism, take their share of each of `split_factor` pieces.
                pieces = index.chunk(getattr(placement, "split_factor", 1)) if len(index) else ()
                chunks = [piece.chunk(mesh.size(position)) for piece in pieces]
                mine = [chunk[coordinate[position]] for chunk in chunks if coordinate[position] < len(chunk)]
                index = torch.cat(mine) if mine else index[:0]
        first = int(index[0]) if len(index) else size
        if len(index) != local_size or not torch.equal(index, torch.arange(first, first + local_size)):
            raise InvalidArgumentError(
                f"parameter {name!r} of shape {tuple(tensor.shape)} is placed as {tensor.placements} on {mesh}, which "
                f"gives this process no contiguous part of dimension {dim}: choose a size that the mesh divides evenly"
            )
        slices.append(slice(first, first + local_size))
    return tuple(slices)


def zeros_beside(param: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros of global ``shape``, divided among processes as ``param`` is.

    ``shape`` is the parameter's own, or has the same first dimension and ``param`` is divided along that one only.
    """
    if not is_dtensor(param):
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    from torch.distributed.tensor import DTensor

    own = local(param).shape
    local_shape = own if tuple(shape) == tuple(param.shape) else (own[0], *shape[1:])
    layout = DTensor.from_local(
        torch.empty(local_shape, dtype=dtype, device="meta"),
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=torch.empty(tuple(shape), device="meta").stride(),
    )
    # By way of meta: from_local moves all else to the mesh's device, but offloaded parameters stay on the CPU.
    return torch.zeros_like(layout, device=device)


def placed_like(value: Tensor, expected: Tensor, device: torch.device) -> Tensor:
    """Return a copy of ``value`` on ``device``, contiguous and divided among processes as ``expected`` is.

    Args:
        value: of the global shape of ``expected``; a DTensor of any placement, or the whole as a plain tensor.
        expected: on any device, meta as well.
        device: where the result's local part is to be.
    """
    if is_dtensor(value) and not (is_dtensor(expected) and _placement(value) == _placement(expected)):
        value = value.full_tensor()
    if is_dtensor(value) or not is_dtensor(expected):
        return value.to(device, copy=True).contiguous()
    result = torch.empty_like(expected, device=device, dtype=value.dtype)
    local(result).copy_(value[part(expected, "")])
    return result


def agreed_gradients(params: Iterable[Tensor], largest: float) -> dict[Tensor, Tensor]:
    """Return the local gradients of all DTensors among ``params`` that have one, ready for steps that skip together.

    Where one process finds a magnitude above ``largest`` or a NaN in its part, the first element of every other part
    becomes NaN as well, in place. A process with an empty part gets one element that stands for its gradient, NaN or 1.
    All processes must call this with the same parameters: it reduces one number for each.
    """
    meshes: dict[DeviceMesh, list[DTensor]] = {}
    for param in params:
        if is_dtensor(param):
            meshes.setdefault(param.device_mesh, []).append(param)
    found: dict[Tensor, Tensor] = {}
    for mesh, members in meshes.items():
        gradients = [_local_gradient(param) for param in members]
        filled = [grad for grad in gradients if grad is not None and grad.numel()]
        device = members[0].device
        norms = iter(torch._foreach_norm(filled, math.inf) if filled else ())
        zero = torch.zeros((), device=device)
        # In fp32: `largest` itself has no bf16 form, and steps compare with it exactly.
        largest_found = torch.stack([next(norms) if _has_elements(grad) else zero for grad in gradients]).float()
        factors = _agree(~(largest_found <= largest), mesh).to(device)
        if filled:
            factors = factors.to(filled[0].dtype)
            places = [index for index, grad in enumerate(gradients) if _has_elements(grad)]
            own_factors = factors.split(1)
            firsts = [grad.as_strided((1,), (1,)) for grad in filled]
            torch._foreach_mul_(firsts, [own_factors[index] for index in places])
        for param, grad, factor in zip(members, gradients, factors.split(1), strict=True):
            if grad is not None:
                found[param] = grad if grad.numel() else factor
    return found


def placed_gradient(param: Tensor) -> Tensor | None:
    """Return the gradient of a parameter, divided among processes as the parameter is.

    That is the gradient itself, but for sums of tensor parallelism that are still partial: those are summed.
    """
    grad = param.grad
    if grad is None or not (is_dtensor(param) and is_dtensor(grad)) or grad.placements == param.placements:
        return grad
    return grad.redistribute(param.device_mesh, param.placements)


def of_whole_tensors(params: Sequence[Tensor], maxima: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """Return largest magnitudes and norms of whole tensors from those of this process's parts.

    All processes must call this with the same parameters, and get the same bits: it is one all-reduce for each
    dimension of a mesh along which any of them is divided.

    Args:
        params: n parameters; what is known of plain tensors is returned as it is.
        maxima: (n,) fp32, of this process's parts, 0 for an empty one.
        norms: (n,) fp32, of this process's parts.
    """
    meshes: dict[DeviceMesh, list[int]] = {}
    for position, param in enumerate(params):
        if is_dtensor(param):
            meshes.setdefault(param.device_mesh, []).append(position)
    for mesh, members in meshes.items():
        places = torch.tensor(members, device=maxima.device)
        found = torch.stack([maxima[places], norms[places] * norms[places]]).to(mesh.device_type)
        for dim in range(mesh.ndim):
            divided = torch.tensor([_is_divided(params[position], dim) for position in members])
            if mesh.size(dim) > 1 and divided.any():
                # Every process fills a row of its own, so that one sum brings both a maximum and a sum to all.
                rows = found.new_zeros(mesh.size(dim), *found.shape)
                rows[mesh.get_local_rank(dim)] = found
                torch.distributed.all_reduce(rows, group=mesh.get_group(dim))
                together = torch.stack([rows[:, 0].amax(dim=0), rows[:, 1].sum(dim=0)])
                found = torch.where(divided.to(found.device, non_blocking=True), together, found)
        found = found.to(maxima.device)
        maxima, norms = maxima.index_copy(0, places, found[0]), norms.index_copy(0, places, found[1].sqrt())
    return maxima, norms


def _is_divided(param: Tensor, dim: int) -> bool:
    return is_dtensor(param) and param.placements[dim].is_shard()


def _placement(tensor: "DTensor") -> tuple[object, ...]:
    return tensor.device_mesh, tensor.placements


def _has_elements(grad: Tensor | None) -> bool:
    return grad is not None and grad.numel() > 0


def _agree(bad: Tensor, mesh: "DeviceMesh") -> Tensor:
    """Return NaN where ``bad`` is true in any process of the mesh, else 1, as fp32 on the mesh's device."""
    flags = bad.to(mesh.device_type, torch.float32)
    for dim in range(mesh.ndim):
        if mesh.size(dim) > 1:
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=mesh.get_group(dim))
    return torch.where(flags > 0, math.nan, 1.0)


def _local_gradient(param: "DTensor") -> Tensor | None:
    grad = placed_gradient(param)
    return None if grad is None else local(grad)
