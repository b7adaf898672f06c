"""One complete copy of a training run in memory, from which it continues as if the steps since had never been.

A Lightning checkpoint cannot serve: ``optimizer.load_state_dict`` shares memory with what it is given (so a second
rollback finds the snapshot changed) and casts states; under FSDP2 it does nothing; ``loop.load_state_dict`` marks the
loop as restarting, which changes its course. Here every value goes back in place and alone.

Lightning calls the hooks of a batch's end before it counts the batch as completed. A snapshot is therefore taken in
``on_train_batch_end`` and restored in the same hook, so that what is still to be counted is counted equally. The very
first one is taken before the first step and holds the counters as that hook would have seen them.

Not restored: attributes of the LightningModule that are neither parameters, buffers nor torchmetrics, and what
callbacks remember. Exceptions are those that say ``restore_on_rollback = True``, and of Lightning's own WeightAveraging
and EarlyStopping, which must not count validations of weights that were abandoned.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, WeightAveraging
from torch import Tensor

from lowbit_lightning.checkpoints import AtomicCheckpointIO
from lowbit_lightning.errors import CheckpointError
from lowbit_lightning.random_state import collect_rng, restore_rng
from lowbit_lightning.spikes import logged_sums, loop_progress
from lowbit_lightning.spikes.data_position import replay_fetcher
from lowbit_lightning.spikes.host_copy import HostCopy
from lowbit_lightning.spikes.optimizer_copy import restore_optimizer, save_optimizer
from lowbit_lightning.spikes.replay_fetcher import ReplayFetcher


class TrainingSnapshot:
    """A copy of everything that decides the next steps. One object can be captured into again; its memory is reused.

    Attributes:
        step: ``trainer.global_step`` when it was taken.
        batch: Batches of the run taken from the loader until then, which is the index of the next one.
        epoch: Epoch of the run, from 0.
        taken_at: Wall clock, seconds since 1970.

    """

    def __init__(self) -> None:
        self.step = self.batch = self.epoch = 0
        self.taken_at = 0.0
        self._copy = HostCopy()
        self._file: Path | None = None
        self._bytes = 0
        self._parts: dict[str, Any] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors, in memory or on disk."""
        return self._bytes

    def capture(self, trainer: Trainer, pl_module: LightningModule, *, before_first_batch: bool = False) -> None:
        """Copies the run. No collectives: of a DTensor, the local shard.

        Args:
            trainer: In ``on_train_batch_end`` of a batch that ended in an optimizer step.
            pl_module: Its module.
            before_first_batch: Called in ``on_train_batch_start`` instead, before anything was trained.

        """
        parts, host = self._parts, self._copy
        host.begin()
        for name, tensor, background in _fixed_tensors(trainer, pl_module):
            host.put(name, tensor, background=background)
        parts["optimizers"] = [save_optimizer(host, i, one) for i, one in enumerate(trainer.optimizers)]
        schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
        parts["schedulers"] = host.pack("schedulers", schedulers)
        parts["precision"] = host.pack("precision", trainer.precision_plugin.state_dict())
        parts["sums"] = logged_sums.save(host, trainer, pl_module)
        parts["averages"] = [_averaging_steps(callback) for callback in _averagings(trainer)]
        parts["callbacks"] = {
            i: host.pack(f"callbacks/{i}", callback.state_dict()) for i, callback in _participants(trainer)
        }
        host.end()
        parts["progress"] = loop_progress.capture(trainer, before_first_batch)
        fetcher = replay_fetcher(trainer)
        if fetcher is None:
            parts["data"], parts["rng"] = None, collect_rng()
        elif before_first_batch:
            parts["data"], parts["rng"] = fetcher.before_first_fetch()
        else:
            parts["data"], parts["rng"] = fetcher.position(), collect_rng()
        self.step, self.epoch = trainer.global_step, trainer.current_epoch
        self.batch = trainer.fit_loop.epoch_loop.batch_progress.total.ready - before_first_batch
        self.taken_at = time.time()
        self._file, self._bytes = None, host.num_bytes

    def before_optimizer_step(self) -> None:
        """Makes the device wait for a copy that is still under way; to be called before weights or states change."""
        self._copy.before_update()

    def move_to_disk(self, path: Path) -> HostCopy:
        """Writes the tensors to ``path``, whole or not at all, and hands back the memory they took.

        Raises:
            OSError: if they cannot be written; the snapshot then stays in memory and is as good as before.

        """
        self._copy.synchronize()
        AtomicCheckpointIO().save_checkpoint(self._copy.tensors, path)
        memory, self._copy, self._file = self._copy, HostCopy(), path
        return memory

    def use_memory(self, memory: HostCopy) -> None:
        """Takes over buffers of an earlier snapshot for the next capture."""
        self._copy = memory

    def restore(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        *,
        data: Literal["skip", "replay"],
        axis: Literal["rewind", "monotonic"],
    ) -> Literal["skip", "replay"]:
        """Puts the run back, in ``on_train_batch_end``; every rank must call it.

        Args:
            trainer: The trainer that the snapshot is of.
            pl_module: Its module.
            data: ``replay``: the counters of batches and epochs and the data go back as well. ``skip``: they go on.
            axis: ``rewind``: the loggers' step goes back as well. ``monotonic``: it goes on.

        Returns:
            What was done about the data: ``skip`` also where batches to replay are no longer held.

        Raises:
            CheckpointError: if the snapshot was moved to disk and cannot be read.
            RuntimeError: if ``replay`` is asked for and ``data_position.prepare_replay`` was not called.

        """
        host, parts = self._in_memory(), self._parts
        host.synchronize()
        fetcher = self._able_to_replay(trainer) if data == "replay" else None
        with torch.no_grad():
            self._restore_tensors(host, trainer, pl_module)
            for optimizer, saved in zip(trainer.optimizers, parts["optimizers"], strict=True):
                restore_optimizer(host, optimizer, saved)
                optimizer.zero_grad()  # what the abandoned step left must reach nobody
            for i, callback in _participants(trainer):
                if i in parts["callbacks"]:
                    callback.load_state_dict(host.unpack(parts["callbacks"][i]))
            keep = fetcher is not None or self.epoch == trainer.current_epoch
            logged_sums.restore(host, trainer, pl_module, parts["sums"], keep=keep)
        for config, state in zip(trainer.lr_scheduler_configs, parts["schedulers"], strict=True):
            config.scheduler.load_state_dict(host.unpack(state))
        if parts["precision"]:
            trainer.precision_plugin.load_state_dict(host.unpack(parts["precision"]))
        loop_progress.restore(trainer, parts["progress"], position=fetcher is not None, axis=axis)
        # Random generators last: making an iterator draws from them.
        if fetcher is not None:
            fetcher.go_back_to(parts["data"])
        restore_rng(parts["rng"])
        return "skip" if fetcher is None else "replay"

    def _in_memory(self) -> HostCopy:
        if self._file is None:
            return self._copy
        host = HostCopy()
        try:
            host.tensors = torch.load(self._file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            raise CheckpointError(
                f"the snapshot {str(self._file)!r} of step {self.step} cannot be read: {error}"
            ) from error
        return host

    def _able_to_replay(self, trainer: Trainer) -> ReplayFetcher | None:
        fetcher = replay_fetcher(trainer)
        if fetcher is None or self._parts["data"] is None:
            raise RuntimeError("data_position.prepare_replay must be called in on_train_start for data: replay")
        # One rank may hold fewer batches than another; all must do the same.
        held = trainer.strategy.reduce_boolean_decision(fetcher.can_go_back_to(self._parts["data"]), all=True)
        return fetcher if held else None

    def _restore_tensors(self, host: HostCopy, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, tensor, _ in _fixed_tensors(trainer, pl_module):
            if not host.holds(name, tensor):
                continue  # registered since
            if name.startswith("buffers/") and not host.fits(name, tensor):
                path, _, attribute = name.removeprefix("buffers/").rpartition(".")
                pl_module.get_submodule(path)._buffers[attribute] = host.tensors[name].to(tensor.device, copy=True)
            else:
                host.copy_into(name, tensor)
        for callback, steps in zip(_averagings(trainer), self._parts["averages"], strict=True):
            vars(callback).update(steps)


def _fixed_tensors(trainer: Trainer, pl_module: LightningModule) -> Iterator[tuple[str, Tensor, bool]]:
    """Yields (name, tensor, whether only the optimizer changes it) of all that keeps its storage during a run."""
    for name, parameter in pl_module.named_parameters():
        yield f"weights/{name}", parameter, True
    for name, buffer in pl_module.named_buffers():  # those that checkpoints leave out too
        yield f"buffers/{name}", buffer, False
    for i, callback in enumerate(_averagings(trainer)):
        averages = callback._average_model
        if averages is not None:
            for name, tensor in [*averages.named_parameters(), *averages.named_buffers()]:
                yield f"average{i}/{name}", tensor, False


def _averagings(trainer: Any) -> list[Any]:
    """Lightning's callbacks that average weights; annotated loosely, as their model is private."""
    return [callback for callback in trainer.callbacks if isinstance(callback, WeightAveraging)]


def _averaging_steps(callback: Any) -> dict[str, int]:
    return {name: vars(callback)[name] for name in ("_latest_update_step", "_latest_update_epoch")}


def _participants(trainer: Any) -> list[tuple[int, Any]]:
    """Callbacks that take part, by their position."""
    return [
        (i, callback)
        for i, callback in enumerate(trainer.callbacks)
        if isinstance(callback, EarlyStopping) or getattr(callback, "restore_on_rollback", False)
    ]
