"""A parameter, or this process's part of one, as the matrix whose rows :mod:`lowbit_lightning.kernels.solo` steps."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from lowbit_lightning.kernels.solo_tensor import Part, SoloTensor
from lowbit_lightning.optim.base import State
from lowbit_lightning.optim.sharding import cut_dimensions, local, part


def matrix_layout(param: Tensor, name: str) -> tuple[Part | None, int, int, int]:
    """Return ``cut``, ``rows``, ``columns`` and ``first_row`` of a SoloTensor for this process's part of ``param``."""
    slices, shape = part(param, name), tuple(param.shape)
    first_row = slices[0].start if param.ndim > 1 else 0
    cut = None
    if param.ndim == 1 and slices[0] != slice(0, *shape):  # one row, divided
        cut = Part((1, *shape), (slice(0, 1), *slices))
    elif cut_dimensions(param):
        cut = Part(shape, slices)
    return cut, *matrix_shape(local(param).shape), first_row


def own_shard(tensor: SoloTensor, cut: Part | None) -> SoloTensor:
    """Return what to step of a sharded parameter: ``tensor``, or a stand-in where this process has nothing of it."""
    if tensor.param.numel():
        tensor.cut = cut
        return tensor
    # One element that counts the steps of the others, or skips them: counters are saved by any one process.
    moments = {key: torch.zeros_like(tensor.grad, dtype=torch.float32) for key in ("exp_avg", "exp_avg_sq")}
    state = {"step": tensor.state["step"], **moments}
    return SoloTensor(torch.zeros_like(tensor.grad), tensor.grad, state, replace(tensor.hyper, bits=(32, 32)), 1, 1)


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """Return rows and columns; a vector is one row."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, shape.numel())


def matrix_views(state: State, shape: tuple[int, int]) -> State:
    """Return the local state with fp32 moments, which have the parameter's own shape, seen as matrices."""
    views = {key: local(value) for key, value in state.items()}
    return {key: value.view(shape) if key in ("exp_avg", "exp_avg_sq") else value for key, value in views.items()}
