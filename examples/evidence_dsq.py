"""Train with DSQ, from scratch and fine-tuning, over several seeds; write the tables and the plot that README shows.

    python examples/evidence_dsq.py

Every run is an ordinary `lowbit-lightning fit` on a shipped recipe, with other settings of its DynamicStashing or
without it. A finished run is not repeated, so a killed study goes on where it stopped; delete runs/evidence to start
over.
"""

import argparse
import hashlib
import json
import platform
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib
import torch
import yaml
from evidence import RESULTS, ROOT, RUNS, show_in_readme
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lowbit_lightning import configs
from lowbit_lightning.cli import LowBitCLI

STASHING = "lowbit_lightning.callbacks.DynamicStashing"
PAPER = {"arithmetic": 20.95, "DRAM": 2.55}  # of the abstract, on IWSLT17, modelled by its authors
# How much less a validation's loss has to be than the best one before: levels of few bits go on improving a little for
# long, and what they cost is the longer to make up for.
FROM_2_BITS = {"preset": "paper", "min_delta": 0.1}
FROM_4_BITS = {"levels": [[4, 4, 4, 16], [8, 4, 4, 16], [16, 4, 4, 16]], "min_delta": 0.05}
# The recipe's model with half the width and depth, so that the study takes minutes on a core.
SMALL = (
    "--model.init_args.config.hidden_size", "64", "--model.init_args.config.intermediate_size", "192",
    "--model.init_args.config.num_hidden_layers", "2", "--data.init_args.seq_len", "129",
    "--trainer.val_check_interval", "20", "--trainer.limit_val_batches", "12",
)  # fmt: skip


@dataclass(frozen=True)
class Study:
    """A recipe and its variants, by what DynamicStashing gets; None leaves it out, the first one is the baseline.

    ``metric`` is shown beside the validation loss; there are at most ``most_seeds``.
    """

    recipe: str
    variants: dict[str, dict[str, Any] | None]
    options: tuple[str, ...] = ()
    metric: str = "val_bits_per_byte"
    most_seeds: int | None = None


STUDIES = {
    "from scratch": Study(
        "dsq_from_scratch",
        {
            "fp32": None,
            "the paper's levels, from [2, 2, 2, 16]": FROM_2_BITS,
            "levels from [4, 4, 4, 16]": FROM_4_BITS,
            "fixed [2, 2, 2, 16]": {"levels": [[2, 2, 2, 16]]},
            "fixed [16, 4, 4, 16]": {"levels": [[16, 4, 4, 16]]},
        },
        SMALL,
    ),
    "fine-tuning": Study(
        "dsq_finetune",
        {
            "fp32": None,
            "stash in 8 bits": {"stash_only": 8},
            "stash in 4 bits": {"stash_only": 4},
            "stash in 2 bits": {"stash_only": 2},
        },
        ("--trainer.max_steps", "100", "--trainer.val_check_interval", "50"),
        metric="val_accuracy",
    ),
    "from scratch, four times as long": Study(
        "dsq_from_scratch",
        {"fp32": None, "the paper's levels, from [2, 2, 2, 16]": FROM_2_BITS},
        (*SMALL, "--trainer.max_steps", "1600"),
        most_seeds=1,
    ),
}


def configured(recipe: str, stashing: dict[str, Any] | None) -> str:
    """Return the recipe with these settings of DynamicStashing, or without it, as YAML."""
    config = yaml.safe_load(configs.shipped("recipes")[recipe].read_text())
    others = [one for one in config["trainer"]["callbacks"] if one["class_path"] != STASHING]
    own = [] if stashing is None else [{"class_path": STASHING, "init_args": stashing}]
    config["trainer"]["callbacks"] = others + own
    return yaml.safe_dump(config)


def run(study: str, variant: str, seed: int, extra: list[str]) -> dict[str, Any]:
    """Train once and return the measurements, or read them if this run was finished before."""
    chosen = STUDIES[study]
    text = configured(chosen.recipe, chosen.variants[variant])
    options = [*chosen.options, *extra]
    # Whatever decides the result is in the name, so that a run made otherwise is never taken for this one.
    identity = hashlib.blake2s(json.dumps([text, options]).encode(), digest_size=4).hexdigest()
    name = "".join(letter if letter.isalnum() else "-" for letter in variant)
    done = RUNS / chosen.recipe / f"{name}-seed{seed}-{identity}.json"
    if done.exists():
        return json.loads(done.read_text())
    done.parent.mkdir(parents=True, exist_ok=True)
    print(f"--- {study}: {variant}, seed {seed}", flush=True)
    torch.set_num_threads(1)
    config = done.with_suffix(".yaml")
    config.write_text(text)
    before = time.process_time()
    cli = LowBitCLI(
        [
            "fit", "--config", str(config), "--seed_everything", str(seed), "--data.init_args.seed", str(seed),
            "--trainer.logger.init_args.save_dir", str(RUNS), "--trainer.logger.init_args.name", chosen.recipe,
            "--trainer.logger.init_args.version", f"{done.stem}-{time.time_ns()}",
            "--trainer.enable_progress_bar", "false", *options,
        ]
    )  # fmt: skip
    events = EventAccumulator(cli.trainer.logger.log_dir)
    events.Reload()
    logged = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag.startswith(("dsq/", "stash/", "val_"))
    }
    result = {
        "variant": variant,
        "seed": seed,
        "cpu_seconds": time.process_time() - before,
        "steps": cli.trainer.global_step,
        **{key: float(value) for key, value in cli.trainer.callback_metrics.items() if key.startswith("val_")},
        "logged": logged,
    }
    partial = done.with_suffix(".partial")
    partial.write_text(json.dumps(result))
    partial.rename(done)
    return result


def mean_logged(runs: list[dict[str, Any]], tag: str) -> float | None:
    """Return the mean of a scalar over the steps at which it was logged, and over seeds."""
    values = [value for one in runs for _, value in one["logged"].get(tag, [])]
    return statistics.mean(values) if values else None


def last_logged(runs: list[dict[str, Any]], tag: str) -> float | None:
    """Return the mean over seeds of a scalar's last value."""
    values = [one["logged"][tag][-1][1] for one in runs if one["logged"].get(tag)]
    return statistics.mean(values) if values else None


def rises(runs: list[dict[str, Any]]) -> str:
    """Return the steps at which the level had risen for the first time, a range over seeds for each level."""
    found: dict[float, list[int]] = {}
    for one in runs:
        levels = one["logged"].get("dsq/level", [])
        for level in sorted({value for _, value in levels} - {0.0}):
            found.setdefault(level, []).append(next(step for step, value in levels if value >= level))
    return ", ".join(f"{min(at)}" if min(at) == max(at) else f"{min(at)}–{max(at)}" for at in found.values()) or "–"


def table(study: Study, results: dict[str, list[dict[str, Any]]]) -> str:
    """Return the Markdown table of a study: means over seeds, changes seed by seed."""
    baseline = {one["seed"]: one["val_loss"] for one in next(iter(results.values()))}
    metric = study.metric.removeprefix("val_").replace("_", " ")
    rows = [
        f"| | validation loss | against fp32 | {metric} | mean q1 | level rises at step | stash of a batch, MB "
        "| times smaller | arithmetic, modelled | DRAM, modelled | CPU seconds |",
        "|---" * 11 + "|",
    ]
    raw = [value for runs in results.values() if (value := mean_logged(runs, "stash/raw_mb")) is not None]
    for variant, runs in results.items():
        losses = [one["val_loss"] for one in runs]
        spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        change = statistics.mean(one["val_loss"] / baseline[one["seed"]] - 1 for one in runs)
        packed = mean_logged(runs, "stash/packed_mb")
        times = None if packed is None or not raw else raw[0] / packed
        ratios = [last_logged(runs, f"dsq/{kind}_ratio") for kind in ("arithmetic", "dram")]
        bits = shown(mean_logged(runs, "dsq/q1"), ".1f", "32")
        rows.append(
            f"| {variant} | {statistics.mean(losses):.4f}{spread} | {change:+.2%} "
            f"| {statistics.mean(one[study.metric] for one in runs):.3f} | {bits} "
            f"| {rises(runs)} | {shown(packed, '.2f', f'{raw[0]:.2f}' if raw else '–')} | {shown(times, '.1f', '1')} "
            f"| {shown(ratios[0], '.2f')} | {shown(ratios[1], '.2f')} "
            f"| {statistics.mean(one['cpu_seconds'] for one in runs):.0f} |"
        )
    return "\n".join(rows)


def shown(value: float | None, how: str, otherwise: str = "–") -> str:
    return otherwise if value is None else format(value, how)


def plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw the validation curves of the runs from scratch, and the bits of the forward GEMM beneath."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, bits) = pyplot.subplots(2, figsize=(7, 6), sharex=True, height_ratios=(3, 1), layout="constrained")
    for variant, runs in results.items():
        steps = [step for step, _ in runs[0]["logged"]["val_loss"]]
        values = [[one["logged"]["val_loss"][i][1] for one in runs] for i in range(len(steps))]
        (line,) = losses.plot(steps, [statistics.mean(at) for at in values], label=variant)
        losses.fill_between(steps, list(map(min, values)), list(map(max, values)), alpha=0.2, color=line.get_color())
        if levels := runs[0]["logged"].get("dsq/q0"):
            bits.step(*zip(*levels, strict=True), where="post", color=line.get_color())
    losses.set_ylabel("validation loss, nats per byte")
    losses.legend()
    bits.set_ylabel("q0, seed 0")
    bits.set_yscale("log", base=2)
    bits.set_yticks([2, 4, 8, 16], ["2", "4", "8", "16"])
    bits.set_xlabel("optimizer step")
    for axes in (losses, bits):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def write(results: dict[str, dict[str, list[dict[str, Any]]]], out: Path, in_readme: bool) -> str:
    """Write tables, plot and numbers of what has been measured so far; return the tables."""
    out.mkdir(parents=True, exist_ok=True)
    parts = []
    for name, of_study in results.items():
        seeds = len(next(iter(of_study.values())))
        steps = next(iter(of_study.values()))[0]["steps"]
        parts.append(f"**{name.capitalize()}**, {steps} steps, {seeds} seed{'s' if seeds > 1 else ''}:")
        parts.append(table(STUDIES[name], of_study))
    parts.append(
        "Means ± standard deviations over seeds; stash counted on the tensors, mean over a run. Ratios are modelled, "
        "for the linear layers of the whole run against 16 bits; the paper's own model gives "
        f"{PAPER['arithmetic']} times less arithmetic and {PAPER['DRAM']} times less DRAM traffic on IWSLT17. "
        f"{platform.machine()} CPU, one thread, torch {torch.__version__}."
    )
    text = "\n\n".join(parts) + "\n"
    (out / "dsq.md").write_text(text)
    (out / "dsq.json").write_text(json.dumps(results))
    image = ""
    if "from scratch" in results:
        plot(results["from scratch"], out / "dsq.png")
        image = "\n![validation loss and bits over steps](examples/results/dsq.png)\n"
    readme = ROOT / "README.md"
    if in_readme and "<!-- evidence:dsq -->" in readme.read_text():
        show_in_readme(readme, "evidence:dsq", text + image)
    return text


def measured(seeds: int, names: list[str], extra: list[str]) -> Iterator[dict[str, dict[str, list[dict[str, Any]]]]]:
    """Yield all results so far after each seed of each study."""
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    # A process for every run: nothing of one run, such as a random generator, reaches the next.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for name, study in STUDIES.items():
            if name not in names:
                continue
            for seed in range(min(seeds, study.most_seeds or seeds)):
                of_study = results.setdefault(name, {variant: [] for variant in study.variants})
                for variant, runs in of_study.items():
                    runs.append(pool.submit(run, name, variant, seed, extra).result())
                yield results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0 on")
    parser.add_argument("--only", choices=STUDIES, nargs="*", help="these studies; default all")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the table, the plot and the numbers")
    arguments, extra = parser.parse_known_args()
    text = ""
    for results in measured(arguments.seeds, arguments.only or list(STUDIES), extra):
        text = write(results, arguments.out, arguments.out == RESULTS and not extra and not arguments.only)
    print(f"\n{text}\nwritten to {arguments.out}")


if __name__ == "__main__":
    main()
