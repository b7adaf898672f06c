"""``lowbit-lightning bench optim``: optimizer steps, paired in one run.

For each workload every optimizer is first probed in a process of its own (:mod:`.bench_probe`). Those that can step it
then run against each other in this process, on the same weights and gradients, in turns: A B C, A B C, ... so that a
machine that gets slower or faster does so for all of them. Before each step a large tensor is copied, which empties the
caches and measures the bandwidth at that very moment; a second step right after it runs on warm caches. Ratios are
taken within a round, and their median is shown.

Bytes moved are not measured but follow from what has to be read and written at the least: weights (read, written),
gradients (read), states (read, written).
"""

import json
import platform
import sys
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lowbit_lightning import __version__
from lowbit_lightning.atomic_file import atomic_file
from lowbit_lightning.errors import InvalidArgumentError

from . import bench_report
from .bench_contenders import BASELINE, CONTENDERS, UnavailableError, build, peers_silenced, reason
from .bench_measure import COPY_BYTES, Copy, Step, available_bytes, load_note, seconds
from .bench_probe import Probe, probe_in_process
from .bench_workloads import DTYPES, Workload, plan_workload
from .doctor import cpu_model

_WARM_UP = 2
# Who takes longer than this for a step sits out after a few rounds: the rest of the run would be spent waiting for it.
_SLOW_SECONDS, _SLOW_ROUNDS = 2.0, 3


@dataclass
class Row:
    """One optimizer on one workload. Samples are in seconds, in the order of the rounds."""

    probe: Probe
    samples: list[float] = field(default_factory=list)
    warm_samples: list[float] = field(default_factory=list)  # of the step right after each of these
    copy_samples: list[float] = field(default_factory=list)  # of the copy right before


def run(
    *,
    device: str,
    workloads: list[str],
    dtype: str,
    repeats: int,
    threads: int | None,
    json_file: Path | None,
    plot_file: Path | None,
) -> int:
    """Measure, print a table for each workload, and write the files asked for.

    Raises:
        InvalidArgumentError: The device is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidArgumentError(
            "bench: --device 'cuda': torch sees no CUDA device; `lowbit-lightning doctor` says more"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    report: dict[str, Any] = {"setting": setting(device, dtype, repeats), "workloads": []}
    print(bench_report.header(report["setting"]), flush=True)
    for name in workloads:
        workload = plan_workload(name, DTYPES[dtype], available_bytes(device))
        rows = measure(workload, device, dtype, repeats) if workload.shapes else {}
        report["workloads"].append(summary(workload, rows, DTYPES[dtype].itemsize, device))
        print(f"\n{bench_report.table(report['workloads'][-1])}", flush=True)
    print(f"\n{bench_report.LEGEND}")
    if json_file is not None:
        with atomic_file(json_file) as file:
            file.write(json.dumps(report, indent=1).encode())
    if plot_file is not None:
        bench_report.plot(report, plot_file)
    return 0


def setting(device: str, dtype: str, repeats: int) -> dict[str, Any]:
    """Return where and how is measured."""
    versions: dict[str, str | None] = {}
    for package in ("torch", "triton", "torchao", "bitsandbytes"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_model(),
        "device_type": device,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "platform": platform.platform(),
        "versions": {"lowbit-lightning": __version__, **versions},
        "remark": load_note(),
    }


def measure(workload: Workload, device: str, dtype: str, repeats: int) -> dict[str, Row]:
    """Return the row of each optimizer on a workload."""
    rows = {}
    for name in CONTENDERS:
        _progress(workload, f"{name}: first step, in a process of its own")
        rows[name] = Row(probe_in_process(name, workload, device, dtype, torch.get_num_threads()))

    params = workload.make_params(device, DTYPES[dtype])
    steps: dict[str, Step] = {}
    rounds: dict[str, int] = {}
    with peers_silenced():
        for name, row in rows.items():
            if row.probe.reason is not None:
                continue
            _progress(workload, f"{name}: warming up")
            try:
                optimizer = build(name, params)
                slow = [seconds(optimizer.step, device) for _ in range(_WARM_UP)][-1] > _SLOW_SECONDS
            except UnavailableError as error:
                row.probe = Probe(reason=str(error))
            except Exception as error:
                row.probe = Probe(reason=reason(error))
            else:
                steps[name] = optimizer.step
                rounds[name] = min(repeats, _SLOW_ROUNDS) if slow else repeats
        copy = Copy(device)
        copy()
        for turn in range(repeats):
            _progress(workload, f"round {turn + 1} of {repeats}")
            for name, step in steps.items():
                if turn >= rounds[name]:
                    continue
                rows[name].copy_samples.append(seconds(copy, device))
                rows[name].samples.append(seconds(step, device))
                rows[name].warm_samples.append(seconds(step, device))
    return rows


def summary(workload: Workload, rows: dict[str, Row], itemsize: int, device: str) -> dict[str, Any]:
    """Return everything about a workload as plain values: figures per optimizer, and what they were made of."""
    copies = [sample for row in rows.values() for sample in row.copy_samples]
    copied = 2 * COPY_BYTES[device]
    return {
        "name": workload.name,
        "note": workload.note,
        "tensors": len(workload.shapes),
        "parameters": workload.numel,
        "copy_bytes": copied,
        "copy_bytes_per_second": copied / median(copies) if copies else None,
        "rows": {name: _figures(row, rows[BASELINE], workload.numel, itemsize, copied) for name, row in rows.items()},
    }


def _figures(row: Row, baseline: Row, numel: int, itemsize: int, copied: int) -> dict[str, Any]:
    if row.probe.reason is not None or row.probe.state_bytes is None:
        return {"reason": row.probe.reason}
    moved = 3 * itemsize + 2 * row.probe.state_bytes / numel
    shares = [moved * numel / own / (copied / copy) for own, copy in zip(row.samples, row.copy_samples, strict=True)]
    return {
        **asdict(row.probe),
        "median_seconds": median(row.samples),
        "min_seconds": min(row.samples),
        "warm_median_seconds": median(row.warm_samples),
        "ratio": _ratio(row.samples, baseline.samples),
        "warm_ratio": _ratio(row.warm_samples, baseline.warm_samples),
        "state_bytes_per_parameter": row.probe.state_bytes / numel,
        "moved_bytes_per_parameter": moved,
        "share_of_copy_bandwidth": median(shares),
        "samples": row.samples,
        "warm_samples": row.warm_samples,
        "copy_samples": row.copy_samples,
    }


def _ratio(own: list[float], baseline: list[float]) -> float | None:
    """Return the median of the ratios within the rounds that both ran in, None where the baseline could not run."""
    return median(a / b for a, b in zip(own, baseline, strict=False)) if baseline else None


def _progress(workload: Workload, text: str) -> None:
    print(f"[{workload.name}] {text}", file=sys.stderr, flush=True)
