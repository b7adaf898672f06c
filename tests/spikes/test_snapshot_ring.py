import errno
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from spikes.rollback_run import Case, Rollback, assert_replay_is_exact, run

from lowbit_lightning.checkpoints import AtomicCheckpointIO
from lowbit_lightning.errors import CheckpointError, InvalidArgumentError
from lowbit_lightning.spikes import snapshot_ring
from lowbit_lightning.spikes.snapshot import TrainingSnapshot
from lowbit_lightning.spikes.snapshot_ring import SnapshotRing

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


class Taking(pl.Callback):
    def __init__(self, ring: SnapshotRing) -> None:
        self.ring = ring
        self.expected = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.ring.check_memory(trainer)
        self.expected = self.ring.expected_bytes(trainer)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.ring.take_first(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if self.ring.due(trainer.global_step):
            self.ring.take(trainer, pl_module)


def taken(steps: int = 10, optimizer: str = "AdamW", **options: Any) -> tuple[SnapshotRing, Taking]:
    ring = SnapshotRing(**options)
    callback = Taking(ring)
    run(Case(steps=steps, optimizer=optimizer, callbacks=(lambda: callback,)))
    return ring, callback


def steps_of(ring: SnapshotRing) -> list[int]:
    return [snapshot.step for snapshot in ring._snapshots]


def test_the_newest_are_kept() -> None:
    ring, _ = taken(every_n_steps=3, keep=3)
    assert steps_of(ring) == [3, 6, 9]


def test_a_step_that_could_have_none_is_made_up_for() -> None:
    ring = SnapshotRing(every_n_steps=4)
    for step in range(3, 28, 3):  # three optimizers
        if ring.due(step):
            ring._snapshots.append(TrainingSnapshot())
            ring._snapshots[-1].step = step
    assert steps_of(ring) == [6, 9, 12, 18, 21, 24]


def test_the_first_is_taken_before_the_first_step() -> None:
    ring, _ = taken(every_n_steps=4, keep=3)
    assert steps_of(ring) == [0, 4, 8]
    assert [snapshot.batch for snapshot in ring._snapshots] == [0, 4, 8]


def test_choice_is_the_newest_that_is_old_enough_or_the_oldest() -> None:
    ring, _ = taken(every_n_steps=3, keep=3, min_age=3)
    assert ring.choose(10).step == 6
    assert ring.choose(12).step == 9
    assert ring.choose(5).step == 3
    assert ring.choose(10, before_step=9).step == 6
    assert ring.choose(10, before_step=2).step == 3
    with pytest.raises(LookupError):
        SnapshotRing().choose(5)


def test_discarded_snapshots_are_taken_again() -> None:
    ring, _ = taken(every_n_steps=3, keep=3)
    memory = {id(snapshot) for snapshot in ring._snapshots}
    ring.discard_after(3)
    assert steps_of(ring) == [3]
    assert not ring.due(3)
    assert ring.due(6)
    assert {id(snapshot) for snapshot in [*ring._snapshots, *ring._spare]} == memory


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "SoloAdamW", "MicroAdam"])
def test_expected_bytes_are_those_taken(optimizer: str) -> None:
    ring, callback = taken(every_n_steps=3, keep=3, optimizer=optimizer)
    measured = sum(snapshot.num_bytes for snapshot in ring._snapshots)
    # Step counters and sums of metrics are not modelled.
    assert callback.expected == pytest.approx(measured, rel=0.1)


def test_a_ring_larger_than_memory_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot_ring, "free_memory_bytes", lambda: 10_000)
    with pytest.raises(InvalidArgumentError, match=r"keep=5.*disk") as error:
        taken(keep=5)
    assert "0.000 GB are free" in str(error.value)


def test_a_ring_larger_than_the_disk_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(snapshot_ring.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InvalidArgumentError, match=r"snapshots do not fit into .*keep=3"):
        taken(where="disk")


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"keep": 0}, {"min_age": -1}, {"where": "gpu"}])
def test_settings_out_of_range_are_named(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(InvalidArgumentError, match=f"snapshot.{name}"):
        SnapshotRing(**options)


def test_files_are_removed_at_the_end_and_after_a_killed_run(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    of_a_dead_process = folder / f"snapshot-{snapshot_ring.socket.gethostname()}-{2**22 + 1}-rank0-0.pt"
    of_another_host = folder / f"snapshot-{snapshot_ring.socket.gethostname()}-2-1-rank0-0.pt"
    for path in (of_a_dead_process, of_another_host):
        path.touch()
    ring, _ = taken(every_n_steps=3, keep=2, where="disk", directory=str(folder))
    own = {path for path in folder.iterdir() if str(os.getpid()) in path.name}
    assert len(own) == 2
    assert set(folder.iterdir()) == own | {of_another_host}
    ring.close()
    assert list(folder.iterdir()) == [of_another_host]


def test_on_disk_memory_for_one_is_reused() -> None:
    ring, _ = taken(every_n_steps=3, keep=3, where="disk")
    assert all(not snapshot._copy.tensors for snapshot in ring._snapshots)
    assert ring._staging is not None


def test_a_full_disk_costs_a_warning_and_the_snapshot_stays_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "snapshot")

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", full)
    with pytest.warns(UserWarning, match="No space left on device.*stays in memory"):
        assert_replay_is_exact(Case(guard={"where": "disk"}))


def test_a_disk_that_fills_up_later_keeps_what_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = AtomicCheckpointIO.save_checkpoint, []

    def fills_up(self: Any, *args: Any) -> None:
        calls.append(1)
        if len(calls) in (3, 4):
            raise OSError(errno.ENOSPC, "No space left on device", "snapshot")
        write(self, *args)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", fills_up)
    with pytest.warns(UserWarning, match="No space left"):
        assert_replay_is_exact(Case(guard={"where": "disk"}, to=2))


def test_a_snapshot_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    class Corrupt(Rollback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 6:
                for path in Path("snapshots").iterdir():
                    path.write_bytes(b"torn")
            super().on_train_batch_end(trainer, *args)

    with pytest.raises(CheckpointError, match="of step 4 cannot be read"):
        run(Case(options={"default_root_dir": tmp_path}), Corrupt(4, [9], "skip", where="disk"))


def test_no_snapshot_within_an_accumulation_window() -> None:
    class Watch(Taking):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            self.ring.take(trainer, pl_module)

    ring = SnapshotRing(keep=9)
    run(Case(steps=3, options={"accumulate_grad_batches": 2}, callbacks=(lambda: Watch(ring),)))
    assert steps_of(ring) == [0, 1, 2, 3]


def test_the_free_memory_of_this_machine_is_known_or_none() -> None:
    free = snapshot_ring.free_memory_bytes()
    assert free is None or free > 0
