import errno
import os
import signal
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from spikes.rollback_run import Case, run

from lowbit_lightning.checkpoints import AtomicCheckpointIO
from lowbit_lightning.errors import CheckpointError
from lowbit_lightning.spikes import trusted
from lowbit_lightning.spikes.trusted import NAME, TrustedCheckpoints, find, verify

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Trusting(pl.Callback):
    """Stands for SpikeGuard in a healthy run."""

    def __init__(self, min_age: int) -> None:
        self.trusted = TrustedCheckpoints(min_age)
        self.promoted: list[tuple[int, int]] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.trusted.note_saved(trainer)
        if (path := self.trusted.healthy_step(trainer)) is not None:
            self.promoted.append((trainer.global_step, step_in(path)))


def step_in(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


def fit(saver: ModelCheckpoint, callback: pl.Callback, steps: int = 12) -> pl.Trainer:
    case = Case(steps=steps, options={"enable_checkpointing": True}, callbacks=(lambda: saver, lambda: callback))
    return run(case)[1]


def test_a_checkpoint_is_trusted_after_healthy_steps(tmp_path: Path) -> None:
    callback = Trusting(min_age=3)
    trainer = fit(ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1), callback)
    # What was saved at the end of step 2 is seen at the end of step 3, the first healthy one.
    assert callback.promoted[0] == (5, 2)
    assert find(trainer) == tmp_path / NAME
    assert step_in(tmp_path / NAME) == callback.promoted[-1][1] == 8


def test_a_checkpoint_that_was_deleted_or_overwritten_is_trusted_all_the_same(tmp_path: Path) -> None:
    callback = Trusting(min_age=4)
    fit(ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=1, save_last=True), callback)
    assert callback.promoted
    assert all(now - saved == 4 for now, saved in callback.promoted)
    callback.trusted.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [NAME, "last.ckpt", "step=12.ckpt"]


def test_candidates_of_steps_that_were_left_are_forgotten(tmp_path: Path) -> None:
    callback = Trusting(min_age=100)
    fit(ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1), callback, steps=9)
    callback.trusted.min_age = 1
    aside = [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert len(aside) == 1
    callback.trusted.discard_after(1)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert callback.trusted.healthy_step(fake_trainer(tmp_path)) is None


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    (tmp_path / f".{NAME}.candidate-7").write_bytes(b"of a killed run")
    callback = Trusting(min_age=3)
    fit(ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1), callback, steps=4)
    assert not (tmp_path / f".{NAME}.candidate-7").exists()


def fake_trainer(folder: Path, saver: Any = None) -> Any:
    saver = saver or saver_in(folder)
    return SimpleNamespace(
        is_global_zero=True, checkpoint_callbacks=[saver], loggers=[], default_root_dir=str(folder / "elsewhere")
    )


def saver_in(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=1)


def save(path: Path, step: int) -> None:
    content = {"global_step": step, "state_dict": {"weight": torch.full((64,), float(step))}}
    AtomicCheckpointIO().save_checkpoint(content | {"pytorch-lightning_version": "2.6"}, path)


def step_of_life(checkpoints: TrustedCheckpoints, trainer: Any, step: int, keep: int = 2) -> None:
    """One training step: the guard's hook, then a save, then the deletion of an old file."""
    checkpoints.note_saved(trainer)
    checkpoints.healthy_step(trainer)
    saver = trainer.checkpoint_callbacks[0]
    path = Path(saver.dirpath) / f"step={step}.ckpt"
    save(path, step)
    saver._last_checkpoint_saved, saver._last_global_step_saved = str(path), step
    (Path(saver.dirpath) / f"step={step - keep}.ckpt").unlink(missing_ok=True)


def test_torn_and_corrupt_files_are_never_chosen(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for step, folder in enumerate((first, second)):
        folder.mkdir()
        save(folder / NAME, step)
        os.utime(folder / NAME, (step, step))
    trainer = fake_trainer(first)
    trainer.checkpoint_callbacks = [saver_in(first), saver_in(second)]
    assert find(trainer) == second / NAME
    whole = (second / NAME).read_bytes()
    at = whole.index(torch.full((64,), 1.0).numpy().tobytes())
    (second / NAME).write_bytes(whole[:at] + b"x" + whole[at + 1 :])  # one byte of one weight
    os.utime(second / NAME, (1, 1))
    with pytest.warns(UserWarning, match=r"corrupt.*left out"):
        assert find(trainer) == first / NAME
    (second / NAME).write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match=r"torn.*left out"):
        assert find(trainer) == first / NAME


def test_a_corrupt_candidate_is_not_promoted(tmp_path: Path) -> None:
    trainer, checkpoints = fake_trainer(tmp_path), TrustedCheckpoints(2)
    for step in range(1, 5):
        step_of_life(checkpoints, trainer, step)
    before = step_in(tmp_path / NAME)
    for candidate in tmp_path.glob(".*"):
        candidate.write_bytes(candidate.read_bytes()[:-30])
    with pytest.warns(UserWarning, match="could not be made last-trusted.ckpt"):
        step_of_life(checkpoints, trainer, 5)
    assert step_in(tmp_path / NAME) == before


def test_nothing_trusted_is_none(tmp_path: Path) -> None:
    assert find(fake_trainer(tmp_path)) is None


def test_objects_in_a_checkpoint_do_not_hinder_trust(tmp_path: Path) -> None:
    trainer, checkpoints = fake_trainer(tmp_path), TrustedCheckpoints(1)
    path = tmp_path / "step=1.ckpt"
    torch.save({"global_step": 1, "hyper_parameters": SimpleNamespace(lr=1)}, path)
    saver = trainer.checkpoint_callbacks[0]
    saver._last_checkpoint_saved, saver._last_global_step_saved = str(path), 1
    checkpoints.note_saved(trainer)
    assert checkpoints.healthy_step(trainer) == tmp_path / NAME


def test_without_hard_links_the_file_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*args: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(trusted.os, "link", no_links)
    trainer, checkpoints = fake_trainer(tmp_path), TrustedCheckpoints(2)
    for step in range(1, 6):
        step_of_life(checkpoints, trainer, step, keep=9)
    assert step_in(tmp_path / NAME) == 3
    assert (tmp_path / "step=3.ckpt").exists()


def test_a_full_disk_is_a_warning_and_the_previous_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, checkpoints = fake_trainer(tmp_path), TrustedCheckpoints(1)
    for step in range(1, 4):
        step_of_life(checkpoints, trainer, step)
    before = step_in(tmp_path / NAME)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trusted.os, "replace", full)
    checkpoints.note_saved(trainer)
    with pytest.warns(UserWarning, match="No space left on device.*training goes on"):
        checkpoints.healthy_step(trainer)
    assert step_in(tmp_path / NAME) == before


def test_a_sharded_checkpoint_is_trusted_through_a_link(tmp_path: Path) -> None:
    trainer, checkpoints = fake_trainer(tmp_path), TrustedCheckpoints(1)
    saver = trainer.checkpoint_callbacks[0]
    for step in (1, 2):
        folder = tmp_path / f"step={step}.ckpt"
        folder.mkdir()
        (folder / ".metadata").write_bytes(b"tensors")
        torch.save({"global_step": step}, folder / "meta.pt")
        saver._last_checkpoint_saved, saver._last_global_step_saved = str(folder), step
        checkpoints.note_saved(trainer)
        assert checkpoints.healthy_step(trainer) == tmp_path / NAME
        assert int(torch.load(tmp_path / NAME / "meta.pt")["global_step"]) == step
    assert find(trainer) == tmp_path / NAME
    assert len(list(tmp_path.glob(".last-trusted.ckpt.step-*"))) == 1


def test_torch_writes_checksums(tmp_path: Path) -> None:
    save(tmp_path / "whole.ckpt", 1)
    with zipfile.ZipFile(tmp_path / "whole.ckpt") as archive:
        assert all(entry.CRC for entry in archive.infolist() if entry.file_size)
    verify(tmp_path / "whole.ckpt")
    with pytest.raises(CheckpointError):
        verify(tmp_path / "none.ckpt")


# Kills


class Crash:
    """Kills the process at the n-th write, fsync, link, rename or unlink."""

    def __init__(self, at: int) -> None:
        self.left = at

    def before(self, function: Any) -> Any:
        def killed(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return killed

    def install(self) -> None:
        for name in ("fsync", "link", "replace", "unlink"):
            setattr(os, name, self.before(getattr(os, name)))
        from lowbit_lightning import checkpoints

        checkpoints._ErrorKeepingFile.write = self.before(checkpoints._ErrorKeepingFile.write)  # type: ignore[method-assign]


def survives_a_kill(folder: Path, at: int) -> bool:
    """Whether the child was killed; asserts that the parent then finds a whole trusted checkpoint."""
    folder.mkdir()
    trainer, checkpoints = fake_trainer(folder), TrustedCheckpoints(2)
    for step in range(1, 6):
        step_of_life(checkpoints, trainer, step)
    assert find(trainer) is not None
    child = os.fork()
    if child == 0:
        Crash(at).install()
        for step in range(6, 12):
            step_of_life(checkpoints, trainer, step)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    # The next start knows nothing but the folder.
    path = find(fake_trainer(folder))
    assert path is not None
    content = torch.load(path, weights_only=True)
    assert content["global_step"] >= 3
    assert torch.equal(content["state_dict"]["weight"], torch.full((64,), float(content["global_step"])))
    return os.WIFSIGNALED(status)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize("at", [1, 5, 9, 14, 20])
def test_a_kill_leaves_a_trusted_checkpoint(tmp_path: Path, at: int) -> None:
    assert survives_a_kill(tmp_path / "run", at)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_hundred_kills_leave_a_trusted_checkpoint(tmp_path: Path) -> None:
    assert sum(survives_a_kill(tmp_path / str(at), at) for at in range(1, 101)) == 100
