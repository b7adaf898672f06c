"""``lowbit-lightning doctor``: what this machine is and what will work on it, as text for a bug report.

It reports and never fails: what is missing is a line of the report. It shows no host name, no user name and no paths
outside the working folder, so that the text can be published as it is.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from lowbit_lightning import __version__

PACKAGES = (
    "torch",
    "lightning",
    "pytorch-lightning",
    "torchmetrics",
    "jsonargparse",
    "triton",
    "transformers",
    "tensorboard",
    "numpy",
    "pyarrow",
)
GIB = 2**30


def run(digest: bool = False) -> int:
    """Print the report, or compare the kernels' results with the committed ones.

    Args:
        digest: Run :mod:`lowbit_lightning.commands.digest` instead.
    """
    if digest:
        import torch

        if not torch.cuda.is_available():
            # Without a GPU Triton only interprets, if told so before it is imported, which torch's optimizers do.
            os.environ.setdefault("TRITON_INTERPRET", "1")
        from lowbit_lightning.commands import digest as digest_command

        return digest_command.run()
    print(report())
    return 0


def report() -> str:
    """The whole text."""
    compiler = compiler_found()
    triton_result = _or_failure(lambda: [triton_self_test()])
    sections: dict[str, list[str]] = {
        "Versions": versions(),
        "Devices": _or_failure(devices),
        "Triton self-test": triton_result,
        "Lightning": lightning_trees(),
        "C++ compiler": [compiler or "none found (c++, g++, clang++ or $CXX)"],
        "Disk": disks(),
        "What will and won't work here": _or_failure(lambda: verdicts(triton_result[0], compiler)),
    }
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections.items())


def _or_failure(section: Callable[[], list[str]]) -> list[str]:
    """A torch that cannot be imported is what a report is most needed for, so it must not end the report."""
    try:
        return section()
    except Exception as error:
        return [f"FAILED: {type(error).__name__}: {error}"]


def versions() -> list[str]:
    """One line per package: its version or ``not installed``."""
    rows = [("lowbit-lightning", __version__), ("python", platform.python_version()), ("platform", platform.platform())]
    for package in PACKAGES:
        try:
            rows.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    return [f"{name:<18} {version}" for name, version in rows]


def devices() -> list[str]:
    """The processor, its memory, and every accelerator that torch can use."""
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = [
        f"CPU   {cpu_model()}, {os.cpu_count()} cores, {usable} usable, {torch.get_num_threads()} torch threads",
        f"RAM   {_memory()}",
    ]
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        lines.append(
            f"CUDA  {index}: {found.name}, capability {found.major}.{found.minor}, {found.total_memory / GIB:.1f} GiB"
        )
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        lines.append(f"CUDA  none ({built})")
    lines.append(f"MPS   {'available' if torch.backends.mps.is_available() else 'none'}")
    return lines


def cpu_model() -> str:
    """The processor's name, as the system gives it."""
    try:
        rows = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        rows = []
    named = next((row.partition(":")[2].strip() for row in rows if row.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def _memory() -> str:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf, macOS no SC_AVPHYS_PAGES
        return "unknown"
    return f"{total / GIB:.1f} GiB, {free / GIB:.1f} GiB free"


def triton_self_test() -> str:
    """Run a tiny kernel in a process of its own; one line says how it went."""
    import torch

    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "lowbit_lightning.commands.triton_self_test"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        return "FAILED: no answer in 300 seconds"
    if done.returncode == 0:
        return done.stdout.strip()
    reason = done.stderr.strip().splitlines()
    return f"FAILED: {reason[-1] if reason else f'exit status {done.returncode}'}"


def lightning_trees() -> list[str]:
    """Both copies of Lightning, which are always installed together and do not mix."""
    lines = []
    for package, module in (("lightning", "lightning.pytorch"), ("pytorch-lightning", "pytorch_lightning")):
        try:
            lines.append(f"{module:<18} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{module:<18} not installed")
    return [
        *lines,
        "Two copies of the same classes, unrelated to each other. Modules, data modules and callbacks must be",
        "built on lightning.pytorch (`import lightning as L`); those built on pytorch_lightning are refused.",
    ]


def compiler_found() -> str:
    """The C++ compiler that torch.compile would use on a CPU, empty when there is none."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            try:
                shown = subprocess.run([name, "--version"], capture_output=True, text=True, timeout=30, check=False)
            except (OSError, subprocess.TimeoutExpired):
                continue
            if shown.returncode == 0 and shown.stdout:
                return shown.stdout.splitlines()[0]
    return ""


def disks() -> list[str]:
    """Free space where runs, caches and temporary files are written."""
    folders: dict[str, Callable[[], Path]] = {
        "working folder (checkpoints, logs)": Path.cwd,
        "cache folder": lambda: Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")),
        "temporary folder": lambda: Path(tempfile.gettempdir()),
    }
    lines = []
    for label, folder in folders.items():
        here = folder().absolute()
        existing = next(path for path in (here, *here.parents) if path.exists())
        writable = "" if os.access(existing, os.W_OK) else ", NOT writable"
        lines.append(f"{label:<36} {shutil.disk_usage(existing).free / GIB:.1f} GiB free{writable}")
    return lines


def compiled_step() -> str:
    """Whether SoloAdamW's fast CPU step can be built and loaded here; builds it if need be."""
    import warnings

    from lowbit_lightning.kernels.solo_cpu import load_library

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if load_library() is not None:
            return "yes  the compiled CPU step of SoloAdamW"
    reason = str(caught[0].message) if caught else "LOWBIT_LIGHTNING_CPU_KERNEL=reference is set"
    return f"NO   the compiled CPU step of SoloAdamW: {reason}"


def verdicts(triton_result: str, compiler: str) -> list[str]:
    """What a user can expect on this machine."""
    import torch

    cuda = torch.cuda.is_available()
    lines = ["yes  training on the CPU", compiled_step()]
    if cuda:
        lines.append(
            "yes  training on CUDA" if "passed" in triton_result else "NO   Triton kernels on CUDA: see the self-test"
        )
        if torch.cuda.is_bf16_supported():
            lines.append("yes  bf16 on CUDA")
        else:
            lines.append("NO   bf16 on this GPU: use precision 16-mixed or 32-true")
    else:
        lines.append("NO   CUDA kernels: no CUDA device; Triton here only interprets, for tests")
    if compiler:
        lines.append("yes  torch.compile on the CPU")
    else:
        lines.append("NO   torch.compile on the CPU: install a C++ compiler (g++ or clang++)")
    if not torch.distributed.is_available():
        lines.append("NO   several processes: torch is built without torch.distributed")
    elif cuda and torch.distributed.is_nccl_available():
        lines.append(f"yes  several processes: gloo on the CPU, nccl on {torch.cuda.device_count()} GPU(s)")
    else:
        lines.append("yes  several processes on the CPU (gloo)")
    return lines
