import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from spikes.rollback_run import Case, Rollback, run

from lowbit_lightning.spikes.abandoned import quarantine, step_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Quarantining(Rollback):
    """A Rollback at batch 9 that cleans up, and looks at what the clean-up left."""

    def __init__(self, to: int = 4, look: Callable[[], Any] = lambda: None) -> None:
        super().__init__(to, [9], "skip")
        self.look = look
        self.renamed: list[str] = []
        self.seen: Any = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        before = len(self.done)
        super().on_train_batch_end(trainer, pl_module, *args)
        if len(self.done) > before:
            snapshot = self.ring.choose(trainer.global_step)
            self.renamed = quarantine(trainer, snapshot.step, since=snapshot.taken_at)
            self.seen = self.look()


class Score(Callback):
    """Logs a metric, low (good) after the batches 3, 4 and 8, of which the last will be abandoned."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        batch = trainer.fit_loop.total_batch_idx + 1
        pl_module.log("score", {3: 1.0, 4: 2.0, 8: 0.0}.get(batch, 50.0 + batch))


def fit(rollback: Quarantining, *savers: Callback, steps: int = 12) -> None:
    callbacks = (Score, *(lambda saver=saver: saver for saver in savers))
    run(Case(steps=steps, options={"enable_checkpointing": True}, callbacks=callbacks), rollback)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def weights(path: Path) -> torch.Tensor:
    tensor: torch.Tensor = torch.load(path, weights_only=True)["state_dict"]["layers.0.weight"]
    return tensor


def test_every_file_of_an_abandoned_step_is_renamed_and_written_anew(tmp_path: Path) -> None:
    rollback = Quarantining()
    fit(rollback, ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1))
    assert [Path(path).name for path in rollback.renamed] == ["step=6.ckpt", "step=8.ckpt"]
    kept = [f"step={step}.ckpt" for step in (2, 4, 6, 8, 10, 12)]
    assert names(tmp_path) == sorted([*kept, "step=6.ckpt.abandoned", "step=8.ckpt.abandoned"])
    assert not torch.equal(weights(tmp_path / "step=8.ckpt"), weights(tmp_path / "step=8.ckpt.abandoned"))


def test_a_step_that_was_saved_before_is_saved_again(tmp_path: Path) -> None:
    fit(Quarantining(to=7), ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8, save_top_k=-1))
    assert names(tmp_path) == ["step=8.ckpt", "step=8.ckpt.abandoned"]


def test_best_and_top_k_forget_the_abandoned(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=3, monitor="score")

    def look() -> tuple[str, list[str], str, float]:
        left = sorted(Path(path).name for path in saver.best_k_models)
        return Path(saver.best_model_path).name, left, saver.kth_best_model_path, float(saver.kth_value)

    rollback = Quarantining(look=look)
    fit(rollback, saver)
    assert rollback.seen == ("step=3.ckpt", ["step=3.ckpt", "step=4.ckpt"], "", float("inf"))
    assert float(saver.best_model_score or 0) == 1.0
    assert "step=8.ckpt.abandoned" in names(tmp_path)
    # Afterwards three are kept again, and no name has a second version.
    assert len(saver.best_k_models) == 3
    assert not [name for name in names(tmp_path) if "-v1" in name]


@pytest.mark.parametrize("kind", [True, "link"])
def test_last_is_renamed_and_written_anew(tmp_path: Path, kind: Any) -> None:
    def look() -> tuple[bool, str]:
        return (tmp_path / "last.ckpt").exists(), saver.last_model_path

    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_last=kind, save_top_k=-1)
    rollback = Quarantining(look=look)
    fit(rollback, saver)
    assert rollback.seen == (False, "")
    assert step_of(tmp_path / "last.ckpt") == 12
    assert not [name for name in names(tmp_path) if "-v1" in name]


def test_several_savers_are_cleaned_up(tmp_path: Path) -> None:
    savers = [
        ModelCheckpoint(tmp_path / "newest", filename="{step}", every_n_train_steps=3),
        ModelCheckpoint(tmp_path / "best", filename="{step}", every_n_train_steps=4, monitor="score"),
    ]

    def look() -> list[str]:
        return [saver.best_model_path for saver in savers]

    rollback = Quarantining(look=look)
    fit(rollback, *savers)
    assert rollback.seen == ["", ""]
    assert names(tmp_path / "newest") == ["step=12.ckpt", "step=6.ckpt.abandoned"]
    assert names(tmp_path / "best") == ["step=12.ckpt", "step=8.ckpt.abandoned"] or "step=8.ckpt.abandoned" in names(
        tmp_path / "best"
    )


def test_files_of_an_earlier_run_are_left_alone(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    earlier = tmp_path / "step=900.ckpt"
    torch.save({"global_step": 900}, earlier)
    os.utime(earlier, (time.time() - 3600, time.time() - 3600))
    fit(Quarantining(), saver)
    assert "step=900.ckpt" in names(tmp_path)


def test_a_name_that_is_taken_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "step=8.ckpt.abandoned").write_bytes(b"of an earlier rollback")
    fit(Quarantining(), ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8, save_top_k=-1), steps=6)
    assert step_of(tmp_path / "step=8.ckpt.abandoned") == 8


def test_the_step_is_read_from_the_file_or_its_name(tmp_path: Path) -> None:
    torch.save({"global_step": 7}, tmp_path / "step=5.ckpt")
    (tmp_path / "step=9.ckpt").write_bytes(b"torn")
    (tmp_path / "torn.ckpt").write_bytes(b"torn")
    folder = tmp_path / "sharded.ckpt"
    folder.mkdir()
    torch.save({"global_step": 3}, folder / "meta.pt")
    steps = [step_of(tmp_path / name) for name in ("step=5.ckpt", "step=9.ckpt", "torn.ckpt", "sharded.ckpt")]
    assert steps == [7, 9, None, 3]
