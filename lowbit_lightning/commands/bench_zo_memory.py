"""The part of ``bench zo`` that wants a process of its own: the peak of memory of a forward-only run.

Compared are the peaks of the same batches, in bare forward passes, through a Trainer's ``validate`` and its ``fit``,
above what the loaded model takes. On Linux the C library is told (``MALLOC_MMAP_THRESHOLD_``) to give freed blocks of
more than a megabyte back to the system at once: otherwise it keeps them in a heap that grows with the order of
allocations, by tens of megabytes whatever a step needs, and the peak would tell about that heap.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from lowbit_lightning.optim import FZOO
from lowbit_lightning.strategies import ForwardOnlyStrategy
from lowbit_lightning.strategies.replay import silent

from .bench_contenders import peers_silenced
from .bench_guard import GuardWorkload
from .bench_measure import transient_bytes

_TIMEOUT = 900  # seconds
_PEAKS, _STEPS = 3, 2
_THRESHOLD = 2**20  # bytes


def memory_in_process(workload: GuardWorkload, perturbations: int, device: str, threads: int) -> dict[str, Any]:
    """Return :func:`memory`, measured in a new process; ``reason`` where there is no answer."""
    task = json.dumps([asdict(workload), perturbations, device, threads])
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
    errors = done.stderr.strip().splitlines()
    return {"reason": errors[-1][:160] if errors else f"exit status {done.returncode}"}


def memory(workload: GuardWorkload, perturbations: int, device: str) -> dict[str, Any]:
    """Return bytes: of the weights, of the largest parameter, and peaks above the loaded model.

    ``forward`` is that of bare forward passes without a Trainer, ``inference`` that of its validation, the others are
    those of training; all None where they cannot be measured.
    """
    small = replace(workload, hidden=64, layers=1, vocabulary=64, batch=1, length=8)
    _evaluate(small, small.module().to(device), device)
    for perturbation in ("rademacher", "rank1"):  # code is loaded, and compiled, before anything is measured
        _train(small, small.module().to(device), perturbation, perturbations, device)
    module = workload.module().to(device)
    sizes = [param.nbytes for param in module.parameters()]
    peaks: dict[str, Any] = {
        "forward": _peak(lambda: _forward(workload, module, device), device),
        "inference": _peak(lambda: _evaluate(workload, module, device), device),
        "sequential": _peak(lambda: _train(workload, module, "rademacher", perturbations, device), device),
        "batched": _peak(lambda: _train(workload, module, "rank1", perturbations, device), device),
    }
    tokens = workload.batch * workload.length
    known = {"weights": sum(sizes), "largest": max(sizes), "tokens": tokens, "perturbations": perturbations}
    return {**known, **peaks}


def _peak(run: Callable[[], object], device: str) -> int | None:
    run()
    peaks = [transient_bytes(run, device) for _ in range(_PEAKS)]
    known = [peak for peak in peaks if peak is not None]
    return int(median(known)) if known else None


def _forward(workload: GuardWorkload, module: LightningModule, device: str) -> None:
    with torch.no_grad(), silent(module):
        for batch in workload.batches(_STEPS):
            module.training_step({key: value.to(device) for key, value in batch.items()}, 0)


def _evaluate(workload: GuardWorkload, module: LightningModule, device: str) -> None:
    batches: Any = workload.batches(_STEPS)
    with _trainer(device) as trainer:
        trainer.validate(module, DataLoader(batches, batch_size=None), verbose=False)
    module.to(device)  # Lightning leaves a module on the CPU


def _train(
    workload: GuardWorkload, module: LightningModule, perturbation: Any, perturbations: int, device: str
) -> None:
    module.configure_optimizers = lambda: FZOO(  # type: ignore[method-assign,assignment]
        module.named_parameters(), 1e-6, perturbation=perturbation, num_perturbations=perturbations,
        execution="batched" if perturbation == "rank1" else "sequential",
    )  # fmt: skip
    batches: Any = workload.batches(_STEPS)
    with _trainer(device, max_steps=_STEPS, strategy=ForwardOnlyStrategy()) as trainer:
        trainer.fit(module, DataLoader(batches, batch_size=None))
    module.to(device)


@contextmanager
def _trainer(device: str, **settings: Any) -> Iterator[Trainer]:
    with tempfile.TemporaryDirectory() as folder, peers_silenced():
        yield Trainer(
            accelerator=device, devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder, **settings,
        )  # fmt: skip


def main() -> None:
    """Measure what standard input asks for and print the result as the last line."""
    workload, perturbations, device, threads = json.load(sys.stdin)
    torch.set_num_threads(threads)
    print(json.dumps(memory(GuardWorkload(**workload), perturbations, device)))


if __name__ == "__main__":
    main()
