"""``last-trusted.ckpt``: the newest checkpoint after which the run stayed healthy, whole at every instant.

A checkpoint is a bad thing to resume from if the run was already going wrong when it was written, and that shows only
later. So each one that ModelCheckpoint writes is first set aside under a second name (a hard link, which takes no
space and outlives the deletion of the first), and becomes ``last-trusted.ckpt`` by a rename after ``min_age`` healthy
steps, if every byte of it still has the checksum that torch wrote beside it. A kill at any instant leaves the previous
``last-trusted.ckpt`` or the new one, never a part of either.
"""

import os
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning_utilities.core.rank_zero import rank_zero_warn

from lowbit_lightning.atomic_file import atomic_file
from lowbit_lightning.checkpoints import check_readable
from lowbit_lightning.errors import CheckpointError
from lowbit_lightning.spikes.abandoned import step_of

NAME = "last-trusted.ckpt"
_ASIDE = f".{NAME}.candidate-"


@dataclass
class _Candidate:
    path: Path  # the second name, or the first where the file system has no hard links
    folder: Path
    step: int
    healthy: int = 0  # steps since it was saved


class TrustedCheckpoints:
    """Watches what the run's ModelCheckpoints save and promotes what has proved healthy. Files only on rank zero.

    Args:
        min_age: Healthy optimizer steps before a checkpoint is trusted.

    """

    def __init__(self, min_age: int) -> None:
        self.min_age = min_age
        self._candidates: list[_Candidate] = []  # oldest first
        self._noted: dict[int, tuple[str, int]] = {}  # of each saver, what it saved last
        self._folders: set[Path] = set()
        self._warned = False

    def note_saved(self, trainer: Trainer) -> None:
        """Sets aside what was saved since the last call; to be called at every batch's end."""
        if not trainer.is_global_zero:
            return
        for saver in trainer.checkpoint_callbacks:
            if not isinstance(saver, ModelCheckpoint) or saver.save_weights_only:
                continue
            path, saved = Path(saver._last_checkpoint_saved), saver._last_global_step_saved
            # A file that is written asynchronously is noted when it is there.
            if (
                not saver._last_checkpoint_saved
                or self._noted.get(id(saver)) == (str(path), saved)
                or not path.exists()
            ):
                continue
            self._noted[id(saver)] = (str(path), saved)
            self._remove_leftovers(path.parent)
            # Not every one: those that ModelCheckpoint has deleted meanwhile take space.
            apart = max(1, self.min_age // 2)
            if not self._candidates or saved >= self._candidates[-1].step + apart:
                aside = path.with_name(f"{_ASIDE}{saved}")
                self._candidates.append(_Candidate(_linked(path, aside), path.parent, saved))

    def healthy_step(self, trainer: Trainer) -> Path | None:
        """Counts a healthy optimizer step; returns the trusted file if one was promoted by it."""
        if not trainer.is_global_zero:
            return None
        for candidate in self._candidates:
            candidate.healthy += 1
        ready = [candidate for candidate in self._candidates if candidate.healthy >= self.min_age]
        if not ready:
            return None
        for older in ready[:-1]:
            self._drop(older)
        self._candidates.remove(ready[-1])
        try:
            return self._promote(ready[-1])
        except (OSError, CheckpointError) as error:
            _remove_aside(ready[-1].path)
            if not self._warned:
                self._warned = True
                rank_zero_warn(
                    f"The checkpoint of step {ready[-1].step} could not be made {NAME} ({error}): the previous one "
                    "stays, and training goes on."
                )
            return None

    def discard_after(self, step: int) -> None:
        """Forgets candidates of steps that the run has left."""
        for candidate in [candidate for candidate in self._candidates if candidate.step > step]:
            self._drop(candidate)

    def close(self) -> None:
        """Removes what was set aside and did not become trusted."""
        for candidate in list(self._candidates):
            self._drop(candidate)
        self._noted.clear()
        self._folders.clear()

    def _remove_leftovers(self, folder: Path) -> None:
        """What a killed run had set aside in the same folder."""
        if folder not in self._folders:
            self._folders.add(folder)
            for leftover in folder.glob(f"{_ASIDE}*"):
                _remove_aside(leftover)

    def _drop(self, candidate: _Candidate) -> None:
        self._candidates.remove(candidate)
        _remove_aside(candidate.path)

    def _promote(self, candidate: _Candidate) -> Path:
        verify(candidate.path)
        # None: it holds objects that only the user may load, and was verified all the same.
        if step_of(candidate.path) not in (None, candidate.step):
            raise CheckpointError(f"{candidate.path.name} was overwritten by a later one")
        trusted = candidate.folder / NAME
        if candidate.path.is_dir():
            _promote_folder(candidate, trusted)
        elif candidate.path.name.startswith("."):
            os.replace(candidate.path, trusted)
        else:
            with candidate.path.open("rb") as source, atomic_file(trusted) as target:
                shutil.copyfileobj(source, target)
        _sync_folder(candidate.folder)
        return trusted


def verify(path: Path) -> None:
    """Reads all of a checkpoint.

    Raises:
        CheckpointError: if it is torn, is no checkpoint, or a byte of it has changed.

    """
    check_readable(path, weights_only=False)
    files = [path] if path.is_file() else []  # the parts of a distributed checkpoint carry no checksums
    for file in files:
        try:
            with zipfile.ZipFile(file) as archive:
                corrupt = archive.testzip()  # torch writes a CRC-32 for every tensor
        except (OSError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{str(file)!r} is torn: {error}.") from error
        if corrupt is not None:
            raise CheckpointError(f"{str(file)!r} is corrupt: the checksum of {corrupt} is wrong.")


def find(trainer: Trainer) -> Path | None:
    """The newest whole ``last-trusted.ckpt`` where this run's ModelCheckpoints write, or their earlier versions did."""
    savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
    folders = {Path(saver.dirpath) for saver in savers if saver.dirpath}
    folders.add(Path(trainer.default_root_dir) / "checkpoints")
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger | CSVLogger):
            folders.update(Path(logger.root_dir).glob("version_*/checkpoints"))
    found = [folder / NAME for folder in folders if (folder / NAME).exists()]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            verify(path)
        except CheckpointError as error:
            rank_zero_warn(f"{error} It is left out.")
            continue
        return path
    return None


def _linked(path: Path, aside: Path) -> Path:
    """A second name for a file, or for a folder of files; the first where the file system has no hard links."""
    try:
        _remove_aside(aside)
        if path.is_dir():
            aside.mkdir()
            for file in path.iterdir():
                os.link(file, aside / file.name)
        else:
            os.link(path, aside)
    except OSError:
        _remove_aside(aside)
        return path
    return aside


def _remove_aside(path: Path) -> None:
    if not path.name.startswith("."):
        return  # the checkpoint itself, which is not ours to delete
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _promote_folder(candidate: _Candidate, trusted: Path) -> None:
    """A folder cannot be renamed over another, so the name is a link that is."""
    kept = candidate.folder / f".{NAME}.step-{candidate.step}"
    if not candidate.path.name.startswith("."):
        kept = candidate.path
    else:
        os.replace(candidate.path, kept)
    link = trusted.with_name(NAME + ".partial")
    link.unlink(missing_ok=True)
    link.symlink_to(kept.name)
    os.replace(link, trusted)
    for older in candidate.folder.glob(f".{NAME}.step-*"):
        if older != kept:
            shutil.rmtree(older, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Makes the rename survive a power cut."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
