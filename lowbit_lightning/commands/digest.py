"""``lowbit-lightning doctor --digest``: does this hardware compute the same as the machine our results come from?

Twenty fixed steps of each technique go through every path that this machine has (reference, compiled CPU path, Triton)
and the digests of the resulting states are compared with those in ``kernels/digests.json``. Inputs are made of Philox
bits by exact arithmetic, and the techniques use nothing but correctly rounded operations, so every bit must agree. A
difference names the first tensor that has one.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_lightning import kernels
from lowbit_lightning.kernels import (
    block_float_cpu,
    block_float_triton,
    micro_adam_cpu,
    micro_adam_triton,
    rademacher_cpu,
    rademacher_triton,
    solo_cpu,
    solo_triton,
)
from lowbit_lightning.kernels.block_float import (
    BoxFormat,
    empty_packed,
    pack_reference,
    quantize_reference,
    unpack_reference,
)
from lowbit_lightning.kernels.micro_adam import micro_adam_step_reference
from lowbit_lightning.kernels.micro_adam_tensor import MicroAdamTensor
from lowbit_lightning.kernels.philox import block_calls, draw_16bit
from lowbit_lightning.kernels.rademacher import (
    UPDATE_SLOT,
    Noise,
    Update,
    apply_update_reference,
    matrix_shape,
    perturbed_copy_reference,
)
from lowbit_lightning.kernels.rademacher_cpu import Pass
from lowbit_lightning.kernels.solo import solo_step_reference
from lowbit_lightning.kernels.solo_tensor import SoloTensor
from lowbit_lightning.optim import MicroAdam, SoloAdamW
from lowbit_lightning.optim.base import LowBitOptimizer

STEPS = 20
SOLO_BITS = ((4, 2), (3, 2), (2, 2), (8, 8))
MICRO_ADAM_SETTINGS: dict[str, dict[str, Any]] = {
    "micro_adam": {},
    "micro_adam auto": {"density": "auto", "error_rounding": "stochastic", "feedback": 0.125},
}
BLOCK_FLOAT_FORMATS = (
    *(BoxFormat(2), BoxFormat(4), BoxFormat(5, 64), BoxFormat(8, rounding="nearest"), BoxFormat(16)),
    *(BoxFormat(2, 32, "affine"), BoxFormat(4, 128, "affine")),
)
# Enough to tell whether the interpreter, which is slow, computes the same.
_INTERPRETED = ("philox", "solo 4/2 float32", "micro_adam float32", "rademacher rank1 bfloat16", "bfp 4 box 16 float32")
_DIGESTS = Path(kernels.__file__).with_name("digests.json")


@dataclass(frozen=True)
class ComputePath:
    """One way to make the steps: on which device, and by which function for each technique's tensors or passes.

    ``block_float`` is None for the reference.
    """

    name: str
    device: str
    solo: Callable[[Sequence[SoloTensor]], list[bool]]
    micro_adam: Callable[[Sequence[MicroAdamTensor]], list[bool]]
    rademacher: Callable[[Pass], None]
    block_float: Callable[..., None] | None


def numbers(rows: int, columns: int, stream: int, step: int) -> Tensor:
    """Return (rows, columns) fp32 fixed values in [-1, 1), each row scaled by another power of two."""
    calls = block_calls(0, rows, -(-columns // 8), torch.device("cpu"))
    values = (draw_16bit(0, stream, step, calls)[:, :columns] - 32768).float() * 2.0**-15
    return values * (1.0 / (1 << torch.arange(rows) % 7)).unsqueeze(-1)


def digest(tensor: Tensor) -> str:
    """Return 16 hexadecimal digits of a tensor's bytes."""
    return hashlib.blake2s(
        tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes(), digest_size=8
    ).hexdigest()


def digests_after_steps(
    build: Callable[..., LowBitOptimizer], dtype: torch.dtype, device: str, step: Callable[[Any], None]
) -> dict[str, str]:
    """Return the digest of the weights and of every state tensor after the fixed steps.

    Args:
        build: makes the optimizer, of named parameters.
        dtype: of weights and gradients.
        device: of all tensors.
        step: makes a step with the optimizer.
    """
    shapes = {"matrix": (8, 200), "vector": (1, 77)}
    params = {name: nn.Parameter(numbers(*shape, 1, 0).to(device, dtype)) for name, shape in shapes.items()}
    params["vector"] = nn.Parameter(params["vector"].detach()[0])
    optimizer = build(params.items(), lr=2.0**-7, weight_decay=0.125, min_numel=0)
    for number in range(1, STEPS + 1):
        for name, param in params.items():
            param.grad = numbers(*shapes[name], 2, number).view(param.shape).to(device, dtype)
        with torch.no_grad():
            step(optimizer)
    found = {}
    for name, param in params.items():
        found[f"{name}.weight"] = digest(param)
        found |= {f"{name}.{key}": digest(value) for key, value in sorted(optimizer.state[param].items())}
    return found


def rademacher_digests(rank1: bool, dtype: torch.dtype, path: ComputePath) -> dict[str, str]:
    """Return the digest of a matrix and of its last perturbed copy after the fixed steps of two perturbations."""
    param = numbers(8, 200, 1, 0).to(path.device, dtype)
    out = torch.empty_like(param)
    for step in range(STEPS):
        noise = Noise(0, 1, 2, step, rank1)
        for index in range(2):
            path.rademacher(Pass(param, out, (1.0, -(2.0**-10)), noise, 1 + index, index, *matrix_shape(param)))
        factors = 1 - 2.0**-10, 2.0**-9, -(2.0**-11)
        path.rademacher(Pass(param, param, factors, noise, UPDATE_SLOT, 0, *matrix_shape(param)))
    return {"weight": digest(param), "perturbed": digest(out)}


def rademacher_reference(one: Pass) -> None:
    """Make a pass by the references."""
    if one.slot == UPDATE_SLOT:
        apply_update_reference(Update(one.source, one.noise, tuple(one.factors[1:]), one.factors[0]))
    else:
        perturbed_copy_reference(one.source, -one.factors[1], one.noise, one.first_index, one.out)


def block_float_digests(format: BoxFormat, dtype: torch.dtype, path: ComputePath) -> dict[str, str]:
    """Return the digests of what a matrix becomes packed, unpacked again, and quantized along its first axis."""
    x = numbers(100, 200, 1, 0).to(path.device, dtype)
    noise = (0, 1, 2) if format.rounding == "stochastic" else None
    if path.block_float is None:
        packed = pack_reference(x, format, noise)
        values, columns = unpack_reference(packed, format, x.shape, dtype), quantize_reference(x, format, noise, 0)
    else:
        packed, values, columns = empty_packed(x, format), torch.empty_like(x), torch.empty_like(x)
        path.block_float(format, (100, 200, 1), noise, x=x, packed=packed)
        path.block_float(format, (100, 200, 1), None, out=values, packed=packed)
        path.block_float(format, (200, 100, 200), noise, x=x, out=columns)
    found = {"codes": packed.codes, "scales": packed.scales, "values": values, "along columns": columns}
    return {name: digest(tensor) for name, tensor in found.items()}


def paths() -> Iterator[ComputePath]:
    """Yield every path that this machine has."""
    reference = _each(solo_step_reference), _each(micro_adam_step_reference), rademacher_reference, None
    launches = rademacher_triton.launch, block_float_triton.launch
    triton = solo_triton.step_triton, micro_adam_triton.step_triton, *launches
    yield ComputePath("reference, CPU", "cpu", *reference)
    solo, micro_adam = solo_cpu.load_library(), micro_adam_cpu.load_library()
    signs, floats = rademacher_cpu.load_library(), block_float_cpu.load_library()
    if solo is not None and micro_adam is not None and signs is not None and floats is not None:
        compiled = partial(solo_cpu.step_compiled, solo), partial(micro_adam_cpu.step_compiled, micro_adam)
        passes = partial(block_float_cpu.run_compiled, floats)
        yield ComputePath(
            "compiled, CPU", "cpu", *compiled, lambda one: rademacher_cpu.run_compiled(signs, [one]), passes
        )
    if torch.cuda.is_available():
        yield ComputePath("reference, CUDA", "cuda", *reference)
        yield ComputePath("Triton, CUDA", "cuda", *triton)
    elif solo_triton.is_available() and os.environ.get("TRITON_INTERPRET") == "1":
        yield ComputePath("Triton, interpreted", "cpu", *triton)


def _each(step: Callable[[Any], bool]) -> Callable[[Sequence[Any]], list[bool]]:
    return lambda tensors: [step(tensor) for tensor in tensors]


def cases(path: ComputePath) -> Iterator[tuple[str, Callable[[], dict[str, str]]]]:
    """Yield technique and settings of every case, and what returns its digests by tensor."""

    def step_solo(optimizer: SoloAdamW) -> None:
        path.solo(optimizer.gather()[1])

    def step_micro_adam(optimizer: MicroAdam) -> None:
        compressed, plain = optimizer.gather()
        path.micro_adam([tensor for _, tensor in compressed])
        path.solo([tensor for _, tensor in plain])

    yield (
        "philox",
        lambda: {"draws": digest(draw_16bit(1, 2, 3, block_calls(2**32 - 2, 4, 16, torch.device(path.device))))},
    )
    small = {"window": 3, "density": 0.05, "topk_block": 512, "error_block": 64}
    builds: dict[str, Callable[..., LowBitOptimizer]]
    builds = {f"solo {first}/{second}": partial(SoloAdamW, bits=(first, second)) for first, second in SOLO_BITS}
    builds |= {name: partial(MicroAdam, **(small | settings)) for name, settings in MICRO_ADAM_SETTINGS.items()}
    for name, build in builds.items():
        step: Callable[[Any], None] = step_solo if name.startswith("solo") else step_micro_adam
        for dtype in (torch.float32, torch.bfloat16):
            case = f"{name} {str(dtype).removeprefix('torch.')}"
            yield case, partial(digests_after_steps, build, dtype, path.device, step)
    for signs, rank1 in (("full", False), ("rank1", True)):
        for dtype in (torch.float32, torch.bfloat16):
            case = f"rademacher {signs} {str(dtype).removeprefix('torch.')}"
            yield case, partial(rademacher_digests, rank1, dtype, path)
    for format in BLOCK_FLOAT_FORMATS:
        for dtype in (torch.float32, torch.bfloat16):
            case = f"{format.kind} {format.bits} box {format.box} {str(dtype).removeprefix('torch.')}"
            yield case, partial(block_float_digests, format, dtype, path)


def first_difference(found: dict[str, str], expected: dict[str, str]) -> str | None:
    """Return the name of the first tensor whose digest is another, or None."""
    return next((name for name in found | expected if found.get(name) != expected.get(name)), None)


def run() -> int:
    """Compare every path with the committed digests and print a line for each case; 1 if anything differs."""
    expected: dict[str, dict[str, str]] = json.loads(_DIGESTS.read_text())
    different = 0
    for path in paths():
        interpreted = path.name == "Triton, interpreted"
        print(f"{path.name} (some cases only: it is slow)" if interpreted else path.name)
        for name, digests in cases(path):
            if interpreted and name not in _INTERPRETED:
                continue
            tensor = first_difference(digests(), expected.get(name, {}))
            different += tensor is not None
            print(f"  {name:<24} {'same' if tensor is None else f'DIFFERS, first in {tensor}'}", flush=True)
    if different:
        print(f"{different} cases differ: please report this with the output of `lowbit-lightning doctor`.")
        return 1
    print("This machine computes the same, bit for bit.")
    return 0


if __name__ == "__main__":  # `make digests`, after a change that is meant to change results
    made = {name: digests() for name, digests in cases(next(paths()))}
    _DIGESTS.write_text(json.dumps(made, indent=1) + "\n")
