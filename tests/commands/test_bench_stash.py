"""`bench stash` on a model of a few thousand parameters. What it measures is not asserted, only that it is measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit_lightning.__main__ import main
from lowbit_lightning.commands import bench, bench_measure, bench_stash, bench_stash_memory, bench_stash_report
from lowbit_lightning.commands.bench_guard import GuardWorkload
from lowbit_lightning.commands.bench_stash_contenders import PLAIN, WAYS, Contender
from lowbit_lightning.commands.bench_stash_kernels import eager_pack, eager_unpack
from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.kernels.block_float import BoxFormat, pack, unpack

TINY = GuardWorkload("15m", hidden=64, layers=1, vocabulary=64, batch=2, length=32)
SMALL = ["--elements", "5000", "--repeats", "2", "--threads", "1", "--memory", "0.001"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_stash.WORKLOADS, "15m", TINY)
    found = {"weights": 1e5, "peak": 3e5, "sample": 1e5}
    monkeypatch.setattr(bench_stash, "memory_in_process", lambda *arguments: found)
    monkeypatch.setitem(bench_measure.COPY_BYTES, "cpu", 2**16)


@pytest.fixture
def report(small: None, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    assert main(["bench", "stash", *SMALL, "--json", "out.json", "--plot", "out.png"]) == 0
    return json.loads(Path("out.json").read_text()), capsys.readouterr().out


def test_everything_is_measured_and_shown(report: tuple[dict[str, Any], str]) -> None:
    found, text = report
    rows = {row["name"]: row for row in found["workloads"][0]["rows"]}
    assert list(rows) == list(WAYS)
    assert not [row for row in rows.values() if "reason" in row]
    assert all(len(row["samples"]) == 2 for row in rows.values())
    assert rows[PLAIN]["gradient_error"] == 0
    assert rows[PLAIN]["time_ratio"] == 1
    kept = [rows[f"ours {bits} bits"]["kept_bytes"] for bits in (8, 4, 2)]
    assert rows[PLAIN]["kept_bytes"] > 3 * kept[0] > 3 * kept[1] > 3 * kept[2]
    errors = [rows[f"ours {bits} bits"]["gradient_error"] for bits in (8, 4, 2)]
    assert 0 < errors[0] < errors[1] < errors[2]
    assert all(row["largest_batch"] == 5 for row in rows.values())
    assert all(row["pack"] > 0 and row["eager_unpack"] > 0 for row in found["kernels"])
    assert "ours 4 bits + checkpointing" in text
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_kept_is_what_autograd_saves_each_storage_once() -> None:
    contender = Contender(WAYS[PLAIN], TINY, "cpu")
    batch = TINY.batches(1)[0]
    own = {tensor.untyped_storage()._cdata for tensor in contender.module.parameters()}
    own |= {tensor.untyped_storage()._cdata for tensor in [*contender.module.buffers(), *batch.values()]}
    seen: dict[int, int] = {}

    def saw(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(saw, lambda x: x):
        loss = contender.forward(batch)
    saved = sum(seen.values())
    contender.backward(loss)
    assert saved <= contender.kept_bytes(batch) <= saved + 1024  # the loss itself, and scalars


def test_kept_bytes_of_ours_are_those_that_it_counts() -> None:
    contender = Contender(WAYS["ours 4 bits"], TINY, "cpu")
    kept = contender.kept_bytes(TINY.batches(1)[0])
    assert contender.stash is not None
    assert kept == pytest.approx(contender.stash.meter.packed_bytes.total(), rel=0.05)


def test_peaks_are_measured_in_the_way_that_is_asked_for() -> None:
    found = bench_stash_memory.memory(PLAIN, TINY, "cpu")
    assert found["weights"] == sum(param.nbytes for param in TINY.module().parameters())
    assert set(found) == {"weights", "peak", "sample"}


def test_a_way_that_fails_is_a_row_that_says_why(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Contender, batch: object) -> torch.Tensor:
        if self.way.offload:
            raise RuntimeError("no room")
        return forward(self, batch)  # type: ignore[arg-type]

    forward = Contender.forward
    monkeypatch.setattr(Contender, "forward", fail)
    rows = bench_stash._figures(TINY, bench_stash.measure(TINY, "cpu", 1), 8.0)["rows"]
    assert [row["name"] for row in rows if "reason" in row] == ["save_on_cpu"]
    table = bench_stash_report.ways_table(
        {"parameters": 1, "batch": 1, "length": 1, "vocabulary": 1, "name": "x", "rows": rows}, 8.0
    )
    assert "save_on_cpu: RuntimeError: no room" in table


def test_the_largest_batch_is_what_is_left_over_the_bytes_of_a_sample() -> None:
    found = {"weights": 100, "peak": 70.0, "sample": 10.0}
    assert bench_stash_memory.largest_batch(found, 4, 1000.0) == 57  # (1000 - 400 - 30) / 10
    assert bench_stash_memory.largest_batch(found, 4, 100.0) == 0
    assert bench_stash_memory.largest_batch({"weights": 100, "peak": None, "sample": None}, 4, 1e9) is None


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_eager_baseline_rounds_as_ours_does(bits: int) -> None:
    x, format = torch.randn(256, 64), BoxFormat(bits)
    eager = eager_unpack(*eager_pack(x, bits), bits, x.dtype).view_as(x)
    ours = unpack(pack(x, format, (1, 2, 3)), format, x.shape, x.dtype)
    assert (eager - x).norm() == pytest.approx(float((ours - x).norm()), rel=0.05)
    step = 2.0 ** (torch.frexp(x.view(-1, 16).abs().amax(1))[1] - bits + 1)
    assert ((eager - ours).view(-1, 16).abs() <= 1.001 * step[:, None]).all()


def test_targets_are_judged_by_the_worst_workload() -> None:
    rows = [
        [
            {
                "name": name,
                "times_smaller": 8.0 + i,
                "gradient_error": 0.01,
                "time_ratio": 1.4 + i,
                "kept_bytes": 10,
                "loss": 2,
            }
            for name in WAYS
        ]
        for i in range(2)
    ]
    kernels = [{"pack": 1.0, "eager_pack": 2.0, "unpack": 1.0, "eager_unpack": 4.0}]
    found = bench_stash_report.targets({"workloads": [{"rows": one} for one in rows], "kernels": kernels})
    assert [one["reached"] for one in found] == [True, True, True, False, False, True, False, True]
    assert found[3]["value"] == 2.4


@pytest.mark.parametrize(("option", "value"), [("--memory", "0"), ("--elements", "-1")])
def test_numbers_out_of_range_are_named(option: str, value: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{option} {value}.* is out of range: more than 0"):
        bench.run(["stash", option, value])


@pytest.mark.parametrize("name", bench_stash.WORKLOADS)
def test_workloads_have_the_size_they_are_named_after(name: str) -> None:
    with torch.device("meta"):
        numel = sum(param.numel() for param in bench_stash.WORKLOADS[name].module().parameters())
    assert numel == pytest.approx(float(name.removesuffix("m")) * 1e6, rel=0.1)
