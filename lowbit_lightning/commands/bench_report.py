"""What ``bench optim`` shows: the text table, and the plot."""

from pathlib import Path
from typing import Any

from lowbit_lightning.atomic_file import atomic_file

COLUMNS = (
    "optimizer", "ms", "min ms", "× fused", "× warm", "state B", "transient MB", "first s", "moved B", "% of copy",
)  # fmt: skip
LEGEND = """\
ms, min ms    median and fastest step, on cold caches, as after a backward pass
× fused       time against torch's fused AdamW in the same round, median (below 1: faster)
× warm        the same, right after a step of the same optimizer
state B       bytes of optimizer state per parameter, counted from the tensors
transient MB  peak memory of a step beyond what was in use before it (10^6 bytes)
first s       first step of a new process with empty caches of compiled kernels, compilation included
moved B       bytes per parameter that a step must move at the least: 3 × weight + 2 × state
% of copy     those bytes per second, against copy_ of a large tensor at the same moment (read + written);
              above 100 % is possible on a CPU, where copying also fetches what it is about to overwrite"""


def header(setting: dict[str, Any]) -> str:
    """Return the lines that say where and how was measured."""
    versions = [f"{name} {version or 'not installed'}" for name, version in setting["versions"].items()]
    lines = [
        f"{setting['device']} ({setting['device_type']}), threads: {setting['threads']}, "
        f"{setting['dtype']} weights and gradients, {setting['repeats']} rounds",
        ", ".join(versions),
    ]
    if setting["remark"]:
        lines.append(f"Note: {setting['remark']}.")
    return "\n".join(lines)


def table(workload: dict[str, Any]) -> str:
    """Return the aligned table of one workload."""
    if not workload["rows"]:
        return f"{workload['name']}: {workload['note']}"
    title = f"{workload['name']}: {_size(workload)}"
    if workload["note"]:
        title += f" ({workload['note']})"
    if workload["copy_bytes_per_second"]:
        title += f"; copy bandwidth {workload['copy_bytes_per_second'] / 1e9:,.1f} GB/s"
    cells = {name: _cells(row) for name, row in workload["rows"].items() if "samples" in row}
    names = max(len(name) for name in workload["rows"])
    widths = [max(len(line[i]) for line in [COLUMNS[1:], *cells.values()]) for i in range(len(COLUMNS) - 1)]
    lines = [title, "  ".join([COLUMNS[0].ljust(names), *(_right(COLUMNS[1:], widths))])]
    for name, row in workload["rows"].items():
        values = _right(cells[name], widths) if name in cells else [row["reason"]]
        lines.append("  ".join([name.ljust(names), *values]))
    return "\n".join(lines)


def _size(workload: dict[str, Any]) -> str:
    tensors = workload["tensors"]
    return f"{tensors:,} tensor{'s' if tensors > 1 else ''}, {workload['parameters'] / 1e6:,.1f}M parameters"


def _right(cells: tuple[str, ...], widths: list[int]) -> list[str]:
    return [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['median_seconds'] * 1e3:,.2f}",
        f"{row['min_seconds'] * 1e3:,.2f}",
        "-" if row["ratio"] is None else f"{row['ratio']:.2f}",
        "-" if row["warm_ratio"] is None else f"{row['warm_ratio']:.2f}",
        f"{row['state_bytes_per_parameter']:.3f}",
        "-" if row["transient_bytes"] is None else f"{row['transient_bytes'] / 1e6:,.1f}",
        f"{row['first_step_seconds']:.2f}",
        f"{row['moved_bytes_per_parameter']:.2f}",
        f"{row['share_of_copy_bandwidth']:.0%}",
    )


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw, for each workload, every optimizer's time against torch's fused AdamW, labelled with its bytes of state."""
    from matplotlib.figure import Figure

    workloads = [workload for workload in report["workloads"] if workload["rows"]]
    figure = Figure(figsize=(8, 0.8 + 3.2 * max(1, len(workloads))), layout="constrained")
    for position, workload in enumerate(workloads):
        axes = figure.add_subplot(len(workloads), 1, position + 1)
        rows = {name: row for name, row in workload["rows"].items() if row.get("ratio") is not None}
        ours = [
            "tab:orange" if name.startswith(("SoloAdamW", "MicroAdam", "StableSPAM")) else "tab:blue" for name in rows
        ]
        bars = axes.barh(list(rows), [row["ratio"] for row in rows.values()], color=ours)
        labels = [f"{row['ratio']:.2f}×, {row['state_bytes_per_parameter']:.2f} B" for row in rows.values()]
        axes.bar_label(bars, labels, padding=3)
        axes.set_xscale("log")
        axes.margins(x=0.3)
        axes.axvline(1, color="grey", linewidth=1)
        axes.invert_yaxis()
        axes.set_title(f"{workload['name']}: {_size(workload)}")
        axes.set_xlabel("step time against torch's fused AdamW; label: bytes of state per parameter")
    setting = report["setting"]
    figure.suptitle(f"{setting['device']}, threads: {setting['threads']}, {setting['dtype']}")
    with atomic_file(path) as file:
        figure.savefig(file, dpi=150, format="png")
