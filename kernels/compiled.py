"""Builds and loads the C++ steps for CPUs: each a library with one function, called once for all tensors of a step.

A library is compiled for this very processor with the C++ compiler that is found ($CXX, c++, g++, clang++), which takes
a few seconds once, and kept in the user's cache folder under a name made of everything that it depends on. It uses
neither Python's nor torch's headers, and threads of its own (``workers.h``), as many as ``torch.get_num_threads()``
says: a second OpenMP runtime beside torch's would be a known source of hangs. Without a compiler the references do the
work, after a warning.

Environment variables, read at the first step:

    LOWBIT_LIGHTNING_CPU_KERNEL   ``auto`` (default), or ``reference`` to not use the libraries
    LOWBIT_LIGHTNING_CACHE        the folder to keep them in
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

SOURCE_FOLDER = Path(__file__).parent
# As `enum Type` in elements.h.
TYPES = {torch.float32: 0, torch.bfloat16: 1}

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


class BuildError(Exception):
    """Why there is no library; the message names the remedy."""


def load(optimizer: str, build: Callable[[Path], Path]) -> ctypes.CDLL | None:
    """Return a library, built if need be, or None where it is not wanted or cannot be had.

    Args:
        optimizer: whose step it makes, for the warning.
        build: returns the path of the library in a folder.

    Raises:
        ValueError: LOWBIT_LIGHTNING_CPU_KERNEL has a value that means nothing.
    """
    choice = os.environ.get("LOWBIT_LIGHTNING_CPU_KERNEL", "auto")
    if choice not in ("auto", "reference"):
        raise ValueError(f"LOWBIT_LIGHTNING_CPU_KERNEL={choice!r} is out of range: auto or reference")
    if choice == "reference":
        return None
    try:
        return ctypes.CDLL(str(build(cache_folder())))
    except (BuildError, OSError) as error:
        warnings.warn(
            f"the fast CPU step of {optimizer} is not available, the slow reference does the work: {error}. "
            "Setting LOWBIT_LIGHTNING_CPU_KERNEL=reference silences this.",
            RuntimeWarning,
            stacklevel=3,
        )
        return None


def cache_folder() -> Path:
    """Return the folder that keeps the libraries, by the platform's convention."""
    if folder := os.environ.get("LOWBIT_LIGHTNING_CACHE"):
        return Path(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "lowbit_lightning"
    conventional = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return conventional / "lowbit_lightning"


def build(stem: str, includes: Sequence[str], generated: Mapping[str, str], folder: Path) -> Path:
    """Return the path of the library made from ``stem``.cpp, in ``folder``, compiled unless it is there already.

    Several processes may do so at once: each compiles on its own, and the last to finish replaces an equal file.

    Args:
        stem: name of the source beside this file, without its suffix.
        includes: names of the headers beside this file that it includes.
        generated: name and text of headers that are written for it.
        folder: where libraries are kept.

    Raises:
        BuildError: no compiler, or none that compiles the source.
        OSError: the folder cannot be written.
    """
    compiler = _compiler()
    source = SOURCE_FOLDER / f"{stem}.cpp"
    sources = [path.read_bytes() for path in (source, *(SOURCE_FOLDER / name for name in includes))]
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=False).stdout
    identity = repr((sources, generated, _FLAGS, _TARGET_FLAGS, compiler, version, _processor()))
    library = folder / f"{stem}_{hashlib.blake2s(identity.encode(), digest_size=10).hexdigest()}.so"
    if library.exists():
        return library

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        for name, text in generated.items():
            (Path(temporary) / name).write_text(text)
        output = Path(temporary) / "library.so"
        for target in _TARGET_FLAGS:
            command = [*compiler, *_FLAGS, *target, "-I", temporary, str(source), "-o", str(output)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode == 0:
                output.replace(library)
                return library
    raise BuildError(
        f"{shlex.join(compiler)} cannot compile {source}; install a newer g++ or clang++, or name one in CXX. "
        f"It says: {result.stderr.strip()[-500:]}"
    )


def _compiler() -> list[str]:
    named = os.environ.get("CXX")
    for candidate in [named] if named else ["c++", "g++", "clang++"]:
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            return command
    missing = f"CXX={named} is not a command" if named else "there is no C++ compiler (c++, g++, clang++)"
    raise BuildError(f"{missing}; install g++ or clang++, or name one in CXX")


def _processor() -> str:
    """Return what -march=native depends on: a home folder may be shared by different machines."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return f"{platform.machine()} {platform.processor()}"
    lines = dict.fromkeys(line for line in info.read_text().splitlines() if line.startswith(_CPUINFO_KEYS))
    return "\n".join(lines)


_CPUINFO_KEYS = ("model name", "flags", "Features", "CPU implementer", "CPU part")


def constants_header(
    scalars: Mapping[str, float], integers: Mapping[str, int], arrays: Mapping[str, Iterable[float]]
) -> str:
    """Return constants of a reference as C++, so that there is one place where they are set."""
    lines = [f"constexpr float {name}[] = {{{_floats(values)}}};" for name, values in arrays.items()]
    lines += [f"constexpr float {name} = {_floats([value])};" for name, value in scalars.items()]
    lines += [f"constexpr int {name} = {value};" for name, value in integers.items()]
    return "\n".join(lines) + "\n"


def _floats(values: Iterable[float]) -> str:
    """Return fp32 literals, rounded by torch as the reference's tensors are."""
    return ", ".join(f"{value.hex()}f" for value in torch.tensor(list(values), dtype=torch.float32).tolist())
