"""The SOLO step on CPUs: builds ``solo.cpp`` on first use, loads it, and hands it all tensors of a step in one call.

The library is compiled for this very processor with the C++ compiler that is found ($CXX, c++, g++, clang++), which
takes a few seconds once, and kept in the user's cache folder under a name made of everything that it depends on. It
uses neither Python's nor torch's headers, and threads of its own, as many as ``torch.get_num_threads()`` says: a second
OpenMP runtime beside torch's would be a known source of hangs. Without a compiler the reference does the work, after a
warning.

Environment variables, read at the first step:

    LOWBIT_LIGHTNING_CPU_KERNEL   ``auto`` (default), or ``reference`` to not use the library
    LOWBIT_LIGHTNING_CACHE        the folder to keep the library in
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from array import array
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import elementary, logarithmic
from .dynamic import dynamic_map, dynamic_midpoints

if TYPE_CHECKING:
    from .solo import SoloHyperparameters, SoloTensor

_FOLDER = Path(__file__).parent
_SOURCES = [_FOLDER / name for name in ("solo.cpp", "solo_formats.h", "workers.h")]
# Nothing that would change a result: contraction is forbidden, the last two only drop errno and floating-point traps.
_FLAGS = ["-std=c++17", "-O3", "-shared", "-fPIC", "-pthread", "-fvisibility=hidden", "-fopenmp-simd"]
_FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
# Tried in this order: compilers differ in how they are told to use all that this processor can do.
_TARGET_FLAGS: tuple[list[str], ...] = (
    ["-march=native", "-mprefer-vector-width=512"],
    ["-march=native"],
    ["-mcpu=native"],
    [],
)

# As `enum Type` in solo.cpp.
_TYPES = {torch.float32: 0, torch.bfloat16: 1}


class _BuildError(Exception):
    """Why there is no library; the message names the remedy."""


def takes(tensor: "SoloTensor") -> bool:
    """Return whether the library can step this tensor: on the CPU, fp32 or bf16, state as the optimizer makes it."""
    param, grad = tensor.param, tensor.grad
    if not (param.is_cpu and grad.is_cpu and param.dtype in _TYPES and grad.dtype in _TYPES):
        return False
    for value in tensor.state.values():
        if not (value.is_cpu and value.is_contiguous()):
            return False
    return 0 < param.numel() == grad.numel() == tensor.rows * tensor.columns


def step_compiled(library: ctypes.CDLL, tensors: Sequence["SoloTensor"]) -> list[bool]:
    """Make one step of all tensors in place, bit for bit what :func:`.solo.solo_step_reference` does.

    Args:
        library: from :func:`load_library`.
        tensors: such as :func:`takes` accepts.

    Returns:
        For each tensor whether it was skipped because of a gradient that is not finite.
    """
    hypers: dict[int, int] = {}
    hyper_table, table = array("d"), array("q")
    copies: list[Tensor] = []  # keeps them alive until the library has read them
    written_back: list[tuple[Tensor, Tensor]] = []
    for tensor in tensors:
        hyper, param, grad = tensor.hyper, tensor.param, tensor.grad
        if not grad.is_contiguous():
            grad = grad.contiguous()
            copies.append(grad)
        if not param.is_contiguous():
            written_back.append((param, param := param.contiguous()))
        if id(hyper) not in hypers:
            hypers[id(hyper)] = len(hypers)
            hyper_table.extend(_hyper_row(hyper))
        types = _TYPES[param.dtype], _TYPES[grad.dtype], _TYPES[tensor.scale_dtype]
        noise = tensor.state_stream, tensor.weight_stream, tensor.first_row
        pointers = param.data_ptr(), grad.data_ptr(), *_state_pointers(tensor)
        table.extend((*pointers, tensor.rows, tensor.columns, *types, *noise, hypers[id(hyper)]))

    skipped = ctypes.create_string_buffer(len(tensors))
    library.solo_step(
        table.buffer_info()[0], len(tensors), hyper_table.buffer_info()[0], torch.get_num_threads(), skipped
    )
    for param, copy in written_back:
        param.copy_(copy)
    return [flag != 0 for flag in skipped.raw]


def _state_pointers(tensor: "SoloTensor") -> tuple[int, ...]:
    state, (first_bits, second_bits) = tensor.state, tensor.hyper.bits
    step = state["step"].data_ptr()
    if first_bits == second_bits == 32:
        return step, state["exp_avg"].data_ptr(), 0, state["exp_avg_sq"].data_ptr(), 0, 0
    first = ("exp_avg",) if first_bits == 32 else ("exp_avg_codes", "exp_avg_scale")
    second = ("exp_avg_sq",) if second_bits == 32 else ("exp_avg_sq_codes", "exp_avg_sq_scale", "exp_avg_sq_log2_base")
    pointers = [[state[key].data_ptr() for key in keys] for keys in (first, second)]
    return step, *pointers[0], *(0,) * (2 - len(first)), *pointers[1], *(0,) * (3 - len(second))


def _hyper_row(hyper: "SoloHyperparameters") -> tuple[float, ...]:
    return (
        hyper.lr,
        hyper.beta1,
        hyper.beta2,
        hyper.eps,
        hyper.weight_decay,
        hyper.quantile,
        *hyper.bits,
        hyper.block_size,
        hyper.seed & 0xFFFFFFFF,
        hyper.stochastic_rounding,
        hyper.bf16_stochastic_rounding,
        hyper.maximize,
    )


@cache
def load_library() -> ctypes.CDLL | None:
    """Return the library, built if need be, or None where it is not wanted or cannot be had.

    Raises:
        ValueError: LOWBIT_LIGHTNING_CPU_KERNEL has a value that means nothing.
    """
    choice = os.environ.get("LOWBIT_LIGHTNING_CPU_KERNEL", "auto")
    if choice not in ("auto", "reference"):
        raise ValueError(f"LOWBIT_LIGHTNING_CPU_KERNEL={choice!r} is out of range: auto or reference")
    if choice == "reference":
        return None
    try:
        library = ctypes.CDLL(str(build_library(cache_folder())))
    except (_BuildError, OSError) as error:
        warnings.warn(
            f"the fast CPU step of SoloAdamW is not available, the slow reference does the work: {error}. "
            "Setting LOWBIT_LIGHTNING_CPU_KERNEL=reference silences this.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.solo_step.argtypes = (pointer, integer, pointer, integer, pointer)
    library.solo_step.restype = None
    return library


def cache_folder() -> Path:
    """Return the folder that keeps the library, by the platform's convention."""
    if folder := os.environ.get("LOWBIT_LIGHTNING_CACHE"):
        return Path(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "lowbit_lightning"
    conventional = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return conventional / "lowbit_lightning"


def build_library(folder: Path) -> Path:
    """Return the path of the library in ``folder``, compiled unless it is there already.

    Several processes may do so at once: each compiles on its own, and the last to finish replaces an equal file.

    Raises:
        _BuildError: no compiler, or none that compiles the source.
        OSError: the folder cannot be written.
    """
    compiler = _compiler()
    sources, constants = [path.read_bytes() for path in _SOURCES], _constants_header()
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=False).stdout
    identity = repr((sources, constants, _FLAGS, _TARGET_FLAGS, compiler, version, _processor()))
    library = folder / f"solo_{hashlib.blake2s(identity.encode(), digest_size=10).hexdigest()}.so"
    if library.exists():
        return library

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as build:
        (Path(build) / "solo_constants.h").write_text(constants)
        output = Path(build) / "solo.so"
        for target in _TARGET_FLAGS:
            command = [*compiler, *_FLAGS, *target, "-I", build, str(_SOURCES[0]), "-o", str(output)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode == 0:
                output.replace(library)
                return library
    raise _BuildError(
        f"{shlex.join(compiler)} cannot compile {_SOURCES[0]}; install a newer g++ or clang++, or name one in CXX. "
        f"It says: {result.stderr.strip()[-500:]}"
    )


def _compiler() -> list[str]:
    named = os.environ.get("CXX")
    for candidate in [named] if named else ["c++", "g++", "clang++"]:
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            return command
    missing = f"CXX={named} is not a command" if named else "there is no C++ compiler (c++, g++, clang++)"
    raise _BuildError(f"{missing}; install g++ or clang++, or name one in CXX")


def _processor() -> str:
    """Return what -march=native depends on: a home folder may be shared by different machines."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return f"{platform.machine()} {platform.processor()}"
    lines = dict.fromkeys(line for line in info.read_text().splitlines() if line.startswith(_CPUINFO_KEYS))
    return "\n".join(lines)


_CPUINFO_KEYS = ("model name", "flags", "Features", "CPU implementer", "CPU part")


def _constants_header() -> str:
    """Return the constants of the reference as C++, so that there is one place where they are set."""
    arrays = {"LOG2_COEFFICIENTS": elementary.LOG2_COEFFICIENTS, "EXP2_COEFFICIENTS": elementary.EXP2_COEFFICIENTS}
    for bits in (2, 3, 4, 8):
        # Vector look-ups read sixteen entries. Normalized values stay below 2, so no code passes the last midpoint.
        padding = (0.0,) * (16 - 2**bits)
        arrays[f"DYNAMIC_MAP_{bits}"] = dynamic_map(bits) + padding
        arrays[f"DYNAMIC_MIDPOINTS_{bits}"] = (*dynamic_midpoints(bits), 2.0, *padding)
    scalars = {
        "SMALLEST_NORMAL": elementary.SMALLEST_NORMAL,
        "LARGEST_SQUARABLE": elementary.LARGEST_SQUARABLE,
        "LOG2_FLOOR": logarithmic.LOG2_FLOOR,
        "LARGEST_ZERO": logarithmic.LARGEST_ZERO,
        "SMALLEST_SPAN": logarithmic.SMALLEST_SPAN,
        "LARGEST_BF16": torch.finfo(torch.bfloat16).max,
    }
    lines = [f"constexpr float {name}[] = {{{_floats(values)}}};" for name, values in arrays.items()]
    lines += [f"constexpr float {name} = {_floats([value])};" for name, value in scalars.items()]
    lines += [f"constexpr int SQRT_HALF_BITS = {elementary.SQRT_HALF_BITS};"]
    return "\n".join(lines) + "\n"


def _floats(values: Iterable[float]) -> str:
    """Return fp32 literals, rounded by torch as the reference's tensors are."""
    return ", ".join(f"{value.hex()}f" for value in torch.tensor(list(values), dtype=torch.float32).tolist())
