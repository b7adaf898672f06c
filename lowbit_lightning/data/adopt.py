"""Makes a ResumableDataLoader of somebody else's DataLoader: same dataset, batches and workers, an order of our own.

What a DataLoader's sampler means (in order, shuffled, divided among ranks) is kept; which permutation it draws is not,
because that one hangs on the state of a global generator at a moment that a checkpoint does not know.
"""

from collections.abc import Callable
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lowbit_lightning.data.batch_order import EpochOrder, ReplayedOrder
from lowbit_lightning.data.resumable import ResumableDataLoader


def adopt(loader: Any, seed: int, shared: dict[str, int] | None, warn: Callable[[str], None]) -> Any:
    """Returns a loader over the same data that can be resumed, or ``loader`` itself after a warning.

    Args:
        loader: Any training loader without ``state_dict``.
        seed: Seed of the order, the same in all processes that share the dataset.
        shared: ``rank`` and ``num_replicas`` where Lightning would divide the dataset among processes, else None.
        warn: Takes the messages about what cannot be exact.

    """
    own_kind = type(loader) is not DataLoader
    if own_kind or (shared and not _has_known_order(loader)):
        warn(
            f"ExactResume cannot take over {type(loader).__name__} (it takes torch's own DataLoader and, under several "
            "processes, torch's own samplers): resumed in mid-epoch, its data starts over. Give it state_dict and "
            "load_state_dict, or use lowbit_lightning.data.ResumableDataLoader."
        )
        return loader
    sampler, batches = _sampler(loader), loader.batch_sampler
    options: dict[str, Any] = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    if type(batches) is BatchSampler:
        options = {"batch_size": batches.batch_size, "drop_last": batches.drop_last}
    if isinstance(loader.dataset, IterableDataset):
        warn(
            f"{type(loader.dataset).__name__} is an iterable dataset: a resume reads and drops what was already used, "
            "which takes time and is exact only if the dataset yields the same again."
        )
    elif _has_known_order(loader):
        order = _epoch_order(loader, seed, shared)
        seed = order.seed
        options |= {"sampler": order, "rank": order.rank, "world_size": order.num_replicas}
    elif sampler is batches:
        options = {"batch_sampler": _replayed(sampler, seed, warn)}
    else:
        options["sampler"] = _replayed(sampler, seed, warn)
    return ResumableDataLoader(
        loader.dataset,
        seed=seed,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        in_order=loader.in_order,
        **options,
    )


def _sampler(loader: DataLoader[Any]) -> Any:
    """Returns what decides the order: of a plain BatchSampler, given by the user or made by torch, its sampler."""
    batch_sampler: Any = loader.batch_sampler
    if batch_sampler is None:
        return loader.sampler
    return batch_sampler.sampler if type(batch_sampler) is BatchSampler else batch_sampler


def _has_known_order(loader: DataLoader[Any]) -> bool:
    sampler = _sampler(loader)
    if type(sampler) is RandomSampler:
        return not sampler.replacement and sampler.num_samples == len(sampler.data_source)
    return isinstance(loader.dataset, IterableDataset) or type(sampler) in (SequentialSampler, DistributedSampler)


def _epoch_order(loader: DataLoader[Any], seed: int, shared: dict[str, int] | None) -> EpochOrder:
    sampler = _sampler(loader)
    if isinstance(sampler, DistributedSampler):
        return EpochOrder(
            sampler.dataset,
            shuffle=sampler.shuffle,
            seed=sampler.seed,
            drop_last=sampler.drop_last,
            rank=sampler.rank,
            world_size=sampler.num_replicas,
        )
    # Where Lightning divides training data among processes it always shuffles; a callback must not change that.
    shuffle = shared is not None or isinstance(sampler, RandomSampler)
    rank, world_size = (shared["rank"], shared["num_replicas"]) if shared else (0, 1)
    return EpochOrder(loader.dataset, shuffle=shuffle, seed=seed, drop_last=False, rank=rank, world_size=world_size)


def _replayed(sampler: Any, seed: int, warn: Callable[[str], None]) -> Any:
    if not type(sampler).__module__.startswith("torch.utils.data"):
        warn(
            f"{type(sampler).__name__} is not one of torch's samplers: a resume draws it again and drops what was "
            "already used, which is exact only if it depends on nothing but its epoch and the random generators."
        )
    return ReplayedOrder(sampler, seed) if hasattr(sampler, "__len__") else sampler
