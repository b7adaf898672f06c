"""Train the variants of a study over several seeds and write the table and the plot that README shows.

    python examples/evidence.py quickstart

Every run is an ordinary `lowbit-lightning fit` on a shipped recipe. A finished run is not repeated, so a killed study
goes on where it stopped; delete runs/evidence to start over.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import platform
import shutil
import statistics
import time
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lowbit_lightning import configs
from lowbit_lightning.cli import LowBitCLI
from lowbit_lightning.optim import state_bytes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "examples" / "results"
RUNS = Path("runs").absolute() / "evidence"


def solo(*bits: int, **settings: Any) -> dict[str, Any]:
    return {"class_path": "lowbit_lightning.optim.SoloAdamW", "init_args": {"bits": list(bits), **COMMON, **settings}}


def micro_adam(**settings: Any) -> dict[str, Any]:
    return {"class_path": "lowbit_lightning.optim.MicroAdam", "init_args": {**COMMON, **settings}}


def naive(bits: int) -> dict[str, Any]:
    return {"class_path": "naive_linear.NaiveLinearAdamW", "init_args": {"bits": bits, **COMMON}}


# The recipe's own settings, the same for every variant. The learning rate is chosen for each variant, since what suits
# one kind of state need not suit another: the best on the first seed of a study's, and as long as the best is the first
# or last, of one half or twice as large.
COMMON = {"weight_decay": 0.1, "betas": [0.9, 0.99]}
MOST_LEARNING_RATES = 6
ADAMW = {"class_path": "torch.optim.AdamW", "init_args": COMMON}
FINE_TUNING = {"weight_decay": 0.01, "betas": [0.9, 0.999]}


@dataclass(frozen=True)
class Study:
    """A recipe and the optimizers to train it with; the first variant is the baseline.

    ``metric`` is shown beside the validation loss; ``arguments`` change the recipe for all variants.
    """

    recipe: str
    variants: dict[str, dict[str, Any]]
    learning_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    metric: str = "val_bits_per_byte"
    arguments: tuple[str, ...] = ()


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
    "micro_adam": Study(
        "quickstart",
        {
            "fp32 AdamW": ADAMW,
            "SOLO 8/8": solo(8, 8),
            "SOLO 4/2": solo(4, 2),
            "MicroAdam": micro_adam(),
            "MicroAdam, density auto": micro_adam(density="auto"),
            "MicroAdam, window correction": micro_adam(bias_correction="window"),
        },
        learning_rates=(1e-3, 2e-3),
        # Half of the recipe: it takes MicroAdam more rates than the others to find its best.
        arguments=("--trainer.max_steps=200", "--trainer.val_check_interval=50"),
    ),
    "micro_adam_finetune": Study(
        "finetune_adam",
        {
            "fp32 AdamW": {"class_path": "torch.optim.AdamW", "init_args": FINE_TUNING},
            "SOLO 8/8": solo(8, 8, **FINE_TUNING),
            "SOLO 4/2": solo(4, 2, **FINE_TUNING),
            "MicroAdam": micro_adam(**FINE_TUNING),
        },
        learning_rates=(2e-4, 4e-4),
        metric="val_accuracy",
        # Shorter texts, so that a small machine does it, and a head that knows nothing: the recipe's is the result
        # without training already.
        arguments=(
            "--model.init_args.head=random",
            "--data.init_args.max_length=32",
            "--trainer.max_steps=60",
            "--trainer.val_check_interval=20",
            "--lr_scheduler.init_args.warmup_steps=6",
        ),
    ),
}


def run(
    recipe: str, variant: str, optimizer: dict[str, Any], lr: float, seed: int, extra: list[str], threads: int
) -> dict[str, Any]:
    """Train once and return the measurements, or read them if this run was finished before."""
    name = variant.replace("/", "-").replace(" ", "-").replace(",", "")
    # Whatever decides the result is in the name, so that a run made otherwise is never taken for this one.
    settings = [configs.shipped("recipes")[recipe].read_text(), optimizer, extra]
    identity = hashlib.blake2s(json.dumps(settings).encode(), digest_size=4).hexdigest()
    done = RUNS / recipe / f"{name}-lr{lr:g}-seed{seed}-{identity}.json"
    if done.exists():
        return json.loads(done.read_text())
    torch.set_num_threads(threads)
    print(f"--- {variant}, learning rate {lr:g}, seed {seed}", flush=True)
    shutil.rmtree(done.with_suffix(""), ignore_errors=True)  # of a killed run
    optimizer = {"class_path": optimizer["class_path"], "init_args": {"lr": lr, **optimizer["init_args"]}}
    started = time.process_time()  # the processor's, because the machine may do other things at the same time
    cli = LowBitCLI(
        [
            "fit", "--config", recipe, "--seed_everything", str(seed), "--optimizer", json.dumps(optimizer),
            "--data.init_args.seed", str(seed), "--trainer.logger.init_args.save_dir", str(RUNS),
            # Of its own: runs at the same time would choose the same number.
            "--trainer.logger.init_args.name", recipe, "--trainer.logger.init_args.version", done.stem, *extra,
        ]
    )  # fmt: skip
    events = EventAccumulator(cli.trainer.logger.log_dir)
    events.Reload()
    result = {
        "variant": variant,
        "lr": lr,
        "seed": seed,
        **{key: float(value) for key, value in cli.trainer.callback_metrics.items() if key.startswith("val_")},
        "cpu_seconds": time.process_time() - started,
        "state_bytes": state_bytes(cli.trainer.optimizers[0]),
        "parameters": sum(parameter.numel() for parameter in cli.model.parameters()),
        "curve": [(event.step, event.value) for event in events.Scalars("val_loss")],
    }
    done.parent.mkdir(parents=True, exist_ok=True)
    partial = done.with_suffix(".partial")
    partial.write_text(json.dumps(result))
    partial.rename(done)
    return result


def table(results: dict[str, list[dict[str, Any]]], metric: str) -> str:
    """Return the Markdown table: mean and standard deviation over seeds, and the mean paired difference."""
    baseline = {r["seed"]: r["val_loss"] for r in next(iter(results.values()))}
    title = metric.removeprefix("val_").replace("_", " ")
    rows = [
        f"| optimizer | best lr | validation loss | {title} | loss against the baseline | state bytes per parameter "
        "| CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant, runs in results.items():
        losses = [r["val_loss"] for r in runs]
        spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        change = statistics.mean(r["val_loss"] / baseline[r["seed"]] - 1 for r in runs)
        rows.append(
            f"| {variant} | {runs[0]['lr']:g} | {statistics.mean(losses):.4f}{spread} "
            f"| {statistics.mean(r[metric] for r in runs):.3f} | {change:+.2%} "
            f"| {runs[0]['state_bytes'] / runs[0]['parameters']:.3f} "
            f"| {statistics.mean(r['cpu_seconds'] for r in runs):.0f} |"
        )
    return "\n".join(rows)


def lr_table(sweep: dict[str, list[dict[str, Any]]]) -> str:
    """Return the Markdown table of the learning-rate sweep."""
    tried = sorted({result["lr"] for runs in sweep.values() for result in runs})
    rows = [
        "| validation loss on seed 0 at learning rate | " + " | ".join(f"{lr:g}" for lr in tried) + " |",
        "|---" * (len(tried) + 1) + "|",
    ]
    for variant, runs in sweep.items():
        losses = {result["lr"]: f"{result['val_loss']:.4f}" for result in runs}
        rows.append(f"| {variant} | " + " | ".join(losses.get(lr, "–") for lr in tried) + " |")
    return "\n".join(rows)


def next_learning_rate(runs: list[dict[str, Any]]) -> float | None:
    """Return what to try beyond the best learning rate so far, or None where it lies between others."""
    tried = [result["lr"] for result in runs]
    best: float = min(runs, key=_finite_loss)["lr"]
    if len(runs) >= MOST_LEARNING_RATES or min(tried) < best < max(tried):
        return None
    return best * 2 if best == max(tried) else best / 2


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
    axes.set_ylabel("validation loss")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def show_in_readme(readme: Path, mark: str, text: str) -> None:
    """Put a text between the two marks of that name."""
    before, rest = readme.read_text().split(f"<!-- {mark} -->\n")
    _, after = rest.split(f"<!-- /{mark} -->")
    readme.write_text(f"{before}<!-- {mark} -->\n{text}<!-- /{mark} -->{after}")


def _finite_loss(result: dict[str, Any]) -> float:
    loss: float = result["val_loss"]
    return loss if math.isfinite(loss) else math.inf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0 on")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, which share the processor's cores")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the table, the plot and the numbers")
    arguments, extra = parser.parse_known_args()

    study = STUDIES[arguments.study]
    settings = [*study.arguments, *extra]
    threads = max(1, torch.get_num_threads() // arguments.workers)
    # A process for every run: nothing of one run, such as a random generator, reaches the next.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, mp_context=spawn, max_tasks_per_child=1) as pool:

        def train(variant: str, lr: float, seed: int) -> "Future[dict[str, Any]]":
            return pool.submit(run, study.recipe, variant, study.variants[variant], lr, seed, settings, threads)

        sweep: dict[str, list[dict[str, Any]]] = {variant: [] for variant in study.variants}
        asked = {variant: list(study.learning_rates) for variant in study.variants}
        while asked:
            futures = {variant: [train(variant, lr, seed=0) for lr in rates] for variant, rates in asked.items()}
            for variant, runs in futures.items():
                sweep[variant] += [future.result() for future in runs]
            further = {variant: next_learning_rate(sweep[variant]) for variant in asked}
            asked = {variant: [lr] for variant, lr in further.items() if lr is not None}
        best = {variant: min(runs, key=_finite_loss)["lr"] for variant, runs in sweep.items()}
        pending = {
            variant: [train(variant, lr, seed) for seed in range(arguments.seeds)] for variant, lr in best.items()
        }
        results = {variant: [future.result() for future in futures] for variant, futures in pending.items()}
    arguments.out.mkdir(parents=True, exist_ok=True)
    made_on = f"{platform.machine()} CPU, torch {torch.__version__}"
    steps = next(iter(results.values()))[0]["curve"][-1][0] + 1
    changed = f" with `{' '.join(settings)}`" if settings else ""
    seeds = (
        f"{arguments.seeds} seeds (mean ± standard deviation), {steps:,} steps of {study.recipe}{changed}, {made_on}."
    )
    text = f"{table(results, study.metric)}\n\n{seeds}\n\n{lr_table(sweep)}\n"
    (arguments.out / f"{arguments.study}.md").write_text(text)
    (arguments.out / f"{arguments.study}.json").write_text(json.dumps(results, indent=1))
    plot(results, arguments.out / f"{arguments.study}.png")
    readme = ROOT / "README.md"
    if arguments.out == RESULTS and not extra and f"<!-- evidence:{arguments.study} -->" in readme.read_text():
        image = f"![validation loss over steps](examples/results/{arguments.study}.png)"
        show_in_readme(readme, f"evidence:{arguments.study}", f"{text}\n{image}\n")
    print(f"\n{text}\nwritten to {arguments.out}")


if __name__ == "__main__":
    main()
