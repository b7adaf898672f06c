"""The part of ``bench optim`` that wants a process of its own for each optimizer: first step, state and peak memory.

A first step is cold only once in a process, and only with empty caches of compiled kernels; and a peak of memory is the
optimizer's own only where no other one is. What kills its process here is one row of the table.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from lowbit_lightning.optim import state_bytes

from .bench_contenders import UnavailableError, build, peers_silenced, reason
from .bench_measure import seconds, transient_bytes
from .bench_workloads import DTYPES, Workload

# Everything that optimizers keep compiled kernels in, so that each process starts without any.
_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "LOWBIT_LIGHTNING_CACHE")
_TIMEOUT = 900  # seconds; the slowest of the peers compiles for two minutes on a busy machine
_PEAKS = 3


@dataclass(frozen=True)
class Probe:
    """What one optimizer needs on one workload; ``reason`` is set, and all else None, where it cannot step it."""

    first_step_seconds: float | None = None
    state_bytes: int | None = None
    transient_bytes: int | None = None
    reason: str | None = None


def probe_in_process(name: str, workload: Workload, device: str, dtype: str, threads: int) -> Probe:
    """Return the probe of the optimizer ``name``, made in a new process with empty caches."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {key: os.path.join(folder, key) for key in _CACHES}
        environment["OMP_NUM_THREADS"] = str(threads)
        task = json.dumps([name, asdict(workload), device, dtype, threads])
        command = [sys.executable, "-W", "ignore", "-m", __name__]
        try:
            done = subprocess.run(
                command, env=environment, input=task, capture_output=True, text=True, timeout=_TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired:
            return Probe(reason=f"no answer in {_TIMEOUT} seconds")
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        return Probe(**json.loads(lines[-1]))  # peers may print too
    if done.returncode < 0:
        return Probe(reason=f"its process was ended by signal {-done.returncode} (out of memory if 9)")
    errors = done.stderr.strip().splitlines()
    return Probe(reason=errors[-1][:160] if errors else f"exit status {done.returncode}")


def probe(name: str, workload: Workload, device: str, dtype: str) -> Probe:
    """Return the probe of the optimizer ``name``, made here: cold only in a process that has done nothing before."""
    params = workload.make_params(device, DTYPES[dtype])
    with peers_silenced():
        try:
            optimizer = build(name, params)
            first = seconds(optimizer.step, device)
            optimizer.step()
            peaks = [transient_bytes(optimizer.step, device) for _ in range(_PEAKS)]
        except UnavailableError as error:
            return Probe(reason=str(error))
        except Exception as error:
            return Probe(reason=reason(error))
    # The median: a page that some other thread touches for the first time is not the step's.
    known = [peak for peak in peaks if peak is not None]
    return Probe(first, state_bytes(optimizer), int(median(known)) if known else None)


def main() -> None:
    """Probe what standard input asks for and print the result as the last line."""
    name, workload, device, dtype, threads = json.load(sys.stdin)
    torch.set_num_threads(threads)
    torch.ones(1, device=device).sum().item()  # a CUDA context is not part of an optimizer's first step
    result: dict[str, Any] = asdict(probe(name, Workload(**workload), device, dtype))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
