"""What ``bench guard`` shows: one aligned table for each workload."""

from typing import Any

SNAPSHOT_EVERY = 100  # steps, SpikeGuard's default, over which the cost of one is spread

COLUMNS = (
    "optimizer", "step ms", "monitor ms", "predicted", "% of step", "snapshot ms", "predicted",
    f"% of {SNAPSHOT_EVERY} steps", "snapshot MB", "B/param",
)  # fmt: skip
LEGEND = f"""\
step ms      forward, backward and optimizer, median
monitor ms   all hooks of SpikeMonitor and SpikeGuard in a step, but for the snapshot; every tenth step's look at the
             weights is counted at a tenth
predicted    bytes that have to be moved over the bandwidth of copy_ at the same moment: gradients (and a tenth of the
             weights) read; weights and states read and written
snapshot ms  one snapshot to the CPU's memory; a run takes one every {SNAPSHOT_EVERY} steps, over which % spreads it
snapshot MB  bytes of one snapshot (10^6); a run keeps three by default"""


def table(workload: dict[str, Any]) -> str:
    """Return the aligned table of one workload."""
    title = f"{workload['name']}: {workload['parameters'] / 1e6:,.1f}M parameters, {workload['tokens']:,} tokens a step"
    if workload["note"]:
        return f"{title}: {workload['note']}"
    rows = [COLUMNS, *((name, *_cells(row)) for name, row in workload["rows"].items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return "\n".join([title, *lines])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['step_seconds'] * 1e3:,.1f}",
        f"{row['monitor_seconds'] * 1e3:,.2f}",
        f"{row['monitor_predicted_seconds'] * 1e3:,.2f}",
        f"{row['monitor_share']:.2%}",
        f"{row['snapshot_seconds'] * 1e3:,.1f}",
        f"{row['snapshot_predicted_seconds'] * 1e3:,.1f}",
        f"{row['snapshot_share']:.2%}",
        f"{row['snapshot_bytes'] / 1e6:,.1f}",
        f"{row['snapshot_bytes_per_parameter']:.2f}",
    )
