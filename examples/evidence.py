"""Train the variants of a study over several seeds and write the table and the plot that README shows.

    python examples/evidence.py quickstart

Every run is an ordinary `lowbit-lightning fit` on a shipped recipe. A finished run is not repeated, so a killed study
goes on where it stopped; delete runs/evidence to start over.
"""

import argparse
import json
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lowbit_lightning.cli import LowBitCLI
from lowbit_lightning.optim import state_bytes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "examples" / "results"
RUNS = ROOT / "runs" / "evidence"


def solo(*bits: int, **settings: Any) -> dict[str, Any]:
    return {"class_path": "lowbit_lightning.optim.SoloAdamW", "init_args": {"bits": list(bits), **COMMON, **settings}}


def naive(bits: int) -> dict[str, Any]:
    return {"class_path": "naive_linear.NaiveLinearAdamW", "init_args": {"bits": bits, **COMMON}}


# The recipe's own settings, the same for every variant; none was tuned for one of them.
COMMON = {"lr": 3e-3, "weight_decay": 0.1, "betas": [0.9, 0.99]}
ADAMW = {"class_path": "torch.optim.AdamW", "init_args": COMMON}


@dataclass(frozen=True)
class Study:
    """A recipe and the optimizers to train it with; the first variant is the baseline."""

    recipe: str
    variants: dict[str, dict[str, Any]]


STUDIES = {
    "quickstart": Study("quickstart", {"fp32 AdamW": ADAMW, "SOLO 4/2": solo(4, 2), "SOLO 2/2": solo(2, 2)}),
    "solo": Study(
        "quickstart",
        {
            "fp32 AdamW": ADAMW,
            "SOLO 8/8": solo(8, 8),
            "SOLO 4/2": solo(4, 2),
            "SOLO 3/2": solo(3, 2),
            "SOLO 2/2": solo(2, 2),
            "SOLO 4/2, β₁ not adjusted": solo(4, 2, reference_bits=None),
            "SOLO 2/2, β₁ not adjusted": solo(2, 2, reference_bits=None),
            "naive linear 4/4": naive(4),
            "naive linear 2/2": naive(2),
        },
    ),
}


def run(recipe: str, variant: str, optimizer: dict[str, Any], seed: int, extra: list[str]) -> dict[str, Any]:
    """Train once and return the measurements, or read them if this run was finished before."""
    name = variant.replace("/", "-").replace(" ", "-").replace(",", "")
    done = RUNS / recipe / f"{name}-{seed}.json"  # by recipe: studies share runs
    if done.exists():
        return json.loads(done.read_text())
    print(f"--- {variant}, seed {seed}", flush=True)
    cli = LowBitCLI(
        [
            "fit", "--config", recipe, "--seed_everything", str(seed), "--optimizer", json.dumps(optimizer),
            "--data.init_args.seed", str(seed), "--trainer.logger.init_args.save_dir", str(RUNS), *extra,
        ]
    )  # fmt: skip
    events = EventAccumulator(cli.trainer.logger.log_dir)
    events.Reload()
    result = {
        "variant": variant,
        "seed": seed,
        "val_loss": float(cli.trainer.callback_metrics["val_loss"]),
        "val_bits_per_byte": float(cli.trainer.callback_metrics["val_bits_per_byte"]),
        "seconds": time.perf_counter() - cli.started,
        "state_bytes": state_bytes(cli.trainer.optimizers[0]),
        "parameters": sum(parameter.numel() for parameter in cli.model.parameters()),
        "curve": [(event.step, event.value) for event in events.Scalars("val_loss")],
    }
    done.parent.mkdir(parents=True, exist_ok=True)
    partial = done.with_suffix(".partial")
    partial.write_text(json.dumps(result))
    partial.rename(done)
    return result


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return the Markdown table: mean and standard deviation over seeds, and the mean paired difference."""
    baseline = {r["seed"]: r["val_loss"] for r in next(iter(results.values()))}
    rows = [
        "| optimizer | validation loss | bits per byte | against the baseline | state bytes per parameter | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for variant, runs in results.items():
        losses = [r["val_loss"] for r in runs]
        spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        change = statistics.mean(r["val_loss"] / baseline[r["seed"]] - 1 for r in runs)
        seconds = statistics.median(r["seconds"] for r in runs)
        rows.append(
            f"| {variant} | {statistics.mean(losses):.4f}{spread} "
            f"| {statistics.mean(r['val_bits_per_byte'] for r in runs):.3f} | {change:+.2%} "
            f"| {runs[0]['state_bytes'] / runs[0]['parameters']:.3f} | {seconds:.0f} |"
        )
    return "\n".join(rows)


def plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw the validation curves, a line for the mean and a band from the lowest to the highest seed."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for variant, runs in results.items():
        steps = [step for step, _ in runs[0]["curve"]]
        losses = [[r["curve"][i][1] for r in runs] for i in range(len(steps))]
        (line,) = axes.plot(steps, [statistics.mean(values) for values in losses], marker="o", label=variant)
        axes.fill_between(steps, list(map(min, losses)), list(map(max, losses)), alpha=0.2, color=line.get_color())
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("validation loss (nats per byte)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0 on")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the table, the plot and the numbers")
    arguments, extra = parser.parse_known_args()

    study = STUDIES[arguments.study]
    results = {
        variant: [run(study.recipe, variant, optimizer, seed, extra) for seed in range(arguments.seeds)]
        for variant, optimizer in study.variants.items()
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    made_on = f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
    text = f"{table(results)}\n\n{arguments.seeds} seeds (mean ± standard deviation), {made_on}.\n"
    (arguments.out / f"{arguments.study}.md").write_text(text)
    (arguments.out / f"{arguments.study}.json").write_text(json.dumps(results, indent=1))
    plot(results, arguments.out / f"{arguments.study}.png")
    print(f"\n{text}\nwritten to {arguments.out}")


if __name__ == "__main__":
    main()
