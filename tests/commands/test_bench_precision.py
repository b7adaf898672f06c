"""`bench precision` on a model of a few thousand parameters: what it counts is checked, what it times is not."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lowbit_lightning.__main__ import main
from lowbit_lightning.commands import bench_precision
from lowbit_lightning.commands.bench_guard import GuardWorkload


def test_a_row_for_each_precision(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = GuardWorkload("10m", hidden=64, layers=1, vocabulary=64, batch=2, length=128)
    monkeypatch.setitem(bench_precision.WORKLOADS, "10m", tiny)
    assert main(["bench", "precision", "--repeats", "2", "--threads", "1", "--json", "out.json"]) == 0
    lines = capsys.readouterr().out.split("10m: ")[1].split("\n\n")[0].splitlines()
    assert len({len(line) for line in lines[1:]}) == 1, "columns are not aligned"
    rows = json.loads(Path("out.json").read_text())["workloads"][0]["rows"]
    assert list(rows) == list(bench_precision.VARIANTS)
    for row in rows.values():
        assert len(row["samples"]["steps"]) == 2
        assert 0 < row["layer_bytes"] < row["kept_bytes"]
    # bf16 casts every layer's input, and weight, by itself; else query, key and value have one, as have gate and up.
    tokens, inputs, weights = 256, [64, 64, 64, 64, 64, 64, 128], 4 * 64 * 64 + 3 * 64 * 128
    assert rows["bf16-mixed"]["layer_bytes"] == 2 * tokens * sum(inputs) + 2 * weights
    assert rows["INT4, not packed"]["layer_bytes"] == 2 * tokens * (64 + 64 + 64 + 128)
    assert rows["INT4"]["layer_bytes"] < 0.4 * rows["INT4, not packed"]["layer_bytes"]  # the groups are short here
    assert rows["bf16-mixed, GradientStabilizer"]["stabilizer_seconds"] > 0


def test_kept_bytes_are_those_of_a_known_network() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    x = torch.randn(32, 8)
    with bench_precision.kept_for_backward(model) as found:
        model(x)
    # Inputs of both layers; the second's is what tanh keeps too.
    assert found() == (4 * 32 * (8 + 16), 4 * 32 * (8 + 16))
    assert not model[0]._forward_hooks
