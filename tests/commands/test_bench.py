"""`bench optim` on tensors of a few thousand elements. What it measures is not asserted, only that it is measured."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit_lightning.__main__ import main
from lowbit_lightning.commands import bench_contenders, bench_measure, bench_optim, bench_probe, bench_workloads
from lowbit_lightning.commands.bench_contenders import CONTENDERS
from lowbit_lightning.commands.bench_probe import Probe
from lowbit_lightning.commands.bench_workloads import Workload, plan_workload

PEERS = [name for name in CONTENDERS if name.startswith(("torchao", "bitsandbytes"))]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors, no peers, and probes in this process: the slow part of the real thing is left out."""
    monkeypatch.setitem(bench_workloads.SINGLE, "10m", [(64, 128), (32,)])
    monkeypatch.setitem(bench_measure.COPY_BYTES, "cpu", 2**20)
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(bench_optim, "probe_in_process", lambda *arguments: bench_probe.probe(*arguments[:-1]))


def rows_of(path: Path) -> dict[str, Any]:
    workload = json.loads(path.read_text())["workloads"][0]
    return workload["rows"]


def test_table_has_a_row_for_every_optimizer(small: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "optim", "--workload", "10m", "--repeats", "2", "--threads", "1"]) == 0
    captured = capsys.readouterr()
    table = captured.out.split("10m: ")[1].split("\n\n")[0].splitlines()
    assert [line[:20].rstrip() for line in table[2:]] == list(CONTENDERS)
    measured = [line for line in table[1:] if not line.startswith(tuple(PEERS))]
    assert len({len(line) for line in measured}) == 1, "columns are not aligned"
    assert "[10m] round 2 of 2" in captured.err


def test_missing_peer_is_a_row_that_says_how_to_get_it(small: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "optim", "--workload", "10m", "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("is not installed: pip install ") == len(PEERS)


def test_failing_contender_is_a_row_with_the_reason(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(params: object) -> torch.optim.Optimizer:
        raise RuntimeError("no kernel for this device\nlong story")

    monkeypatch.setitem(CONTENDERS, "torch foreach", fail)
    assert main(["bench", "optim", "--workload", "10m", "--repeats", "1", "--json", "out.json"]) == 0
    rows = rows_of(tmp_path / "out.json")
    assert rows["torch foreach"] == {"reason": "RuntimeError: no kernel for this device"}
    assert rows["SoloAdamW 4/2"]["ratio"] > 0


def test_json_holds_figures_and_every_sample(small: None, tmp_path: Path) -> None:
    assert main(["bench", "optim", "--workload", "10m", "--repeats", "3", "--dtype", "bf16", "--json", "out.json"]) == 0
    rows = rows_of(tmp_path / "out.json")
    ours, fused = rows["SoloAdamW 4/2"], rows["torch fused"]
    for samples in ("samples", "warm_samples", "copy_samples"):
        assert len(ours[samples]) == 3
    assert ours["min_seconds"] == min(ours["samples"])
    assert fused["ratio"] == fused["warm_ratio"] == 1
    assert fused["state_bytes_per_parameter"] == pytest.approx(4, abs=0.01)
    assert fused["moved_bytes_per_parameter"] == pytest.approx(14, abs=0.01)
    # 4 + 2 bits and three fp32 numbers per block of 128; the vector of 32 and the step counters are fp32.
    assert ours["state_bytes"] == 64 * 128 * 27 // 32 + 32 * 8 + 2 * 4


def test_slow_optimizer_sits_out_after_three_rounds(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench_optim, "_SLOW_SECONDS", 0.0)
    assert main(["bench", "optim", "--workload", "10m", "--repeats", "5", "--json", "out.json"]) == 0
    assert len(rows_of(tmp_path / "out.json")["SoloAdamW 2/2"]["samples"]) == 3


def test_plot_is_a_png(small: None, tmp_path: Path) -> None:
    assert main(["bench", "optim", "--workload", "10m", "--repeats", "1", "--plot", "out.png"]) == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_is_refused_before_measuring(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench", "optim", "--plot", "out.png"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--device", "tpu"], ["--device 'tpu'", "cpu, cuda"]),
        (["--workload", "10m", "tyni"], ["--workload 'tyni'", "10m, 100m, 1b-mix, tiny", "Did you mean tiny?"]),
        (["--dtype", "fp16"], ["--dtype 'fp16'", "fp32, bf16"]),
        (["--repeats", "0"], ["--repeats 0", "at least 1"]),
        (["--threads", "-1"], ["--threads -1", "at least 1"]),
        (["--json", "nowhere/out.json"], ["--json 'nowhere/out.json'", "create it first"]),
    ],
)
def test_bad_argument_is_named_with_what_is_allowed(
    arguments: list[str], named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "optim", *arguments]) == 2
    message = capsys.readouterr().err
    assert [text for text in named if text not in message] == []


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "optim", "--device", "cuda"]) == 2
    assert "--device 'cuda'" in capsys.readouterr().err


def test_workload_without_memory_for_it_is_skipped_and_says_so(
    small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_optim, "available_bytes", lambda device: 2**30)
    assert main(["bench", "optim", "--workload", "100m"]) == 0
    assert "100m: skipped: needs about 6.8 GiB of free memory, there are 1.0" in capsys.readouterr().out


def test_mix_shrinks_with_memory_by_whole_layers() -> None:
    whole, part = (plan_workload("1b-mix", torch.float32, available) for available in (None, 20 * 2**30))
    assert whole.numel == 1_235_814_400  # Llama 3.2 1B
    assert 0 < part.numel * 45 < 20 * 2**30
    assert part.note.startswith("4 of 16 layers")
    assert not plan_workload("1b-mix", torch.float32, 2**30).shapes


def test_a_process_of_its_own_probes_one_optimizer() -> None:
    workload = Workload("small", [(64, 128)])
    probe = bench_probe.probe_in_process("torch fused", workload, "cpu", "fp32", threads=1)
    assert probe.reason is None
    assert probe.state_bytes == 64 * 128 * 8 + 4
    assert probe.first_step_seconds is not None


def test_a_process_that_dies_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_probe.sys, "executable", "false")
    probe = bench_probe.probe_in_process("torch fused", Workload("small", [(8,)]), "cpu", "fp32", threads=1)
    assert probe == Probe(reason="exit status 1")


def test_transient_bytes_sees_temporaries_and_only_those() -> None:
    tensor = torch.ones(4 * 2**20)
    tensor.mul_(2)
    in_place = bench_measure.transient_bytes(lambda: tensor.mul_(2), "cpu")
    with_temporary = bench_measure.transient_bytes(lambda: tensor.mul(2).sum(), "cpu")
    if in_place is None or with_temporary is None:
        assert not Path("/proc/self/clear_refs").exists(), "unknown only where the system cannot tell"
        return
    assert in_place < 2**20
    assert tensor.nbytes <= with_temporary + 2**20 <= tensor.nbytes + 3 * 2**20


def test_peers_are_silenced_and_logging_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    import logging
    import warnings

    with bench_contenders.peers_silenced():
        warnings.warn("not shown", stacklevel=1)
        logging.getLogger("peer").warning("not shown")
    logging.getLogger("peer").warning("shown")
    assert caplog.messages == ["shown"]
