"""Fire drills: the quickstart broken on purpose, without and with SpikeGuard, against the run that nothing happened to.

python examples/spike_drill.py

Every fault of SpikeInjector alone, and all in one run as the overlay spike_drill has them; the same seed, the same
steps. Writes the table and the plot that README shows. A finished run is not repeated, so a killed study goes on where
it stopped; delete runs/evidence/spike_drill to start over.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import platform
import statistics
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import evidence
import matplotlib
import torch
import yaml
from spike_curves import Record

from lowbit_lightning import configs
from lowbit_lightning.cli import LowBitCLI

RUNS = evidence.RUNS / "spike_drill"
FAULTS = {
    "none": "no fault",
    "nan_grad": "a NaN gradient",
    "loss": "loss and gradient × 1000",
    "batch": "a corrupted batch",
    "weights": "all weights × 10",
    "all": "all of these in one run",
}

Result = dict[str, Any]


def callbacks(fault: str, guarded: bool, steps: int) -> list[dict[str, Any]]:
    """Return the callbacks that a drill adds to the quickstart; a single fault comes half-way."""
    added = overlay("spike_guard") if guarded else []
    if fault == "all":
        return added + overlay("spike_drill")
    if fault != "none":
        injector = {"step": steps // 2, "kind": fault}
        added.append({"class_path": "lowbit_lightning.callbacks.SpikeInjector", "init_args": injector})
    return added


def overlay(name: str) -> list[dict[str, Any]]:
    """Return the callbacks that a shipped technique adds."""
    added: list[dict[str, Any]] = yaml.safe_load(configs.shipped("techniques")[name].read_text())["trainer"][
        "callbacks+"
    ]
    return added


def run(fault: str, guarded: bool, seed: int, steps: int, extra: list[str], threads: int) -> Result:
    """Train once and return the measurements, or read them if this run was finished before."""
    added = callbacks(fault, guarded, steps)
    settings = [configs.shipped("recipes")["quickstart"].read_text(), added, steps, extra]
    identity = hashlib.blake2s(json.dumps(settings).encode(), digest_size=4).hexdigest()
    name = f"{fault}-{'guarded' if guarded else 'alone'}-seed{seed}-{identity}"
    done, ledger = RUNS / f"{name}.json", RUNS / f"{name}.jsonl"
    if done.exists():
        return json.loads(done.read_text())
    RUNS.mkdir(parents=True, exist_ok=True)
    ledger.unlink(missing_ok=True)  # of a run that was killed: the guard would go by it
    for one in added:
        if one["class_path"].endswith("SpikeGuard"):
            one["init_args"]["ledger"] = str(ledger)
    torch.set_num_threads(threads)
    print(f"--- {FAULTS[fault]}, {'with' if guarded else 'without'} guard, seed {seed}", flush=True)
    cli = LowBitCLI(
        [
            "--config", "quickstart", "--seed_everything", str(seed), "--data.init_args.seed", str(seed),
            "--trainer.max_steps", str(steps), "--trainer.limit_val_batches", "0",
            "--trainer.logger.init_args.save_dir", str(RUNS / name), "--trainer.enable_progress_bar", "false",
            *(f"--trainer.callbacks+={json.dumps(one)}" for one in added),
            *extra,
        ],
        run=False,
    )  # fmt: skip
    record = Record()
    cli.trainer.callbacks.insert(0, record)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    cli.trainer.limit_val_batches = 1.0
    (validation,) = cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    entries = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
    result = {
        "fault": fault,
        "guarded": guarded,
        "seed": seed,
        "val_loss": validation["val_loss"],
        "train_loss": record.loss,
        "decisions": [entry["decision"] for entry in entries if "decision" in entry],
    }
    partial = done.with_suffix(".partial")
    partial.write_text(json.dumps(result))
    partial.rename(done)
    return result


def table(results: list[Result], steps: int) -> str:
    """Return the Markdown table: validation loss without and with the guard, against the clean run of the same seed."""
    clean = {r["seed"]: r["val_loss"] for r in results if r["fault"] == "none" and not r["guarded"]}
    rows = [
        "| what happens | validation loss, without guard | with guard | what the guard did, seed 0 |",
        "|---|---|---|---|",
    ]
    for fault, what in FAULTS.items():
        cells = []
        for guarded in (False, True):
            runs = [r for r in results if r["fault"] == fault and r["guarded"] == guarded]
            mean = statistics.fmean(r["val_loss"] for r in runs)
            change = statistics.fmean(r["val_loss"] / clean[r["seed"]] - 1 for r in runs)
            cells.append(f"{mean:.3f} ({change:+.1%})" if math.isfinite(mean) else "NaN")
        did = Counter(next(r["decisions"] for r in runs if r["seed"] == 0))
        cells.append(", ".join(f"{count} × {decision}" for decision, count in did.items()) or "nothing")
        rows.append(f"| {what} | " + " | ".join(cells) + " |")
    seeds = f"{len(clean)} seed{'s' if len(clean) > 1 else ''}"
    made_on = f"{platform.machine()} CPU, torch {torch.__version__}"
    return "\n".join(
        [*rows, "", f"{steps} steps of the quickstart, {seeds}, change against the clean run, {made_on}.", ""]
    )


def plot(results: list[Result], path: Path) -> None:
    """Draw training losses over batches, for each fault without and with the guard, on seed 0."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    faults = [fault for fault in FAULTS if fault != "none"]
    figure, all_axes = pyplot.subplots(
        1, len(faults), figsize=(3 * len(faults), 3.2), sharey=True, layout="constrained"
    )
    clean = next(r for r in results if r["fault"] == "none" and not r["guarded"] and r["seed"] == 0)
    for fault, axes in zip(faults, all_axes, strict=True):
        axes.plot(clean["train_loss"], color="grey", linewidth=0.8, label="nothing happens")
        for guarded, label in ((False, "without guard"), (True, "with guard")):
            run = next(r for r in results if r["fault"] == fault and r["guarded"] == guarded and r["seed"] == 0)
            axes.plot(run["train_loss"], linewidth=0.8, label=label)
        axes.set_title(FAULTS[fault], fontsize=10)
        axes.set_yscale("log")
        axes.set_xlabel("batch")
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("training loss (nats per byte)")
    all_axes[-1].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0 on")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of every run")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, which share the processor's cores")
    parser.add_argument("--out", type=Path, default=evidence.RESULTS, help="folder for table, plot and numbers")
    arguments, extra = parser.parse_known_args()
    threads = max(1, (os.cpu_count() or 1) // arguments.workers)
    # A process for every run: nothing of one run, such as a random generator, reaches the next.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, mp_context=spawn, max_tasks_per_child=1) as pool:
        pending = [
            pool.submit(run, fault, guarded, seed, arguments.steps, extra, threads)
            for seed in range(arguments.seeds)
            for fault in FAULTS
            for guarded in (False, True)
        ]
        results = [future.result() for future in pending]
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = table(results, arguments.steps)
    (arguments.out / "spike_drill.md").write_text(text)
    without_curves = [{key: value for key, value in r.items() if key != "train_loss"} for r in results]
    (arguments.out / "spike_drill.json").write_text(json.dumps(without_curves, indent=1))
    plot(results, arguments.out / "spike_drill.png")
    readme = evidence.ROOT / "README.md"
    if arguments.out == evidence.RESULTS and not extra and "<!-- evidence:spike_drill -->" in readme.read_text():
        image = "![training losses of the drills](examples/results/spike_drill.png)"
        evidence.show_in_readme(readme, "evidence:spike_drill", f"{text}\n{image}\n")
    print(f"\n{text}\nwritten to {arguments.out}")


if __name__ == "__main__":
    main()
