"""`bench zo` on a model of a few thousand parameters. What it measures is not asserted, only that it is measured."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit_lightning.__main__ import main
from lowbit_lightning.commands import bench_zo, bench_zo_memory, bench_zo_report
from lowbit_lightning.commands.bench_guard import GuardWorkload

SMALL = ["--tokens", "8", "32", "--perturbations", "8", "1", "--elements", "2000", "--repeats", "2", "--threads", "1"]
MEMORY = {
    "weights": 100,
    "largest": 10,
    "tokens": 256,
    "perturbations": 8,
    "forward": 48,
    "inference": 50,
    "sequential": 64,
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = GuardWorkload("20m", hidden=64, layers=1, vocabulary=64, batch=1, length=16)
    monkeypatch.setitem(bench_zo.WORKLOADS, "20m", tiny)
    monkeypatch.setattr(bench_zo, "memory_in_process", lambda *arguments: {**MEMORY, "batched": 90})


@pytest.fixture
def report(small: None, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    assert main(["bench", "zo", *SMALL, "--json", "out.json", "--plot", "out.png"]) == 0
    return json.loads(Path("out.json").read_text()), capsys.readouterr().out


def test_everything_is_measured_and_shown(report: tuple[dict[str, Any], str]) -> None:
    found, text = report
    rows = found["workloads"][0]["rows"]
    ways = [(row["way"], row["tokens"], row["perturbations"]) for row in rows]
    each = [("sequential", 1), ("sequential", 8), ("batched", 8), ("published", 8)]
    assert ways == [(way, tokens, count) for tokens in (8, 32) for way, count in each]
    assert all(len(row["samples"]["steps"]) == len(row["samples"]["forwards"]) == 2 for row in rows)
    assert all(row["forwards_per_step"] > 0 for row in rows)
    assert all(row["times_faster"] > 0 for row in found["signs"]["rows"] if "signs" in row["name"])
    assert "not measured" in text  # no run of 256 tokens
    assert "these are the processor's seconds, on one thread" in text
    assert "peak of sequential steps" in text
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")


def test_batches_have_the_tokens_asked_for() -> None:
    for tokens in (16, 64, 256, 1024, 2048):
        one = bench_zo.sized(bench_zo.WORKLOADS["20m"], tokens)
        assert one.batch * one.length == tokens


@pytest.mark.parametrize("name", bench_zo.WORKLOADS)
def test_workloads_have_the_size_they_are_named_after(name: str) -> None:
    with torch.device("meta"):
        numel = sum(param.numel() for param in bench_zo.WORKLOADS[name].module().parameters())
    assert numel == pytest.approx(float(name.removesuffix("m")) * 1e6, rel=0.1)


def test_published_step_comes_back_to_its_weights_but_for_rounding_and_the_update(small: None) -> None:
    """The baseline is the method: at a step size of next to nothing the weights stay where they were."""
    workload = bench_zo.sized(bench_zo.WORKLOADS["20m"], 16)
    module = workload.module()
    before = [param.detach().clone() for param in module.parameters()]
    with torch.no_grad(), bench_zo.silent(module):
        bench_zo._published_step(module, workload.batches(1)[0], 4)
    after = list(module.parameters())
    assert all(torch.allclose(*pair, atol=2e-5) for pair in zip(before, after, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_targets_are_judged_by_the_worst_row_of_the_model_they_are_stated_for() -> None:
    shares = {("sequential", 256): 1.1, ("sequential", 1024): 1.3, ("sequential", 16): 9.0, ("batched", 16): 0.7}
    rows = [
        {"way": way, "tokens": tokens, "perturbations": 8, "share": share} for (way, tokens), share in shares.items()
    ]
    signs = {"rows": [{"times_faster": 12.0}, {"times_faster": 9.0}]}
    one = {"name": "20m", "rows": rows, "memory": {**MEMORY, "batched": 90}}
    found = bench_zo_report.targets({"signs": signs, "workloads": [one]})
    assert [target["reached"] for target in found] == [False, False, True, None, True]
    assert found[1]["value"] == 1.3
    tight = {**one, "memory": {**MEMORY, "sequential": 66, "batched": 90}}  # bound: 50 + 10 + 5
    assert bench_zo_report.targets({"signs": signs, "workloads": [tight]})[-1]["reached"] is False
    other = {**one, "name": "2m"}
    rest = bench_zo_report.targets({"signs": signs, "workloads": [other]})[1:]
    assert {target["reached"] for target in rest} == {None}


def test_batched_row_without_memory_for_it_is_skipped_and_says_so(
    small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_zo, "available_bytes", lambda device: 1000)
    assert main(["bench", "zo", *SMALL]) == 0
    assert "skipped: needs" in capsys.readouterr().out


def test_memory_is_that_of_the_model_asked_for() -> None:
    tiny = GuardWorkload("tiny", hidden=64, layers=1, vocabulary=512, batch=1, length=16)
    found = bench_zo_memory.memory(tiny, 2, "cpu")
    params = [param.nbytes for param in tiny.module().parameters()]
    assert (found["weights"], found["largest"]) == (sum(params), max(params))
    assert found["inference"] is None or found["inference"] >= 0


def test_memory_without_an_answer_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_zo_memory.sys, "executable", "false")
    tiny = replace(bench_zo.WORKLOADS["2m"], layers=1)
    found = bench_zo_memory.memory_in_process(tiny, 2, "cpu", 1)
    assert "exit status" in found["reason"]
    assert bench_zo_report.memory_table(found).startswith("memory: exit status")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--workload", "10m"], ["--workload '10m'", "20m, 2m"]),
        (["--tokens", "16", "0"], ["--tokens 0", "at least 1"]),
        (["--perturbations", "0"], ["--perturbations 0", "at least 1"]),
        (["--elements", "-5"], ["--elements -5", "at least 1"]),
        (["--plot", "nowhere/out.png"], ["--plot 'nowhere/out.png'", "create it first"]),
    ],
)
def test_bad_argument_is_named_with_what_is_allowed(
    arguments: list[str], named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "zo", *arguments]) == 2
    message = capsys.readouterr().err
    assert [text for text in named if text not in message] == []
