"""``lowbit-lightning bench guard``: what SpikeMonitor and SpikeGuard cost, in per cent of the step that they watch.

A Llama is trained on random tokens by a real Trainer with both callbacks on. Lightning marks the beginning and end of
every hook for its profilers; a clock on these marks gives, for each step, the step itself (forward, backward and
optimizer, without the hooks within it), the hooks of monitor and guard, and the snapshot, which is taken after every
step here and every 100 steps in a run. So all of a row is measured in the same steps, and a busy machine is busy for
all of it.

Predicted, before anything was measured, from what has to be moved: the monitor reads every gradient once, 4 bytes per
fp32 parameter, and every tenth step the weights too; a snapshot reads and writes weights and optimizer states, 2 × 12
bytes per parameter with AdamW and 2 × 4.84 with SOLO at 4/2 bits. Divided by the bandwidth of ``copy_`` of a large
tensor at the same moment this gives the predicted milliseconds. A step computes on each parameter for every token, so
with a few thousand tokens both should be below 1 %.
"""

import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lowbit_lightning.atomic_file import atomic_file
from lowbit_lightning.callbacks.spike_guard import SpikeGuard
from lowbit_lightning.callbacks.spike_monitor import SpikeMonitor
from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.models import CausalLM
from lowbit_lightning.optim import SoloAdamW
from lowbit_lightning.spikes.snapshot_ring import SnapshotRing
from lowbit_lightning.spikes.step_meter import SAMPLE_EVERY

from . import bench_report
from .bench_contenders import peers_silenced
from .bench_guard_report import LEGEND, SNAPSHOT_EVERY, table
from .bench_measure import COPY_BYTES, Copy, available_bytes, seconds
from .bench_optim import setting

_WARM_UP = 3  # steps; the ring's snapshots are allocated in the first ones
_KEPT = 2  # snapshots
# Weights, gradients, AdamW's states and temporaries, snapshots of 12 bytes each, and the activations of 4096 tokens.
_BYTES_PER_PARAMETER = 24 + 12 * (_KEPT + 1) + 16

OPTIMIZERS: dict[str, Callable[[LightningModule], Optimizer]] = {
    "torch AdamW": lambda module: torch.optim.AdamW(module.parameters(), 1e-3),
    "SoloAdamW 4/2": lambda module: SoloAdamW(module.named_parameters(), 1e-3, bits=(4, 2)),
}


@dataclass(frozen=True)
class GuardWorkload:
    """A Llama and a batch of random tokens for it."""

    name: str
    hidden: int
    layers: int
    vocabulary: int
    batch: int
    length: int

    def module(self) -> CausalLM:
        """Return the model, from scratch."""
        torch.manual_seed(0)
        return CausalLM(
            {
                "model_type": "llama", "vocab_size": self.vocabulary, "hidden_size": self.hidden,
                "intermediate_size": self.hidden * 8 // 3 // 64 * 64, "num_hidden_layers": self.layers,
                "num_attention_heads": max(1, self.hidden // 64), "max_position_embeddings": self.length,
                "bos_token_id": None, "eos_token_id": 0,
            }
        )  # fmt: skip

    def batches(self, count: int) -> list[dict[str, Tensor]]:
        """Return ``count`` batches; random tokens cost what text costs."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.length)
        tokens = [torch.randint(self.vocabulary, shape, generator=generator) for _ in range(count)]
        return [{"input_ids": one, "labels": one} for one in tokens]


WORKLOADS = {
    "10m": GuardWorkload("10m", hidden=320, layers=6, vocabulary=4096, batch=8, length=256),
    "100m": GuardWorkload("100m", hidden=768, layers=12, vocabulary=8192, batch=8, length=256),
}


@dataclass
class Row:
    """One optimizer on one workload. Samples are in seconds, in the order of the steps."""

    parameters: int = 0
    snapshot_bytes: int = 0
    looks: list[bool] = field(default_factory=list)  # whether the monitor looked at the weights too
    steps: list[float] = field(default_factory=list)
    hooks: list[float] = field(default_factory=list)
    snapshots: list[float] = field(default_factory=list)
    copies: list[float] = field(default_factory=list)


class _Clock(Profiler):
    """Adds up the seconds between Lightning's marks, of the training step and of our two callbacks."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._device = device
        self._begun: dict[str, float] = {}
        self._within = 0.0  # seconds of our hooks within the present training step

    def start(self, action_name: str) -> None:
        if _part(action_name):
            self._begun[action_name] = self._now()

    def stop(self, action_name: str) -> None:
        part = _part(action_name)
        if not part or action_name not in self._begun:
            return
        taken = self._now() - self._begun.pop(action_name)
        if part == "step":
            taken, self._within = taken - self._within, 0.0
        elif "run_training_batch" in self._begun:
            self._within += taken
        self.seconds[part] += taken

    def _now(self) -> float:
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _part(action: str) -> str:
    """What a mark of Lightning's belongs to; empty if it is not measured."""
    if action == "run_training_batch":
        return "step"
    if action == "[Callback]SpikeGuard.on_train_batch_end":
        return "snapshot"
    return "hooks" if action.startswith(("[Callback]SpikeMonitor.", "[Callback]SpikeGuard.")) else ""


class _Rounds(Callback):
    """After every step: what the clock says, and the bandwidth at that moment."""

    def __init__(self, row: Row, clock: _Clock, device: str, progress: Callable[[int], None]) -> None:
        self.row, self.clock, self.device, self.progress = row, clock, device, progress
        self.copy = Copy(device)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.row.parameters = sum(param.numel() for param in pl_module.parameters())
        self.row.snapshot_bytes = SnapshotRing(keep=1).expected_bytes(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        taken = dict(self.clock.seconds)
        self.clock.seconds.clear()
        self.progress(trainer.global_step)
        if trainer.global_step <= _WARM_UP:
            return
        self.row.looks.append((trainer.global_step - 1) % SAMPLE_EVERY == 0)
        self.row.steps.append(taken["step"])
        self.row.hooks.append(taken["hooks"])
        self.row.snapshots.append(taken["snapshot"])
        self.row.copies.append(seconds(self.copy, self.device))


def run(*, device: str, workloads: list[str], repeats: int, threads: int | None, json_file: Path | None) -> int:
    """Measure, print a table for each workload, and write the file asked for.

    Raises:
        InvalidArgumentError: The device is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidArgumentError(
            "bench: --device 'cuda': torch sees no CUDA device; `lowbit-lightning doctor` says more"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    report: dict[str, Any] = {"setting": setting(device, "fp32", repeats), "workloads": []}
    print(bench_report.header(report["setting"]), flush=True)
    for name in workloads:
        workload = WORKLOADS[name]
        with torch.device("meta"):
            parameters = sum(param.numel() for param in workload.module().parameters())
        needed, free = parameters * _BYTES_PER_PARAMETER, available_bytes(device)
        rows: dict[str, Row] = {}
        if free is None or needed <= free:
            rows = {optimizer: measure(workload, optimizer, device, repeats) for optimizer in OPTIMIZERS}
        report["workloads"].append(summary(workload, parameters, rows, device, needed, free))
        print(f"\n{table(report['workloads'][-1])}", flush=True)
    print(f"\n{LEGEND}")
    if json_file is not None:
        with atomic_file(json_file) as file:
            file.write(json.dumps(report, indent=1).encode())
    return 0


def measure(workload: GuardWorkload, optimizer: str, device: str, repeats: int) -> Row:
    """Train for ``repeats`` steps after the warm-up, with both callbacks, and return the samples."""

    def progress(step: int) -> None:
        print(f"[{workload.name}] {optimizer}: step {step} of {_WARM_UP + repeats}", file=sys.stderr, flush=True)

    row, clock, module = Row(), _Clock(device), workload.module()
    module.configure_optimizers = lambda: OPTIMIZERS[optimizer](module)  # type: ignore[method-assign,assignment]
    with tempfile.TemporaryDirectory() as folder, peers_silenced():  # Lightning's advice, here
        guard = SpikeGuard(
            snapshot={"every_n_steps": 1, "keep": _KEPT, "where": "cpu", "min_age": 20},
            ledger=str(Path(folder) / "spikes.jsonl"),
        )
        trainer = Trainer(
            accelerator=device, devices=1, max_steps=_WARM_UP + repeats, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, profiler=clock,
            callbacks=[SpikeMonitor(), guard, _Rounds(row, clock, device, progress)],
        )  # fmt: skip
        batches: Any = workload.batches(_WARM_UP + repeats)
        trainer.fit(module, DataLoader(batches, batch_size=None))
    return row


def summary(
    workload: GuardWorkload, parameters: int, rows: dict[str, Row], device: str, needed: int, free: int | None
) -> dict[str, Any]:
    """Return everything about a workload as plain values."""
    note = (
        ""
        if rows
        else (f"skipped: needs about {needed / 2**30:.1f} GiB of free memory, there are {(free or 0) / 2**30:.1f}")
    )
    copied = 2 * COPY_BYTES[device]
    return {
        "name": workload.name,
        "note": note,
        "parameters": parameters,
        "tokens": workload.batch * workload.length,
        "rows": {name: _figures(row, copied) for name, row in rows.items()},
    }


def _figures(row: Row, copied: int) -> dict[str, Any]:
    usual = [taken for taken, look in zip(row.hooks, row.looks, strict=True) if not look]
    looking = [taken for taken, look in zip(row.hooks, row.looks, strict=True) if look] or usual
    hooks = ((SAMPLE_EVERY - 1) * median(usual) + median(looking)) / SAMPLE_EVERY
    bandwidth = copied / median(row.copies)
    read = row.parameters * 4 * (1 + 1 / SAMPLE_EVERY)
    step, snapshot = median(row.steps), median(row.snapshots)
    return {
        "step_seconds": step,
        "monitor_seconds": hooks,
        "monitor_share": hooks / step,
        "monitor_predicted_seconds": read / bandwidth,
        "snapshot_seconds": snapshot,
        "snapshot_share": snapshot / SNAPSHOT_EVERY / step,
        "snapshot_predicted_seconds": 2 * row.snapshot_bytes / bandwidth,
        "snapshot_bytes": row.snapshot_bytes,
        "snapshot_bytes_per_parameter": row.snapshot_bytes / row.parameters,
        "copy_bytes_per_second": bandwidth,
        "samples": {"steps": row.steps, "hooks": row.hooks, "snapshots": row.snapshots, "copies": row.copies},
    }
