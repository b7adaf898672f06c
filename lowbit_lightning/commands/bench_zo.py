"""``lowbit-lightning bench zo``: what forward-only training costs, in forward passes.

Three things are measured. **Signs**: a perturbed copy of a large tensor and the update of all perturbations, against
the published way, which draws them from ``randint`` (FZOO) or ``normal`` (MeZO) and makes new tensors. **Steps**: those
of a Trainer with ForwardOnlyStrategy on a Llama, from the start of a batch to its end, each followed by plain forward
passes on the same batch; ratios are taken within such a pair. **Memory**: the peak of some steps against that of a
validation on the same batches, in a process of its own (:mod:`.bench_zo_memory`). On one CPU thread it is the
processor's seconds that are counted, which other work on the machine hardly changes.

The published step is re-implemented here as the plain loop that it is: per perturbation a pass over the weights to add,
one to take away again, and one to update, each drawing its signs anew.
"""

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lowbit_lightning.atomic_file import atomic_file
from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.kernels.rademacher import Noise, Update, apply_updates, perturbed_copy
from lowbit_lightning.optim import FZOO
from lowbit_lightning.strategies import ForwardOnlyStrategy
from lowbit_lightning.strategies.replay import silent

from . import bench_zo_report
from .bench_contenders import peers_silenced
from .bench_guard import GuardWorkload
from .bench_measure import available_bytes, seconds
from .bench_optim import setting
from .bench_zo_memory import memory_in_process

WORKLOADS = {
    "20m": GuardWorkload("20m", hidden=384, layers=8, vocabulary=8192, batch=1, length=128),
    "2m": GuardWorkload("2m", hidden=192, layers=4, vocabulary=1024, batch=1, length=128),
}
#: Perturbations of FZOO's default; what targets are stated for and the published way is measured with.
DEFAULT_N = 8
MEMORY_TOKENS = 256
_EPS, _LR = 1e-3, 1e-6
_WARM_UP = 2  # steps; the first batched one checks itself
_FORWARDS = 3  # after each step
_PUBLISHED_ROUNDS = 2  # at most: each takes seconds


@dataclass
class Row:
    """Steps of one kind. Samples are in seconds, in the order of the steps; ``reason`` says why there are none."""

    way: str
    tokens: int
    perturbations: int
    steps: list[float] = field(default_factory=list)
    forwards: list[float] = field(default_factory=list)
    reason: str | None = None


def run(
    *,
    device: str,
    workloads: list[str],
    tokens: list[int],
    perturbations: list[int],
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
    report: dict[str, Any] = {"setting": setting(device, "fp32", repeats), "workloads": []}
    if _clock(device) is time.process_time:
        report["setting"] |= {"clock": "processor", "remark": "these are the processor's seconds, on one thread"}
    print(bench_zo_report.header(report["setting"]), flush=True)
    report["signs"] = {"elements": elements, "rows": measure_signs(elements, device, repeats)}
    print(f"\n{bench_zo_report.signs_table(report['signs'])}", flush=True)
    for name in workloads:
        workload = WORKLOADS[name]
        module = workload.module()
        rows = [
            _figures(row)
            for tokens_ in tokens
            for row in measure_steps(workload, module, tokens_, perturbations, device, repeats)
        ]
        _progress(f"[{name}] memory, in a process of its own")
        memory = memory_in_process(sized(workload, MEMORY_TOKENS), DEFAULT_N, device, torch.get_num_threads())
        numel = sum(param.numel() for param in module.parameters())
        report["workloads"].append({"name": name, "parameters": numel, "rows": rows, "memory": memory})
        print(f"\n{bench_zo_report.steps_table(report['workloads'][-1])}", flush=True)
        print(f"\n{bench_zo_report.memory_table(memory)}", flush=True)
    report["targets"] = bench_zo_report.targets(report)
    print(f"\n{bench_zo_report.targets_table(report['targets'])}\n\n{bench_zo_report.LEGEND}")
    if json_file is not None:
        with atomic_file(json_file) as file:
            file.write(json.dumps(report, indent=1).encode())
    if plot_file is not None:
        bench_zo_report.plot(report, plot_file)
    return 0


def sized(workload: GuardWorkload, tokens: int) -> GuardWorkload:
    """Return the workload with so many tokens a batch, in sequences of no more than its length."""
    length = min(tokens, workload.length)
    return replace(workload, batch=tokens // length, length=length)


# ---- signs ----------------------------------------------------------------------------------------------------------


def measure_signs(elements: int, device: str, repeats: int) -> list[dict[str, Any]]:
    """Return a row for each pass over a tensor of so many fp32 elements; published passes are their own baseline."""
    columns = 1000 if elements % 1000 == 0 else 1
    param = torch.full((elements // columns, columns), 0.5, device=device)
    out = torch.empty_like(param)
    noise = Noise(0, 1, 2, 3)
    sizes = tuple(_LR * (i + 1) for i in range(DEFAULT_N))

    def published(draw: Callable[[Tensor], Tensor], passes: int) -> None:
        moved = param
        for _ in range(passes):
            moved = moved + _EPS * draw(param)  # a new tensor, as published

    passes: list[tuple[str, str | None, Callable[[], object]]] = [
        ("copy_", None, lambda: out.copy_(param)),
        ("perturbed copy, randint as published", None, lambda: published(_randint, 1)),
        ("perturbed copy, normal as in MeZO", None, lambda: published(torch.randn_like, 1)),
        (
            "perturbed copy, full signs", "perturbed copy, randint as published",
            lambda: perturbed_copy(param, _EPS, noise, 0, out),
        ),
        (
            "perturbed copy, rank-1 signs", "perturbed copy, randint as published",
            lambda: perturbed_copy(param, _EPS, replace(noise, rank1=True), 0, out),
        ),
        (f"update of {DEFAULT_N}, randint as published", None, lambda: published(_randint, DEFAULT_N)),
        (
            f"update of {DEFAULT_N}, full signs", f"update of {DEFAULT_N}, randint as published",
            lambda: apply_updates([Update(param, noise, sizes)]),
        ),
        (
            f"update of {DEFAULT_N}, rank-1 signs", f"update of {DEFAULT_N}, randint as published",
            lambda: apply_updates([Update(param, replace(noise, rank1=True), sizes)]),
        ),
    ]  # fmt: skip
    samples: dict[str, list[float]] = {name: [] for name, _, _ in passes}
    perturbed_copy(param, _EPS, noise, 0, out)  # may compile
    for turn in range(repeats):
        _progress(f"signs: round {turn + 1} of {repeats}")
        for name, _, one in passes:
            samples[name].append(_seconds(one, device))
    rows = []
    for name, baseline, _ in passes:
        row: dict[str, Any] = {"name": name, "seconds": median(samples[name]), "samples": samples[name]}
        if baseline is not None:
            pairs = zip(samples[baseline], samples[name], strict=True)
            row["times_faster"] = median(published_ / own for published_, own in pairs)
        rows.append(row)
    return rows


def _randint(param: Tensor) -> Tensor:
    return torch.randint(0, 2, param.shape, dtype=param.dtype, device=param.device) * 2 - 1


# ---- steps ----------------------------------------------------------------------------------------------------------


def measure_steps(
    workload: GuardWorkload, module: LightningModule, tokens: int, perturbations: list[int], device: str, repeats: int
) -> Iterator[Row]:
    """Yield a row for each number of perturbations and way of making them."""
    one = sized(workload, tokens)
    for count in perturbations:
        for way in ("sequential", "batched", "published"):
            if (way == "batched" and count == 1) or (way == "published" and count != DEFAULT_N):
                continue
            row = Row(way, tokens, count)
            _progress(f"[{workload.name}] {tokens} tokens, N = {count}, {way}")
            free = available_bytes(device)
            # Logits, their softmax and its input, for every perturbation at once.
            needed = 3 * 4 * count * tokens * workload.vocabulary if way == "batched" else 0
            if free is not None and 2 * needed > free:
                row.reason = f"skipped: needs {needed / 2**30:.1f} GiB and more"
            elif way == "published":
                _published_steps(row, one, module.to(device), repeats)
            else:
                _our_steps(row, one, module, device, repeats)
            yield row


class _Rounds(Callback):
    """Times every step after the warm-up, and forward passes right after it."""

    def __init__(self, row: Row, device: str) -> None:
        self._row, self._device = row, device
        self._begun = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._begun = self._now()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        taken = self._now() - self._begun
        forward = _forward_seconds(pl_module, batch, self._device)
        if batch_idx >= _WARM_UP:
            self._row.steps.append(taken)
            self._row.forwards.append(forward)

    def _now(self) -> float:
        if self._device == "cuda":
            torch.cuda.synchronize()
        return _clock(self._device)()


def _clock(device: str) -> Callable[[], float]:
    """Return what seconds are counted by: with one thread the processor's own, so that other work does not matter."""
    return time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def _seconds(step: Callable[[], object], device: str) -> float:
    return seconds(step, device, _clock(device))


def _forward_seconds(module: LightningModule, batch: Any, device: str) -> float:
    with torch.no_grad(), silent(module):
        return fmean(_seconds(lambda: module.training_step(batch, 0), device) for _ in range(_FORWARDS))


def _our_steps(row: Row, workload: GuardWorkload, module: LightningModule, device: str, repeats: int) -> None:
    settings: Any = {"perturbation": "rank1", "execution": "batched"} if row.way == "batched" else {}
    module.configure_optimizers = lambda: FZOO(  # type: ignore[method-assign,assignment]
        module.named_parameters(), _LR, eps=_EPS, num_perturbations=row.perturbations, **settings
    )
    batches: Any = workload.batches(_WARM_UP + repeats)
    with tempfile.TemporaryDirectory() as folder, peers_silenced():
        # A batched run that cannot go on as one says so, and is no longer what is measured here.
        warnings.filterwarnings("error", message=".*makes the perturbed passes one after another")
        trainer = Trainer(
            accelerator=device, devices=1, max_steps=len(batches), strategy=ForwardOnlyStrategy(), logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
            callbacks=[_Rounds(row, device)],
        )  # fmt: skip
        try:
            trainer.fit(module, DataLoader(batches, batch_size=None))
        except UserWarning as reason:
            row.reason = str(reason)


def _published_steps(row: Row, workload: GuardWorkload, module: LightningModule, repeats: int) -> None:
    batches = workload.batches(1 + min(repeats, _PUBLISHED_ROUNDS))
    for turn, batch in enumerate(batches):
        batch = {key: value.to(module.device) for key, value in batch.items()}
        with torch.no_grad(), silent(module):
            taken = _seconds(lambda: _published_step(module, batch, row.perturbations), module.device.type)  # noqa: B023
        forward = _forward_seconds(module, batch, module.device.type)
        if turn:
            row.steps.append(taken)
            row.forwards.append(forward)


def _published_step(module: LightningModule, batch: Any, perturbations: int) -> None:
    """One FZOO step as its authors' trainer makes it."""

    def add(seed: int, size: float) -> None:
        torch.manual_seed(seed)
        for param in module.parameters():
            param.data = param.data + size * _randint(param)

    losses = []
    for seed in range(perturbations):
        add(seed, _EPS)
        losses.append(_loss(module, batch))
        add(seed, -_EPS)
    clean, deviation = _loss(module, batch), torch.tensor(losses).std(unbiased=False)
    for seed, loss in enumerate(losses):
        add(seed, -_LR * float((loss - clean) / (perturbations * deviation + 1e-12)))


def _loss(module: LightningModule, batch: Any) -> float:
    loss: Any = module.training_step(batch, 0)
    return float(loss["loss"] if isinstance(loss, dict) else loss)


def _figures(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = {"way": row.way, "tokens": row.tokens, "perturbations": row.perturbations}
    if row.reason is not None:
        return found | {"reason": row.reason}
    ratios = [step / forward for step, forward in zip(row.steps, row.forwards, strict=True)]
    return found | {
        "step_seconds": median(row.steps),
        "forward_seconds": median(row.forwards),
        "forwards_per_step": median(ratios),
        "share": median(ratios) / (row.perturbations + 1),
        "samples": {"steps": row.steps, "forwards": row.forwards},
    }


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
