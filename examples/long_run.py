"""Do low-memory optimizers stay healthy over a long run whose data changes half-way?

python examples/long_run.py --steps 50000

Trains a small next-byte network with fp32 AdamW, SOLO 4/2 and 2/2, and MicroAdam with either bias correction, from the
same start and on the same batches: first on Python source, from half-way on C headers. Writes the losses as a table and
a plot, with how well SOLO's second moments follow their exact averages (the error and the swamped share of
lowbit_lightning.callbacks.SwampingMonitor) and how large MicroAdam's kept error is. A bare loop, without a Trainer.
Variants that --out has already are not trained again, so a killed run goes on where it stopped. --redraw makes table
and plot again from those numbers.
"""

import argparse
import json
import sysconfig
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn

from lowbit_lightning.callbacks.swamping_monitor import FEWEST_MOVED, level_distance, swamped_elements
from lowbit_lightning.optim import MicroAdam, SoloAdamW

RESULTS = Path(__file__).parent / "results"
# Of a curve: a number at each of the points, or None.
Curves = dict[str, list[Any]]
CONTEXT, BATCH, WIDTH = 16, 64, 128
# What "tuned" tries, on the first 25th of the run.
LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)


@dataclass(frozen=True)
class Variant:
    """An optimizer and its settings; ``tuned`` ones choose the best of LEARNING_RATES, the others have the first."""

    kind: type[torch.optim.Optimizer]
    settings: dict[str, Any] = field(default_factory=dict)
    tuned: bool = False

    def build(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return self.kind(model.named_parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=0.01, **self.settings)


BASELINE = "fp32 AdamW"
WINDOW = {"bias_correction": "window"}
VARIANTS = {
    BASELINE: Variant(torch.optim.AdamW),
    "SOLO 4/2": Variant(SoloAdamW, {"bits": (4, 2)}),
    "SOLO 2/2": Variant(SoloAdamW, {"bits": (2, 2)}),
    "MicroAdam": Variant(MicroAdam),
    "MicroAdam, tuned": Variant(MicroAdam, tuned=True),
    "MicroAdam, window correction": Variant(MicroAdam, WINDOW),
    "MicroAdam, window correction, tuned": Variant(MicroAdam, WINDOW, tuned=True),
}


@cache
def corpus(folder: str, pattern: str) -> Tensor:
    """Return the bytes of all files below a folder, in the order of their names."""
    files = sorted(Path(folder).rglob(pattern))
    return torch.from_numpy(np.frombuffer(b"\n".join(file.read_bytes() for file in files), dtype=np.uint8).copy())


def batch(data: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Return (BATCH, CONTEXT) bytes and the (BATCH,) that follow; a function of the step."""
    starts = torch.randint(len(data) - CONTEXT, (BATCH,), generator=torch.Generator().manual_seed(step))
    windows = data[starts.unsqueeze(1) + torch.arange(CONTEXT + 1)].long()
    return windows[:, :-1], windows[:, -1]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(256, 32), nn.Flatten(), nn.Linear(32 * CONTEXT, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH),
        nn.GELU(), nn.Linear(WIDTH, 256),
    )  # fmt: skip


def train(variant: Variant, corpora: tuple[Tensor, Tensor], lr: float, steps: int, stop: int) -> Curves:
    """Return the curves of the first ``stop`` of ``steps`` steps: each point sums up what happened since the last."""
    model = network()
    optimizer = variant.build(model, lr)
    exact = {param: torch.zeros_like(param) for param in model.parameters() if param.numel() >= 4096}
    swamping = Swamping(optimizer, exact)
    curves: Curves = {"step": [], "loss": [], "lr": [], "state_error": [], "swamped": [], "kept_error": []}
    total, every = 0.0, max(1, steps // 100)
    for step in range(1, stop + 1):
        inputs, targets = batch(corpora[0] if step <= steps // 2 else corpora[1], step)
        loss = nn.functional.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
        with torch.no_grad():
            for param, average in exact.items():
                average.lerp_(param.grad.square(), 1e-3)  # type: ignore[union-attr]
        if step % every == 0:
            curves["step"].append(step)
            curves["loss"].append(total / every)
            curves["lr"].append(lr)
            curves["state_error"].append(state_error(optimizer, exact))
            curves["swamped"].append(swamping.share())
            curves["kept_error"].append(kept_error(optimizer, exact))
            total = 0.0
    return curves


def train_wholly(variant: Variant, corpora: tuple[Tensor, Tensor], steps: int) -> Curves:
    """Return the curves of a run, at the learning rate that suits its beginning if the variant is to be tuned."""

    def last_loss(lr: float) -> float:
        return float(train(variant, corpora, lr, steps, stop=max(1, steps // 25))["loss"][-1])

    lr = min(LEARNING_RATES, key=last_loss) if variant.tuned else LEARNING_RATES[0]
    return train(variant, corpora, lr, steps, stop=steps)


def state_error(optimizer: torch.optim.Optimizer, exact: dict[Tensor, Tensor]) -> float | None:
    """Return the error of SOLO's sqrt(v) over all quantized tensors, relative to the exact one."""
    if not isinstance(optimizer, SoloAdamW):
        return None
    error = norm = 0.0
    for param, average in exact.items():
        state = optimizer.dequantized_state(param)["exp_avg_sq"]
        error += float((state.sqrt() - average.sqrt()).square().sum())
        norm += float(average.sum())
    return (error / norm) ** 0.5


def kept_error(optimizer: torch.optim.Optimizer, params: Iterable[Tensor]) -> float | None:
    """Return the norm of what MicroAdam keeps for later steps, relative to the gradient's."""
    if not isinstance(optimizer, MicroAdam):
        return None
    kept = sum(optimizer.dequantized_error(param).square().sum().item() for param in params)
    gradient = sum(param.grad.square().sum().item() for param in params if param.grad is not None)
    return (kept / gradient) ** 0.5


class Swamping:
    """The share of elements whose exact average moved by a level since the last look and whose state did not."""

    def __init__(self, optimizer: torch.optim.Optimizer, exact: dict[Tensor, Tensor]) -> None:
        self.optimizer = optimizer
        self.exact = exact
        self.last: dict[Tensor, tuple[Tensor, Tensor]] = {}

    def share(self) -> float | None:
        """Return it and remember this look; None where too few moved by a level for a share to mean anything."""
        if not isinstance(self.optimizer, SoloAdamW):
            return None
        swamped = moved = 0
        for param, average in self.exact.items():
            if "exp_avg_sq_codes" not in self.optimizer.state[param]:
                continue  # the embedding's rows are too narrow
            state = self.optimizer.dequantized_state(param)["exp_avg_sq"]
            if param in self.last:
                level = level_distance(self.optimizer, param, len(param), self.optimizer.defaults["block_size"])
                counts = swamped_elements(average, self.last[param][0], state, self.last[param][1], level)
                swamped, moved = swamped + counts[0], moved + counts[1]
            self.last[param] = (average.clone(), state)
        return swamped / moved if moved >= FEWEST_MOVED else None


def table(results: dict[str, Curves], steps: int) -> str:
    """Return the Markdown table: mean loss of the last tenth of each half, and the state error there."""
    points = len(results[BASELINE]["loss"])
    halves = [slice(points // 2 - points // 10, points // 2), slice(points - points // 10, points)]

    def mean(curve: list[float], part: slice) -> float:
        return sum(curve[part]) / len(curve[part])

    rows = [
        "| optimizer | lr | loss, end of first corpus | against fp32 | end of second | against fp32 | error of √v |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant, curves in results.items():
        cells = [variant, f"{curves['lr'][-1]:g}"]
        for part in halves:
            loss, baseline = mean(curves["loss"], part), mean(results[BASELINE]["loss"], part)
            cells += [f"{loss:.4f}", f"{loss / baseline - 1:+.2%}"]
        has_error = curves["state_error"][-1] is not None
        rows.append(
            "| " + " | ".join([*cells, f"{mean(curves['state_error'], halves[1]):.3f}" if has_error else "–"]) + " |"
        )
    tried = ", ".join(f"{lr:g}" for lr in LEARNING_RATES)
    return "\n".join(
        [
            *rows,
            "",
            f"{steps:,} steps, one seed, the corpus changes half-way; training loss in nats per byte. Tuned: the "
            f"learning rate ({tried}) with the lowest loss after a 25th of the run.",
        ]
    )


PANELS = {
    "loss": "training loss (nats per byte)",
    "state_error": "SOLO: relative error of √v",
    "swamped": "SOLO: swamped share",
    "kept_error": "MicroAdam: ‖e‖ / ‖g‖",
}


def plot(results: dict[str, Curves], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(PANELS), 1, figsize=(7, 11), sharex=True, layout="constrained")
    colors = {variant: f"C{position}" for position, variant in enumerate(results)}
    for axes, (key, label) in zip(panels, PANELS.items(), strict=True):
        for variant, curves in results.items():
            if any(value is not None for value in curves[key]):
                values = np.array(curves[key], dtype=float)
                axes.plot(curves["step"], values, ".-", markersize=3, label=variant, color=colors[variant])
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
        if key != "loss":
            axes.set_ylim(bottom=0)
    panels[-1].set_xlabel("optimizer step")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="train no others, but the baseline"
    )
    parser.add_argument("--redraw", action="store_true", help="train none, only write table and plot again")
    arguments = parser.parse_args()
    numbers = arguments.out / "long_run.json"
    results: dict[str, Curves] = json.loads(numbers.read_text()) if numbers.exists() else {}
    paths = sysconfig.get_paths()
    for name in [] if arguments.redraw else dict.fromkeys([BASELINE, *arguments.only]):
        if name in results and results[name]["step"][-1] == arguments.steps:
            continue
        corpora = corpus(paths["stdlib"], "*.py"), corpus(paths["include"], "*.h")
        start = time.perf_counter()
        results[name] = train_wholly(VARIANTS[name], corpora, arguments.steps)
        print(f"{name}: {arguments.steps} steps in {time.perf_counter() - start:.0f} s", flush=True)
        arguments.out.mkdir(parents=True, exist_ok=True)
        numbers.write_text(json.dumps(results))
    results = {name: results[name] for name in VARIANTS if name in results}
    text = table(results, results[BASELINE]["step"][-1])
    (arguments.out / "long_run.md").write_text(text + "\n")
    plot(results, arguments.out / "long_run.png")
    print(f"\n{text}\n\nwritten to {arguments.out}")


if __name__ == "__main__":
    main()
