"""The last few snapshots of a run, in memory or on disk.

A new snapshot takes the memory of the oldest one, so after the first round nothing is allocated. On disk, one
snapshot's worth of memory is still needed to copy into before writing; a disk that is full costs a warning, never the
run: the snapshot then stays where it is.
"""

import os
import re
import shutil
import socket
from pathlib import Path
from typing import Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning_utilities.core.rank_zero import rank_zero_warn

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.optim.base import state_bytes
from lowbit_lightning.optim.state_memory import modelled_state_bytes, tensor_bytes
from lowbit_lightning.spikes.arguments import check
from lowbit_lightning.spikes.data_position import replay_fetcher
from lowbit_lightning.spikes.free_memory import free_memory_bytes
from lowbit_lightning.spikes.host_copy import HostCopy
from lowbit_lightning.spikes.snapshot import TrainingSnapshot

GIGABYTE = 1_000_000_000  # bytes
_UNKNOWN_STATE = 2  # bytes of states per byte of weights for an optimizer we know nothing of: that of Adam


class SnapshotRing:
    """Keeps the newest snapshots.

    Args:
        every_n_steps: Optimizer steps between two snapshots.
        keep: Snapshots to keep.
        where: ``cpu``: host memory, pinned where the weights are on a CUDA device. ``disk``: files.
        min_age: Optimizer steps that a snapshot should be old before a run goes back to it.
        directory: Folder of the files; None: ``snapshots`` in the trainer's ``default_root_dir``.

    Raises:
        InvalidArgumentError: if a number is out of range.

    """

    def __init__(
        self,
        every_n_steps: int = 100,
        keep: int = 3,
        where: Literal["cpu", "disk"] = "cpu",
        min_age: int = 20,
        directory: str | None = None,
    ) -> None:
        for name, value, least in (("every_n_steps", every_n_steps, 1), ("keep", keep, 1), ("min_age", min_age, 0)):
            check(value >= least, f"snapshot.{name}", value, f"an integer >= {least}")
        check(where in ("cpu", "disk"), "snapshot.where", where, "cpu or disk")
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.where = where
        self.min_age = min_age
        self.directory = directory
        self._snapshots: list[TrainingSnapshot] = []  # oldest first
        self._spare: list[TrainingSnapshot] = []
        self._staging: HostCopy | None = None  # memory that snapshots pass through on their way to the disk
        self._files: dict[int, Path] = {}  # of a snapshot, by its id
        self._warned = False

    def expected_bytes(self, trainer: Trainer) -> int:
        """Returns the bytes that all snapshots of this process will take, known before the first step.

        Optimizers that can allocate their states do so now. For one that neither can nor is torch's own, the states of
        Adam are assumed.
        """
        return self.keep * self._bytes_of_one(trainer)

    def check_memory(self, trainer: Trainer) -> None:
        """Makes sure that the ring fits; every rank must call it.

        Raises:
            InvalidArgumentError: if it does not, with the numbers; on every rank, if it does not on one.

        """
        problem = self._lack_of_memory(trainer)
        if not trainer.strategy.reduce_boolean_decision(problem is None, all=True):
            raise InvalidArgumentError(problem or "the snapshots of another process do not fit: see its message.")

    def due(self, step: int) -> bool:
        """Whether a snapshot is to be taken after optimizer step ``step``.

        It is at every multiple of ``every_n_steps``, or at the next step that can have one: the multiple itself may
        have been out of line, or have passed within a batch of several optimizers' steps.
        """
        last = self._snapshots[-1].step if self._snapshots else 0
        return step // self.every_n_steps > last // self.every_n_steps

    def take_first(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the snapshot before the first step, in ``on_train_batch_start``; does nothing once there is one.

        Nor does it within a window of accumulation, where a resumed run may start: its gradients are no snapshot's.
        """
        begun = trainer.fit_loop.epoch_loop.batch_idx % trainer.accumulate_grad_batches
        if not self._snapshots and not begun:
            self._take(trainer, pl_module, before_first_batch=True)

    def take(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes a snapshot in ``on_train_batch_end``, unless gradients are being accumulated."""
        if not trainer.fit_loop._should_accumulate():
            self._take(trainer, pl_module, before_first_batch=False)

    def before_optimizer_step(self) -> None:
        """Lets copies that are still under way end first; to be called in every ``on_before_optimizer_step``."""
        for snapshot in self._snapshots[-1:]:
            snapshot.before_optimizer_step()

    @property
    def is_empty(self) -> bool:
        """Whether there is no snapshot yet."""
        return not self._snapshots

    def choose(self, step: int, before_step: int | None = None) -> TrainingSnapshot:
        """Returns the snapshot to go back to.

        Args:
            step: The present step.
            before_step: Take the newest one of an earlier step than this; None: the newest of at least ``min_age``.

        Returns:
            The oldest one where none is old enough.

        Raises:
            LookupError: if there is no snapshot at all.

        """
        if not self._snapshots:
            raise LookupError("no snapshot was taken yet")
        newest = step - self.min_age if before_step is None else before_step - 1
        old_enough = [snapshot for snapshot in self._snapshots if snapshot.step <= newest]
        return old_enough[-1] if old_enough else self._snapshots[0]

    def discard_after(self, step: int) -> None:
        """Forgets the snapshots of later steps: the run has left them."""
        self._spare += [snapshot for snapshot in self._snapshots if snapshot.step > step]
        self._snapshots = [snapshot for snapshot in self._snapshots if snapshot.step <= step]

    def close(self) -> None:
        """Lets go of memory and removes the files."""
        for path in self._files.values():
            path.unlink(missing_ok=True)
        self._snapshots, self._spare, self._staging, self._files = [], [], None, {}

    def _take(self, trainer: Trainer, pl_module: LightningModule, *, before_first_batch: bool) -> None:
        if self._spare:
            snapshot = self._spare.pop()
        elif len(self._snapshots) >= self.keep:
            snapshot = self._snapshots.pop(0)
        else:
            snapshot = TrainingSnapshot()
        if self._staging is not None:
            snapshot.use_memory(self._staging)
            self._staging = None
        snapshot.capture(trainer, pl_module, before_first_batch=before_first_batch)
        self._snapshots.append(snapshot)
        if self.where == "disk":
            self._move_to_disk(trainer, snapshot)
        if (fetcher := replay_fetcher(trainer)) is not None:
            fetcher.forget_before(self._snapshots[0].batch)

    def _move_to_disk(self, trainer: Trainer, snapshot: TrainingSnapshot) -> None:
        path = self._files.get(id(snapshot))
        try:
            if path is None:
                name = f"{_own_prefix()}-rank{trainer.global_rank}-{len(self._files)}.pt"
                path = self._folder(trainer) / name
            self._staging = snapshot.move_to_disk(path)
            self._files[id(snapshot)] = path
        except OSError as error:
            if not self._warned:
                self._warned = True
                rank_zero_warn(
                    f"The snapshot of step {snapshot.step} could not be written ({error}): it stays in memory "
                    f"({snapshot.num_bytes / GIGABYTE:.3f} GB), and training goes on."
                )

    def _lack_of_memory(self, trainer: Trainer) -> str | None:
        """Returns what does not fit, if anything."""
        one, processes = self._bytes_of_one(trainer), trainer.num_devices
        on_disk = self.where == "disk"
        copies = 1 if on_disk else self.keep
        needed, free = copies * one * processes, free_memory_bytes()
        if free is not None and needed > free:
            remedy = "" if on_disk else f" lower snapshot.keep={self.keep}, set snapshot.where to 'disk' or"
            return (
                f"snapshots do not fit into memory: {copies} of {one / GIGABYTE:.3f} GB for {processes} process(es) of "
                f"this machine take {needed / GIGABYTE:.3f} GB, {free / GIGABYTE:.3f} GB are free:{remedy} use an "
                "optimizer with low-bit states."
            )
        if on_disk:
            folder = self._folder(trainer)
            needed = (self.keep + 1) * one * processes  # a file is replaced only when the new one is whole
            left = shutil.disk_usage(folder).free
            if needed > left:
                return (
                    f"snapshots do not fit into {str(folder)!r}: {self.keep + 1} of {one / GIGABYTE:.3f} GB for "
                    f"{processes} process(es) take {needed / GIGABYTE:.3f} GB, {left / GIGABYTE:.3f} GB are free: "
                    f"lower snapshot.keep={self.keep} or name another folder in snapshot.directory."
                )
        return None

    def _bytes_of_one(self, trainer: Trainer) -> int:
        module = trainer.lightning_module
        total = tensor_bytes([*module.parameters(), *module.buffers()])
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, WeightAveraging) and callback._average_model is not None:
                averages = callback._average_model
                total += tensor_bytes([*averages.parameters(), *averages.buffers()])
        for optimizer in trainer.optimizers:
            if hasattr(optimizer, "initialize_state"):
                optimizer.initialize_state()
            for group in optimizer.param_groups:
                size = state_bytes(optimizer, group) or modelled_state_bytes(optimizer, group)
                trainable = [parameter for parameter in group["params"] if parameter.requires_grad]
                total += _UNKNOWN_STATE * tensor_bytes(trainable) if size is None else size
        return total

    def _folder(self, trainer: Trainer) -> Path:
        if self.directory is None and "://" in str(trainer.default_root_dir):
            raise InvalidArgumentError(
                f"snapshot.where=disk needs snapshot.directory: default_root_dir={str(trainer.default_root_dir)!r} is "
                "no folder of this machine"
            )
        folder = Path(self.directory or Path(trainer.default_root_dir) / "snapshots")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidArgumentError(
                f"snapshot.directory={str(folder)!r} cannot be made: {error.strerror}."
            ) from error
        own = re.compile(re.escape(f"snapshot-{socket.gethostname()}-") + r"(\d+)-rank\d+-\d+\.pt")
        for leftover in folder.iterdir():
            if (name := own.fullmatch(leftover.name)) and not _is_alive(int(name[1])):
                leftover.unlink(missing_ok=True)  # of a killed run: the files are of no use to another process
        return folder


def _own_prefix() -> str:
    """Names that no other run uses, even in the same folder of a shared file system."""
    return f"snapshot-{socket.gethostname()}-{os.getpid()}"


def _is_alive(process: int) -> bool:
    if os.name == "nt":  # where signal 0 is Ctrl+C
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
