"""``lowbit-lightning bench stash``: what DynamicStashing saves, and what it costs, against the other ways to save.

Models of one shape and weights, each trained in one way, take a step in turns: forward and backward on the same batch,
without an optimizer, which is the same for all. **Kept** are the tensors that a forward pass made and that are alive at
its end, counted one by one. **Time** is a step's over that of the plain one in the same precision and the same round.
**Gradient error** is relative to the plain fp32 gradient, |g - g'| / |g|. **Peaks** of memory are measured in a process
of its own for each way (:mod:`.bench_stash_memory`), and tell how many samples fit. Packing itself is timed on one
large tensor (:mod:`.bench_stash_kernels`).
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lowbit_lightning.atomic_file import atomic_file
from lowbit_lightning.errors import InvalidArgumentError

from . import bench_stash_report
from .bench_contenders import peers_silenced, reason
from .bench_guard import GuardWorkload
from .bench_measure import seconds
from .bench_optim import setting
from .bench_stash_contenders import PLAIN, WAYS, Contender
from .bench_stash_kernels import measure as measure_kernels
from .bench_stash_memory import largest_batch, memory_in_process

WORKLOADS = {
    "15m": GuardWorkload("15m", hidden=512, layers=4, vocabulary=2048, batch=2, length=256),
    "1m": GuardWorkload("1m", hidden=128, layers=4, vocabulary=1024, batch=4, length=128),
    "400m": GuardWorkload("400m", hidden=1280, layers=16, vocabulary=32000, batch=8, length=1024),
}
_TRAINED = 10  # steps before anything is measured: gradients of a model from scratch are not those of training
_LR = 1e-3


@dataclass
class Row:
    """Steps in one way. Samples are in seconds, in the order of the rounds; ``reason`` says why there are none."""

    name: str
    kept_bytes: int = 0
    loss: float = 0.0
    gradient_error: float = 0.0
    steps: list[float] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None


def run(
    *,
    device: str,
    workloads: list[str],
    memory: float,
    elements: int,
    repeats: int,
    threads: int | None,
    json_file: Path | None,
    plot_file: Path | None,
) -> int:
    """Measure, print the tables, and write the files asked for.

    Raises:
        InvalidArgumentError: The device is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidArgumentError(
            "bench: --device 'cuda': torch sees no CUDA device; `lowbit-lightning doctor` says more"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    report: dict[str, Any] = {"setting": setting(device, "fp32", repeats), "memory_gb": memory, "workloads": []}
    print(bench_stash_report.header(report["setting"]), flush=True)
    _progress("packing alone")
    report["kernels"] = measure_kernels(elements, device, repeats)
    print(f"\n{bench_stash_report.kernels_table(report['kernels'])}", flush=True)
    for name in workloads:
        workload = WORKLOADS[name]
        rows = measure(workload, device, repeats)
        for row in rows:
            if row.reason is None:
                _progress(f"[{name}] {row.name}: memory, in a process of its own")
                row.memory = memory_in_process(row.name, workload, device, torch.get_num_threads())
        report["workloads"].append(_figures(workload, rows, memory))
        print(f"\n{bench_stash_report.ways_table(report['workloads'][-1], memory)}", flush=True)
    report["targets"] = bench_stash_report.targets(report)
    print(f"\n{bench_stash_report.targets_table(report['targets'])}\n\n{bench_stash_report.LEGEND}")
    if json_file is not None:
        with atomic_file(json_file) as file:
            file.write(json.dumps(report, indent=1).encode())
    if plot_file is not None:
        bench_stash_report.plot(report, plot_file)
    return 0


def measure(workload: GuardWorkload, device: str, repeats: int) -> list[Row]:
    """Return the row of each way; steps are made in turns."""
    batch = {key: value.to(device) for key, value in workload.batches(1)[0].items()}
    weights = _trained(workload, device, batch)
    rows, contenders = {name: Row(name) for name in WAYS}, {}
    exact: Tensor | None = None
    for name, way in WAYS.items():
        _progress(f"[{workload.name}] {name}: gradients")
        row = rows[name]
        try:
            with peers_silenced():
                contender = Contender(way, workload, device, weights)
                row.loss = float(contender.step(batch))
                gradient = contender.gradient()
                row.kept_bytes = contender.kept_bytes(batch)
        except Exception as error:
            row.reason = reason(error)
            continue
        exact = gradient if exact is None else exact
        row.gradient_error = float((gradient - exact).norm() / exact.norm())
        contenders[name] = contender
    for turn in range(repeats):
        _progress(f"[{workload.name}] round {turn + 1} of {repeats}")
        for name, contender in contenders.items():
            rows[name].steps.append(seconds(lambda one=contender: one.step(batch), device))  # type: ignore[misc]
            contender.module.zero_grad()
    return list(rows.values())


def _trained(workload: GuardWorkload, device: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    with peers_silenced():
        plain = Contender(WAYS[PLAIN], workload, device)
        optimizer = torch.optim.AdamW(plain.module.parameters(), _LR)
        for _ in range(_TRAINED):
            plain.step(batch)
            optimizer.step()
    return plain.module.state_dict()


def _figures(workload: GuardWorkload, rows: list[Row], memory: float) -> dict[str, Any]:
    """Return the rows with what is concluded from them."""
    by_name = {row.name: row for row in rows}
    figures: list[dict[str, Any]] = []
    for row in rows:
        if row.reason is not None:
            figures.append({"name": row.name, "reason": row.reason})
            continue
        baseline = by_name[WAYS[row.name].baseline]
        ratios = [one / other for one, other in zip(row.steps, baseline.steps, strict=True)]
        figures.append(
            {
                "name": row.name,
                "kept_bytes": row.kept_bytes,
                "times_smaller": by_name[PLAIN].kept_bytes / row.kept_bytes,
                "peak_bytes": row.memory.get("peak"),
                "sample_bytes": row.memory.get("sample"),
                "memory_reason": row.memory.get("reason"),
                "largest_batch": largest_batch(row.memory, workload.batch, memory * 1e9),
                "step_seconds": median(row.steps),
                "time_ratio": median(ratios),
                "gradient_error": row.gradient_error,
                "loss": row.loss,
                "samples": row.steps,
            }
        )
    with torch.device("meta"):
        parameters = sum(param.numel() for param in workload.module().parameters())
    shape = {"batch": workload.batch, "length": workload.length, "vocabulary": workload.vocabulary}
    return {"name": workload.name, "parameters": parameters, **shape, "rows": figures}


def _progress(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
