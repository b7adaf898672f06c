"""What ``bench zo`` shows: aligned tables, the targets of the project and whether they are reached, and the plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowbit_lightning.atomic_file import atomic_file

LEGEND = """\
× faster       than the published way in the same round, median
step ms        of the Trainer, from the start of a batch to its end: all forward passes and the update
forward ms     one forward pass on the same batch, without a Trainer
forwards       step over forward within a pair, median; × (N+1) is that over the passes that a step consists of
published      the authors' loop: weights perturbed in place and back, signs drawn by randint; without a Trainer
peak MB        above the loaded model (10^6 bytes); batched passes have their activations N times
inference      a Trainer's validation; forward is bare passes, without a Trainer
bound          inference + the largest parameter + 5 % of the weights"""

#: What targets are stated for; with fewer parameters a step is mostly the time it takes to ask for it.
_MODEL = "20m"
#: Way, tokens it is stated for, largest share of N+1 forward passes; at FZOO's default of 8 perturbations.
_SHARES = (("sequential", (256, 10**9), 1.25), ("batched", (16, 16), 0.75), ("batched", (64, 64), 1.0))
_TIMES_FASTER = 10.0
_DEFAULT_N = 8


def header(setting: dict[str, Any]) -> str:
    """Return the lines that say where and how was measured."""
    lines = [
        f"{setting['device']} ({setting['device_type']}), threads: {setting['threads']}, {setting['dtype']} weights, "
        f"{setting['repeats']} rounds",
        ", ".join(f"{name} {setting['versions'][name] or 'not installed'}" for name in ("lowbit-lightning", "torch")),
    ]
    if setting["remark"]:
        lines.append(f"Note: {setting['remark']}.")
    return "\n".join(lines)


def signs_table(signs: dict[str, Any]) -> str:
    """Return the table of sign passes."""
    copy = signs["rows"][0]["seconds"]
    rows = [
        (
            row["name"],
            f"{row['seconds'] * 1e3:,.1f}",
            f"{row['seconds'] / copy:.1f}",
            f"{row['times_faster']:.1f}" if "times_faster" in row else "",
        )
        for row in signs["rows"]
    ]
    title = f"signs: one tensor of {signs['elements'] / 1e6:,.0f}M elements"
    return "\n".join([title, *_aligned([("pass", "ms", "× copy_", "× faster"), *rows], 1)])


def steps_table(workload: dict[str, Any]) -> str:
    """Return the table of steps of one workload."""
    rows = [
        (
            row["way"],
            str(row["tokens"]),
            str(row["perturbations"]),
            *((row["reason"], "", "", "") if "reason" in row else _cells(row)),
        )
        for row in workload["rows"]
    ]
    title = f"{workload['name']}: a Llama of {workload['parameters'] / 1e6:,.1f}M parameters"
    head = ("way", "tokens", "N", "step ms", "forward ms", "forwards", "× (N+1)")
    return "\n".join([title, *_aligned([head, *rows], 1)])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['step_seconds'] * 1e3:,.1f}",
        f"{row['forward_seconds'] * 1e3:,.1f}",
        f"{row['forwards_per_step']:.2f}",
        f"{row['share']:.2f}",
    )


def memory_table(memory: dict[str, Any]) -> str:
    """Return the table of peaks."""
    if (reason := _no_memory(memory)) is not None:
        return f"memory: {reason}"
    base = memory["inference"]
    rows = [
        (name, f"{memory[name] / 1e6:,.1f}", "" if name == "inference" else f"{(memory[name] - base) / 1e6:+,.1f}")
        for name in ("forward", "inference", "sequential", "batched")
    ]
    rows.append(("bound", f"{_bound(memory) / 1e6:,.1f}", f"{(_bound(memory) - base) / 1e6:+,.1f}"))
    title = (
        f"memory: weights {memory['weights'] / 1e6:,.1f} MB, largest parameter {memory['largest'] / 1e6:,.1f} MB, "
        f"{memory['tokens']} tokens, N = {memory['perturbations']}"
    )
    return "\n".join([title, *_aligned([("way", "peak MB", "over inference"), *rows], 1)])


def _no_memory(memory: dict[str, Any]) -> str | None:
    if "reason" in memory:
        return str(memory["reason"])
    return "peaks cannot be measured here" if memory["inference"] is None else None


def _bound(memory: dict[str, Any]) -> float:
    return float(memory["inference"] + memory["largest"] + 0.05 * memory["weights"])


def targets(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each target with the worst value measured for it (None if it was not measured) and its limit."""
    faster = [row["times_faster"] for row in report["signs"]["rows"][:5] if "times_faster" in row]
    found: list[dict[str, Any]] = [
        {"target": "perturbed copy, times faster than randint", "limit": _TIMES_FASTER, "value": min(faster)}
    ]
    found[0]["reached"] = found[0]["value"] >= _TIMES_FASTER
    measured = {workload["name"]: workload for workload in report["workloads"]}
    workload = measured.get(_MODEL, {"rows": [], "memory": {"reason": "not measured"}})
    for way, (least, most), limit in _SHARES:
        shares = [
            row["share"]
            for row in workload["rows"]
            if row["way"] == way and least <= row["tokens"] <= most and row["perturbations"] == _DEFAULT_N
            if "share" in row
        ]
        tokens = f"{least} tokens" if least == most else f"{least} tokens and more"
        value = max(shares, default=None)
        name = f"{_MODEL}: {way} step at {tokens}, × (N+1) forwards, N = {_DEFAULT_N}"
        found.append({"target": name, "limit": limit, "value": value, "reached": value and value <= limit})
    memory = workload["memory"]
    known = _no_memory(memory) is None
    found.append(
        {
            "target": f"{_MODEL}: peak of sequential steps, MB",
            "limit": _bound(memory) / 1e6 if known else None,
            "value": memory["sequential"] / 1e6 if known else None,
            "reached": memory["sequential"] <= _bound(memory) if known else None,
        }
    )
    return found


def targets_table(found: Sequence[dict[str, Any]]) -> str:
    """Return the table of targets."""
    said = {True: "reached", False: "NOT reached", None: "not measured"}
    rows = [(one["target"], _number(one["value"]), _number(one["limit"]), said[one["reached"]]) for one in found]
    return "\n".join(_aligned([("target", "measured", "limit", ""), *rows], 1))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _aligned(rows: Sequence[Sequence[str]], names: int) -> list[str]:
    """Return lines with the first ``names`` columns to the left and numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if position < names else cell.rjust(width)
            for position, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw, for each workload, the time of a step over that of its forward passes against tokens."""
    from matplotlib.figure import Figure

    workloads = report["workloads"]
    figure = Figure(figsize=(8, 0.8 + 4.2 * len(workloads)), layout="constrained")
    colours = {"sequential": "tab:blue", "batched": "tab:orange", "published": "tab:grey"}
    for position, workload in enumerate(workloads):
        axes = figure.add_subplot(len(workloads), 1, position + 1)
        rows = [row for row in workload["rows"] if "share" in row]
        counts = sorted({row["perturbations"] for row in rows})
        for way, count in sorted({(row["way"], row["perturbations"]) for row in rows}):
            line = [row for row in rows if (row["way"], row["perturbations"]) == (way, count)]
            axes.plot(
                [row["tokens"] for row in line], [row["share"] for row in line], marker="o", color=colours[way],
                alpha=0.3 + 0.7 * (counts.index(count) + 1) / len(counts), label=f"{way}, N = {count}",
            )  # fmt: skip
        axes.axhline(1, color="grey", linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="tokens in a batch", title=workload["name"])
        axes.set_ylabel("step time / time of N+1 forward passes")
        axes.legend(fontsize="small")
    setting = report["setting"]
    figure.suptitle(f"{setting['device']}, threads: {setting['threads']}, {setting['dtype']}")
    with atomic_file(path) as file:
        figure.savefig(file, dpi=150, format="png")
