"""After a rollback: checkpoints of the steps that never were must not be found, ranked or resumed from.

``ModelCheckpoint`` knows nothing of a rollback. Left alone, it keeps a poisoned file as the best one, writes the new
one of the same step beside it as ``-v1``, or does not write it at all because it has "already saved" that step.
"""

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_utilities.core.rank_zero import rank_zero_warn

_CLOCK_MARGIN = 2.0  # seconds; the coarsest file system's timestamps


def quarantine(trainer: Trainer, after_step: int, since: float | None = None) -> list[str]:
    """Renames checkpoints of later steps to ``*.abandoned`` and makes every ModelCheckpoint forget them.

    Every rank must call it, in ``on_train_batch_end``, before ModelCheckpoint saves.

    Args:
        trainer: The trainer, already back at ``after_step``.
        after_step: Steps above it are abandoned.
        since: Wall clock of the snapshot (``taken_at``). Files in the same folders that were written later are looked
            at as well: of ``save_top_k: -1``, ModelCheckpoint itself knows only the last one. None: only files that it
            knows. Checkpoints of earlier runs are never touched.

    Returns:
        The paths that were renamed, without the ``.abandoned``.

    """
    savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
    renamed: list[str] = []
    if trainer.is_global_zero:
        for path in sorted({path for saver in savers for path in _files(saver, since)}):
            step = step_of(Path(path))
            if step is not None and step > after_step and _rename(Path(path)):
                renamed.append(path)
        renamed += _unlink_dangling(savers)
    renamed = trainer.strategy.broadcast(renamed)
    for saver in savers:
        _forget(saver, set(renamed))
        if saver._last_global_step_saved > after_step:
            # The snapshot's own step was saved then, if it was due; it must not be saved again beside itself.
            saver._last_global_step_saved = after_step
        saver._defer_save_until_validation = False
    return renamed


def step_of(path: Path) -> int | None:
    """The ``global_step`` inside a checkpoint, or the one in its name; None where neither can be read."""
    inside = path / "meta.pt" if path.is_dir() else path  # Lightning's distributed checkpoints are folders
    try:
        return int(torch.load(inside, map_location="cpu", weights_only=True, mmap=True)["global_step"])
    except Exception:  # torn, or with objects in it that only the user may load
        named = re.search(r"step=?(\d+)", path.name)
        return int(named[1]) if named else None


def _files(saver: ModelCheckpoint, since: float | None) -> Iterable[str]:
    known = {
        saver.best_model_path,
        saver.kth_best_model_path,
        saver.last_model_path,
        saver._last_checkpoint_saved,
        *saver.best_k_models,
    }
    yield from (path for path in known if path and "://" not in path and not os.path.islink(path))
    if since is not None and saver.dirpath and "://" not in str(saver.dirpath):
        for path in Path(saver.dirpath).glob(f"*{saver.FILE_EXTENSION}"):
            # What is trusted was healthy for long after it was saved, and stays.
            own = path.stem != "last-trusted" and not path.is_symlink()
            if own and path.stat().st_mtime >= since - _CLOCK_MARGIN:
                yield str(path)


def _rename(path: Path) -> bool:
    target = path.with_name(path.name + ".abandoned")
    try:
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        os.replace(path, target)
    except FileNotFoundError:
        return False
    except OSError as error:
        rank_zero_warn(f"{str(path)!r} is of abandoned steps and could not be renamed: {error}.")
        return False
    return True


def _unlink_dangling(savers: list[ModelCheckpoint]) -> list[str]:
    """Removes ``last.ckpt`` where it is a link (``save_last="link"``) to a file that has just been renamed."""
    links = {saver.last_model_path for saver in savers if os.path.islink(saver.last_model_path)}
    dangling = [link for link in sorted(links) if not os.path.exists(link)]
    for link in dangling:
        os.unlink(link)
    return dangling


def _forget(saver: Any, gone: set[str]) -> None:
    for path in gone & saver.best_k_models.keys():
        del saver.best_k_models[path]
    if saver.last_model_path in gone:
        saver.last_model_path = ""
    if saver._last_checkpoint_saved in gone:
        saver._last_checkpoint_saved = ""
    if saver.monitor is None:
        if saver.best_model_path in gone:
            saver.best_model_path = ""
        return
    if not gone & {saver.best_model_path, saver.kth_best_model_path}:
        return
    best, worst = (min, max) if saver.mode == "min" else (max, min)
    scores = saver.best_k_models
    saver.best_model_path = best(scores, key=scores.get) if scores else ""
    saver.best_model_score = scores.get(saver.best_model_path)
    # As in ModelCheckpoint: only a full list has a k-th best.
    full = len(scores) == saver.save_top_k
    saver.kth_best_model_path = worst(scores, key=scores.get) if full else ""
    none_yet = torch.tensor(torch.inf if saver.mode == "min" else -torch.inf)
    saver.kth_value = scores[saver.kth_best_model_path] if full else none_yet
