"""Where a run stands in its training data: getting ready to go back there, and leaving batches out.

Going back needs to see every batch that Lightning fetches, so its fetcher is replaced by a ``ReplayFetcher``.
"""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.spikes.replay_fetcher import MEGABYTE, ReplayFetcher


def prepare_replay(trainer: Trainer, replay_mb: float) -> None:
    """Gets ready for ``data: replay``; to be called in ``on_train_start``, before the first batch is fetched.

    Args:
        trainer: The trainer; its training data must be set up.
        replay_mb: Megabytes (10^6 bytes) of batches to keep for loaders that cannot go back.

    Raises:
        InvalidArgumentError: if this run takes its data in a way that cannot be repeated.

    """
    fetcher = trainer.fit_loop._data_fetcher
    if isinstance(fetcher, ReplayFetcher):
        return
    # An attribute that Trainer's connectors add, unknown to its annotations.
    if reloads := getattr(trainer, "reload_dataloaders_every_n_epochs", 0):
        raise InvalidArgumentError(
            f"data='replay' cannot go back to a loader that reload_dataloaders_every_n_epochs={reloads} has replaced:"
            " use data='skip', or do not reload."
        )
    if isinstance(fetcher, _DataLoaderIterDataFetcher):
        raise InvalidArgumentError(
            "data='replay' cannot see the batches of a training_step that takes dataloader_iter: use data='skip'."
        )
    if fetcher is not None:
        trainer.fit_loop._data_fetcher = ReplayFetcher(trainer, fetcher, replay_mb * MEGABYTE)


def replay_fetcher(trainer: Trainer) -> ReplayFetcher | None:
    """The fetcher that ``prepare_replay`` installed, if it did."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher if isinstance(fetcher, ReplayFetcher) else None


def accumulated_batches(trainer: Trainer) -> tuple[int, int]:
    """The first and the last batch, by their index in the run, whose gradients are accumulated in this step."""
    loop = trainer.fit_loop.epoch_loop
    return loop.total_batch_idx - loop.batch_idx % trainer.accumulate_grad_batches, loop.total_batch_idx


def skip_batches(trainer: Trainer, count: int) -> int:
    """Drops the next batches without training on them, in ``on_train_batch_end``; stops at the epoch's end.

    Windows of accumulation stay whole: the count is rounded up to a multiple of ``accumulate_grad_batches``.

    Args:
        trainer: The trainer, at the end of a batch that ended in an optimizer step.
        count: Batches of this rank to drop.

    Returns:
        How many were dropped; fewer than ``count`` at the end of an epoch.

    """
    epoch_loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    source: Any = fetcher.iterator_wrapper if isinstance(fetcher, _DataLoaderIterDataFetcher) else fetcher
    window = trainer.accumulate_grad_batches
    dropped = 0
    while dropped < -(-count // window) * window and not epoch_loop._num_ready_batches_reached():
        try:
            next(source)
        except StopIteration:
            epoch_loop.batch_progress.is_last_batch = True
            break
        dropped += 1
        epoch_loop.batch_progress.increment_by(1, is_last_batch=source.done)
    if dropped and epoch_loop._num_ready_batches_reached():
        # What the loop would have done before this hook, had it known that this batch is the epoch's last.
        epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=False)
    return dropped
