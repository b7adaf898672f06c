"""A resumed run that cannot be told from one that was never stopped, to the last bit of every weight.

A Lightning checkpoint lacks two things that decide the next step: the state of every random generator (dropout) and
the position in the data. This callback saves both, and closes three gaps by which they drift apart after a resume:

* A plain DataLoader starts over in mid-epoch. It is replaced by a ``ResumableDataLoader`` over the same dataset.
* Lightning does not run the validation again that followed a checkpoint, and even a loader without workers draws a
  seed from the global generator whenever it is iterated; so every validation shifted the stream of the uninterrupted
  run only. Validation now leaves the generators as it found them, as Lightning's own sanity check does.
* At an epoch's end torchdata's StatefulDataLoader goes wrong in two ways. From a checkpoint of the last batch it is
  handed the state "nothing left" and yields an epoch without batches; from one of the epoch's end Lightning hands it
  no state, and it shuffles from a seed drawn anew. ``ResumableDataLoader`` says "batch 0 of the next epoch" in both.

A checkpoint inside an accumulation window carries its gradients; ModelCheckpoint writes such a one after every resume.
What cannot be restored: those gradients under several processes (a warning says so), random transforms inside worker
processes in mid-epoch, and what user hooks draw between the checkpoint at an epoch's last batch and the next epoch.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from lowbit_lightning.data.adopt import adopt
from lowbit_lightning.data.batch_order import mixed_seed
from lowbit_lightning.data.resumable import ResumableDataLoader
from lowbit_lightning.random_state import collect_rng, restore_rng


def _progress(trainer: Trainer) -> Any:
    """Lightning's count of this epoch's batches: ``ready`` when fetched, ``processed`` when trained on."""
    return trainer.fit_loop.epoch_loop.batch_progress.current


class ExactResume(Callback):
    """Makes ``ckpt_path=...`` continue bit for bit, in the middle of an epoch and at its end.

    Training data may come from any map-style DataLoader. Its shuffled order becomes a function of the seed, the epoch
    and the rank, so it differs from the order that DataLoader itself would draw. Loaders that save their own position
    (``ResumableDataLoader``, torchdata's ``StatefulDataLoader``) are left as they are. An iterable dataset is resumed
    by reading and dropping what was already used.
    """

    def __init__(self) -> None:
        self._trainer: Trainer | None = None
        self._loaders: list[ResumableDataLoader] = []
        self._pending: dict[str, Any] | None = None  # a loaded state, until the first batch
        self._seed: int | None = None
        self._training_rng: dict[str, Any] | None = None  # set while a validation runs
        self._rng_after_batch: dict[str, Any] | None = None
        self._warned: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hooks into where the fit loop gets its loader from and into the validation loop."""
        if stage != "fit":
            return
        self._detach()
        self._trainer = trainer
        # Instance attributes that shadow methods: one place for loaders of a datamodule, of a module and loaders
        # passed to fit(), which Lightning itself only tells apart behind these two methods.
        source, validation = trainer.fit_loop._data_source, trainer.fit_loop.epoch_loop.val_loop
        vars(source)["dataloader"] = self._resumable(source.dataloader)
        for name in ("run", "increment_progress_to_evaluation_end"):
            vars(validation)[name] = self._without_random_trace(getattr(validation, name))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Warns about a checkpoint that was written without this callback."""
        if self.state_key not in checkpoint["callbacks"]:
            self._warn(
                f"The checkpoint {trainer.ckpt_path!r} was written without ExactResume: random generators and the "
                "order of the data start anew, so this run will differ from an uninterrupted one."
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state until the loaders exist."""
        self._pending = state_dict
        self._seed = state_dict["seed"]

    def state_dict(self) -> dict[str, Any]:
        """Returns every rank's generators, the loaders' positions and the orders' seed; every rank must call it."""
        trainer = self._trainer
        if trainer is None or self._seed is None:
            return {}
        progress = _progress(trainer)
        in_batch = progress.ready > progress.processed  # an exception: Lightning will repeat the batch
        mid_epoch = in_batch or (progress.ready > 0 and not trainer.is_last_batch)
        gradients: dict[str, Tensor] = {}
        if mid_epoch and progress.processed % trainer.accumulate_grad_batches:
            gradients = self._gradients(trainer)
        own = self._training_rng or (self._rng_after_batch if in_batch else None) or collect_rng()
        everyone: list[Any] = [own]
        if trainer.world_size > 1:
            everyone = [None] * trainer.world_size
            dist.all_gather_object(everyone, own)
        loaders = [loader.state_dict() for loader in self._loaders]
        state = {"rng": everyone, "loaders": loaders, "seed": self._seed, "mid_epoch": mid_epoch}
        return state | {"gradients": gradients}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores the generators again if the epoch was begun (a foreign loader draws from them), and gradients."""
        if self._pending is None:
            return
        if self._pending["mid_epoch"]:
            self._restore_rng()
        parameters = dict(pl_module.named_parameters())
        for name, gradient in self._pending["gradients"].items():
            parameters[name].grad = gradient.to(parameters[name].device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Lets go of the loaded state."""
        self._pending = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the generators as they are before the next batch is fetched, in case that batch raises."""
        self._rng_after_batch = collect_rng()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the hooks back; after an exception, which skips this, ``setup`` does."""
        if stage == "fit":
            self._detach()

    def _detach(self) -> None:
        if self._trainer is not None:
            vars(self._trainer.fit_loop._data_source).pop("dataloader", None)
            for name in ("run", "increment_progress_to_evaluation_end"):
                vars(self._trainer.fit_loop.epoch_loop.val_loop).pop(name, None)
        self._trainer, self._loaders, self._training_rng, self._rng_after_batch = None, [], None, None

    def _resumable(self, request: Callable[[], Any]) -> Callable[[], Any]:
        def dataloader() -> Any:
            trainer = self._trainer
            assert trainer is not None
            loaders = request()
            if getattr(trainer, "overfit_batches", 0) > 0:  # Lightning rebuilds such loaders
                return loaders
            if self._seed is None:
                self._seed = int(trainer.strategy.broadcast(torch.initial_seed()))
            # The mode is Lightning's own for training loaders.
            combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "max_size_cycle")
            combined.flattened = [
                self._convert(trainer, loader, mixed_seed(self._seed, number))
                for number, loader in enumerate(combined.flattened)
            ]
            self._loaders = [loader for loader in combined.flattened if isinstance(loader, ResumableDataLoader)]
            if len(combined.flattened) == 1:  # of several, a short one goes round within the epoch
                for loader in self._loaders:
                    loader.consumed = lambda: _progress(trainer).processed
            self._restore(combined.flattened[:1])
            return combined

        return dataloader

    def _restore(self, first_loader: list[Any]) -> None:
        """After the loaders were made (a random split is drawn there) and before anything iterates them."""
        if self._pending is None:
            return
        self._restore_rng()
        states = self._pending["loaders"]
        if len(states) != len(self._loaders):
            self._warn(
                f"The checkpoint holds the positions of {len(states)} training loaders, this run has "
                f"{len(self._loaders)}: their order starts anew."
            )
            return
        for loader, state in zip(self._loaders, states, strict=True):
            loader.load_state_dict(state)
        if self._pending["mid_epoch"] and first_loader[0] in self._loaders:
            first_loader[0].before_first_batch = self._restore_rng

    def _gradients(self, trainer: Trainer) -> dict[str, Tensor]:
        """The gradients of a window of accumulation that a checkpoint cuts in two; under one process only."""
        if trainer.world_size > 1:  # every rank has others until the window ends
            self._warn(
                f"A checkpoint was written within {trainer.accumulate_grad_batches} accumulated batches. The gradients "
                "of several processes are not saved, so a resume from it loses the first part of "
                "the window. Save by ModelCheckpoint(every_n_train_steps=...), which falls between the windows."
            )
            return {}
        named = trainer.lightning_module.named_parameters()
        return {name: param.grad.detach().clone() for name, param in named if param.grad is not None}

    def _restore_rng(self) -> None:
        if self._pending is None or self._trainer is None:
            return
        states = self._pending["rng"]
        if len(states) == self._trainer.world_size:
            restore_rng(states[self._trainer.global_rank])
        else:
            self._warn(
                f"The checkpoint was written by {len(states)} processes, this run has {self._trainer.world_size}: "
                "the random generators start anew, so this run will differ from an uninterrupted one."
            )

    def _without_random_trace(self, method: Callable[[], Any]) -> Callable[[], Any]:
        def isolated() -> Any:
            self._training_rng = collect_rng()  # a checkpoint at the validation's end must hold these too
            try:
                return method()
            finally:
                restore_rng(self._training_rng)
                self._training_rng = None

        return isolated

    def _convert(self, trainer: Trainer, loader: Any, seed: int) -> Any:
        if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
            return loader
        # Lightning's own answer: False for loaders that it would not divide among the processes.
        shared = isinstance(loader, DataLoader) and trainer._data_connector._requires_distributed_sampler(loader)
        return adopt(loader, seed, trainer.distributed_sampler_kwargs if shared else None, self._warn)

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            rank_zero_warn(message)
