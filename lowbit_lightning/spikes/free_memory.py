"""How much memory this process may still take, as the system that limits it says."""

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def free_memory_bytes() -> int | None:
    """Returns what can still be allocated on this machine, or within this container; None where nothing says so."""
    limits = [free for free in (_of_machine(), _of_container()) if free is not None]
    return min(limits, default=None)


def _of_machine() -> int | None:
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:  # not Linux
        return None
    values = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return values[0] * 1024 if values else None  # given in KiB


def _of_container() -> int | None:
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no container, or one of the older kind
        return None
    if limit == "max":
        return None
    # Cached files count as used, but the kernel gives them up when memory is asked for.
    return int(limit) - used + int(statistics.get("inactive_file", 0))
