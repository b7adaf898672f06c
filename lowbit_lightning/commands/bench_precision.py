"""``lowbit-lightning bench precision``: what 4-bit training takes and saves, and what GradientStabilizer costs.

A Llama trains on random tokens with torch's AdamW, in fp32, in bf16 and with FourBitPrecision, and once more in bf16
behind GradientStabilizer. Times are of whole training steps; bytes kept for backward are counted from the tensors that
autograd saves, those of the converted layers apart.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lowbit_lightning.atomic_file import atomic_file
from lowbit_lightning.callbacks import GradientStabilizer
from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.precision import FourBitPrecision
from lowbit_lightning.precision.four_bit import DEFAULT_EXCLUDE
from lowbit_lightning.precision.layers import layers_to_quantize

from . import bench_report
from .bench_contenders import peers_silenced
from .bench_guard import WORKLOADS, GuardWorkload
from .bench_measure import transient_bytes
from .bench_optim import setting

_WARM_UP = 2  # steps
_IN_A_ROW = 2  # timed steps of one variant, before it is the next one's turn

_BASELINE = "bf16-mixed"
#: Keeps each distinct input of the layers once, in bf16.
_UNPACKED = "INT4, not packed"
_STABILIZED = "bf16-mixed, GradientStabilizer"
#: What is measured: settings of the Trainer. Times are compared with the baseline's.
VARIANTS: dict[str, Callable[[], dict[str, Any]]] = {
    "fp32": lambda: {},
    _BASELINE: lambda: {"precision": "bf16-mixed"},
    "FP4": lambda: {"plugins": [FourBitPrecision("fp4")]},
    "INT4": lambda: {"plugins": [FourBitPrecision("int4")]},
    _UNPACKED: lambda: {"plugins": [FourBitPrecision("int4", save_packed=False)]},
    "NVFP4": lambda: {"plugins": [FourBitPrecision("nvfp4")]},
    "FP4, stochastic": lambda: {"plugins": [FourBitPrecision("fp4", rounding="stochastic")]},
    _STABILIZED: lambda: {"precision": "bf16-mixed", "callbacks": [TimedStabilizer()]},
}
COLUMNS = (
    "precision",
    "step ms",
    "x bf16",
    "kept MB",
    "of layers",
    "x inputs",
    "peak MB",
    "stabilizer ms",
    "% of step",
)
LEGEND = """\
step ms        forward, backward and optimizer, median
kept MB        what autograd keeps for backward beside the weights, each storage once (10^6 bytes)
of layers      the part of it that those layers keep which FourBitPrecision converts: their inputs, and in bf16-mixed
               copies of their weights
x inputs       that in units of every distinct input once, in bf16
peak MB        the peak of a training step beyond what was in use before it
stabilizer ms  GradientStabilizer with AdaClip, AdaGN and momentum reset, within the step"""


@dataclass
class Row:
    """One variant; samples in seconds, in the order of the steps."""

    steps: list[float] = field(default_factory=list)
    stabilizer: list[float] = field(default_factory=list)
    kept_bytes: int = 0
    layer_bytes: int = 0
    peak_bytes: int | None = None


class TimedStabilizer(GradientStabilizer):
    """GradientStabilizer that knows how long it took."""

    seconds = 0.0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Time the rules."""
        started = _now(pl_module)
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self.seconds = _now(pl_module) - started


class _Samples(Callback):
    """Times every step after the warm-up; counts bytes and the peak in the last two, which are not timed."""

    def __init__(self, row: Row, repeats: int, device: str) -> None:
        self.row, self.timed, self.device = row, range(_WARM_UP, _WARM_UP + repeats), device
        self._started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # In the first turn there are two steps more, which are not timed.
        healthy, counted, peaked = pl_module.training_step, self.timed.stop, self.timed.stop + 1

        def watched(batch: Any, batch_idx: int) -> Any:
            if trainer.global_step == counted:
                with kept_for_backward(pl_module) as found:
                    loss = healthy(batch, batch_idx)
                self.row.kept_bytes, self.row.layer_bytes = found()
                return loss
            if trainer.global_step == peaked:
                # Apart from the loop: forward and backward, with the gradients that it makes.
                def step() -> None:
                    loss: Any = healthy(batch, batch_idx)
                    loss.backward()

                pl_module.zero_grad()
                self.row.peak_bytes = transient_bytes(step, self.device)
                pl_module.zero_grad()
            return healthy(batch, batch_idx)

        pl_module.training_step = watched  # type: ignore[method-assign]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._started = _now(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step - 1 in self.timed:
            self.row.steps.append(_now(pl_module) - self._started)
            stabilizers = [one for one in trainer.callbacks if isinstance(one, TimedStabilizer)]  # type: ignore[attr-defined]
            self.row.stabilizer += [one.seconds for one in stabilizers]


def _now(module: LightningModule) -> float:
    if module.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def kept_for_backward(model: nn.Module) -> Iterator[Callable[[], tuple[int, int]]]:
    """Within it, count what autograd saves; yields what then returns the bytes of all, and of convertible layers.

    Parameters do not count, and of several tensors that share a storage, the storage counts once.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    layers = [layer for _, layer in layers_to_quantize(model, ["*"], DEFAULT_EXCLUDE)]
    everything: dict[int, int] = {}
    of_layers: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no storage's address is used again
    inside: list[nn.Module] = []

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            everything[storage.data_ptr()] = storage.nbytes()
            if inside:
                of_layers[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    hooks = [layer.register_forward_pre_hook(lambda layer, _: inside.append(layer)) for layer in layers]
    hooks += [layer.register_forward_hook(lambda *_: bool(inside.pop()) and None) for layer in layers]
    try:
        with saved_tensors_hooks(note, lambda tensor: tensor):
            yield lambda: (sum(everything.values()), sum(of_layers.values()))
    finally:
        for hook in hooks:
            hook.remove()


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
        rows = {variant: Row() for variant in VARIANTS}
        # In turns, so that a machine that is slower for a while is so for all.
        for first in range(0, repeats, _IN_A_ROW):
            for variant, row in rows.items():
                measure(WORKLOADS[name], variant, row, device, min(_IN_A_ROW, repeats - first))
        report["workloads"].append(summary(WORKLOADS[name], rows))
        print(f"\n{table(report['workloads'][-1])}", flush=True)
    print(f"\n{LEGEND}")
    if json_file is not None:
        with atomic_file(json_file) as file:
            file.write(json.dumps(report, indent=1).encode())
    return 0


def measure(workload: GuardWorkload, variant: str, row: Row, device: str, repeats: int) -> None:
    """Train for the warm-up and ``repeats`` timed steps; the first time also count bytes. Adds to ``row``."""
    print(f"[{workload.name}] {variant}", file=sys.stderr, flush=True)
    module, settings = workload.module(), VARIANTS[variant]()
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), 1e-3)  # type: ignore[method-assign,assignment]
    callbacks = [*settings.pop("callbacks", []), _Samples(row, repeats, device)]
    steps = _WARM_UP + repeats + (0 if row.steps else 2)
    with tempfile.TemporaryDirectory() as folder, peers_silenced():  # Lightning's advice, here
        trainer = Trainer(
            accelerator=device, devices=1, max_steps=steps, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, callbacks=callbacks,
            **settings,
        )  # fmt: skip
        batches: Any = workload.batches(steps)
        trainer.fit(module, DataLoader(batches, batch_size=None))


def summary(workload: GuardWorkload, rows: dict[str, Row]) -> dict[str, Any]:
    """Return everything about a workload as plain values."""
    base = rows[_BASELINE]
    with torch.device("meta"):
        parameters = sum(param.numel() for param in workload.module().parameters())
    figures = {}
    for name, row in rows.items():
        step = median(row.steps)
        figures[name] = {
            "step_seconds": step,
            "step_ratio": step / median(base.steps),
            "kept_bytes": row.kept_bytes,
            "layer_bytes": row.layer_bytes,
            "layer_ratio": row.layer_bytes / rows[_UNPACKED].layer_bytes,
            "peak_bytes": row.peak_bytes,
            "stabilizer_seconds": median(row.stabilizer) if row.stabilizer else None,
            "stabilizer_share": median(row.stabilizer) / step if row.stabilizer else None,
            "samples": {"steps": row.steps, "stabilizer": row.stabilizer},
        }
    return {
        "name": workload.name,
        "parameters": parameters,
        "tokens": workload.batch * workload.length,
        "rows": figures,
    }


def table(workload: dict[str, Any]) -> str:
    """Return the aligned table of one workload."""
    title = f"{workload['name']}: {workload['parameters'] / 1e6:,.1f}M parameters, {workload['tokens']:,} tokens a step"
    rows = [COLUMNS, *((name, *_cells(row)) for name, row in workload["rows"].items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    return "\n".join(
        [
            title,
            *(
                "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, len(COLUMNS)))])
                for row in rows
            ),
        ]
    )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    shared = row["stabilizer_share"] is not None
    return (
        f"{row['step_seconds'] * 1e3:,.1f}",
        f"{row['step_ratio']:.2f}",
        f"{row['kept_bytes'] / 1e6:,.1f}",
        f"{row['layer_bytes'] / 1e6:,.1f}",
        f"{row['layer_ratio']:.2f}",
        "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.1f}",
        f"{row['stabilizer_seconds'] * 1e3:,.2f}" if shared else "",
        f"{row['stabilizer_share']:.2%}" if shared else "",
    )
