"""The order of a dataset's samples as a function of (seed, epoch, rank, world size), which can be entered anywhere.

To resume is to compute the order again and to start further on; no generator's state has to be kept. ``EpochOrder`` is
such an order for sequential and shuffled data, ``ReplayedOrder`` makes one of somebody else's sampler.
"""

import random
from collections.abc import Iterable, Iterator, Sized
from hashlib import blake2b
from typing import Any, cast

import numpy
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import Dataset, DistributedSampler, Sampler

_CHUNK = 65_536  # indices turned into Python ints at a time: a whole permutation of them would take 40 bytes each


def mixed_seed(*parts: int) -> int:
    """Hashes integers to a 63-bit seed, so that neighbouring seeds and epochs share nothing (seed + epoch would)."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


class EpochOrder(DistributedSampler[int]):
    """Indices of one rank: a function of (seed, epoch, rank, world_size), which can start at its ``first``-th index.

    Pads like its base class when ``drop_last`` is false, so one process neither drops nor repeats anything. It is a
    DistributedSampler so that Lightning neither replaces it nor forgets to call ``set_epoch``.
    """

    def __init__(
        self, dataset: Dataset[Any], *, shuffle: bool, seed: int, drop_last: bool, rank: int, world_size: int
    ) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed, drop_last=drop_last)
        self.first = 0

    def __iter__(self) -> Iterator[int]:
        total = len(cast(Sized, self.dataset))
        if self.shuffle:
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
            order = torch.randperm(total, generator=generator)
        else:
            order = torch.arange(total)
        if total and self.total_size > total:
            order = order.repeat(-(-self.total_size // total))
        own = order[: self.total_size][self.rank :: self.num_replicas]
        for chunk in own[self.first :].split(_CHUNK):
            yield from chunk.tolist()


class ReplayedOrder(Sampler[Any]):
    """Any other sampler or batch sampler, drawn under random generators seeded from (seed, epoch), start selectable.

    Exact for every sampler that draws from the global generators or from its ``generator`` (WeightedRandomSampler,
    SubsetRandomSampler, ...); one that carries another state from epoch to epoch cannot be replayed.
    """

    def __init__(self, source: Iterable[Any], seed: int) -> None:
        self.source = source
        self.seed = seed
        self.epoch = 0
        self.first = 0

    @property
    def sampler(self) -> "ReplayedOrder":
        """Itself: Lightning looks for ``set_epoch`` in the ``sampler`` of a batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch here and in the sampler that is replayed."""
        self.epoch = epoch
        for target in (self.source, getattr(self.source, "sampler", None)):
            if (set_epoch := getattr(target, "set_epoch", None)) is not None:
                set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        with isolate_rng():
            _seed_global_generators(mixed_seed(self.seed, self.epoch))
            for target in (self.source, getattr(self.source, "sampler", None)):
                if isinstance(generator := getattr(target, "generator", None), torch.Generator):
                    generator.manual_seed(mixed_seed(self.seed, self.epoch))
            order = list(self.source)
        yield from order[self.first :]

    def __len__(self) -> int:
        return len(cast(Sized, self.source))


def _seed_global_generators(seed: int) -> None:
    """Seeds what a sampler may draw from; the caller isolates it."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
