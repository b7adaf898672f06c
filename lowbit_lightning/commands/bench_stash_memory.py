"""The part of ``bench stash`` that wants a process of its own for each way: the peak of memory of a step.

Two batches, one half as large as the other, tell what a sample takes. On Linux the C library is told to give freed
blocks of more than a megabyte back at once, see :mod:`.bench_zo_memory`.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import torch

from .bench_guard import GuardWorkload
from .bench_measure import transient_bytes
from .bench_stash_contenders import WAYS, Contender

_TIMEOUT = 900  # seconds
_PEAKS = 2
_THRESHOLD = 2**20  # bytes


def memory_in_process(name: str, workload: GuardWorkload, device: str, threads: int) -> dict[str, Any]:
    """Return :func:`memory` of the way ``name``, measured in a new process; ``reason`` where there is no answer."""
    task = json.dumps([name, asdict(workload), device, threads])
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(_THRESHOLD), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-W", "ignore", "-m", __name__]
    try:
        done = subprocess.run(
            command, env=environment, input=task, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return {"reason": f"no answer in {_TIMEOUT} seconds"}
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        found: dict[str, Any] = json.loads(lines[-1])
        return found
    if done.returncode < 0:
        return {"reason": f"its process was ended by signal {-done.returncode} (out of memory if 9)"}
    errors = done.stderr.strip().splitlines()
    return {"reason": errors[-1][:160] if errors else f"exit status {done.returncode}"}


def memory(name: str, workload: GuardWorkload, device: str) -> dict[str, Any]:
    """Return bytes: ``peak`` of a step above the model with its gradients, ``sample``, the part of each sample in it.

    Both are None where they cannot be measured. Also ``weights``.
    """
    contender = Contender(WAYS[name], workload, device)
    peaks: list[int | None] = []
    for batch_size in (workload.batch // 2, workload.batch):
        one = replace(workload, batch=batch_size).batches(1)[0]
        batch = {key: value.to(device) for key, value in one.items()}
        contender.step(batch)  # gradients exist from here on

        def accumulate(batch: dict[str, torch.Tensor] = batch) -> None:
            contender.backward(contender.forward(batch))

        accumulate()
        found = [transient_bytes(accumulate, device) for _ in range(_PEAKS)]
        known = [peak for peak in found if peak is not None]
        peaks.append(int(median(known)) if known else None)
    weights = sum(param.nbytes for param in contender.module.parameters())
    small, large = peaks
    if small is None or large is None:
        return {"weights": weights, "peak": None, "sample": None}
    return {"weights": weights, "peak": large, "sample": (large - small) / (workload.batch - workload.batch // 2)}


def largest_batch(found: dict[str, Any], batch: int, available: float) -> int | None:
    """Return how many samples fit, **modelled** from what was measured.

    Args:
        found: by :func:`memory`.
        batch: samples that its peak was measured with.
        available: bytes for weights, gradients, AdamW's two states and the step.
    """
    if found.get("sample") is None or found["sample"] <= 0:
        return None
    fixed = 4 * found["weights"] + max(0.0, found["peak"] - batch * found["sample"])
    return max(0, int((available - fixed) / found["sample"]))


def main() -> None:
    """Measure what standard input asks for and print the result as the last line."""
    name, workload, device, threads = json.load(sys.stdin)
    torch.set_num_threads(threads)
    print(json.dumps(memory(name, GuardWorkload(**workload), device)))


if __name__ == "__main__":
    main()
