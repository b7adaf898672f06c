"""Who stays stable in four bits? Stable-SPAM (arXiv 2502.17055) against Adam, in FP4, INT4, INT3 and INT2.

    python examples/evidence_four_bit.py

Trains a small Llama on the source of Python's standard library with every variant at four learning rates, with three
seeds at two of them, and once more at one of these with injected spikes: three steps whose loss, and with it every
gradient, is a thousand times too large. Writes who diverged and who ended where, as a table and a plot. Each run is a
shipped recipe with overrides; a finished one is not repeated, so a killed study goes on where it stopped. Delete
runs/four_bit to start over.
"""

import argparse
import hashlib
import json
import math
import platform
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from evidence import RESULTS, ROOT, show_in_readme
from lightning.pytorch import Callback, LightningModule, Trainer

from lowbit_lightning.cli import LowBitCLI

RUNS = Path("runs").absolute() / "four_bit"
LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SEEDED_RATES = (3e-3, 1e-2)  # those of three seeds
SPIKED_RATE = 3e-3
SPIKES = (120, 150, 180)  # steps
MODEL = {
    "model_type": "llama", "vocab_size": 256, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 0,
    "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
# The paper's for 4-bit training, but for the resets, which it makes every 500 of 20,000 steps.
RESET_INTERVAL = 80
STABLE_SPAM = {
    "class_path": "lowbit_lightning.optim.StableSPAM",
    "init_args": {"gammas": [0.7, 0.9, 0.999], "reset_interval": RESET_INTERVAL},
}
ADAM = {"class_path": "torch.optim.AdamW", "init_args": {"weight_decay": 0.0}}


@dataclass(frozen=True)
class Variant:
    """A number format, an optimizer, and what is done to gradients before it."""

    format: str | None = None
    optimizer: dict[str, Any] = field(default_factory=lambda: ADAM)
    clip: float | None = None
    rules: tuple[Any, ...] = ()


SPAM = ("spam_clip", {"momentum_reset": {"every_n_steps": RESET_INTERVAL}})
VARIANTS = {
    "BF16 Adam": Variant(),
    "BF16 Adam + clip": Variant(clip=1.0),
    "FP4 Adam": Variant("fp4"),
    "FP4 SPAM": Variant("fp4", rules=SPAM),
    "FP4 Stable-SPAM": Variant("fp4", STABLE_SPAM),
    "INT4 Stable-SPAM": Variant("int4", STABLE_SPAM),
    "INT3 Stable-SPAM": Variant("int3", STABLE_SPAM),
    "INT2 Stable-SPAM": Variant("int2", STABLE_SPAM),
}


@dataclass(frozen=True)
class Job:
    """One run of the study."""

    variant: str
    lr: float
    seed: int
    spikes: bool = False


class Curves(Callback):
    """Collects the losses of a run."""

    def __init__(self) -> None:
        self.train: list[float] = []
        self.validation: list[tuple[int, float]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.train.append(float(outputs["loss"]))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validation.append((trainer.global_step, float(trainer.callback_metrics["val_loss"])))


def jobs(seeds: int) -> list[Job]:
    """Return all runs, the whole sweep first."""
    every = [Job(name, lr, 0) for lr in LEARNING_RATES for name in VARIANTS]
    every += [Job(name, SPIKED_RATE, 0, spikes=True) for name in VARIANTS]
    every += [Job(name, lr, seed) for seed in range(1, seeds) for lr in SEEDED_RATES for name in VARIANTS]
    return every


def overrides(job: Job, steps: int) -> dict[str, Any]:
    """Return the configuration of a run, to be laid over the recipe ``quickstart``."""
    variant = VARIANTS[job.variant]
    callbacks: list[Any] = []
    if variant.rules:
        rules = {"rules": list(variant.rules)}
        callbacks.append({"class_path": "lowbit_lightning.callbacks.GradientStabilizer", "init_args": rules})
    if job.spikes:
        spikes = {"step": sorted({min(step, steps - 1) for step in SPIKES}), "kind": "loss"}
        callbacks.append({"class_path": "lowbit_lightning.callbacks.SpikeInjector", "init_args": spikes})
    trainer: dict[str, Any] = {
        "accelerator": "cpu", "max_steps": steps, "val_check_interval": steps // 4, "limit_val_batches": 16,
        "gradient_clip_val": variant.clip, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "callbacks": callbacks,
    }  # fmt: skip
    if variant.format is None:
        trainer["precision"] = "bf16-mixed"
    else:
        plugin = {"weight": variant.format, "compute": "bf16-mixed"}
        trainer["plugins"] = [{"class_path": "lowbit_lightning.precision.FourBitPrecision", "init_args": plugin}]
    optimizer = {**variant.optimizer, "init_args": {"lr": job.lr, **variant.optimizer["init_args"]}}
    return {
        "seed_everything": job.seed,
        "trainer": trainer,
        "model": {"init_args": {"config": MODEL}},
        "data": {"init_args": {"seq_len": 129, "batch_size": 8, "seed": job.seed, "max_bytes": 4_000_000}},
        "optimizer": optimizer,
        "lr_scheduler": {"init_args": {"warmup_steps": steps // 10}},
    }


def result_file(job: Job, steps: int) -> Path:
    """Return where a run's measurements are kept: whatever decides them is in the name."""
    settings = json.dumps(overrides(job, steps), sort_keys=True)
    identity = hashlib.blake2s(settings.encode(), digest_size=6).hexdigest()
    return RUNS / f"{job.variant.replace(' ', '-')}-lr{job.lr:g}-seed{job.seed}-{identity}.json"


def run(job: Job, steps: int) -> dict[str, Any]:
    """Train once and return the measurements, or read them if this run was finished before."""
    config, done = overrides(job, steps), result_file(job, steps)
    if done.exists():
        return json.loads(done.read_text())
    RUNS.mkdir(parents=True, exist_ok=True)
    config["trainer"]["default_root_dir"] = str(RUNS)
    laid_over = done.with_suffix(".yaml")
    laid_over.write_text(json.dumps(config))  # which is YAML
    started, curves = time.perf_counter(), Curves()
    cli = LowBitCLI(["--config", "quickstart", "--config", str(laid_over)], run=False)
    cli.trainer.callbacks.append(curves)
    cli.trainer.fit(cli.model, cli.datamodule)
    laid_over.unlink()
    result = {
        **asdict(job),
        "val_loss": curves.validation[-1][1],
        "validation": curves.validation,
        "train": curves.train,
        "seconds": time.perf_counter() - started,
    }
    partial = done.with_suffix(".partial")
    partial.write_text(json.dumps(result))
    partial.rename(done)
    return result


def diverged(result: dict[str, Any]) -> bool:
    """Whether a run ended in numbers that are none, or half a nat above what it had reached, over 20 steps each."""
    losses = result["train"]
    means = [statistics.mean(losses[i : i + 20]) for i in range(0, len(losses) - 19, 20)]
    return not (math.isfinite(result["val_loss"]) and means[-1] <= min(means) + 0.5)


def cell(results: list[dict[str, Any]]) -> str:
    """Return the mean validation loss of runs that differ in the seed, and how many diverged."""
    if not results:
        return "–"
    losses = [result["val_loss"] for result in results]
    spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
    broken = sum(map(diverged, results))
    note = f" ({broken} of {len(results)} diverged)" if broken else ""
    return f"{statistics.mean(losses):.3f}{spread}{note}"


def select(results: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """Return the results of these settings."""
    return [one for one in results if all(one[key] == value for key, value in wanted.items())]


def tables(results: list[dict[str, Any]]) -> str:
    """Return both Markdown tables."""
    rates = [lr for lr in LEARNING_RATES if select(results, lr=lr)]
    rows = ["| validation loss at learning rate | " + " | ".join(f"{lr:g}" for lr in rates) + " |"]
    rows.append("|---" * (len(rates) + 1) + "|")
    for name in VARIANTS:
        cells = [cell(select(results, variant=name, lr=lr, spikes=False)) for lr in rates]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    rows += ["", "| three injected spikes | without | with | difference |", "|---|---|---|---|"]
    for name in VARIANTS:
        both = [select(results, variant=name, lr=SPIKED_RATE, seed=0, spikes=spikes) for spikes in (False, True)]
        if all(both):
            change = both[1][0]["val_loss"] - both[0][0]["val_loss"]
            rows.append(f"| {name} | {cell(both[0])} | {cell(both[1])} | {change:+.3f} |")
    return "\n".join(rows)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw where runs end over the learning rate, and the losses of those with spikes."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (sweep, spiked) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for index, name in enumerate(VARIANTS):
        style = {"color": f"C{index}", "linestyle": "-" if "Stable" in name else "--"}
        runs = [select(results, variant=name, lr=lr, spikes=False) for lr in LEARNING_RATES]
        points = [(one[0]["lr"], statistics.mean(r["val_loss"] for r in one)) for one in runs if one]
        sweep.plot(*zip(*points, strict=True), marker="o", label=name, **style)
        for result in select(results, variant=name, spikes=True):
            losses = result["train"]
            smooth = [statistics.mean(losses[max(0, i - 9) : i + 1]) for i in range(len(losses))]
            spiked.plot(smooth, label=name, linewidth=1, **style)
    sweep.set(xscale="log", xlabel="learning rate", ylabel="validation loss at the end")
    spiked.set(xlabel="step", ylabel="training loss, mean of 10 steps", title="three injected spikes", ylim=(1.5, 6))
    for axes in (sweep, spiked):
        axes.grid(alpha=0.3)
    sweep.legend(fontsize="small")
    figure.savefig(path, dpi=130)


def write(results: list[dict[str, Any]], steps: int, out: Path) -> str:
    """Write numbers, tables and plot of what there is; return the text."""
    out.mkdir(parents=True, exist_ok=True)
    seeds = len({result["seed"] for result in results})
    text = (
        f"{tables(results)}\n\n{steps} steps; mean ± standard deviation of {seeds} seeds, or seed 0 alone. "
        f"{platform.machine()} CPU, torch {torch.__version__}.\n"
    )
    (out / "four_bit.md").write_text(text)
    (out / "four_bit.json").write_text(json.dumps([{**one, "train": _thinned(one["train"])} for one in results]))
    plot(results, out / "four_bit.png")
    return text


def _thinned(losses: list[float]) -> list[float]:
    return [round(statistics.mean(losses[i : i + 10]), 4) for i in range(0, len(losses), 10)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240, help="optimizer steps of every run")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0 on")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the table, the plot and the numbers")
    parser.add_argument("--finished", action="store_true", help="train nothing, show the runs that there are")
    arguments = parser.parse_args()

    results, todo = [], jobs(arguments.seeds)
    if arguments.finished:
        todo = [job for job in todo if result_file(job, arguments.steps).exists()]
    for number, job in enumerate(todo, start=1):
        print(f"--- {number} of {len(todo)}: {job}", flush=True)
        results.append(run(job, arguments.steps))
        print(f"    validation loss {results[-1]['val_loss']:.4f}, {results[-1]['seconds']:.0f} s", flush=True)
    text = write(results, arguments.steps, arguments.out)
    readme = ROOT / "README.md"
    if arguments.out == RESULTS and "<!-- evidence:four_bit -->" in readme.read_text():
        image = "![validation loss over learning rate; training loss with spikes](examples/results/four_bit.png)"
        show_in_readme(readme, "evidence:four_bit", f"{text}\n{image}\n")
    print(f"\n{text}\nwritten to {arguments.out}")


if __name__ == "__main__":
    main()
