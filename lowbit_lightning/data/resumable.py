"""A DataLoader whose next batch is known from plain integers: (seed, epoch, batches already taken, rank, world size).

Lightning saves the position of a loader that offers ``state_dict`` and ``load_state_dict``, and nothing of any other,
so a plain DataLoader starts over in the middle of an epoch after a resume. Here the order of a map-style dataset is a
function and not the state of some generator: to resume is to compute the order again and to start further on, without
reading a single skipped sample. The global random generators are neither read nor advanced by the order or by the
seeds of the workers. What is not restored: random transforms that run inside worker processes are seeded per epoch
and start over when the epoch is resumed in its middle (with ``num_workers=0``, ``ExactResume`` restores them too).
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from lowbit_lightning.data.batch_order import EpochOrder, ReplayedOrder, mixed_seed
from lowbit_lightning.errors import CheckpointError, InvalidArgumentError


class _EpochOfIterable(Sampler[None]):
    """Stands in for the sampler that a DataLoader gives to an iterable dataset; hears ``set_epoch`` from Lightning."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that the next iteration passes on to the dataset."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[None]:
        return itertools.repeat(None)


class ResumableDataLoader(DataLoader[Any]):
    """A DataLoader that can say where it is and go on from there.

    The position counts batches *yielded*. That is one too many where a trainer fetches ahead (Lightning does for a
    dataset without a length) or stops within a batch; ``ExactResume`` corrects it through ``consumed``.

    Args:
        dataset: Map-style, or iterable. An iterable may offer ``set_epoch(epoch)``; it is resumed by consuming.
        batch_size: Samples per batch, or None for samples that are batches already.
        shuffle: Draw a new order in every epoch. Map-style only.
        seed: Seed of the orders and of the workers. A loaded state brings its own.
        drop_last: Drop the last batch if it is short; with several ranks, drop the tail instead of padding it.
        num_workers: Worker processes.
        collate_fn: Makes a batch from a list of samples.
        pin_memory: Copy batches to pinned memory.
        rank: This process's rank. None: from ``torch.distributed``, 0 when it is not running.
        world_size: Number of processes that share the dataset. None: as above, 1 when it is not running.
        options: Further arguments of DataLoader. A ``sampler`` or ``batch_sampler`` is resumed by skipping indices if
            it is an ``EpochOrder`` or a ``ReplayedOrder``, else by consuming batches.

    Raises:
        InvalidArgumentError: if ``shuffle`` is asked of an iterable dataset.

    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int | None = 1,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        **options: Any,
    ) -> None:
        if shuffle and isinstance(dataset, IterableDataset):
            raise InvalidArgumentError("shuffle=True needs a map-style dataset; an iterable one shuffles by itself.")
        distributed = dist.is_available() and dist.is_initialized()
        self.rank = rank if rank is not None else dist.get_rank() if distributed else 0
        self.world_size = world_size if world_size is not None else dist.get_world_size() if distributed else 1
        self.shuffle = shuffle
        self.seed = seed
        batch_sampler = options.get("batch_sampler")
        if options.get("sampler") is None and batch_sampler is None and not isinstance(dataset, IterableDataset):
            options["sampler"] = EpochOrder(
                dataset, shuffle=shuffle, seed=seed, drop_last=drop_last, rank=self.rank, world_size=self.world_size
            )
        super().__init__(
            dataset,
            batch_size,
            num_workers=num_workers,
            collate_fn=collate_fn,
            pin_memory=pin_memory,
            drop_last=drop_last,
            **options,
        )
        self.generator = torch.Generator()  # of the workers' base seed, else it would be drawn from the global one
        if isinstance(dataset, IterableDataset):
            # DataLoader refuses a sampler here and forbids to set one later; it only ever draws None from it.
            vars(self)["sampler"] = _EpochOfIterable()
            if self.batch_sampler is not None:
                cast(Any, self.batch_sampler).sampler = self.sampler
        order = self.sampler if batch_sampler is None else batch_sampler
        self._order: Any = order if hasattr(order, "epoch") else _EpochOfIterable()
        self._skips_indices = isinstance(order, EpochOrder | ReplayedOrder)
        self._indices_per_batch = (batch_size or 1) if batch_sampler is None else 1
        self._position = (0, 0)  # (epoch, batches of it already yielded)
        self._resume_from: tuple[int, int] | None = None
        self.consumed: Callable[[], int] | None = None  # how many of the epoch's batches a trainer has used
        self.before_first_batch: Callable[[], None] | None = None  # called between skipping and the first fetch
        self._finished = False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator, so nothing starts before the first batch is asked for: Lightning calls iter() before it calls
        # set_epoch(), and a loader with workers would by then have fetched batches of the wrong epoch.
        epoch = self._order.epoch
        first = self._resume_from[1] if self._resume_from is not None and self._resume_from[0] == epoch else 0
        self._resume_from = None
        self._position, self._finished = (epoch, first), False
        self.generator.manual_seed(mixed_seed(self.seed, epoch, self.rank))
        if hasattr(self._order, "seed"):
            self._order.seed = self.seed
        if isinstance(self.dataset, IterableDataset) and hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        if self._skips_indices:
            self._order.first = first * self._indices_per_batch
            batches = iter(super().__iter__())
        else:
            batches = iter(super().__iter__())
            with isolate_rng():  # the skipped batches were drawn before the checkpoint, not after it
                for _ in itertools.islice(batches, first):
                    pass
        if self.before_first_batch is not None:
            self.before_first_batch()
        for number, batch in enumerate(batches, start=first + 1):
            self._position = (epoch, number)
            yield batch
        self._finished = True

    def state_dict(self) -> dict[str, int]:
        """The next batch to come, as plain integers. After an epoch's last batch that is batch 0 of the next epoch."""
        epoch, yielded = self._resume_from or self._position
        batches = min(yielded, self.consumed()) if self.consumed is not None and not self._resume_from else yielded
        length = self._length()
        if batches and (batches == length or (self._finished and batches == yielded)):
            epoch, batches = epoch + 1, 0
        return {
            "epoch": epoch,
            "batches": batches,
            "seed": self.seed,
            "length": length,
            "batch_size": self.batch_size or 0,
            "world_size": self.world_size,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Makes the next iteration start where ``state`` was taken, if it is an iteration of the same epoch.

        Args:
            state: What ``state_dict`` returned. Its seed replaces this loader's.

        Raises:
            CheckpointError: if ``state`` is not the state of such a loader.

        """
        if missing := {"epoch", "batches", "seed"} - state.keys():
            raise CheckpointError(
                f"The position of the data loader in the checkpoint has the keys {sorted(state)} and lacks "
                f"{sorted(missing)}: it was written by another kind of loader. Resume with that loader."
            )
        own = self.state_dict()
        changed = [key for key in ("length", "batch_size", "world_size") if state.get(key, own[key]) != own[key]]
        if changed and state["batches"]:
            differences = ", ".join(f"{key}: {state[key]} then, {own[key]} now" for key in changed)
            rank_zero_warn(
                f"The data changed since the checkpoint was written ({differences}; length in batches). Training goes "
                f"on at batch {state['batches']} of epoch {state['epoch']}, but of another order: some samples of this "
                "epoch may repeat and some be left out."
            )
        self.seed = state["seed"]
        self._resume_from = (state["epoch"], state["batches"])
        self._order.epoch = state["epoch"]  # for loops that do not call set_epoch themselves

    def _length(self) -> int:
        """Batches per epoch, -1 where the dataset does not know."""
        try:
            return len(self)
        except (TypeError, NotImplementedError):
            return -1
