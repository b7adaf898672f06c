"""`bench guard` on a model of a few thousand parameters. What it measures is not asserted, only that it is measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit_lightning.__main__ import main
from lowbit_lightning.commands import bench_guard, bench_measure
from lowbit_lightning.commands.bench_guard import GuardWorkload


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = GuardWorkload("10m", hidden=64, layers=1, vocabulary=64, batch=2, length=16)
    monkeypatch.setitem(bench_guard.WORKLOADS, "10m", tiny)
    monkeypatch.setitem(bench_measure.COPY_BYTES, "cpu", 2**20)


def measured(*arguments: str) -> dict[str, Any]:
    assert main(["bench", "guard", "--json", "out.json", *arguments]) == 0
    workload: dict[str, Any] = json.loads(Path("out.json").read_text())["workloads"][0]
    return workload


def test_table_has_a_row_for_each_optimizer(small: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "guard", "--repeats", "2", "--threads", "1"]) == 0
    table = capsys.readouterr().out.split("10m: ")[1].split("\n\n")[0].splitlines()
    assert [line[:13].rstrip() for line in table[2:]] == list(bench_guard.OPTIMIZERS)
    assert len({len(line) for line in table[1:]}) == 1, "columns are not aligned"


def test_json_holds_figures_and_every_sample(small: None) -> None:
    workload = measured("--repeats", "3")
    for row in workload["rows"].values():
        assert {len(samples) for samples in row["samples"].values()} == {3}
        assert all(sample > 0 for samples in row["samples"].values() for sample in samples)
        assert row["monitor_share"] > 0
        assert row["snapshot_share"] > 0
    assert workload["tokens"] == 32


def test_a_snapshot_is_weights_and_states(small: None) -> None:
    """Twelve bytes per fp32 parameter with AdamW; random generators, counters and schedules are small."""
    rows = measured("--repeats", "1")["rows"]
    numel = sum(param.numel() for param in bench_guard.WORKLOADS["10m"].module().parameters())
    assert 12 * numel <= rows["torch AdamW"]["snapshot_bytes"] < 12 * numel + 50_000
    assert rows["SoloAdamW 4/2"]["snapshot_bytes"] < 6 * numel + 50_000


def test_the_step_is_counted_without_the_hooks_within_it(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 2.0, 5.0, 10.0, 10.0, 11.0])
    clock = bench_guard._Clock("cpu")
    monkeypatch.setattr(clock, "_now", lambda: next(times))
    hook = "[Callback]SpikeMonitor.on_before_optimizer_step"
    clock.start("run_training_batch")  # 0
    clock.start(hook)  # 2
    clock.start("[Callback]Other.on_before_optimizer_step")
    clock.stop("[Callback]Other.on_before_optimizer_step")
    clock.stop(hook)  # 5
    clock.stop("run_training_batch")  # 10
    clock.start("[Callback]SpikeGuard.on_train_batch_end")  # 10
    clock.stop("[Callback]SpikeGuard.on_train_batch_end")  # 11
    assert dict(clock.seconds) == {"hooks": 3, "step": 7, "snapshot": 1}


def test_the_rare_look_at_the_weights_counts_at_its_share() -> None:
    row = bench_guard.Row(
        parameters=10, snapshot_bytes=120, looks=[True, False, False], steps=[1.0] * 3, hooks=[0.5, 0.1, 0.1],
        snapshots=[0.2] * 3, copies=[1.0] * 3,
    )  # fmt: skip
    figures = bench_guard._figures(row, copied=100)
    assert figures["monitor_seconds"] == pytest.approx(0.9 * 0.1 + 0.1 * 0.5)
    assert figures["snapshot_share"] == pytest.approx(0.002)
    assert figures["snapshot_predicted_seconds"] == pytest.approx(2.4)


@pytest.mark.parametrize("name", bench_guard.WORKLOADS)
def test_workloads_have_the_size_they_are_named_after(name: str) -> None:
    with torch.device("meta"):
        numel = sum(param.numel() for param in bench_guard.WORKLOADS[name].module().parameters())
    assert numel == pytest.approx(float(name.removesuffix("m")) * 1e6, rel=0.05)


def test_workload_without_memory_for_it_is_skipped_and_says_so(
    small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_guard, "available_bytes", lambda device: 1000)
    assert main(["bench", "guard"]) == 0
    assert "skipped: needs about" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--workload", "1b-mix"], ["--workload '1b-mix'", "10m, 100m"]),
        (["--device", "tpu"], ["--device 'tpu'", "cpu, cuda"]),
        (["--repeats", "0"], ["--repeats 0", "at least 1"]),
        (["--json", "nowhere/out.json"], ["--json 'nowhere/out.json'", "create it first"]),
    ],
)
def test_bad_argument_is_named_with_what_is_allowed(
    arguments: list[str], named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "guard", *arguments]) == 2
    message = capsys.readouterr().err
    assert [text for text in named if text not in message] == []


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "guard", "--device", "cuda"]) == 2
    assert "--device 'cuda'" in capsys.readouterr().err
