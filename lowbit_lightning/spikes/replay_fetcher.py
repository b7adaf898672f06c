"""Lightning's data fetcher, which can also be sent back to where it was.

A loader that can say where it is (``state_dict`` and ``load_state_dict``, as ``ResumableDataLoader`` has) is sent back.
For any other the batches since the oldest snapshot are kept, as they came from the loader and up to a bound of memory,
together with the random generators' state after each of them, so that the loader itself is not touched.

For a loader of unknown length the fetcher is one batch ahead of training; that batch is part of the position.
"""

import copy
import inspect
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch import Trainer
from lightning.pytorch.loops.fetchers import _DataFetcher, _PrefetchDataFetcher
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lowbit_lightning.data.resumable import ResumableDataLoader
from lowbit_lightning.random_state import collect_rng, restore_rng

MEGABYTE = 1_000_000  # bytes
_RNG_BYTES = 50_000  # collect_rng as Python objects, without CUDA devices


@dataclass(frozen=True)
class Position:
    """A place in the training data.

    Attributes:
        batch: Batches of the run that were trained on.
        epoch: What the samplers were told.
        fetched: The fetcher's own count.
        done: Whether the epoch's last batch was given out.
        waiting: Batches that were fetched ahead.
        loaders: The states of the loaders; None where batches are kept instead.

    """

    batch: int
    epoch: int
    fetched: int
    done: bool
    waiting: list[Any]
    loaders: list[Any] | None


@dataclass(frozen=True)
class _KeptBatch:
    number: int  # in the run
    item: Any  # what the fetcher gave
    done: bool
    rng: dict[str, Any]  # after it was fetched
    num_bytes: int


class ReplayFetcher(_PrefetchDataFetcher):
    """Lightning's fetcher, which can also be sent back.

    Args:
        trainer: The trainer whose fetcher it replaces.
        replaced: That fetcher, already set up.
        max_bytes: Bound of the batches that are kept for loaders that cannot go back.

    """

    def __init__(self, trainer: Trainer, replaced: _DataFetcher, max_bytes: float) -> None:
        super().__init__()
        vars(self).update(vars(replaced))
        self._trainer = trainer
        self._max_bytes = max_bytes
        self._stateful = all(isinstance(loader, _Stateful) for loader in self.combined_loader.flattened)
        self._kept: deque[_KeptBatch] = deque()
        self._kept_bytes = 0
        self._to_repeat: deque[_KeptBatch] = deque()
        self._needed_from = 0  # batches before it belong to no snapshot
        self._warned = False
        self._first: tuple[Position, dict[str, Any]] | None = None

    def __iter__(self) -> "ReplayFetcher":
        if self._to_repeat:  # a new epoch, of which batches are kept: the loader is already in it or beyond
            self.done = False
            return self
        super().__iter__()
        return self

    def __next__(self) -> Any:
        number = self._number()
        if self._first is None:
            self._first = self.position(), collect_rng()
        if self._to_repeat:
            kept = self._to_repeat.popleft()
            restore_rng(kept.rng)
            self.done = kept.done
            return _cloned(kept.item)
        item = super().__next__()
        if not self._stateful:
            self._keep(number, item)
        return item

    def before_first_fetch(self) -> tuple[Position, dict[str, Any]]:
        """Returns the position and the random generators' state before this fetcher gave out anything."""
        assert self._first is not None, "no batch was fetched yet"
        return self._first

    def position(self) -> Position:
        """Returns where the data stands between two batches."""
        return Position(
            batch=self._number(),
            epoch=_epochs_processed(self._trainer),
            fetched=self.fetched,
            done=self.done,
            waiting=_cloned(self.batches) if self._stateful else [],
            loaders=[_state_of(loader) for loader in self.combined_loader.flattened] if self._stateful else None,
        )

    def can_go_back_to(self, position: Position) -> bool:
        """Whether every batch since ``position`` can be had again."""
        if self._stateful or position.batch == self._number():
            return True
        return bool(self._kept) and self._kept[0].number <= position.batch

    def go_back_to(self, position: Position) -> None:
        """Makes the next batch the one that followed ``position``. Draws from the random generators."""
        self.done = position.done
        if not self._stateful:
            self._to_repeat = deque(kept for kept in self._kept if kept.number >= position.batch)
            return
        combined = self.combined_loader
        for loader, state in zip(combined.flattened, position.loaders or [], strict=True):
            loader.load_state_dict(copy.deepcopy(state))
            _set_sampler_epoch(loader, position.epoch)
        _DataFetcher.__iter__(self)  # without fetching ahead, which was done before
        self.batches = _cloned(position.waiting)
        self.fetched, self.done = position.fetched, position.done
        if any(_starts_late(loader) for loader in combined.flattened):
            self.iterator = _started(combined)

    def forget_before(self, batch: int) -> None:
        """Lets go of kept batches that no snapshot needs any more."""
        self._needed_from = batch
        while self._kept and self._kept[0].number < batch:
            self._kept_bytes -= self._kept.popleft().num_bytes

    def _number(self) -> int:
        return self._trainer.fit_loop.epoch_loop.batch_progress.total.ready

    def _keep(self, number: int, item: Any) -> None:
        sizes: list[int] = []
        apply_to_collection(item, Tensor, lambda tensor: sizes.append(tensor.numel() * tensor.element_size()))
        kept = _KeptBatch(number, _cloned(item), self.done, collect_rng(), sum(sizes) + _RNG_BYTES)
        self._kept.append(kept)
        self._kept_bytes += kept.num_bytes
        while self._kept_bytes > self._max_bytes:
            lost = self._kept.popleft()
            self._kept_bytes -= lost.num_bytes
            if lost.number >= self._needed_from and not self._warned:
                self._warned = True
                rank_zero_warn(
                    f"replay_mb={self._max_bytes / MEGABYTE:g} does not hold the batches since the oldest snapshot "
                    f"(one takes {kept.num_bytes / MEGABYTE:.3g} MB, {number - self._needed_from + 1} are needed so "
                    "far): a rollback to a snapshot whose batches are gone goes on with new ones, as data: skip does. "
                    "Raise replay_mb, take snapshots more often, or use ResumableDataLoader, which needs no memory."
                )


def _epochs_processed(trainer: Any) -> int:
    """What Lightning tells the samplers at the start of an epoch."""
    return int(trainer.fit_loop.epoch_progress.current.processed)


def _cloned(item: Any) -> Any:
    """A batch that nobody else can change in place; what is not a tensor is shared."""
    return apply_to_collection(item, Tensor, lambda tensor: tensor.clone())


def _state_of(loader: Any) -> Any:
    if not isinstance(loader, ResumableDataLoader):
        return copy.deepcopy(loader.state_dict())
    # ExactResume makes it leave out what was fetched ahead, which is kept here on its own.
    consumed, loader.consumed = loader.consumed, None
    try:
        return loader.state_dict()
    finally:
        loader.consumed = consumed


def _starts_late(loader: Any) -> bool:
    """Whether ``iter()`` does nothing yet, so that a seed would be drawn after the random generators were restored.

    A ResumableDataLoader is such a one and draws nothing.
    """
    return inspect.isgeneratorfunction(type(loader).__iter__) and not isinstance(loader, ResumableDataLoader)


def _started(combined: CombinedLoader) -> Iterator[Any]:
    """The iterator after its first batch was fetched, which makes it draw its seeds now."""
    try:
        first = next(combined)
    except StopIteration:
        return iter(())

    def batches() -> Iterator[Any]:
        yield first
        while True:
            try:
                batch = next(combined)
            except StopIteration:
                return
            yield batch

    return batches()
