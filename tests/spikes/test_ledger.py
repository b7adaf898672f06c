"""The ledger survives what happens to files, and says which batches a resumed run must leave out."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.spikes.events import SpikeEvent
from lowbit_lightning.spikes.ledger import Ledger, LeftOut

PATH = Path("spikes.jsonl")


def event(batch: int = 5, value: float = math.nan) -> SpikeEvent:
    return SpikeEvent(
        "spike", 5, 0, batch, "loss", value, score=math.inf, limit=3.0, rank=1, signals={"loss": value}, samples=[1, 2]
    )


def test_line_is_strict_json_with_event_and_decision() -> None:
    Ledger(PATH, "a").append(event(), "skip", "the step is left out", left_out=(5, 5))
    line = json.loads(PATH.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert line["decision"] == "skip"
    assert line["left_out"] == [5, 5]
    assert str(SpikeEvent.from_json(line)) == str(event())


def test_resumed_run_reads_its_own_lines_only() -> None:
    Ledger(PATH, "earlier").append(event(1), "skip", "", left_out=(1, 1))
    ours = Ledger(PATH, "ours")
    ours.append(event(2), "skip", "", left_out=(2, 2))
    assert LeftOut(Ledger(PATH, "ours").read()).batches == {2}
    assert ours.read() == Ledger(PATH, "ours").read()


def test_torn_line_is_passed_over_and_not_written_into() -> None:
    ledger = Ledger(PATH, "a")
    ledger.append(event(1), "skip", "", left_out=(1, 1))
    with PATH.open("a") as file:
        file.write('{"kind": "spike", "st')
    ledger.append(event(2), "skip", "", left_out=(2, 2))
    assert LeftOut(ledger.read()).batches == {1, 2}


def test_rollback_leaves_a_stretch_behind() -> None:
    ledger = Ledger(PATH, "a")
    ledger.append(event(9), "rollback", "", left_out=(3, 9))
    assert LeftOut(ledger.read()).stretches == [(3, 9)]
    assert LeftOut(ledger.read()).batches == set()


def test_replayed_batches_are_judged_by_their_last_decision() -> None:
    ledger = Ledger(PATH, "a")
    ledger.append(event(2), "skip", "", left_out=(2, 2))
    ledger.append(event(6), "skip", "", left_out=(6, 6))
    ledger.append(event(9), "rollback", "", replayed=(4, 9))
    ledger.append(event(8), "skip", "", left_out=(8, 8))
    assert LeftOut(ledger.read()).batches == {2, 8}
    assert LeftOut(ledger.read()).stretches == []


def test_stretches_that_touch_are_passed_over_in_one_go() -> None:
    left_out = LeftOut([])
    left_out.stretches = [(3, 9), (5, 12), (13, 14), (20, 21)]
    assert [left_out.upcoming(batch) for batch in (2, 3, 5, 14, 15, 20)] == [0, 12, 10, 1, 0, 2]


def test_missing_file_has_no_lines() -> None:
    assert Ledger(PATH, "a").read() == []


def test_folder_is_made() -> None:
    ledger = Ledger(Path("runs/one/spikes.jsonl"), "a")
    ledger.check_writable()
    ledger.append(event(), "skip", "")
    assert len(ledger.read()) == 1


def test_unwritable_ledger_is_refused_by_name() -> None:
    Path("file").touch()
    with pytest.raises(InvalidArgumentError, match=r"ledger='file/spikes\.jsonl' cannot be written"):
        Ledger(Path("file/spikes.jsonl"), "a").check_writable()
    with pytest.raises(InvalidArgumentError, match=r"ledger='\.' cannot be written"):
        Ledger(Path(), "a").check_writable()


def test_full_disk_keeps_lines_in_memory_until_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(PATH, "a")
    ledger.append(event(1), "skip", "", left_out=(1, 1))
    written, full = os.write, True

    def half(descriptor: int, data: bytes) -> Any:
        return written(descriptor, data[: len(data) // 2]) if full else written(descriptor, data)

    monkeypatch.setattr(os, "write", half)
    with pytest.warns(UserWarning, match=r"spikes\.jsonl' cannot be written: No space left.*training goes on"):
        ledger.append(event(2), "skip", "", left_out=(2, 2))
    ledger.append(event(3), "skip", "", left_out=(3, 3))  # says nothing a second time: warnings are errors here
    assert LeftOut(ledger.read()).batches == {1}
    full = False
    ledger.append(event(4), "skip", "", left_out=(4, 4))
    assert [entry["batch"] for entry in ledger.read()] == [1, 2, 3, 4]
