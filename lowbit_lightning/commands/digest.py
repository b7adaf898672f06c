"""``lowbit-lightning doctor --digest``: does this hardware compute the same as the machine our results come from?

Twenty fixed steps of each technique go through every path that this machine has (reference, compiled CPU path, Triton)
and the digests of the resulting states are compared with those in ``kernels/digests.json``. Inputs are made of Philox
bits by exact arithmetic, and the techniques use nothing but correctly rounded operations, so every bit must agree. A
difference names the first tensor that has one.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lowbit_lightning import kernels
from lowbit_lightning.kernels import solo_triton
from lowbit_lightning.kernels.philox import block_calls, draw_16bit
from lowbit_lightning.kernels.solo import SoloTensor, solo_step_reference
from lowbit_lightning.kernels.solo_cpu import load_library, step_compiled
from lowbit_lightning.kernels.solo_triton import step_triton
from lowbit_lightning.optim import SoloAdamW

STEPS = 20
SOLO_BITS = ((4, 2), (3, 2), (2, 2), (8, 8))
_DIGESTS = Path(kernels.__file__).with_name("digests.json")

Step = Callable[[Sequence[SoloTensor]], list[bool]]


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


def solo_digests(bits: tuple[int, int], dtype: torch.dtype, device: str, step_function: Step) -> dict[str, str]:
    """Return the digest of the weights and of every state tensor after the fixed steps of :class:`SoloAdamW`."""
    shapes = {"matrix": (8, 200), "vector": (1, 77)}
    params = {name: nn.Parameter(numbers(*shape, 1, 0).to(device, dtype)) for name, shape in shapes.items()}
    params["vector"] = nn.Parameter(params["vector"].detach()[0])
    optimizer = SoloAdamW(params.items(), lr=2.0**-7, weight_decay=0.125, bits=bits, min_numel=0)
    for step in range(1, STEPS + 1):
        for name, param in params.items():
            param.grad = numbers(*shapes[name], 2, step).view(param.shape).to(device, dtype)
        with torch.no_grad():
            step_function(optimizer.gather()[1])
    found = {}
    for name, param in params.items():
        found[f"{name}.weight"] = digest(param)
        found |= {f"{name}.{key}": digest(value) for key, value in sorted(optimizer.state[param].items())}
    return found


def paths() -> Iterator[tuple[str, str, Step]]:
    """Yield (name, device, step function) of every path that this machine has."""
    yield "reference, CPU", "cpu", _reference
    library = load_library()
    if library is not None:
        yield "compiled, CPU", "cpu", lambda tensors: step_compiled(library, tensors)
    if torch.cuda.is_available():
        yield "reference, CUDA", "cuda", _reference
        yield "Triton, CUDA", "cuda", step_triton
    elif solo_triton.is_available() and os.environ.get("TRITON_INTERPRET") == "1":
        yield "Triton, interpreted", "cpu", step_triton


def _reference(tensors: Sequence[SoloTensor]) -> list[bool]:
    return [solo_step_reference(tensor) for tensor in tensors]


def cases(device: str, step_function: Step) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (technique and settings, digests by tensor) of every case."""
    calls = block_calls(2**32 - 2, 4, 16, torch.device(device))
    yield "philox", {"draws": digest(draw_16bit(1, 2, 3, calls))}
    for first, second in SOLO_BITS:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"solo {first}/{second} {str(dtype).removeprefix('torch.')}"
            yield name, solo_digests((first, second), dtype, device, step_function)


def first_difference(found: dict[str, str], expected: dict[str, str]) -> str | None:
    """Return the name of the first tensor whose digest is another, or None."""
    return next((name for name in found | expected if found.get(name) != expected.get(name)), None)


def run() -> int:
    """Compare every path with the committed digests and print a line for each case; 1 if anything differs."""
    expected: dict[str, dict[str, str]] = json.loads(_DIGESTS.read_text())
    different = 0
    for path, device, step_function in paths():
        interpreted = path == "Triton, interpreted"
        print(f"{path} (one case of SOLO: it is slow)" if interpreted else path)
        for name, found in itertools.islice(cases(device, step_function), 2 if interpreted else None):
            tensor = first_difference(found, expected.get(name, {}))
            different += tensor is not None
            print(f"  {name:<20} {'same' if tensor is None else f'DIFFERS, first in {tensor}'}", flush=True)
    if different:
        print(f"{different} cases differ: please report this with the output of `lowbit-lightning doctor`.")
        return 1
    print("This machine computes the same, bit for bit.")
    return 0


if __name__ == "__main__":  # `make digests`, after a change that is meant to change results
    _DIGESTS.write_text(json.dumps(dict(cases("cpu", _reference)), indent=1) + "\n")
