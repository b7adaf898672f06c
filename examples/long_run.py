"""Do low-bit states stay healthy over a long run whose data changes half-way?

python examples/long_run.py --steps 50000

Trains a small next-byte network with fp32 AdamW and with SOLO 4/2 and 2/2, from the same start and on the same batches:
first on Python source, from half-way on C headers. Writes the losses, and how well the second moments follow their
exact averages (see lowbit_lightning.callbacks.SwampingMonitor), as a table and a plot. A bare loop, without Lightning.
"""

import argparse
import json
import sysconfig
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn

from lowbit_lightning.optim import SoloAdamW

RESULTS = Path(__file__).parent / "results"
CONTEXT, BATCH, WIDTH = 16, 64, 128
VARIANTS: dict[str, tuple[int, int] | None] = {"fp32 AdamW": None, "SOLO 4/2": (4, 2), "SOLO 2/2": (2, 2)}


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


def train(bits: tuple[int, int] | None, corpora: tuple[Tensor, Tensor], steps: int) -> dict[str, list[float]]:
    """Return the curves: step, mean loss since the last point, relative error of the root of the second moment."""
    model = network()
    settings: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.01}
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(model.parameters(), **settings)
        if bits is None
        else SoloAdamW(model.named_parameters(), bits=bits, **settings)
    )
    exact = {param: torch.zeros_like(param) for param in model.parameters() if param.numel() >= 4096}
    curves: dict[str, list[float]] = {"step": [], "loss": [], "state_error": []}
    total, every = 0.0, max(1, steps // 100)
    for step in range(1, steps + 1):
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
            curves["state_error"].append(state_error(optimizer, exact))
            total = 0.0
    return curves


def state_error(optimizer: torch.optim.Optimizer, exact: dict[Tensor, Tensor]) -> float:
    """Return the error of sqrt(v) over all quantized tensors, relative to the exact one."""
    if not isinstance(optimizer, SoloAdamW):
        return 0.0
    error = norm = 0.0
    for param, average in exact.items():
        state = optimizer.dequantized_state(param)["exp_avg_sq"]
        error += float((state.sqrt() - average.sqrt()).square().sum())
        norm += float(average.sum())
    return (error / norm) ** 0.5


def table(results: dict[str, dict[str, list[float]]], steps: int) -> str:
    """Return the Markdown table: mean loss of the last tenth of each half, and the state error there."""
    points = len(results["fp32 AdamW"]["loss"])
    halves = [slice(points // 2 - points // 10, points // 2), slice(points - points // 10, points)]

    def mean(curve: list[float], part: slice) -> float:
        return sum(curve[part]) / len(curve[part])

    rows = [
        "| optimizer | loss, end of first corpus | against fp32 | loss, end of second | against fp32 | error of √v |",
        "|---|---|---|---|---|---|",
    ]
    for variant, curves in results.items():
        cells = [variant]
        for part in halves:
            loss, baseline = mean(curves["loss"], part), mean(results["fp32 AdamW"]["loss"], part)
            cells += [f"{loss:.4f}", f"{loss / baseline - 1:+.2%}"]
        rows.append("| " + " | ".join([*cells, f"{mean(curves['state_error'], halves[1]):.3f}"]) + " |")
    return "\n".join(
        [*rows, "", f"{steps:,} steps, one seed, the corpus changes half-way; training loss in nats per byte."]
    )


def plot(results: dict[str, dict[str, list[float]]], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, errors) = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    for variant, curves in results.items():
        (line,) = losses.plot(curves["step"], curves["loss"], label=variant)
        if any(curves["state_error"]):
            errors.plot(curves["step"], curves["state_error"], label=variant, color=line.get_color())
    losses.set_ylabel("training loss (nats per byte)")
    errors.set_ylabel("relative error of √v")
    errors.set_xlabel("optimizer step")
    errors.set_ylim(bottom=0)
    for axes in (losses, errors):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    paths = sysconfig.get_paths()
    corpora = corpus(paths["stdlib"], "*.py"), corpus(paths["include"], "*.h")
    results = {}
    for variant, bits in VARIANTS.items():
        start = time.perf_counter()
        results[variant] = train(bits, corpora, arguments.steps)
        print(f"{variant}: {arguments.steps} steps in {time.perf_counter() - start:.0f} s", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = table(results, arguments.steps)
    (arguments.out / "long_run.md").write_text(text + "\n")
    (arguments.out / "long_run.json").write_text(json.dumps(results))
    plot(results, arguments.out / "long_run.png")
    print(f"\n{text}\n\nwritten to {arguments.out}")


if __name__ == "__main__":
    main()
