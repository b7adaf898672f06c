"""What do forward passes alone learn on real pretrained weights, in the passes and the time that Adam takes?

    python examples/forward_only.py

Fine-tunes MiniLM (`make minilm`) to tell which package a docstring is from, by the recipes finetune_adam, finetune_fzoo
and finetune_mezo, in three settings. The noise of a forward-only step grows with the number of trained parameters, so
they differ in that: the head alone from random weights, LoRA adapters and head from the centroids of a few texts, and
all weights from the class centroids of all texts, which are the result without training.

Within a setting every method gets the same number of forward passes; an Adam step counts as three, because its backward
pass costs two. The learning rate is chosen for each method and setting on seed 0. Texts and batches are shorter than in
the recipes, so that one core does it within the hour. A finished run is not repeated; delete runs/forward_only to start
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
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
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
# Validations of a run, after equal shares of its steps; a share is whole steps of every method.
VALIDATIONS, SHARE = 4, 18
ADAPTERS = '{"r": 4, "lora_alpha": 16, "target_modules": ["query", "value"]}'
Result = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A recipe, the forward passes that a step of it costs, and its own optimizer settings."""

    recipe: str
    forwards: int
    settings: tuple[str, ...] = ()


METHODS = {
    "AdamW": Method("finetune_adam", 3),
    "MeZO": Method("finetune_mezo", 2),
    "FZOO, full signs": Method("finetune_fzoo", 9, ("perturbation=rademacher",)),
    "FZOO, rank-1 signs": Method("finetune_fzoo", 9, ("perturbation=rank1",)),
}


@dataclass(frozen=True)
class Setting:
    """What is trained from what: a name for the table, the model's settings, a budget, and what each method tries."""

    name: str
    model: tuple[str, ...]
    forwards: int
    learning_rates: dict[str, tuple[float, ...]]

    def arguments(self, method: Method, lr: float, seed: int, forwards: int) -> list[str]:
        """Return the command line of a run with a budget of so many forward passes."""
        return [
            "--config", method.recipe, *TASK, *(f"--model.init_args.{setting}" for setting in self.model),
            f"--seed_everything={seed}", f"--data.init_args.seed={seed}",
            f"--optimizer.init_args.lr={lr:g}",
            *(f"--optimizer.init_args.{setting}" for setting in method.settings),
            *([] if method.recipe == "finetune_adam" else [f"--optimizer.init_args.seed={seed}"]),
            f"--trainer.max_steps={forwards // method.forwards}",
            f"--trainer.val_check_interval={forwards // VALIDATIONS // method.forwards}",
        ]  # fmt: skip


def _rates(adam: tuple[float, ...], mezo: tuple[float, ...], fzoo: tuple[float, ...]) -> dict[str, tuple[float, ...]]:
    return dict(zip(METHODS, (adam, mezo, fzoo, fzoo), strict=True))


SETTINGS = {
    "all": Setting(
        "all weights, from class centroids", ("head=centroids",), 360,
        _rates((3e-5, 1e-4), (3e-6, 1e-5), (1e-4, 3e-4)),
    ),
    "head": Setting(
        "the head, from random", ("head=random", 'trainable=["head.*"]'), 1080,
        _rates((3e-3, 1e-2), (1e-3, 3e-3), (1e-2, 3e-2)),
    ),
    "lora": Setting(
        "adapters and head, from centroids of a few texts",
        ("head=centroids", "centroid_examples=8", f"lora={ADAPTERS}"), 360,
        _rates((1e-3, 3e-3), (1e-4, 3e-4), (3e-3, 1e-2)),
    ),
}  # fmt: skip


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


def run(name: str, setting: str, lr: float, seed: int, forwards: int, extra: list[str], threads: int) -> Result:
    """Train once and return the measurements, or read them if this run was finished before."""
    method = METHODS[name]
    arguments = [*SETTINGS[setting].arguments(method, lr, seed, forwards), *extra]
    # Whatever decides the result is in the name, so that a run made otherwise is never taken for this one.
    settings = [configs.shipped("recipes")[method.recipe].read_text(), arguments]
    identity = hashlib.blake2s(json.dumps(settings).encode(), digest_size=4).hexdigest()
    slug = name.replace(",", "").replace(" ", "-")
    done = RUNS / f"{slug}-{setting}-lr{lr:g}-seed{seed}-{identity}.json"
    if done.exists():
        return json.loads(done.read_text())
    torch.set_num_threads(threads)
    print(f"--- {name}, {SETTINGS[setting].name}, learning rate {lr:g}, seed {seed}", flush=True)
    cli = LowBitCLI(
        [
            *arguments, "--trainer.logger=false", "--trainer.callbacks=[]", f"--trainer.default_root_dir={RUNS}",
            "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false",
        ],
        run=False,
    )  # fmt: skip
    stopwatch = Stopwatch(method.forwards)
    cli.trainer.callbacks.append(stopwatch)
    cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    trained = sum(param.numel() for param in cli.model.parameters() if param.requires_grad)
    result = {
        "method": name, "setting": setting, "lr": lr, "seed": seed, "trained": trained, "curve": stopwatch.curve,
    }  # fmt: skip
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
    """Return the Markdown table: by setting and method, what was reached, and what it cost."""
    rows = [
        "| trained | method | learning rate | forward passes | accuracy | loss | against the start | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for setting in dict.fromkeys(r["setting"] for r in results):
        title = f"{SETTINGS[setting].name} ({next(r['trained'] for r in results if r['setting'] == setting):,})"
        first = [r["curve"][0] for r in results if r["setting"] == setting]
        rows.append(
            f"| {title} | none | – | 0 | {_mean(point[2] for point in first):.3f} "
            f"| {_mean(point[3] for point in first):.3f} | – | 0 |"
        )
        for method in dict.fromkeys(r["method"] for r in results if r["setting"] == setting):
            runs = [r for r in results if (r["setting"], r["method"]) == (setting, method)]
            forwards, _, _, _ = runs[0]["curve"][-1]
            accuracies, losses, seconds = ([r["curve"][-1][i] for r in runs] for i in (2, 3, 1))
            gain = _mean(r["curve"][-1][2] - r["curve"][0][2] for r in runs)
            rows.append(
                f"| | {method} | {runs[0]['lr']:g} | {forwards} "
                f"| {_mean(accuracies):.3f}{_spread(accuracies)} | {_mean(losses):.3f}{_spread(losses)} "
                f"| {gain:+.3f} | {_mean(seconds):.0f} |"
            )
    return "\n".join(rows)


def lr_table(sweep: list[Result]) -> str:
    """Return the Markdown table of the learning rates that were tried."""
    rows = ["| trained | method | validation loss on seed 0 by learning rate |", "|---|---|---|"]
    for setting, method in dict.fromkeys((r["setting"], r["method"]) for r in sweep):
        runs = [r for r in sweep if (r["setting"], r["method"]) == (setting, method)]
        tried = ", ".join(f"{r['lr']:g}: {r['curve'][-1][3]:.3f}" for r in runs)
        rows.append(f"| {SETTINGS[setting].name} | {method} | {tried} |")
    return "\n".join(rows)


def plot(results: list[Result], path: Path) -> None:
    """Draw accuracies over forward passes and over seconds: the mean, and a band around all seeds."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = list(dict.fromkeys(r["setting"] for r in results))
    figure, grid = pyplot.subplots(
        len(settings), 2, figsize=(9, 3.5 * len(settings)), sharey="row", squeeze=False, layout="constrained"
    )
    for setting, both in zip(settings, grid, strict=True):
        for axes, column, label in zip(both, (0, 1), ("forward passes", "CPU seconds of training"), strict=True):
            for method in dict.fromkeys(r["method"] for r in results if r["setting"] == setting):
                runs = [r["curve"] for r in results if (r["setting"], r["method"]) == (setting, method)]
                points = list(zip(*runs, strict=True))
                at = [_mean(point[column] for point in of_seeds) for of_seeds in points]
                accuracies = [[point[2] for point in of_seeds] for of_seeds in points]
                (line,) = axes.plot(at, [_mean(values) for values in accuracies], marker="o", label=method)
                low, high = list(map(min, accuracies)), list(map(max, accuracies))
                axes.fill_between(at, low, high, alpha=0.2, color=line.get_color())
            axes.set_xlabel(label)
            axes.grid(alpha=0.3)
        both[0].set_ylabel("accuracy")
        both[0].set_title(SETTINGS[setting].name, loc="left", fontsize="medium")
    grid[0][0].legend()
    figure.savefig(path, dpi=130)


def _mean(values: Any) -> float:
    return statistics.fmean(values)


def _spread(values: list[float]) -> str:
    return f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="what is trained")
    parser.add_argument("--forwards", type=int, help="of every run, in place of each setting's own number")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0 on")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, which share the processor's cores")
    parser.add_argument("--out", type=Path, default=evidence.RESULTS, help="folder for table, plot and numbers")
    arguments, extra = parser.parse_known_args()
    if arguments.forwards is not None and (arguments.forwards < 1 or arguments.forwards % (VALIDATIONS * SHARE)):
        parser.error(f"--forwards {arguments.forwards} is not a multiple of {VALIDATIONS * SHARE}")
    threads = max(1, torch.get_num_threads() // arguments.workers)
    spawn = multiprocessing.get_context("spawn")
    sweeps: list[Result] = []
    results: list[Result] = []
    with ProcessPoolExecutor(arguments.workers, mp_context=spawn) as pool:

        def train(method: str, setting: str, lr: float, seed: int) -> "Future[Result]":
            forwards = arguments.forwards or SETTINGS[setting].forwards
            return pool.submit(run, method, setting, lr, seed, forwards, extra, threads)

        for setting in arguments.settings:
            rates = SETTINGS[setting].learning_rates
            tried = {method: [train(method, setting, lr, 0) for lr in rates[method]] for method in METHODS}
            sweep = {method: [future.result() for future in futures] for method, futures in tried.items()}
            best = {method: best_learning_rate(runs) for method, runs in sweep.items()}
            pending = [
                train(method, setting, lr, seed) for method, lr in best.items() for seed in range(arguments.seeds)
            ]
            sweeps += [result for runs in sweep.values() for result in runs]
            results += [future.result() for future in pending]
            made_on = f"{threads} thread{'s' * (threads > 1)} of a {platform.machine()} CPU, torch {torch.__version__}"
            seeds = f"{arguments.seeds} seeds (mean ± standard deviation), {made_on}."
            # After each setting, so that a study cut short shows what it has.
            write(arguments.out, results, f"{table(results)}\n\n{seeds}\n\n{lr_table(sweeps)}\n", shows=not extra)
    print(f"written to {arguments.out}")


def write(out: Path, results: list[Result], text: str, shows: bool) -> None:
    """Write table, numbers and plot, and put them into README if it shows this study."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "forward_only.md").write_text(text)
    (out / "forward_only.json").write_text(json.dumps(results, indent=1))
    plot(results, out / "forward_only.png")
    readme = evidence.ROOT / "README.md"
    if shows and out == evidence.RESULTS and "<!-- evidence:forward_only -->" in readme.read_text():
        image = "![accuracy over forward passes and over seconds](examples/results/forward_only.png)"
        evidence.show_in_readme(readme, "evidence:forward_only", f"{text}\n{image}\n")
    print(f"\n{text}", flush=True)


if __name__ == "__main__":
    main()
