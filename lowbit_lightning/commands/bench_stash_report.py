"""What ``bench stash`` shows: aligned tables, the targets of the project and whether they are reached, and the plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowbit_lightning.atomic_file import atomic_file

from .bench_stash_contenders import PLAIN, PLAIN_BF16
from .bench_zo_report import header

__all__ = ["LEGEND", "header", "kernels_table", "plot", "targets", "targets_table", "ways_table"]

LEGEND = """\
kept MB        tensors that a forward pass made and that are alive at its end, without casts of weights (10^6 bytes)
x smaller      than what plain fp32 keeps
peak MB        of a step, above the model with its gradients
batch          samples that fit with weights, gradients and AdamW's states: modelled from peaks at two batch sizes
x time         a step over the plain one in the same precision and round, median; forward and backward
grad error     of all gradients together, relative to plain fp32
x copy         time of packing (and of unpacking) over that of copying the tensor once, in the same round, median
x faster       than the same in torch's own operations"""

# Name of a row, key, limit, whether it is a lower limit.
_LIMITS = (
    ("ours 4 bits", "times_smaller", 7.0, True),
    ("ours 8 bits", "gradient_error", 0.02, False),
    ("ours 4 bits", "gradient_error", 0.15, False),
    ("ours 4 bits", "time_ratio", 1.5, False),
)
_NAMES = {
    "times_smaller": "kept, times smaller than plain fp32",
    "gradient_error": "gradient error",
    "time_ratio": "step, x plain",
}
_TIMES_SMALLER_THAN_BF16, _TIMES_FASTER = 3.5, 3.0


def kernels_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of packing alone."""
    cells = [
        (
            row["dtype"],
            str(row["bits"]),
            *(
                text
                for name in ("pack", "unpack")
                for text in (
                    f"{row[name] * 1e3:,.2f}",
                    f"{row[name] / row['copy']:.2f}",
                    f"{row[f'eager_{name}'] / row[name]:.1f}",
                )
            ),
        )
        for row in rows
    ]
    head = ("dtype", "bits", "pack ms", "x copy", "x faster", "unpack ms", "x copy", "x faster")
    title = f"packing alone: {rows[0]['elements'] / 1e6:,.1f}M elements, boxes of 16, stochastic rounding"
    return "\n".join([title, *_aligned([head, *cells], 1)])


def ways_table(workload: dict[str, Any], memory: float) -> str:
    """Return the table of ways to train one model."""
    title = (
        f"{workload['name']}: a Llama of {workload['parameters'] / 1e6:,.1f}M parameters, {workload['batch']} x "
        f"{workload['length']} tokens, vocabulary {workload['vocabulary']}"
    )
    head = ("way", "kept MB", "x smaller", "peak MB", f"batch in {memory:g} GB", "step ms", "x time", "grad error")
    rows = [(row["name"], *_cells(row)) for row in workload["rows"]]
    reasons = [f"{row['name']}: {why}" for row in workload["rows"] if (why := row.get("reason"))]
    reasons += [f"{row['name']}: no peak, {why}" for row in workload["rows"] if (why := row.get("memory_reason"))]
    return "\n".join([title, *_aligned([head, *rows], 1), *reasons])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if "reason" in row:
        return ("failed", *[""] * 6)
    return (
        f"{row['kept_bytes'] / 1e6:,.1f}",
        f"{row['times_smaller']:.1f}",
        "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.1f}",
        "" if row["largest_batch"] is None else f"{row['largest_batch']:,}",
        f"{row['step_seconds'] * 1e3:,.1f}",
        f"{row['time_ratio']:.2f}",
        f"{row['gradient_error']:.4f}",
    )


def targets(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each target with the worst value measured for it (None if there is none) and its limit."""
    tables = [{row["name"]: row for row in workload["rows"]} for workload in report["workloads"]]
    found = []
    for name, key, limit, at_least in _LIMITS:
        values = [table[name][key] for table in tables if key in table[name]]
        found.append(_target(f"{name}: {_NAMES[key]}", values, limit, at_least))
    ours = "ours 4 bits, bf16-mixed"
    shares = [
        table[PLAIN_BF16]["kept_bytes"] / table[ours]["kept_bytes"]
        for table in tables
        if "kept_bytes" in table[PLAIN_BF16] and "kept_bytes" in table[ours]
    ]
    found.append(
        _target(f"{ours}: kept, times smaller than {PLAIN_BF16}", shares, _TIMES_SMALLER_THAN_BF16, at_least=True)
    )
    losses = [
        abs(table["ours 4 bits"]["loss"] - table[PLAIN]["loss"])
        for table in tables
        if "loss" in table[PLAIN] and "loss" in table["ours 4 bits"]
    ]
    found.append(_target("ours 4 bits: change of the loss", losses, 1e-5, at_least=False))
    for name in ("pack", "unpack"):
        values = [row[f"eager_{name}"] / row[name] for row in report["kernels"]]
        found.append(_target(f"{name}, times faster than torch's operations", values, _TIMES_FASTER, at_least=True))
    return found


def _target(name: str, values: Sequence[float], limit: float, at_least: bool) -> dict[str, Any]:
    worst = (min if at_least else max)(values, default=None)
    reached = None if worst is None else (worst >= limit if at_least else worst <= limit)
    return {"target": name, "value": worst, "limit": limit, "at_least": at_least, "reached": reached}


def targets_table(found: Sequence[dict[str, Any]]) -> str:
    """Return the table of targets."""
    said = {True: "reached", False: "NOT reached", None: "not measured"}
    rows = [
        (
            one["target"],
            "" if one["value"] is None else f"{one['value']:.3g}",
            f"{'at least' if one['at_least'] else 'at most'} {one['limit']:g}",
            said[one["reached"]],
        )
        for one in found
    ]
    return "\n".join(_aligned([("target", "worst", "limit", ""), *rows], 1))


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
    """Draw, for each workload, the time of a step against what is kept for it, labelled with the gradient error."""
    from matplotlib.figure import Figure

    workloads = report["workloads"]
    figure = Figure(figsize=(8, 0.8 + 4.5 * len(workloads)), layout="constrained")
    for position, workload in enumerate(workloads):
        axes = figure.add_subplot(len(workloads), 1, position + 1)
        for row in workload["rows"]:
            if "reason" in row:
                continue
            colour = "tab:orange" if row["name"].startswith("ours") else "tab:grey"
            axes.plot(row["kept_bytes"] / 1e6, row["time_ratio"], marker="o", color=colour)
            axes.annotate(
                f"{row['name']} ({row['gradient_error']:.3f})", (row["kept_bytes"] / 1e6, row["time_ratio"]),
                xytext=(6, 4), textcoords="offset points", fontsize="small",
            )  # fmt: skip
        axes.axhline(1, color="grey", linewidth=1)
        axes.set(xscale="log", xlabel="MB kept for backward", title=workload["name"])
        axes.set_ylabel("step time / plain, same precision")
        axes.margins(x=0.35, y=0.15)
    setting = report["setting"]
    figure.suptitle(f"{setting['device']}, threads: {setting['threads']}; in brackets: gradient error")
    with atomic_file(path) as file:
        figure.savefig(file, dpi=150, format="png")
