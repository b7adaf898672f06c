"""What do forward passes alone learn on real pretrained weights, in the passes and the time that Adam takes?

    python examples/forward_only.py

Fine-tunes MiniLM (`make minilm`) to tell which package a docstring is from, by the recipes finetune_adam, finetune_fzoo
and finetune_mezo: from the class centroids, which are the result without training, and from those of a few texts, which
leave more to learn. Every method gets the same number of forward passes; an Adam step counts as three, because its
backward pass costs two. The learning rate is chosen for each method and start on seed 0. Texts and batches are shorter
than in the recipes, so that a small machine does it. A finished run is not repeated; delete runs/forward_only to start
over.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import platform
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import evidence
import matplotlib
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lowbit_lightning import configs
from lowbit_lightning.cli import LowBitCLI

RUNS = Path("runs").absolute() / "forward_only"
TASK = ("--data.init_args.max_length=16", "--data.init_args.batch_size=8")
# Forward passes between two validations: whole steps of every method.
EVERY = 90
Result = dict[str, Any]


@dataclass(frozen=True)
class Start:
    """What the head starts from: a name for the table, and the model's settings."""

    name: str
    settings: tuple[str, ...]


STARTS = {
    "centroids": Start("class centroids", ("head=centroids",)),
    "few": Start("centroids of 8 texts a class", ("head=centroids", "centroid_examples=8")),
}


@dataclass(frozen=True)
class Method:
    """A recipe, the forward passes that a step of it costs, what is tried for it, and its own optimizer settings."""

    recipe: str
    forwards: int
    learning_rates: tuple[float, ...]
    settings: tuple[str, ...] = ()

    def arguments(self, start: str, lr: float, seed: int, forwards: int) -> list[str]:
        """Return the command line of a run with a budget of so many forward passes."""
        return [
            "--config", self.recipe, *TASK, *(f"--model.init_args.{setting}" for setting in STARTS[start].settings),
            f"--seed_everything={seed}", f"--data.init_args.seed={seed}",
            f"--optimizer.init_args.lr={lr:g}",
            *(f"--optimizer.init_args.{setting}" for setting in self.settings),
            *([] if self.recipe == "finetune_adam" else [f"--optimizer.init_args.seed={seed}"]),
            f"--trainer.max_steps={forwards // self.forwards}",
            f"--trainer.val_check_interval={EVERY // self.forwards}",
        ]  # fmt: skip


METHODS = {
    "AdamW": Method("finetune_adam", 3, (3e-5, 1e-4, 3e-4)),
    "MeZO": Method("finetune_mezo", 2, (3e-6, 1e-5, 3e-5)),
    "FZOO, full signs": Method("finetune_fzoo", 9, (3e-4, 1e-3, 3e-3), ("perturbation=rademacher",)),
    "FZOO, rank-1 signs": Method("finetune_fzoo", 9, (3e-4, 1e-3, 3e-3), ("perturbation=rank1",)),
}


class Stopwatch(Callback):
    """Notes validation results with the forward passes and the processor's seconds that training took until then.

    Seconds of the processor, because the machine may do other things at the same time.
    """

    def __init__(self, forwards: int) -> None:
        self.curve: list[tuple[int, float, float, float]] = []  # forward passes, seconds, accuracy, loss
        self._forwards = forwards
        self._seconds = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self._started = time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        self._seconds += time.process_time() - self._started

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        accuracy, loss = (float(trainer.callback_metrics[name]) for name in ("val_accuracy", "val_loss"))
        self.curve.append((trainer.global_step * self._forwards, self._seconds, accuracy, loss))


def run(name: str, start: str, lr: float, seed: int, forwards: int, extra: list[str], threads: int) -> Result:
    """Train once and return the measurements, or read them if this run was finished before."""
    method = METHODS[name]
    arguments = [*method.arguments(start, lr, seed, forwards), *extra]
    settings = [configs.shipped("recipes")[method.recipe].read_text(), asdict(method), arguments]
    identity = hashlib.blake2s(json.dumps(settings).encode(), digest_size=4).hexdigest()
    slug = name.replace(",", "").replace(" ", "-")
    done = RUNS / f"{slug}-{start}-lr{lr:g}-seed{seed}-{identity}.json"
    if done.exists():
        return json.loads(done.read_text())
    torch.set_num_threads(threads)
    print(f"--- {name} from {STARTS[start].name}, learning rate {lr:g}, seed {seed}", flush=True)
    cli = LowBitCLI(
        [
            *arguments, "--trainer.logger=false", "--trainer.callbacks=[]",
            "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false",
        ],
        run=False,
    )  # fmt: skip
    stopwatch = Stopwatch(method.forwards)
    cli.trainer.callbacks.append(stopwatch)
    cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    result = {"method": name, "start": start, "lr": lr, "seed": seed, "curve": stopwatch.curve}
    done.parent.mkdir(parents=True, exist_ok=True)
    partial = done.with_suffix(".partial")
    partial.write_text(json.dumps(result))
    partial.rename(done)
    return result


def best_learning_rate(runs: list[Result]) -> float:
    """Return the rate whose run ends with the least validation loss; a loss that is not finite is the worst."""

    def last_loss(result: Result) -> float:
        loss: float = result["curve"][-1][3]
        return loss if math.isfinite(loss) else math.inf

    return float(min(runs, key=last_loss)["lr"])


def table(results: list[Result]) -> str:
    """Return the Markdown table: by start and method, what was reached, and what it cost."""
    rows = [
        "| start | method | learning rate | forward passes | accuracy | loss | against the start | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for start in dict.fromkeys(r["start"] for r in results):
        first = [r["curve"][0] for r in results if r["start"] == start]
        rows.append(
            f"| {STARTS[start].name} | none | – | 0 | {_mean(point[2] for point in first):.3f} "
            f"| {_mean(point[3] for point in first):.3f} | – | 0 |"
        )
        for method in dict.fromkeys(r["method"] for r in results if r["start"] == start):
            runs = [r for r in results if (r["start"], r["method"]) == (start, method)]
            forwards, _, _, _ = runs[0]["curve"][-1]
            accuracies, losses, seconds = ([r["curve"][-1][i] for r in runs] for i in (2, 3, 1))
            gain = _mean(r["curve"][-1][2] - r["curve"][0][2] for r in runs)
            rows.append(
                f"| {STARTS[start].name} | {method} | {runs[0]['lr']:g} | {forwards} "
                f"| {_mean(accuracies):.3f}{_spread(accuracies)} | {_mean(losses):.3f}{_spread(losses)} "
                f"| {gain:+.3f} | {_mean(seconds):.0f} |"
            )
    return "\n".join(rows)


def lr_table(sweep: list[Result]) -> str:
    """Return the Markdown table of the learning rates that were tried."""
    rows = ["| start | method | validation loss on seed 0 by learning rate |", "|---|---|---|"]
    for start, method in dict.fromkeys((r["start"], r["method"]) for r in sweep):
        runs = [r for r in sweep if (r["start"], r["method"]) == (start, method)]
        tried = ", ".join(f"{r['lr']:g}: {r['curve'][-1][3]:.3f}" for r in runs)
        rows.append(f"| {STARTS[start].name} | {method} | {tried} |")
    return "\n".join(rows)


def plot(results: list[Result], path: Path) -> None:
    """Draw accuracies over forward passes and over seconds: the mean, and a band around all seeds."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    starts = list(dict.fromkeys(r["start"] for r in results))
    figure, grid = pyplot.subplots(
        len(starts), 2, figsize=(9, 3.5 * len(starts)), sharey="row", squeeze=False, layout="constrained"
    )
    for start, both in zip(starts, grid, strict=True):
        for axes, column, label in zip(both, (0, 1), ("forward passes", "CPU seconds of training"), strict=True):
            for method in dict.fromkeys(r["method"] for r in results if r["start"] == start):
                runs = [r["curve"] for r in results if (r["start"], r["method"]) == (start, method)]
                points = list(zip(*runs, strict=True))
                at = [_mean(point[column] for point in of_seeds) for of_seeds in points]
                accuracies = [[point[2] for point in of_seeds] for of_seeds in points]
                (line,) = axes.plot(at, [_mean(values) for values in accuracies], marker="o", label=method)
                low, high = list(map(min, accuracies)), list(map(max, accuracies))
                axes.fill_between(at, low, high, alpha=0.2, color=line.get_color())
            axes.set_xlabel(label)
            axes.grid(alpha=0.3)
        both[0].set_ylabel(f"accuracy, from {STARTS[start].name}")
    grid[0][0].legend()
    figure.savefig(path, dpi=130)


def _mean(values: Any) -> float:
    return statistics.fmean(values)


def _spread(values: list[float]) -> str:
    return f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS), help="what the head starts from")
    parser.add_argument("--forwards", type=int, default=360, help=f"of every run, a multiple of {EVERY}")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0 on")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, which share the processor's cores")
    parser.add_argument("--out", type=Path, default=evidence.RESULTS, help="folder for table, plot and numbers")
    arguments, extra = parser.parse_known_args()
    if arguments.forwards < EVERY or arguments.forwards % EVERY:
        parser.error(f"--forwards {arguments.forwards} is not a multiple of {EVERY}")
    threads = max(1, torch.get_num_threads() // arguments.workers)
    cases = [(method, start) for start in arguments.starts for method in METHODS]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, mp_context=spawn) as pool:

        def train(method: str, start: str, lr: float, seed: int) -> Any:
            return pool.submit(run, method, start, lr, seed, arguments.forwards, extra, threads)

        tried = {case: [train(*case, lr, 0) for lr in METHODS[case[0]].learning_rates] for case in cases}
        sweep = {case: [future.result() for future in futures] for case, futures in tried.items()}
        best = {case: best_learning_rate(runs) for case, runs in sweep.items()}
        pending = [train(*case, lr, seed) for case, lr in best.items() for seed in range(arguments.seeds)]
        results = [future.result() for future in pending]
    arguments.out.mkdir(parents=True, exist_ok=True)
    made_on = f"{threads} thread{'s' if threads > 1 else ''} of a {platform.machine()} CPU, torch {torch.__version__}"
    seeds = f"{arguments.seeds} seeds (mean ± standard deviation), {made_on}."
    text = f"{table(results)}\n\n{seeds}\n\n{lr_table([r for runs in sweep.values() for r in runs])}\n"
    (arguments.out / "forward_only.md").write_text(text)
    (arguments.out / "forward_only.json").write_text(json.dumps(results, indent=1))
    plot(results, arguments.out / "forward_only.png")
    readme = evidence.ROOT / "README.md"
    if arguments.out == evidence.RESULTS and not extra and "<!-- evidence:forward_only -->" in readme.read_text():
        image = "![accuracy over forward passes and over seconds](examples/results/forward_only.png)"
        evidence.show_in_readme(readme, "evidence:forward_only", f"{text}\n{image}\n")
    print(f"\n{text}\nwritten to {arguments.out}")


if __name__ == "__main__":
    main()
