"""How ``bench`` measures time, memory and bandwidth on a device."""

import ctypes
import gc
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

# Of the tensor that is read, and of the one that is written. Far larger than the caches that a step's data could stay
# in: 50 MB on an H100. Server processors have more for all their cores together, hence warm steps are measured as well.
COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}

Step = Callable[[], object]


def seconds(step: Step, device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds from asking for a step to its end, with nothing else in flight on the device.

    ``clock`` is what a CPU's are counted by.

    On CUDA the time between two events, the first of which is reached before the step is asked for: the time to launch
    many small kernels counts, as it does in a training loop whose processor is not ahead of its GPU.
    """
    if device == "cpu":
        started = clock()
        step()
        return clock() - started
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


class Copy:
    """The measure of bandwidth: ``copy_`` of a tensor that no cache holds.

    Made before each measured step, it leaves the same cold caches to every optimizer.
    """

    def __init__(self, device: str) -> None:
        self.source = torch.ones(COPY_BYTES[device] // 4, device=device)
        self.target = torch.ones_like(self.source)

    def __call__(self) -> None:
        """Make one copy."""
        self.target.copy_(self.source)


def transient_bytes(step: Step, device: str) -> int | None:
    """Return the peak of memory in use during ``step`` beyond what was in use before it, or None where unknown.

    CUDA: the peak of the caching allocator. Linux CPU: the growth of the resident set to its high-water mark. Free
    memory that the C library keeps is given back first, otherwise a step could reuse it unseen. Good to about 0.1 MB.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to the present size
        before = _resident("VmRSS")
        step()
        return max(0, _resident("VmHWM") - before)
    except (OSError, AttributeError, TypeError):  # no Linux, another C library, a closed /proc
        return None


def _resident(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {key}")
    return int(found[1]) * 1024


def available_bytes(device: str) -> int | None:
    """Return the memory that can still be allocated, None where unknown."""
    gc.collect()  # optimizers of an earlier workload may sit in reference cycles
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        available = int(found[1]) * 1024 if found else None
    except OSError:
        return None
    try:  # a container may be allowed less than the machine has
        group = Path("/sys/fs/cgroup")
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return available
    return available if limit == "max" or available is None else min(available, int(limit) - used)


def load_note() -> str | None:
    """Return a remark where the processors are busy with other work, which makes times unreliable."""
    if not hasattr(os, "getloadavg"):
        return None
    load, processors = os.getloadavg()[0], os.cpu_count() or 1
    if load < 0.3 * processors:
        return None
    return (
        f"the machine is busy (load {load:.1f} on {processors} processors): times are provisional, and with more than "
        "one thread so are ratios, since threads wait for each other; --threads 1 is safer"
    )
