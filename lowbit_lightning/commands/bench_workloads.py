"""What ``bench optim`` steps: shapes of tensors, cut to the memory that there is."""

from dataclasses import dataclass

import torch
from torch import nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Shapes = list[tuple[int, ...]]

# Llama 3.2 1B: hidden size 2048, 8 key-value heads of 64, MLP 8192, 16 layers, vocabulary 128256 (tied). One sixteenth:
_LAYER: Shapes = [
    (2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192), (2048,), (2048,),
]  # fmt: skip
_LAYERS, _VOCABULARY, _HIDDEN = 16, 128256, 2048

SINGLE: dict[str, Shapes] = {"10m": [(2560, 4096)], "100m": [(10240, 10240)]}
TINY: Shapes = [*[(768,)] * 1000, *[(8, 768)] * 500, *[(768, 8)] * 500]


@dataclass(frozen=True)
class Workload:
    """Shapes to step, none where memory does not allow it; ``note`` says what was left out and why."""

    name: str
    shapes: Shapes
    note: str = ""

    @property
    def numel(self) -> int:
        """The number of parameters."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    def make_params(self, device: str, dtype: torch.dtype) -> list[nn.Parameter]:
        """Return parameters with gradients, of the sizes that weights and gradients have."""
        generator = torch.Generator(device).manual_seed(0)
        params = []
        for shape in self.shapes:
            weight, grad = (torch.randn(shape, device=device, generator=generator) for _ in range(2))
            params.append(nn.Parameter(weight.mul_(0.02).to(dtype)))
            params[-1].grad = grad.mul_(1e-3).to(dtype)
        return params


def plan_workload(name: str, dtype: torch.dtype, available: int | None) -> Workload:
    """Return the workload ``name``, scaled or empty according to ``available`` bytes (None: unknown, all of it).

    Weights and gradients are shared by the eleven optimizers, whose states are all there at the same time: 35.6 bytes
    per fp32 parameter, 27.6 per bf16 one. torch's foreach needs up to three times the weights for its intermediates.
    """
    itemsize = dtype.itemsize
    per_param = 2 * itemsize + (35.6 if itemsize == 4 else 27.6) + 3 * itemsize
    room = None if available is None else int(0.8 * available / per_param)
    if name == "1b-mix":
        layers = _LAYERS if room is None else min(_LAYERS, room // _mix(1).numel)
        if layers:
            return _mix(layers)
        needed = _mix(1)
    else:
        needed = Workload(name, SINGLE.get(name, TINY))
        if room is None or needed.numel <= room:
            return needed
    note = f"skipped: needs about {needed.numel * per_param / 0.8 / 2**30:.1f} GiB of free memory"
    return Workload(name, [], f"{note}, there are {(available or 0) / 2**30:.1f}")


def _mix(layers: int) -> Workload:
    """Return ``layers`` layers of the 1B model and the same share of its vocabulary."""
    shapes = [(_VOCABULARY * layers // _LAYERS, _HIDDEN), (_HIDDEN,), *(_LAYER * layers)]
    share = "" if layers == _LAYERS else f"{layers} of {_LAYERS} layers and {layers}/{_LAYERS} of the vocabulary fit"
    return Workload("1b-mix", shapes, share)
